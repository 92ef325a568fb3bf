"""Likelihoods against torch.distributions; prior and energy by hand.

Shapes: M chains, B examples, C classes, N training examples.
"""

import math

import pytest
import torch
from torch import Tensor

from bayesian_lora.posterior import (
    PriorGroup,
    delta_w_prior_std,
    energy,
    negative_log_likelihood,
    prior_energy,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_categorical_is_minus_the_log_probability():
    outputs = 3 * normal(2, 5, 4)
    labels = torch.tensor([[0, 1, 2, 3, 0], [3, 3, 2, 1, 1]])
    nll = negative_log_likelihood("categorical", outputs, labels)
    expected = -torch.distributions.Categorical(logits=outputs).log_prob(labels)
    assert nll.shape == (2, 5)
    torch.testing.assert_close(nll, expected)


def test_gaussian_is_minus_the_log_density():
    """Each chain has its own noise; the density's constant is part of the NLL."""
    means, labels = normal(2, 5, 1), normal(2, 5, seed=1)
    noise = torch.tensor([0.3, 2.0], dtype=torch.float64)
    nll = negative_log_likelihood("gaussian", means, labels, noise)
    law = torch.distributions.Normal(means[..., 0], noise[:, None])
    assert nll.shape == (2, 5)
    torch.testing.assert_close(nll, -law.log_prob(labels))


def test_gaussian_needs_its_noise():
    with pytest.raises(ValueError, match="noise_std"):
        negative_log_likelihood("gaussian", normal(1, 2, 1), normal(1, 2))


def test_prior_energy_by_hand():
    groups = [
        PriorGroup((torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[2.0], [1.0]])), 0.5),
        PriorGroup((torch.tensor([4.0, -2.0]),), 2.0),
    ]
    # (1 + 4 + 4)/(2·¼) + 16/(2·4) and (9 + 0 + 1)/(2·¼) + 4/(2·4)
    assert prior_energy(groups).tolist() == pytest.approx([20.0, 20.5])


def test_prior_energy_is_the_normal_density_up_to_its_constant():
    tensor = normal(3, 4, 2)
    law = torch.distributions.Normal(0.0, 0.7)
    at_zero = law.log_prob(torch.zeros(4, 2, dtype=torch.float64)).sum()
    expected = at_zero - law.log_prob(tensor).sum((1, 2))
    torch.testing.assert_close(prior_energy([PriorGroup((tensor,), 0.7)]), expected)


@pytest.mark.parametrize("with_a_proper_one", [True, False])
def test_a_flat_prior_adds_nothing(with_a_proper_one: bool):
    groups = [PriorGroup((normal(2, 3),), math.inf)]
    if with_a_proper_one:
        groups.append(PriorGroup((torch.tensor([[1.0], [2.0]]),), 1.0))
    expected = [0.5, 2.0] if with_a_proper_one else [0.0, 0.0]
    assert prior_energy(groups).tolist() == pytest.approx(expected)


def test_energy_and_its_gradient():
    """U = N·L + ‖θ‖²/(2σ²), so ∇U = N·∇L + θ/σ² in each group."""
    n, a, b = 30, normal(2, 3).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    groups = [PriorGroup((a,), 0.4), PriorGroup((b,), 1.5)]

    def mean_nll() -> Tensor:
        return (a.sum(1) * b.square().sum(1)).sin()

    u = energy(mean_nll(), n, groups)
    by_hand = n * mean_nll() + a.square().sum(1) / (2 * 0.4**2) + b.square().sum(1) / (2 * 1.5**2)
    torch.testing.assert_close(u, by_hand)
    gradients = torch.autograd.grad(u.sum(), (a, b))
    of_loss = torch.autograd.grad(mean_nll().sum(), (a, b))
    for gradient, nll, tensor, std in zip(gradients, of_loss, (a, b), (0.4, 1.5), strict=True):
        torch.testing.assert_close(gradient, n * nll + tensor.detach() / std**2)


@pytest.mark.parametrize(("rank", "scaling", "std_a", "std_b"), [(8, 2.0, 0.1, 0.05), (1, 3, 1, 2)])
def test_prior_of_delta_w_against_monte_carlo(
    rank: int, scaling: float, std_a: float, std_b: float
):
    draws = 200_000
    a, b = std_a * normal(draws, rank), std_b * normal(draws, rank, seed=1)
    entries = scaling * (a * b).sum(1)
    expected = delta_w_prior_std(rank, scaling, std_a, std_b)
    # For rank 1 the product's kurtosis is 9: the sampling error of the sd is √(8/4n) = .3 %.
    assert entries.std().item() == pytest.approx(expected, rel=0.015)
