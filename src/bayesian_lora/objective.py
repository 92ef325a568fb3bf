"""Batches → the mean negative log-likelihood of every chain, and its gradient.

Shapes: M chains, B examples of a chain's batch, d parameters of a chain.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.data.batching import Batch, TokenisedSet
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.posterior import LikelihoodName, PriorGroup, negative_log_likelihood
from bayesian_lora.predict import predict_logits
from bayesian_lora.samplers.base import Closure
from bayesian_lora.samplers.failures import require_finite

# Where batches are padded, and under dropout, whose draws must not depend on other chains' tokens.
MICRO_BATCH_ON_CPU = 8


class Objective:
    """The likelihood of a task under a model: closures for training, values for traces.

    Args:
        model: with M chains.
        data: the training set; its size is N.
        likelihood: of the task.
        micro_batch: examples of a chain in one forward pass, a bound on memory; None is as many as
            run fastest on the CPU, and the whole batch elsewhere.
    """

    def __init__(
        self,
        model: ChainModel,
        data: TokenisedSet,
        likelihood: LikelihoodName,
        micro_batch: int | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.likelihood: LikelihoodName = likelihood
        self.micro_batch = micro_batch
        self.log_noise: Tensor | None = None
        """(M,) log standard deviations of the Gaussian likelihood, None for the categorical."""
        if likelihood == "gaussian":
            like = next(iter(model.chain_parameters().values()))
            spread = data.labels.std().log().to(like)
            self.log_noise = spread.expand(model.num_chains).clone()
        self.accuracy: Tensor | None = None
        """(M,) of the last batch, at the closure's first call; None for regression."""
        self.evaluations = 0
        """Gradient evaluations of a chain's batch so far."""

    def closure(
        self, rows: np.ndarray, evaluations: int = 1, micro_batch: int | None = None
    ) -> Closure:
        """The closure of one batch (M, B) of the training set; see `Sampler`'s units.

        It raises `Diverged` where a chain's loss or gradient is not finite. `evaluations`: how
        many batches' worth of work a call counts as. `micro_batch`: in the place of the
        objective's own.
        """
        called = False

        def compute() -> Tensor:
            nonlocal called
            for tensor in self._tensors():
                tensor.grad = None
            total = torch.zeros(rows.shape[0], device=self.model.device)
            correct = torch.zeros_like(total)
            size = micro_batch or self._pass_size(rows)
            for batch in self.data.micro_batches(rows, size, self.model.device):
                outputs = self.model(**batch.inputs)
                loss = self.losses(outputs, batch).mean(1) * batch.share
                loss.sum().backward()
                total = total + loss.detach()
                correct += self.right(outputs.detach(), batch).float().mean(1) * batch.share
            self.evaluations += evaluations
            if not called:
                self.accuracy = correct if self.likelihood == "categorical" else None
            called = True
            require_finite("the loss", total)
            require_finite("the gradient", self._gradient_sum())
            return total

        return compute

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """What is descended on, of every example (M, b): the negative log-likelihood."""
        noise = None if self.log_noise is None else self.log_noise.exp()
        return negative_log_likelihood(self.likelihood, outputs, batch.labels, noise)

    def right(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Whether the most probable class is the label, (M, b)."""
        return outputs.argmax(-1) == batch.labels

    def _pass_size(self, rows: np.ndarray) -> int | None:
        """Examples of a chain in one forward pass over rows (M, B); None is all."""
        if self.micro_batch is not None or self.model.device.type != "cpu":
            return self.micro_batch
        if not self.model.flat or self.model.dropping:
            return MICRO_BATCH_ON_CPU
        passes = -(-int(self.data.lengths[rows].sum()) // self.model.tokens_per_pass)
        return -(-rows.shape[1] // passes)

    def _tensors(self) -> list[Tensor]:
        """All that has a gradient, each (M, …)."""
        noise = [] if self.log_noise is None else [self.log_noise]
        return [*self.model.chain_parameters().values(), *noise]

    def _gradient_sum(self) -> Tensor:
        """(M,), not finite where any part of a chain's gradient is not."""
        grads = [t.grad for t in self._tensors() if t.grad is not None]
        return torch.stack([g.reshape(len(g), -1).sum(1) for g in grads]).sum(0)

    def keep(self, kept: Sequence[int]) -> None:
        """Cut model and noise scales to these chains, in place: optimisers go on with them."""
        parameters = self.model.chain_parameters()
        self.model.load_chains({n: p.detach()[list(kept)] for n, p in parameters.items()})
        if self.log_noise is not None:
            self.log_noise.data = self.log_noise.data[list(kept)]
            self.log_noise.grad = None

    @property
    def noise_std(self) -> Tensor | None:
        """(M,) float64 on the CPU, None for the categorical likelihood."""
        return None if self.log_noise is None else self.log_noise.detach().cpu().double().exp()

    def mean_nll(self, data: TokenisedSet) -> Tensor:
        """Mean NLL (M,) of another set without gradients, float64 on the CPU."""
        return self.score(data)[0]

    def score(self, data: TokenisedSet) -> tuple[Tensor, Tensor | None]:
        """Mean NLL (M,) and accuracy (M,) (None for regression) of another set."""
        outputs = torch.from_numpy(predict_logits(self.model, data)).double()
        labels = data.labels.expand(outputs.shape[0], -1)
        nll = negative_log_likelihood(self.likelihood, outputs, labels, self.noise_std).mean(1)
        if self.likelihood == "gaussian":
            return nll, None
        return nll, (outputs.argmax(-1) == labels).double().mean(1)


def prior_groups(
    model: ChainModel, std: float | Tensor, head_std: float | None
) -> list[PriorGroup]:
    """The factors under N(0, std²), the head under N(0, head_std²) (None: the same).

    A tensor (M,) gives every chain a prior of its own.
    """
    head = {id(p) for layer in model.head_layers().values() for p in layer.parameters()}
    parameters = list(model.chain_parameters().values())
    factors = tuple(p for p in parameters if id(p) not in head)
    heads = tuple(p for p in parameters if id(p) in head)
    return [PriorGroup(factors, std), PriorGroup(heads, head_std or std)]
