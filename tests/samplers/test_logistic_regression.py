"""Bayesian logistic regression, N = 500, d = 5, full batch: every exact sampler against NUTS.

The reference is pyro-ppl's NUTS on the same energy, run once for the module. Steps keep
h·k_max ≤ .02, so that the samplers' own bias is below 1 % of a variance.
Shapes: M chains, d parameters. Units: `bayesian_lora.samplers.base`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import ASGLD, CSGLD, PSGLD, SGHMC, SGLD, SGNHT
from bayesian_lora.samplers import SAMSGLDRank1 as Rank1
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.verification.mutations import mutations

pytestmark = pytest.mark.slow

N, D, PRIOR_STD, CHAINS, HK = 500, 5, 0.5, 1_000, 0.02


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Problem:
    """P(y = 1 | x) = sigmoid(⟨x, θ⟩), correlated x, θ ~ N(0, σ²I); σ matters beside the data."""

    def __init__(self) -> None:
        rng = generator(1)
        x = torch.randn(N, D, generator=rng, dtype=torch.float64)
        self.x = x + 0.2 * x.roll(1, dims=1)
        truth = torch.tensor([1.5, -1.0, 0.5, 0.0, 1.0], dtype=torch.float64)
        chance = torch.rand(N, generator=rng, dtype=torch.float64)
        self.y = (chance < torch.sigmoid(self.x @ truth)).double()
        self.probes = torch.randn(200, D, generator=rng, dtype=torch.float64)
        self.mode = torch.zeros(D, dtype=torch.float64)
        for _ in range(20):
            step = torch.linalg.solve(self.curvature(self.mode), self.gradient(self.mode[None])[0])
            self.mode = self.mode - step
        self.k = self.curvature(self.mode)
        self.k_max = torch.linalg.eigvalsh(self.k)[-1].item()

    def nll_gradient(self, theta: Tensor) -> Tensor:
        """Of the mean NLL, (M, d)."""
        return (torch.sigmoid(theta @ self.x.T) - self.y) @ self.x / N

    def gradient(self, theta: Tensor) -> Tensor:
        return self.nll_gradient(theta) + theta / (N * PRIOR_STD**2)

    def curvature(self, theta: Tensor) -> Tensor:
        """Hessian of U/N, (d, d)."""
        p = torch.sigmoid(self.x @ theta)
        weighted = self.x.T @ (self.x * (p * (1 - p))[:, None]) / N
        return weighted + torch.eye(D, dtype=torch.float64) / (N * PRIOR_STD**2)

    def energy(self, parameters: dict[str, Tensor]) -> Tensor:
        theta = parameters["theta"]
        logits = self.x @ theta
        nll = (torch.nn.functional.softplus(logits) - self.y * logits).sum()
        return nll + theta.square().sum() / (2 * PRIOR_STD**2)

    def predictions(self, draws: Tensor) -> Tensor:
        """P(y = 1) at the probes, averaged over draws (n, d)."""
        return torch.sigmoid(self.probes @ draws.T).mean(1)


@cache
def problem() -> Problem:
    return Problem()


@pytest.fixture(scope="module")
def reference() -> Tensor:
    """12,000 draws of NUTS (n, d): MCSE .009 of a standard deviation, .0003 of a probability."""
    from pyro.infer import MCMC, NUTS

    with torch.random.fork_rng():
        torch.manual_seed(0)
        kernel = NUTS(potential_fn=problem().energy, target_accept_prob=0.8)
        start = {"theta": problem().mode.clone()}
        chain = MCMC(
            kernel,
            num_samples=12_000,
            warmup_steps=300,
            initial_params=start,
            disable_progbar=True,
        )
        chain.run()
        return chain.get_samples()["theta"]


@dataclass(frozen=True)
class Case:
    """A sampler, the multiple of .02/k_max it may step by, its steps, and between draws."""

    make: Callable[..., Sampler]
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    warm: int = 300
    gap: int = 100
    draws: int = 12


RANK1 = {"rho": 0.0, "sigma_dir": 0.5}
CASES = {
    "sgld": Case(SGLD),
    "psgld": Case(PSGLD, {"burn_in": 300, "lambd": 0.02}, 0.02, warm=700),
    "asgld": Case(ASGLD, {"burn_in": 100, "a": 0.02}, warm=500),
    "sghmc_euler": Case(SGHMC, {"friction": 0.2}, warm=200, gap=30),
    "sghmc_baoab": Case(SGHMC, {"friction": 0.2, "integrator": "baoab"}, warm=200, gap=30),
    "sgnht": Case(SGNHT, {"friction": 0.2}, warm=500, gap=30),
    "csgld": Case(CSGLD, {"cycle_steps": 1000, "explore_fraction": 0.1}, 1.0, 1000, 1000, 5),
    "rank1_frozen": Case(Rank1, {**RANK1, "burn_in": 100}, 1 / 2.25, 500, 160),
    "rank1_cross_chain": Case(Rank1, {**RANK1, "u_mode": "cross_chain"}, 1 / 2.25, 500, 160),
}


def draws_of(case: Case) -> Tensor:
    """Draws (n, d) of M chains from the Gaussian approximation at the mode on."""
    p, rng = problem(), generator(2)
    root = torch.linalg.cholesky(torch.linalg.inv(p.k) / N)
    z = torch.randn(CHAINS, D, generator=rng, dtype=torch.float64)
    theta = (p.mode + z @ root.T).requires_grad_()
    sampler = case.make(
        [theta],
        step_size=case.scale * HK / p.k_max,
        num_examples=N,
        prior_std=PRIOR_STD,
        chain_dim=0,
        generators=rng,
        **case.options,
    )

    def closure() -> Tensor:
        theta.grad = p.nll_gradient(theta.detach())
        return torch.zeros(CHAINS)

    draws = []
    for step in range(1, case.warm + case.gap * case.draws + 1):
        sampler.step(closure)
        if step > case.warm and (step - case.warm) % case.gap == 0:
            draws.append(theta.detach().clone())
    metric = sampler.metric(draws[0])
    if metric is not None:
        root = metric[:, :, None].sqrt()
        whitened = root * p.k * root.transpose(1, 2)
        top = torch.linalg.eigvalsh(whitened)[:, -1] * sampler.param_groups[0]["lr"]
        assert top.max().item() <= HK
    return torch.cat(draws)


@dataclass(frozen=True)
class Gap:
    """Largest differences from the reference: means over sd, sd ratios − 1, probabilities."""

    mean: float
    spread: float
    probability: float

    @property
    def small(self) -> bool:
        return self.mean < 0.05 and self.spread < 0.05 and self.probability < 0.01


def gap(draws: Tensor, reference: Tensor) -> Gap:
    p, sd = problem(), reference.std(0)
    return Gap(
        ((draws.mean(0) - reference.mean(0)).abs() / sd).max().item(),
        (draws.std(0) / sd - 1).abs().max().item(),
        (p.predictions(draws) - p.predictions(reference)).abs().max().item(),
    )


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_nuts(name: str, reference: Tensor):
    found = gap(draws_of(CASES[name]), reference)
    assert found.small, found


class WithoutPrior(SGLD):
    def drift(self, prior: bool = True) -> Tensor:
        return super().drift(prior=False)


class ConstantDrift(ASGLD):
    def strength(self) -> float:
        return self.a


WRONG = mutations(SGLD)
BROKEN = {
    "half_the_noise": Case(WRONG["noise × √½"]),
    "prior_on_the_mean_loss": Case(WRONG["prior on the mean loss"]),
    "without_prior": Case(WithoutPrior),
    "constant_adaptive_drift": Case(ConstantDrift, {"a": 0.02}),
    "rank1_current": Case(Rank1, {**RANK1, "u_mode": "current"}),
    "csgld_cycle_too_short": Case(CSGLD, {"cycle_steps": 40}, warm=400, gap=40),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_rejects_broken_rules(name: str, reference: Tensor):
    found = gap(draws_of(BROKEN[name]), reference)
    assert not found.small, found


def test_the_gaussian_start_is_not_the_posterior(reference: Tensor):
    """The check sees the skewness that the chains' start lacks, so it is not passed by standing."""
    p = problem()
    root = torch.linalg.cholesky(torch.linalg.inv(p.k) / N)
    z = torch.randn(20_000, D, generator=generator(3), dtype=torch.float64)
    assert not gap(p.mode + z @ root.T, reference).small
