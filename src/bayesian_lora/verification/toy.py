"""Toy targets whose laws are known in closed form, and chains that run on them.

Shapes: M chains, d parameters of a chain. Units: `bayesian_lora.samplers.base`; a *variance* is
that of one coordinate, and curvatures are those of U/N.
Every draw is the last state of a chain of its own, so draws are independent and no
autocorrelation has to be estimated.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.samplers.base import Closure, Sampler
from bayesian_lora.samplers.failures import Diverged
from bayesian_lora.utils.rng import chain_generators

MakeSampler = Callable[..., Sampler]
RELAXATIONS = 4
"""Relaxation times a chain is left: what is left of a wrong variance is e⁻⁸."""


@dataclass(frozen=True)
class Setting:
    """N, T, h and σ of a run."""

    num_examples: int = 50
    temperature: float = 0.5
    step_size: float = 0.1
    prior_std: float = 1.0

    @property
    def prior_curvature(self) -> float:
        """1/(Nσ²), the prior's part of every k."""
        return 1.0 / (self.num_examples * self.prior_std**2)

    @property
    def unit(self) -> float:
        """T/N: the variance at curvature 1 of a rule without bias."""
        return self.temperature / self.num_examples


@dataclass(frozen=True)
class Figure:
    """A measured variance (or standard deviation) beside the derived one."""

    law: str
    derived: float
    measured: float
    tolerance: float
    """Largest |measured/derived − 1|."""
    error: float
    """Relative standard error of `measured`."""
    shift: float = 0.0
    """(Mean of the draws − derived mean) in Monte Carlo standard errors."""

    @property
    def ratio(self) -> float:
        return self.measured / self.derived

    @property
    def right_variance(self) -> bool:
        """Within the tolerance; NaN never."""
        return abs(self.ratio - 1) < self.tolerance

    @property
    def agrees(self) -> bool:
        """Also within 4 standard errors of the mean."""
        return self.right_variance and abs(self.shift) < 4

    @property
    def rejects(self) -> bool:
        """Outside by more than sampling error explains (4 standard errors beyond each bound)."""
        return not (abs(self.ratio - 1) < self.tolerance + 4 * self.error and abs(self.shift) < 8)


@dataclass(frozen=True)
class Quadratic:
    """L = ½ Σ k(θ − centre)² of every chain, beside the setting's prior.

    `curvature` is (M, d), the data's part; `start` (M, d) are first states. `warm` (M, d) is a
    gradient given at θ = 0 for one first step: what a rule with ``burn_in=1`` freezes is then
    known exactly.
    """

    curvature: Tensor
    centre: float
    start: Tensor
    warm: Tensor | None = None


def generator(seed: int, purpose: str) -> torch.Generator:
    return chain_generators(seed, [0], purpose)[0]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "start"), dtype=torch.float64)


def build(
    make: MakeSampler, theta: Tensor, setting: Setting, options: Mapping[str, Any], seed: int
) -> Sampler:
    """The sampler on θ (M, d), one generator for all chains."""
    return make(
        [theta],
        step_size=setting.step_size,
        num_examples=setting.num_examples,
        prior_std=setting.prior_std,
        temperature=setting.temperature,
        chain_dim=0,
        generators=generator(seed, "noise"),
        **options,
    )


def pushed(theta: Tensor, gradient: Tensor) -> Closure:
    """The closure of a loss with a constant gradient (M, d)."""

    def closure() -> Tensor:
        theta.grad = gradient
        return theta.new_zeros(theta.shape[0])

    return closure


def simulate(
    make: MakeSampler,
    options: Mapping[str, Any],
    problem: Quadratic,
    setting: Setting,
    steps: Callable[[Sampler], int],
    seed: int,
) -> tuple[Tensor, Sampler]:
    """The chains' last states (M, d) and their sampler; NaN throughout if it diverged.

    `steps` is asked once the sampler is warm.
    """
    theta = torch.zeros_like(problem.start).requires_grad_()
    sampler = build(make, theta, setting, options, seed)
    if problem.warm is not None:
        sampler.step(pushed(theta, problem.warm))
    with torch.no_grad():
        theta.copy_(problem.start)

    def closure() -> Tensor:
        away = theta.detach() - problem.centre
        theta.grad = problem.curvature * away
        return 0.5 * (theta.grad * away).sum(1)

    try:
        for _ in range(steps(sampler)):
            sampler.step(closure)
    except Diverged:
        return torch.full_like(problem.start, math.nan), sampler
    return theta.detach(), sampler


def compare(law: str, draws: Tensor, mean: float, derived: float, tolerance: float) -> Figure:
    """The variance of draws (M, d), alike in all coordinates, against a derived one.

    Standard errors come from the spread between chains, so that coordinates of a chain may
    depend on one another.
    """
    root = math.sqrt(draws.shape[0])
    centres = draws.mean(1)
    squares = (draws - draws.mean()).square().mean(1)
    measured = squares.mean().item()
    return Figure(
        law,
        derived,
        measured,
        tolerance,
        error=squares.std().item() / root / measured,
        shift=(draws.mean().item() - mean) / (centres.std().item() / root),
    )


def radial_variance(setting: Setting, k: float, rho: float, d: int) -> float:
    """E r²/d under N(L + ρ‖∇L‖) + prior for an isotropic L = ½k_L r² with k_L + 1/(Nσ²) = k.

    One-dimensional quadrature: the density of r is ∝ r^(d−1) exp(−U(r)/T).
    """
    slope = rho * (k - setting.prior_curvature)
    furthest = (math.sqrt(d) + 10) * math.sqrt(setting.unit / k)
    r = torch.linspace(0, furthest, 100_001, dtype=torch.float64)[1:]
    log_density = (d - 1) * r.log() - (0.5 * k * r.square() + slope * r) / setting.unit
    weight = (log_density - log_density.max()).exp()
    return ((weight * r.square()).sum() / weight.sum() / d).item()
