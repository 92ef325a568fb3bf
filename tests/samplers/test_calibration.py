"""Simulation-based calibration and Geweke's joint-distribution test of every exact sampler.

Both on the mean of n Gaussian observations, θ ~ N(0, I), ȳ | θ ~ N(θ, I/n), so that U/n has
curvature k = 1 + 1/n in each of d coordinates. Units: `bayesian_lora.samplers.base`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from bayesian_lora.samplers import ASGLD, CSGLD, PSGLD, SGHMC, SGLD, SGNHT
from bayesian_lora.samplers import SAMSGLDRank1 as Rank1
from bayesian_lora.samplers.base import Closure, Sampler
from bayesian_lora.samplers.flat import Scale
from bayesian_lora.verification.mutations import mutations

D = 4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def closure_of(theta: Tensor, y: Tensor) -> Closure:
    """The gradient of the mean NLL ‖θ − ȳ‖²/2, (M, d)."""

    def closure() -> Tensor:
        theta.grad = theta.detach() - y
        return torch.zeros(len(theta))

    return closure


@dataclass(frozen=True)
class Case:
    """A sampler; hk, warm-up and steps between draws of its own (relaxation 1/(hk) for SGLD)."""

    make: Callable[..., Sampler]
    options: dict[str, Any] = field(default_factory=dict)
    hk: float = 0.02
    warm: int = 250
    gap: int = 60


CYCLE = 100
RANK1 = {"rho": 0.0, "sigma_dir": 0.5}
CASES = {
    "sgld": Case(SGLD),
    "psgld": Case(PSGLD, {"burn_in": 100, "lambd": 0.1}, hk=0.006, warm=400),
    "asgld": Case(ASGLD, {"burn_in": 50}, warm=300),
    "sghmc_euler": Case(SGHMC, {"friction": 0.3}, warm=150),
    "sghmc_baoab": Case(SGHMC, {"friction": 0.3, "integrator": "baoab"}, warm=150),
    "sgnht": Case(SGNHT, {"friction": 0.3}, warm=300),
    "csgld": Case(CSGLD, {"cycle_steps": CYCLE, "explore_fraction": 0.1}, 0.1, CYCLE, CYCLE),
    "rank1_frozen": Case(Rank1, {**RANK1, "burn_in": 50}, warm=300),
    "rank1_cross_chain": Case(Rank1, {**RANK1, "u_mode": "cross_chain"}, 0.012, 350, 80),
}


def make(case: Case, theta: Tensor, n: int, rng: torch.Generator) -> Sampler:
    return case.make(
        [theta],
        step_size=case.hk / (1 + 1 / n),
        num_examples=n,
        prior_std=1.0,
        chain_dim=0,
        generators=rng,
        **case.options,
    )


def observation_mean(theta: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """ȳ of n observations N(θ, I), of the shape of θ."""
    return theta + torch.randn(theta.shape, generator=rng, dtype=torch.float64) / n**0.5


class DriftWithoutP(Rank1):
    def update(self, g: Tensor, h: Scale) -> None:
        u = self.direction(g)
        super().update(g - self.c / (1 + self.c) * u * (u * g).sum(1, keepdim=True), h)


WRONG = mutations(SGLD)
BROKEN = {
    "half_the_noise": Case(WRONG["noise × √½"]),
    "prior_on_the_mean_loss": Case(WRONG["prior on the mean loss"]),
    "asgld_constant": Case(ASGLD, {"a": 0.5, "anneal": False}),
    "rank1_current": Case(Rank1, {**RANK1, "u_mode": "current"}),
    "rank1_drift_without_p": Case(
        DriftWithoutP, {"rho": 0.0, "sigma_dir": 1.0, "burn_in": 50}, warm=300
    ),
    "csgld_cycle_too_short": Case(CSGLD, {"cycle_steps": CYCLE}, 0.02, CYCLE, CYCLE),
}


QUICK = ("sgld", "sghmc_euler", "csgld", "half_the_noise", "csgld_cycle_too_short")


def marked(cases: dict[str, Case]) -> list[Any]:
    """Names of the cases; the quick ones run always."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in cases]


# --- Simulation-based calibration (Talts et al. 2018) -----------------------------------------


def calibration_p_value(case: Case, replicates: int = 1_000, chains: int = 63) -> float:
    """χ² over 16 bins of the rank of θ₁ among the last states of 63 chains, n = 20.

    Chains start at ȳ and are left for 5 relaxation times of SGLD.
    """
    n = 20
    truth = torch.randn(replicates, 1, D, generator=generator(6), dtype=torch.float64)
    y = observation_mean(truth, n, generator(7)).expand(-1, chains, -1).reshape(-1, D)
    theta = y.clone().requires_grad_()
    sampler = make(case, theta, n, generator(8))
    closure = closure_of(theta, y)
    for _ in range(case.warm):
        sampler.step(closure)
    ranks = (theta.detach().reshape(replicates, chains, D) < truth).sum(1)[:, 0]
    counts = torch.bincount(ranks * 16 // (chains + 1), minlength=16).double()
    expected = replicates / 16
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum().item(), df=15))


@pytest.mark.parametrize("name", marked(CASES))
def test_simulation_based_calibration(name: str):
    assert calibration_p_value(CASES[name]) > 0.001


@pytest.mark.parametrize("name", marked(BROKEN))
def test_calibration_rejects_broken_rules(name: str):
    assert calibration_p_value(BROKEN[name]) < 0.001


# --- Geweke (2004) ----------------------------------------------------------------------------


def geweke_scores(case: Case, chains: int = 10_000, rounds: int = 20) -> list[float]:
    """z of θ, θ² and ȳθ, per coordinate, after rounds of (steps given ȳ, then ȳ given θ), n = 4.

    A kernel that keeps p(θ | ȳ) keeps the joint, under which the means are 0, 1, 1.
    """
    n, rng = 4, generator(9)
    theta = torch.randn(chains, D, generator=rng, dtype=torch.float64).requires_grad_()
    sampler = make(case, theta, n, generator(10))
    for i in range(rounds):
        y = observation_mean(theta.detach(), n, rng)
        closure = closure_of(theta, y)
        for _ in range(case.gap if i else case.warm):
            sampler.step(closure)
    draws = theta.detach()
    y = observation_mean(draws, n, rng)
    scores = []
    for values, expected in ((draws, 0.0), (draws**2, 1.0), (y * draws, 1.0)):
        mean = values.mean(1)
        scores.append(((mean.mean() - expected) / (mean.std() / chains**0.5)).item())
    return scores


@pytest.mark.parametrize("name", marked(CASES))
def test_geweke_joint_distribution(name: str):
    scores = geweke_scores(CASES[name])
    assert all(abs(z) < 4 for z in scores), scores


@pytest.mark.parametrize("name", marked(BROKEN))
def test_geweke_rejects_broken_rules(name: str):
    scores = geweke_scores(BROKEN[name])
    assert max(abs(z) for z in scores) > 4, scores
