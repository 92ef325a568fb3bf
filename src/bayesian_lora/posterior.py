"""Likelihoods and the energy U(θ) = N·L(θ) + ‖θ‖²/(2σ²), one value per chain.

Shapes: M chains, B examples, C classes. Units: nats.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LikelihoodName = Literal["categorical", "gaussian"]


@dataclass(frozen=True)
class PriorGroup:
    """Tensors (M, …) under one N(0, std²) prior, or each chain under its own, std (M,)."""

    tensors: tuple[Tensor, ...]
    std: float | Tensor


def negative_log_likelihood(
    likelihood: LikelihoodName, outputs: Tensor, labels: Tensor, noise_std: Tensor | None = None
) -> Tensor:
    """−log p(y | x, θ) of every example, (M, B).

    Args:
        likelihood: ``categorical`` (softmax over C outputs) or ``gaussian`` (the one output is
            the mean).
        outputs: (M, B, C) logits, or (M, B, 1) means.
        labels: (M, B) class numbers (int64) or targets (float).
        noise_std: (M,) standard deviations of the Gaussian; needed by it alone.
    """
    if likelihood == "categorical":
        chains, batch, classes = outputs.shape
        flat = F.cross_entropy(outputs.reshape(-1, classes), labels.reshape(-1), reduction="none")
        return flat.reshape(chains, batch)
    if noise_std is None:
        raise ValueError("the Gaussian likelihood needs noise_std (M,)")
    std = noise_std[:, None]
    residual = (labels - outputs.squeeze(-1)) / std
    return 0.5 * residual.square() + std.log() + 0.5 * math.log(2 * math.pi)


def prior_energy(groups: Iterable[PriorGroup]) -> Tensor:
    """Σ ‖θ‖²/(2σ²) over the groups, (M,); the constant of the density is left out."""
    terms = [
        tensor.reshape(tensor.shape[0], -1).square().sum(1) / (2 * group.std**2)
        for group in groups
        for tensor in group.tensors
    ]
    return torch.stack(terms).sum(0)


def energy(mean_nll: Tensor, num_examples: int, groups: Iterable[PriorGroup]) -> Tensor:
    """U(θ) = N·L + ‖θ‖²/(2σ²), (M,), from the mean NLL (M,) over (a sample of) the training set."""
    return num_examples * mean_nll + prior_energy(groups)


def delta_w_prior_std(rank: int, scaling: float, std_a: float, std_b: float) -> float:
    """Standard deviation of an entry of ΔW = s·BA under the prior: s·√r·σ_A·σ_B."""
    return scaling * math.sqrt(rank) * std_a * std_b
