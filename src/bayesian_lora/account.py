"""What a sampler will do, measured at the warm start before it does it.

Curvature and minibatch noise along the stiffest direction give the step size (`auto`), its two
biases, the effective temperature and the relaxation time, to be held against the steps planned.

Shapes: M chains, d parameters of one chain. Units: `bayesian_lora.samplers.base`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.errors import InputError
from bayesian_lora.samplers.base import Closure, Sampler
from bayesian_lora.samplers.flat import unit
from bayesian_lora.samplers.psgld import PSGLD

GRADIENTS = 50
"""Batch gradients for the variance, over all chains."""
CURVATURE_STEPS = 10
"""Hessian-vector products of the power iteration, at most."""
CURVATURE_TOLERANCE = 0.03
"""Relative change of k at which it ends."""
DISPLACEMENT = 0.03
"""Norm of the finite difference's displacement: about a stiff direction's posterior width."""
SAFETY = 0.5
"""Of the largest stable step, the most that `auto` takes."""


@dataclass(frozen=True)
class Measured:
    """Along the stiffest direction at the warm start, in the sampler's metric.

    k_max: largest curvature of U/N over the chains. k_prior: the least curvature there is, the
    prior's. variance: of a batch gradient along the direction, mean over chains. direction: unit
    vectors (M, d).
    """

    k_max: float
    k_prior: float
    variance: float
    direction: Tensor


@dataclass(frozen=True)
class Account:
    """A step size and what it entails. Biases are relative to the target's variance along k_max.

    discretisation: α h k_max (SGLD: h·k_max/2). heat: η N h v/(2T) (None at T = 0). t_eff: with
    that heat. largest_stable: by the sampler's own limit. relaxation: steps to 1/e along the
    stiffest direction; relaxation_prior: where only the prior holds; steps: planned, a chain.
    """

    step_size: float
    auto: bool
    k_max: float
    variance: float
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
    batch: Callable[[], Closure],
    fixed: Closure,
    away: bool = False,
) -> Measured:
    """Curvature by power iteration, then the gradient's variance along it; θ stays as it is.

    Args:
        sampler: over the parameters, at the warm start.
        batch: a closure of a new i.i.d. batch at every call, of the size used while sampling.
        fixed: the closure whose curvature is taken, the same batch at every call.
        away: measure the variance one posterior width √(T/(N k_max)) off in every coordinate, for
            gradients whose variance vanishes at the warm start (`ControlVariate`).
    """
    rounds = max(4, -(-GRADIENTS // sampler.num_chains))
    if isinstance(sampler, PSGLD):
        for _ in range(rounds):
            sampler.adapt(_drift(sampler, batch()))
    start = _guess(_drift(sampler, batch()) - _drift(sampler, batch()))
    curvature, direction = top_curvature(sampler, fixed, start)
    k_prior = _prior_curvature(sampler, direction)
    k_max = max(float(curvature.max()), k_prior)
    offset = torch.zeros_like(direction)
    if away:
        metric = sampler.metric(direction)
        width = math.sqrt(sampler.mean_temperature() / (sampler.num_examples * k_max))
        offset = width * sampler.normal(direction)
        offset = offset if metric is None else metric.sqrt() * offset
    with displaced(sampler, offset):
        along = [
            (direction * sampler.whitened(_drift(sampler, batch()))).sum(1).double()
            for _ in range(rounds)
        ]
    return Measured(k_max, k_prior, float(torch.stack(along).var(0).mean()), direction)


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
        before, curvature = curvature, (v * image).sum(1).double().cpu()
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
    measured: Measured,
    *,
    step_size: float | None,
    bias: float,
    steps: int,
    burn_in_step_size: float | None = None,
) -> Account:
    """The account of a step size; None chooses it so that both biases add up to `bias`.

    h = bias/(α k_max + η N v/(2T)), and at most half the largest stable step.

    Raises:
        InputError: a step size is unstable by the sampler's own limit.
    """
    t = sampler.mean_temperature()
    k, n = measured.k_max, sampler.num_examples
    largest = sampler.stability / k
    heat_per_step = 0.5 * sampler.heat_gain * n * measured.variance
    for key, value in {"step_size": step_size, "burn_in_step_size": burn_in_step_size}.items():
        if value is not None and value >= largest:
            raise InputError(
                f"sampler.{key}={value:g}: unstable, the chain would diverge; at the warm start "
                f"the largest curvature is {k:.3g}, and {type(sampler).__name__} is stable below "
                f"{sampler.stability:.3g}/{k:.3g} = {largest:.3g}: set sampler.{key} below that, "
                "or sampler.step_size=auto"
            )
    h = step_size
    if h is None:
        h = min(bias / (sampler.bias_gain * k + heat_per_step / t), SAFETY * largest)
    return Account(
        step_size=h,
        auto=step_size is None,
        k_max=k,
        variance=measured.variance,
        discretisation=sampler.bias_gain * h * k,
        heat=h * heat_per_step / t if t > 0 else None,
        t_eff=t + h * heat_per_step,
        largest_stable=largest,
        relaxation=sampler.relaxation_steps(h, k),
        relaxation_prior=_relaxation(sampler, h, measured.k_prior),
        steps=steps,
    )


def account_lines(a: Account, bias: float) -> list[str]:
    """The account for a person, with a warning where the run is shorter than it relaxes."""
    origin = f"auto, for a bias of {bias:g}" if a.auto else "as given"
    heat = "not defined at T = 0" if a.heat is None else f"{a.heat:.3g}"
    lines = [
        f"Step size h = {a.step_size:.3g} ({origin}); at the warm start, along the stiffest "
        "direction:",
        f"  curvature k_max {a.k_max:.3g} (stable below h = {a.largest_stable:.3g}), variance of "
        f"a batch gradient {a.variance:.3g}",
        f"  biases of the variance: discretisation {a.discretisation:.3g}, minibatch heat {heat}; "
        f"T_eff {a.t_eff:.3g}",
        f"  relaxation: {_steps(a.relaxation)} steps there, {_steps(a.relaxation_prior)} where "
        f"only the prior holds; a chain will make {a.steps}",
    ]
    if a.steps < a.relaxation_prior:
        which = "any direction" if a.steps < a.relaxation else "directions that the data leave free"
        lines.append(
            f"  Warning: too short for {which}: expect 'not mixed', an ensemble of its starts; "
            "more steps, a narrower prior or sampler.variance_reduction=true (larger h) help"
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


def _relaxation(sampler: Sampler, h: float, k: float) -> float:
    return sampler.relaxation_steps(h, k) if k > 0 else math.inf


def _steps(value: float) -> str:
    return "infinitely many" if math.isinf(value) else f"{value:.3g}"
