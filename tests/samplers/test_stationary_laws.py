"""Stationary laws of the samplers against derived ones; broken rules must fail the same checks.

Shapes: M independent chains, d parameters of a chain. Units: `bayesian_lora.samplers.base`.
Every draw used here is the last state of a chain of its own, so M draws have an effective sample
size of M exactly and no autocorrelation has to be estimated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from bayesian_lora.samplers import SGLD
from bayesian_lora.samplers.base import Closure, Sampler

MakeSampler = Callable[..., Sampler]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def closure_of(theta: Tensor, mean_nll: Callable[[Tensor], Tensor]) -> Closure:
    """The closure of a loss θ (M, d) → (M,)."""

    def closure() -> Tensor:
        theta.grad = None
        loss = mean_nll(theta)
        loss.sum().backward()
        return loss.detach()

    return closure


# --- A Gaussian target ----------------------------------------------------------------------

N, T, STEP, PRIOR_STD, CENTRE = 50, 0.5, 0.1, 1.0, 1.0
CURVATURES = (0.1, 1.0, 4.0)


@dataclass(frozen=True)
class Law:
    """A sampler and the variance it should have at curvature k, as a multiple of T/(Nk)."""

    make: MakeSampler
    factor: Callable[[float], float]


LAWS = {"sgld": Law(SGLD, lambda k: 1 / (1 - STEP * k / 2))}


def gaussian_figures(law: Law, k: float, chains: int = 50_000) -> tuple[float, float]:
    """Variance over the derived one, and the mean's error in MCSE, at curvature k of U/N.

    Of k, 1/(Nσ²) comes from the prior, so the prior's unit is tested too. Chains start at T/(Nk)
    around the posterior's mean and are left for five relaxation times.
    """
    from_data = k - 1 / (N * PRIOR_STD**2)
    mean, start_std = from_data * CENTRE / k, math.sqrt(T / (N * k))
    start = torch.randn(chains, 1, generator=generator(1), dtype=torch.float64)
    theta = (mean + start_std * start).requires_grad_()
    sampler = law.make(
        [theta],
        step_size=STEP,
        num_examples=N,
        prior_std=PRIOR_STD,
        temperature=T,
        chain_dim=0,
        generators=generator(2),
    )
    closure = closure_of(theta, lambda x: 0.5 * from_data * (x - CENTRE).square().sum(1))
    for _ in range(math.ceil(5 / (STEP * k))):
        sampler.step(closure)
    draws = theta.detach()[:, 0]
    expected = T / (N * k) * law.factor(k)
    error = (draws.mean() - mean) / (draws.std() / math.sqrt(chains))
    return (draws.var() / expected).item(), error.item()


def is_the_law(figures: tuple[float, float]) -> bool:
    """Within 4 % in variance (the sampling error is .6 %) and 4 MCSE in mean."""
    ratio, error = figures
    return abs(ratio - 1) < 0.04 and abs(error) < 4


@pytest.mark.parametrize("k", CURVATURES)
@pytest.mark.parametrize("name", LAWS)
def test_gaussian_law(name: str, k: float):
    figures = gaussian_figures(LAWS[name], k)
    assert is_the_law(figures), figures


class NoiseWithoutN(SGLD):
    def add_noise(self, params: list[Tensor], std: float) -> None:
        super().add_noise(params, std * math.sqrt(self.num_examples))


class HalfTheNoise(SGLD):
    def add_noise(self, params: list[Tensor], std: float) -> None:
        super().add_noise(params, std * math.sqrt(0.5))


class TemperatureDivides(SGLD):
    def add_noise(self, params: list[Tensor], std: float) -> None:
        super().add_noise(params, std / self.param_groups[0]["temperature"])


class PriorOnTheMeanLoss(SGLD):
    def drift(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        return super().drift({**group, "prior_std": group["prior_std"] / math.sqrt(N)})


BROKEN = (NoiseWithoutN, HalfTheNoise, TemperatureDivides, PriorOnTheMeanLoss)


@pytest.mark.parametrize("k", CURVATURES)
@pytest.mark.parametrize("rule", BROKEN)
def test_the_gaussian_check_rejects_broken_rules(rule: MakeSampler, k: float):
    figures = gaussian_figures(Law(rule, LAWS["sgld"].factor), k, chains=5_000)
    assert not is_the_law(figures), figures


def test_the_gaussian_check_tells_the_derived_law_from_the_target():
    """At hk = .4 the chain is 25 % wider than the posterior, and the check sees it."""
    figures = gaussian_figures(Law(SGLD, lambda k: 1.0), 4.0)
    assert figures[0] == pytest.approx(1.25, rel=0.04)
    assert not is_the_law(figures)


# --- Conjugate Bayesian linear regression ---------------------------------------------------


class LinearRegression:
    """y = Xw + ε, ε ~ N(0, 1), w ~ N(0, σ²I): curvatures 1 to 3, posterior in closed form."""

    n, d, prior_std, temperature = 100, 4, 0.5, 1.0

    def __init__(self) -> None:
        rng = generator(3)
        scale = torch.tensor([1.0, 1.3, 1.5, 1.7], dtype=torch.float64)
        self.x = torch.randn(self.n, self.d, generator=rng, dtype=torch.float64) * scale
        w = self.prior_std * torch.randn(self.d, generator=rng, dtype=torch.float64)
        self.y = self.x @ w + torch.randn(self.n, generator=rng, dtype=torch.float64)
        eye = torch.eye(self.d, dtype=torch.float64)
        self.k = self.x.T @ self.x / self.n + eye / (self.n * self.prior_std**2)
        self.mean = torch.linalg.solve(self.k, self.x.T @ self.y / self.n)
        self.covariance = self.temperature / self.n * torch.linalg.inv(self.k)

    def run(self, chains: int, h: float, steps: int, batch: int | None) -> Tensor:
        """The chains' last states (M, d), started at the posterior's mean."""
        theta = self.mean.expand(chains, self.d).clone().requires_grad_()
        sampler = SGLD(
            [theta],
            step_size=h,
            num_examples=self.n,
            prior_std=self.prior_std,
            temperature=self.temperature,
            chain_dim=0,
            generators=generator(4),
        )
        order = generator(5)

        def mean_nll(w: Tensor) -> Tensor:
            if batch is None:
                return 0.5 * (self.y - w @ self.x.T).square().mean(1)
            rows = torch.randint(self.n, (chains, batch), generator=order)
            residual = self.y[rows] - (self.x[rows] @ w[:, :, None])[..., 0]
            return 0.5 * residual.square().mean(1)

        closure = closure_of(theta, mean_nll)
        for _ in range(steps):
            sampler.step(closure)
        return theta.detach()

    def gradient_covariance(self, w: Tensor, batch: int) -> Tensor:
        """C (d, d): covariance of a minibatch's gradient, averaged over the states w (M, d)."""
        per_example = (w @ self.x.T - self.y)[..., None] * self.x
        centred = per_example - per_example.mean(1, keepdim=True)
        return torch.einsum("mni,mnj->ij", centred, centred) / (w.shape[0] * self.n * batch)


def frobenius_error(found: Tensor, expected: Tensor) -> float:
    return (torch.linalg.norm(found - expected) / torch.linalg.norm(expected)).item()


def test_linear_regression_full_batch():
    """Mean of the posterior; covariance Σ(I − hK/2)⁻¹, and not Σ."""
    problem, h, chains = LinearRegression(), 0.2, 20_000
    draws = problem.run(chains, h, steps=50, batch=None)
    mcse = draws.std(0) / math.sqrt(chains)
    assert bool(((draws.mean(0) - problem.mean).abs() < 4 * mcse).all())
    eye = torch.eye(problem.d, dtype=torch.float64)
    derived = problem.covariance @ torch.linalg.inv(eye - 0.5 * h * problem.k)
    assert frobenius_error(draws.T.cov(), derived) < 0.05
    assert frobenius_error(draws.T.cov(), problem.covariance) > 0.1


def test_linear_regression_minibatch():
    """KΣ + ΣK − hKΣK = (2T/N)I + hC with i.i.d. batches; without hC it does not hold."""
    problem, h, chains, batch = LinearRegression(), 0.05, 10_000, 8
    draws = problem.run(chains, h, steps=150, batch=batch)
    mcse = draws.std(0) / math.sqrt(chains)
    assert bool(((draws.mean(0) - problem.mean).abs() < 4 * mcse).all())
    k, s = problem.k, draws.T.cov()
    left = k @ s + s @ k - h * k @ s @ k
    langevin = 2 * problem.temperature / problem.n * torch.eye(problem.d, dtype=torch.float64)
    heat = h * problem.gradient_covariance(draws, batch)
    assert frobenius_error(left, langevin + heat) < 0.05
    assert frobenius_error(left, langevin) > 0.2


# --- Calibration and the joint distribution, on the mean of N Gaussian observations ----------


def observation_mean(theta: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """ȳ of n observations N(θ, 1), of the shape of θ."""
    z = torch.randn(theta.shape, generator=rng, dtype=torch.float64)
    return theta + z / math.sqrt(n)


def calibration_p_value(rule: MakeSampler, replicates: int = 1_000, chains: int = 63) -> float:
    """Simulation-based calibration (Talts et al. 2018): ranks of θ among the chains, 16 bins.

    θ ~ N(0, 1), ȳ | θ of N = 20; U/N has curvature k = 1 + 1/N, and hk = .02.
    """
    n = 20
    truth = torch.randn(replicates, 1, generator=generator(6), dtype=torch.float64)
    y = observation_mean(truth, n, generator(7)).expand(replicates, chains).reshape(-1, 1)
    theta = torch.zeros_like(y).requires_grad_()
    sampler = rule(
        [theta],
        step_size=0.02 / (1 + 1 / n),
        num_examples=n,
        prior_std=1.0,
        chain_dim=0,
        generators=generator(8),
    )
    closure = closure_of(theta, lambda x: 0.5 * (x - y).square().sum(1))
    for _ in range(400):
        sampler.step(closure)
    ranks = (theta.detach().reshape(replicates, chains) < truth).sum(1)
    counts = torch.bincount(ranks * 16 // (chains + 1), minlength=16).double()
    expected = replicates / 16
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum().item(), df=15))


def test_simulation_based_calibration():
    assert calibration_p_value(SGLD) > 0.001


def test_calibration_rejects_half_the_noise():
    assert calibration_p_value(HalfTheNoise) < 0.001


def geweke_scores(rule: MakeSampler, chains: int = 20_000) -> list[float]:
    """z of θ, θ² and ȳθ after 30 rounds of (50 steps given ȳ, then ȳ given θ) from the joint.

    Geweke (2004): a kernel that keeps p(θ | ȳ) keeps the joint; under it the means are 0, 1, 1.
    """
    n, rng = 4, generator(9)
    theta = torch.randn(chains, 1, generator=rng, dtype=torch.float64).requires_grad_()
    sampler = rule(
        [theta],
        step_size=0.02 / (1 + 1 / n),
        num_examples=n,
        prior_std=1.0,
        chain_dim=0,
        generators=generator(10),
    )
    for _ in range(30):
        y = observation_mean(theta.detach(), n, rng)
        closure = closure_of(theta, lambda x, y=y: 0.5 * (x - y).square().sum(1))
        for _ in range(50):
            sampler.step(closure)
    draws = theta.detach()
    y = observation_mean(draws, n, rng)
    scores = []
    for values, expected in ((draws, 0.0), (draws**2, 1.0), (y * draws, 1.0)):
        mcse = values.std() / math.sqrt(chains)
        scores.append(((values.mean() - expected) / mcse).item())
    return scores


def test_geweke_joint_distribution():
    scores = geweke_scores(SGLD)
    assert all(abs(z) < 4 for z in scores), scores


def test_geweke_rejects_half_the_noise():
    assert max(abs(z) for z in geweke_scores(HalfTheNoise)) > 4
