"""The checks of a sampler: the unit of its noise, and the law it claims on toy targets.

Each check takes a sampler's class, its options, the number of draws and a seed, and gives the
figures it measured beside the derived ones; those come from the sampler's own `variance_factor`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.sam_sgld_rank1 import SAMSGLDRank1
from bayesian_lora.verification.toy import (
    RELAXATIONS,
    Figure,
    MakeSampler,
    Quadratic,
    Setting,
    build,
    compare,
    normal,
    pushed,
    radial_variance,
    simulate,
)

Options = Mapping[str, Any]
CURVATURES = (0.1, 1.0, 4.0)
GAUSSIAN = Setting()
RADIAL = Setting(num_examples=3668, temperature=1.0, step_size=0.005, prior_std=0.05)
FACTORS = ((1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4))
"""On N, T and h."""


# --- the unit of the noise ------------------------------------------------------------------


def noise(
    make: MakeSampler,
    options: Options,
    size: int,
    seed: int,
    *,
    gain: Callable[[Any], float],
    gradient: float = 0.0,
    before: int = 0,
) -> list[Figure]:
    """Standard deviation of one step without drift over coordinates, against gain · √(2hT/N).

    Args:
        size: d of the one chain.
        gain: the derived factor, given the sampler after the step.
        gradient, before: steps made first, with this gradient in every coordinate.

    Returns:
        Of the settings with N, T and h each × 4, the one furthest off.
    """
    figures = []
    for setting in _settings():
        moved, sampler = _one_step(
            make, options, setting, torch.full((1, size), gradient), before, seed
        )
        figures.append(_spread("noise", setting, gain(sampler), moved))
    return [max(figures, key=lambda figure: abs(figure.ratio - 1))]


def directional_noise(
    make: MakeSampler, options: Options, size: int, seed: int, *, before: int = 1
) -> list[Figure]:
    """As `noise`, along u and across it: (1 + σ_dir)·√(2hT/N) and √(2hT/N)."""
    u = torch.tensor([0.6, 0.8])
    along, across = [], []
    for setting in _settings():
        push = u.expand(size // 2, 2).contiguous()
        moved, sampler = _one_step(make, options, setting, push, before, seed)
        assert isinstance(sampler, SAMSGLDRank1)
        along.append(_spread("noise along u", setting, 1 + sampler.sigma_dir, moved @ u))
        across.append(_spread("noise across u", setting, 1.0, moved @ torch.tensor([-0.8, 0.6])))
    return [max(found, key=lambda figure: abs(figure.ratio - 1)) for found in (along, across)]


def _settings() -> list[Setting]:
    g = GAUSSIAN
    return [
        Setting(g.num_examples * n, g.temperature * t, g.step_size * h, math.inf)
        for n, t, h in FACTORS
    ]


def _one_step(
    make: MakeSampler, options: Options, setting: Setting, gradient: Tensor, before: int, seed: int
) -> tuple[Tensor, Sampler]:
    """How far the parameters move in the step after `before` steps, less the common drift."""
    theta = torch.zeros_like(gradient).requires_grad_()
    sampler = build(make, theta, setting, options, seed)
    for _ in range(before):
        sampler.step(pushed(theta, gradient))
    start = theta.detach().clone()
    sampler.step(pushed(theta, gradient))
    return theta.detach() - start, sampler


def _spread(what: str, setting: Setting, gain: float, moved: Tensor) -> Figure:
    n, t, h = setting.num_examples, setting.temperature, setting.step_size
    return Figure(
        f"{what}, N={n} T={t:g} h={h:g}",
        derived=gain * math.sqrt(2 * h * t / n),
        measured=moved.std().item(),
        tolerance=0.005,
        error=1 / math.sqrt(2 * moved.numel()),
    )


# --- Gaussian targets -----------------------------------------------------------------------


def gaussian(
    make: MakeSampler,
    options: Options,
    draws: int,
    seed: int,
    *,
    d: int = 1,
    centre: float = 1.0,
    warm: tuple[float, ...] = (),
    settle: int = 0,
) -> list[Figure]:
    """Variance and mean at k = .1, 1, 4 against T/(Nk)·`variance_factor`, all at once.

    Of k, 1/(Nσ²) comes from the prior, so the prior's unit is tested too. A third of the chains
    has each k. Chains start around the derived mean with the target's variance T/(Nk).
    For the SAM samplers the law is about their own potential: with d = 1 and a `centre` far from
    the prior's, ‖∇L‖ is linear wherever the chain goes, so the potential is exactly quadratic,
    of curvature k and with its mode where L is centred at centre + ρ.

    Args:
        draws: of each k.
        d: parameters of a chain, alike (isotropic).
        warm: gradients of a first step, by k (`Quadratic`).
        settle: steps beyond the relaxation times.
    """
    chains, setting = draws // d, GAUSSIAN
    from_data = [k - setting.prior_curvature for k in CURVATURES]
    shifted = centre + options.get("rho", 0.0)
    means = [kd * shifted / k for kd, k in zip(from_data, CURVATURES, strict=True)]

    def by_chain(values: tuple[float, ...] | list[float]) -> Tensor:
        column = torch.tensor(values, dtype=torch.float64).repeat_interleave(chains)
        return column[:, None].expand(-1, d).contiguous()

    spread = by_chain([math.sqrt(setting.unit / k) for k in CURVATURES])
    problem = Quadratic(
        by_chain(from_data),
        centre,
        by_chain(means) + spread * normal((3 * chains, d), seed),
        by_chain(warm) if warm else None,
    )
    whitened: list[float] = []

    def steps(sampler: Sampler) -> int:
        metric = sampler.metric(problem.start)
        gains = [1.0] * 3 if metric is None else metric[::chains, 0].tolist()
        whitened.extend(k * gain for k, gain in zip(CURVATURES, gains, strict=True))
        slowest = max(sampler.relaxation_steps(setting.step_size, k) for k in whitened)
        count, cycle = settle + math.ceil(RELAXATIONS * slowest), options.get("cycle_steps", 1)
        return -(-count // cycle) * cycle

    theta, sampler = simulate(make, options, problem, setting, steps, seed)
    figures = []
    for i, (k, mean) in enumerate(zip(CURVATURES, means, strict=True)):
        factor = sampler.variance_factor(setting.step_size, whitened[i])
        part = theta[i * chains : (i + 1) * chains]
        law = f"variance at k={k:g}"
        figures.append(compare(law, part, mean, setting.unit / k * factor, 0.04))
    return figures


def radial(make: MakeSampler, options: Options, draws: int, seed: int) -> list[Figure]:
    """SAM on an isotropic Gaussian, d = 10, against quadrature; the bias of h = .005 is < 2 %."""
    return [sam_radius(make, options, RADIAL, draws, seed)]


def sam_radius(
    make: MakeSampler, options: Options, setting: Setting, chains: int, seed: int, k: float = 1.0
) -> Figure:
    """E r²/d of a SAM sampler at k, of which the setting's prior is a part, d = 10, ρ = .05."""
    d, rho = 10, 0.05
    start = 0.7 * math.sqrt(setting.unit / k) * normal((chains, d), seed)
    problem = Quadratic(torch.full_like(start, k - setting.prior_curvature), 0.0, start)
    # The cusp and the d directions hold r: at rate k + (d − 1)T/(Nr²), here more than 3k.
    steps = math.ceil(RELAXATIONS / (3 * setting.step_size * k))
    given = {**options, "rho": rho}
    theta, _ = simulate(make, given, problem, setting, lambda _: steps, seed)
    derived = radial_variance(setting, k, rho, d)
    return compare(f"E r²/d at ρ={rho:g}, h→0", theta, 0.0, derived, 0.02)


# --- directions of rank-1 noise -------------------------------------------------------------


def fixed_direction(make: MakeSampler, options: Options, draws: int, seed: int) -> list[Figure]:
    """Variance along a frozen u and across it, from Σ = (T/N)(K − hKPK/2)⁻¹, d = 5, ρ = 0."""
    setting = Setting(prior_std=math.inf)
    k = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    u = torch.tensor([1.0, 2.0, -1.0, 1.0, 1.0], dtype=torch.float64) / math.sqrt(8)
    w = torch.tensor([2.0, -1.0, 0.0, 1.0, -1.0], dtype=torch.float64) / math.sqrt(7)
    K, h = torch.diag(k), setting.step_size
    start = normal((draws, 5), seed) * (setting.unit / k).sqrt()
    rows = u.expand(draws, 5).contiguous()
    problem = Quadratic(k.expand(draws, 5), 0.0, start, rows)
    steps = math.ceil(RELAXATIONS / (h * 0.5))
    given = {**options, "rho": 0.0}
    theta, sampler = simulate(make, given, problem, setting, lambda _: steps, seed)
    assert isinstance(sampler, SAMSGLDRank1)
    P = torch.eye(5, dtype=torch.float64) + sampler.c * torch.outer(u, u)
    law = setting.unit * torch.linalg.inv(K - 0.5 * h * K @ P @ K)
    return [
        compare(f"variance {name} u", (theta @ v)[:, None], 0.0, (v @ law @ v).item(), 0.04)
        for name, v in (("along", u), ("across", w))
    ]


def isotropic(
    make: MakeSampler, options: Options, draws: int, seed: int, *, step_size: float = 0.01
) -> list[Figure]:
    """Noise along a u that moves, against T/(Nk), right up to O(h): d = 5, c = 3, k = 1, ρ = 0."""
    d, setting = 5, Setting(step_size=step_size, prior_std=math.inf)
    start = normal((draws // d, d), seed) * math.sqrt(setting.unit)
    problem = Quadratic(torch.ones_like(start), 0.0, start)
    given = {**options, "rho": 0.0, "sigma_dir": 1.0}
    steps = math.ceil(RELAXATIONS / step_size)
    theta, _ = simulate(make, given, problem, setting, lambda _: steps, seed)
    law = f"variance at d={d} h={step_size:g}, h→0"
    return [compare(law, theta, 0.0, setting.unit, 0.04)]
