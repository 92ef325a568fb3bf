"""What a sampler will do, measured at the warm start before it does it.

Curvature and minibatch noise along the stiffest direction give the step size (`auto`), its biases,
T_eff and the relaxation time, to be held against the steps planned.

Shapes: M chains, d parameters of one chain. Units: `bayesian_lora.samplers.base`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.errors import InputError
from bayesian_lora.samplers.base import Closure, Sampler
from bayesian_lora.samplers.flat import unit

ADAPTING = 16
"""Batch gradients from which a preconditioner is learnt first."""
GRADIENTS = 50
"""Batch gradients for the variance, over all chains."""
CURVATURE_STEPS = 10
"""Hessian-vector products of the power iteration, at most."""
CURVATURE_TOLERANCE = 0.03
"""Relative change of k at which it ends."""
DISPLACEMENT = 0.03
"""Norm of the finite difference's displacement: about a stiff direction's posterior width."""
FLATTEST = 1e-6
"""Of k_max, a curvature under which nothing relaxes in any run: under a flat prior."""
SAFETY = 0.5
"""Of the largest stable step, the most that `auto` takes."""


@dataclass(frozen=True)
class Stiffest:
    """Along the stiffest direction at the warm start, in the sampler's metric.

    k_max: largest curvature of U/N over the chains, in modulus. k_prior: the least curvature there
    is, the prior's. variance: of a batch gradient along the direction, mean over chains; `grows`:
    with the distance from the warm start, one posterior width from which it is taken.
    """

    k_max: float
    k_prior: float
    variance: float
    grows: bool

    def variance_at(self, sampler: Sampler, h: float, steps: int) -> float:
        """The variance by the end of a run of step size h: where it grows, with the square of the
        distance, for which every coordinate is taken to diffuse freely up to its prior.

        At temperature T no coordinate's mean (Δθ)² over T/(N k_max) is more than what it is where
        the prior alone holds, (k_max/k_prior)·(1 − exp(−2·steps/relaxation there)).
        """
        if not self.grows:
            return self.variance
        slow = max(self.k_prior, FLATTEST * self.k_max)
        reached = -math.expm1(-2.0 * steps / sampler.relaxation_steps(h, slow))
        return self.variance * max(1.0, reached * self.k_max / slow)


@dataclass(frozen=True)
class Measured(Stiffest):
    """The direction with it: unit vectors (M, d); curvature: along them (M,)."""

    direction: Tensor
    curvature: Tensor


@dataclass(frozen=True)
class Account(Stiffest):
    """A step size and what it entails. Biases are relative to the target's variance along k_max.

    variance_end: v by the run's end (`Stiffest.variance_at`). discretisation: α h k_max (SGLD:
    h·k_max/2). heat: η N h v/(2T) (None at T = 0) with that v. t_eff: with that heat.
    largest_stable: by the sampler's own limit. relaxation: steps to 1/e along the stiffest
    direction; relaxation_prior: where only the prior holds; steps: planned, a chain.
    """

    step_size: float
    auto: bool
    variance_end: float
    discretisation: float
    heat: float | None
    t_eff: float
    largest_stable: float
    relaxation: float
    relaxation_prior: float
    steps: int

    def facts(self) -> dict[str, Any]:
        """For `run.json`; infinite values are None."""
        return {k: None if v == math.inf else v for k, v in asdict(self).items()}


def measure(
    sampler: Sampler,
    plain: Callable[[], Closure],
    fixed: Closure,
    reduced: Callable[[], Closure] | None = None,
) -> Measured:
    """Curvature by power iteration, then the gradient's variance along it; θ stays as it is.

    Args:
        sampler: over the parameters, at the warm start.
        plain: a closure of a new i.i.d. batch at every call, of the size used while sampling.
        fixed: the closure whose curvature is taken, the same batch at every call.
        reduced: as `plain`, with the control variate, where the run has one. Its variance vanishes
            at the warm start, so it is measured one posterior width √(T/(N k_max)) off in every
            coordinate; it grows with the distance (`Stiffest.variance_at`).
    """
    for _ in range(ADAPTING if sampler.metric(_drift(sampler, fixed)) is not None else 0):
        sampler.adapt(_drift(sampler, plain()))
    start = _guess(_drift(sampler, plain()) - _drift(sampler, plain()))
    curvature, direction = top_curvature(sampler, fixed, start)
    k_prior = _prior_curvature(sampler, direction)
    k_max = max(float(curvature.abs().max()), k_prior)
    offset = torch.zeros_like(direction)
    if reduced is not None:
        metric = sampler.metric(direction)
        width = math.sqrt(sampler.mean_temperature() / (sampler.num_examples * k_max))
        offset = width * sampler.normal(direction)
        offset = offset if metric is None else metric.sqrt() * offset
    batch, along = reduced or plain, []
    with displaced(sampler, offset):
        for _ in range(max(4, -(-GRADIENTS // sampler.num_chains))):
            g = sampler.whitened(_drift(sampler, batch()))
            along.append((direction * g).sum(1).cpu().double())
    variance = float(torch.stack(along).var(0).mean())
    return Measured(k_max, k_prior, variance, reduced is not None, direction, curvature)


def top_curvature(sampler: Sampler, closure: Closure, start: Tensor) -> tuple[Tensor, Tensor]:
    """Largest curvature (M,) of U/N and its direction (M, d), from a first guess (M, d).

    Power iteration on finite-difference Hessian-vector products of the drift, in the sampler's
    metric: √G K √G. The Rayleigh quotient can only be too small.
    """
    here = _drift(sampler, closure)
    metric = sampler.metric(here)
    root = torch.ones_like(here) if metric is None else metric.sqrt()
    v = unit(start)
    curvature = torch.zeros(len(start), dtype=torch.float64)
    for _ in range(CURVATURE_STEPS):
        step = root * v
        scale = DISPLACEMENT / torch.linalg.vector_norm(step, dim=1, keepdim=True)
        with displaced(sampler, scale * step):
            there = _drift(sampler, closure)
        image = root * (there - here) / scale
        before, curvature = curvature, (v * image).sum(1).cpu().double()
        v = unit(torch.where((image == 0).all(1, keepdim=True), v, image))
        if bool(((curvature - before).abs() <= CURVATURE_TOLERANCE * curvature.abs()).all()):
            break
    return curvature, v


def _guess(noise: Tensor) -> Tensor:
    """Where gradients vary most the loss is stiff; a fixed random part, lest that is nothing."""
    rng = torch.Generator(noise.device).manual_seed(0)
    rest = torch.randn(noise.shape[1:], generator=rng, device=noise.device, dtype=noise.dtype)
    return unit(noise) + unit(rest[None])


@contextmanager
def displaced(sampler: Sampler, x: Tensor) -> Iterator[None]:
    """θ + x for the block; afterwards θ again, to the last bit."""
    parameters = sampler.present
    here = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        sampler.shift(x)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, here, strict=True):
                p.copy_(value)


def account_of(
    sampler: Sampler,
    measured: Stiffest,
    *,
    step_size: float | None,
    bias: float,
    steps: int,
    burn_in_step_size: float | None = None,
) -> Account:
    """The account of a step size; None chooses it so that both biases add up to `bias`:
    α h k_max + η N h v/(2T) = bias, and at most half the largest stable step.

    Raises:
        InputError: a step size is unstable by the sampler's own limit.
    """
    t, k = sampler.mean_temperature(), measured.k_max
    largest = sampler.stability / k
    for key, value in {"step_size": step_size, "burn_in_step_size": burn_in_step_size}.items():
        if value is not None and value >= largest:
            raise InputError(
                f"sampler.{key}={value:g}: unstable, the chain would diverge; at the warm start "
                f"the largest curvature is {k:.3g}, and {type(sampler).__name__} is stable below "
                f"{sampler.stability:.3g}/{k:.3g} = {largest:.3g}: set sampler.{key} below that"
                + (", or to auto" if key == "step_size" else ", or leave it out")
            )

    def heat(h: float) -> float:
        gain = sampler.planned_heat_gain or sampler.heat_gain
        return 0.5 * gain * sampler.num_examples * h * measured.variance_at(sampler, h, steps)

    if step_size is None and t == 0:
        raise InputError("sampler.step_size=auto weighs noise against the temperature, which is 0")
    h, flattest = step_size, measured.k_prior
    if h is None:
        h = _largest(lambda h: sampler.bias_gain * h * k + heat(h) / t <= bias, SAFETY * largest)
    return Account(
        k_max=k,
        k_prior=measured.k_prior,
        variance=measured.variance,
        grows=measured.grows,
        step_size=h,
        auto=step_size is None,
        variance_end=measured.variance_at(sampler, h, steps),
        discretisation=sampler.bias_gain * h * k,
        heat=heat(h) / t if t > 0 else None,
        t_eff=t + heat(h),
        largest_stable=largest,
        relaxation=sampler.relaxation_steps(h, k),
        relaxation_prior=sampler.relaxation_steps(h, flattest) if flattest > 0 else math.inf,
        steps=steps,
    )


def longer(sampler: Sampler, account: Account, steps: int) -> Account:
    """The account of the same run with other steps planned, at its step size."""
    end, heat = account.variance_at(sampler, account.step_size, steps), account.heat
    more = end / account.variance_end - 1 if account.variance_end > 0 else 0.0
    added = account.t_eff if heat is None else account.t_eff * heat / (1 + heat)
    t_eff, heat = account.t_eff + more * added, None if heat is None else heat * (1 + more)
    return replace(account, steps=steps, variance_end=end, heat=heat, t_eff=t_eff)


def _largest(allowed: Callable[[float], bool], most: float) -> float:
    """The largest h up to `most` that is allowed; allowed is what is small."""
    if allowed(most):
        return most
    low, high = 0.0, most
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def account_lines(a: Account, bias: float) -> list[str]:
    """The account for a person, with a warning where the run is shorter than it relaxes."""
    origin = f"auto, for a bias of {bias:g}" if a.auto else "as given"
    heat = "not defined at T = 0" if a.heat is None else f"{a.heat:.3g}"
    growth = " a posterior width away" if a.grows else ""
    end = f" by step {a.steps}, at a variance of {a.variance_end:.3g}" if a.grows else ""
    lines = [
        f"Step size h = {a.step_size:.3g} ({origin}); at the warm start, along the stiffest "
        "direction:",
        f"  curvature k_max {a.k_max:.3g} (stable below h = {a.largest_stable:.3g}), variance of "
        f"a batch gradient {a.variance:.3g}{growth}",
        f"  biases of the variance: discretisation {a.discretisation:.3g}, minibatch heat {heat}; "
        f"T_eff {a.t_eff:.3g}{end}",
        f"  relaxation: {_steps(a.relaxation)} steps there, {_steps(a.relaxation_prior)} where "
        f"only the prior holds; a chain will make {a.steps}",
    ]
    if a.steps < a.relaxation_prior:
        more = " or sampler.variance_reduction=true (larger h)" if a.auto and not a.grows else ""
        which = "any direction" if a.steps < a.relaxation else "directions that the data leave free"
        lines.append(
            f"  Warning: too short for {which}: expect 'not mixed', an ensemble of its starts; "
            f"more steps, a narrower prior{more} help"
        )
    return lines


def _drift(sampler: Sampler, closure: Closure) -> Tensor:
    sampler.gradient(closure)
    with torch.no_grad():
        return sampler.drift()


def _prior_curvature(sampler: Sampler, like: Tensor) -> float:
    """The least 1/(Nσ²) of any coordinate, in the sampler's metric."""
    precision = sampler.per_coordinate(
        lambda group: 1.0 / (sampler.num_examples * group["prior_std"] ** 2)
    )
    metric = sampler.metric(like)
    least = precision if metric is None else metric * precision
    return float(least.min()) if isinstance(least, Tensor) else least


def _steps(value: float) -> str:
    return "infinitely many" if math.isinf(value) else f"{value:.3g}"
