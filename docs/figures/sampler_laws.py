"""Derived against measured variance of every sampler over its step sizes: sampler_laws.svg.

    python docs/figures/sampler_laws.py [--chains 20000] [--out sampler_laws.svg]

Shapes: M independent chains, d parameters of a chain. On a quadratic of curvature k, full batch,
flat prior. A draw is the last state of its chain, so a standard error needs no autocorrelation.
"""

import argparse
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora import samplers as family
from bayesian_lora.samplers.base import Sampler

N, T, K = 50, 0.5, 1.0
TARGET = T / (N * K)
SHARES = (0.03, 0.08, 0.2, 0.4, 0.6, 0.75, 0.9)
"""Step sizes measured, as shares of the stability limit."""
FIRST_STEPS = 20
"""Steps in which a rule adapts, where it does."""


@dataclass(frozen=True)
class Series:
    """One derived line and its measured points.

    own: the sampler's own arguments; adapt: the constant gradient (d,) it sees while it adapts,
    which makes what it learns known; metric: G that comes of it; coordinate: which is measured;
    draws_per_chain: d where coordinates are exchangeable; derived: variance over the target's as a
    function of the sampler and h, None for the sampler's own `variance_factor`; shares: of the
    limit, at which it is measured.
    """

    sampler: str
    label: str
    own: dict[str, Any] = field(default_factory=dict)
    adapt: tuple[float, ...] | None = None
    metric: float = 1.0
    coordinate: int | None = None
    draws_per_chain: int = 1
    settle: int = 400
    limit: float | None = None
    shares: tuple[float, ...] = SHARES
    target: float = TARGET
    derived: Callable[[Sampler, float], float] | None = None

    @property
    def d(self) -> int:
        return len(self.adapt) if self.adapt else self.draws_per_chain

    def make(self, theta: Tensor, h: float, seed: int) -> Sampler:
        return getattr(family, family.MODULES[self.sampler])(
            [theta],
            step_size=h,
            num_examples=N,
            temperature=T,
            chain_dim=0,
            generators=torch.Generator().manual_seed(seed),
            **self.own,
        )

    def law(self, h: float) -> float:
        """The derived variance, over `target`, at step size h."""
        sampler = self.make(torch.zeros(2, self.d, dtype=torch.float64, requires_grad=True), h, 0)
        if self.derived is not None:
            return self.derived(sampler, h)
        return sampler.variance_factor(h, self.metric * K)

    def stability(self) -> float:
        """The limit of h·G·k, the x axis."""
        theta = torch.zeros(2, self.d, dtype=torch.float64, requires_grad=True)
        return self.limit or self.make(theta, 0.1, 0).stability


def sam_law(rho: float) -> Callable[[Sampler, float], float]:
    """Exact law of SAM-SGLD in one dimension, over the variance in its potential N(L + ρ|∇L|).

    θ' ~ N(θ − hk(θ + ρ sgn θ), 2hT/N): the stationary density of that kernel on a grid.
    """

    def factor(_: Sampler, h: float) -> float:
        width = 10 * math.sqrt(TARGET / (1 - 0.5 * h * K))
        grid = np.linspace(-width, width, 600)  # an even number: 0, where sgn jumps, is no node
        mean = grid - h * K * (grid + rho * np.sign(grid))
        kernel = np.exp(-((grid - mean[:, None]) ** 2) / (4 * h * T / N))
        kernel /= kernel.sum(1, keepdims=True)
        system = kernel.T - np.eye(grid.size)
        system[-1] = 1.0  # the densities sum to 1
        density = np.linalg.solve(system, np.eye(grid.size)[-1])
        return float((density * grid**2).sum() / sam_target(rho))

    return factor


def sam_target(rho: float) -> float:
    """∫θ² π / ∫π for π = exp(−(N/T)(kθ²/2 + ρk|θ|)), by quadrature."""
    x = np.linspace(0, 12 * math.sqrt(TARGET), 20_001)
    density = np.exp(-(N / T) * K * (x**2 / 2 + rho * x))
    return float((x**2 * density).sum() / density.sum())


def thermostat_limit(friction: float) -> float:
    """hk up to which SGNHT's thermostat has a fixed point: 2(√2 − √f)².

    At friction ξ the kinetic temperature is (f/ξ)/(1 − hk/(2(2−ξ))) of T. That it be T is
    ξ² − ξ(2 + f − hk/2) + 2f = 0, which has real roots only so far.
    """
    return 2 * (math.sqrt(2) - math.sqrt(friction)) ** 2


def cycles(steps: int) -> Series:
    """Settles over whole cycles: draws are taken at a cycle's end."""
    settle = math.ceil(600 / steps) * steps
    return Series("csgld", f"C = {steps}", {"cycle_steps": steps}, settle=settle)


FRICTION = 0.1  # the classes' default
ADAPT = {"burn_in": FIRST_STEPS}
FLAT = {"rho": 0.0}


def sam(label: str, rho: float) -> Series:
    """Off the y axis beyond the first step sizes."""
    law, target = sam_law(rho), sam_target(rho)
    return Series("sam_sgld", label, {"rho": rho}, shares=SHARES[:5], target=target, derived=law)


def rank1(label: str, coordinate: int, derived: Any = None) -> Series:
    own = {**ADAPT, **FLAT}
    return Series("sam_sgld_rank1", label, own, (1.0, 0.0), coordinate=coordinate, derived=derived)


PANELS: dict[str, list[Series]] = {
    "sgld": [Series("sgld", "")],
    "psgld (x is h·G·k, G = 2)": [Series("psgld", "", ADAPT, (0.5,), metric=2.0)],
    "asgld (annealed)": [Series("asgld", "", ADAPT, (1.0,))],
    "sghmc, euler": [Series("sghmc", "", {"friction": FRICTION})],
    "sghmc, baoab": [Series("sghmc", "", {"friction": FRICTION, "integrator": "baoab"})],
    "sgnht": [
        Series("sgnht", "", draws_per_chain=100, settle=2000, limit=thermostat_limit(FRICTION))
    ],
    "csgld (end of a cycle)": [cycles(200), cycles(20)],
    "sam_sgld (over its potential)": [
        Series("sam_sgld", "ρ = 0", FLAT),
        sam("ρ = √(T/(Nk))", math.sqrt(TARGET)),
    ],
    "sam_sgld_rank1 (ρ = 0, σ_dir = .5)": [
        rank1("along u", 0),
        rank1("across u", 1, lambda _, h: 1 / (1 - h * K / 2)),
    ],
}


def step_sizes(series: Series) -> list[float]:
    return [share * series.stability() / (series.metric * K) for share in series.shares]


def measure(
    series: Series, h: float, chains: int, seed: int = 0, make: Callable[..., Sampler] | None = None
) -> tuple[float, float]:
    """Variance over `series.target` at step size h, and its standard error.

    Args:
        chains: draws in all; a chain whose coordinates are exchangeable gives d of them, and the
            error is that between chains.
        make: another rule with `Series.make`'s arguments (tests break one).
    """
    m = max(2, chains // series.draws_per_chain)
    theta = torch.zeros(m, series.d, dtype=torch.float64, requires_grad=True)
    sampler = (make or series.make)(theta, h, seed)
    _adapt(sampler, theta, series)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        theta.copy_(torch.randn(theta.shape, generator=generator, dtype=theta.dtype))
        theta.mul_(math.sqrt(series.target))

    def closure() -> Tensor:
        theta.grad = K * theta.detach()
        return 0.5 * K * theta.detach().square().sum(1)

    sampler.memory["step"] *= series.sampler != "csgld"  # cycles begin here
    for _ in range(series.settle):
        sampler.step(closure)
    draws = theta.detach()
    if series.coordinate is not None:
        draws = draws[:, series.coordinate : series.coordinate + 1]
    squares = draws.square().mean(1) / series.target
    return float(squares.mean()), float(squares.std() / math.sqrt(m))


def _adapt(sampler: Sampler, theta: Tensor, series: Series) -> None:
    """Let the rule adapt to a constant gradient, so that what it learns is known exactly."""
    if series.adapt is None:
        return
    slope = torch.tensor(series.adapt, dtype=theta.dtype)

    def closure() -> Tensor:
        theta.grad = slope.expand_as(theta).clone()
        return (theta.detach() * slope).sum(1)

    for _ in range(FIRST_STEPS):
        sampler.step(closure)


def points(series: Series, chains: int) -> list[tuple[float, float, float, float]]:
    """(h, measured, standard error, derived) over the step sizes."""
    rows, first = [], zlib.crc32(f"{series.sampler} {series.label} {series.own}".encode())
    for i, h in enumerate(step_sizes(series)):
        value, error = measure(series, h, chains, seed=first + 2 * i)
        rows.append((h, value, error, series.law(h)))
    return rows


def draw(path: Path, chains: int) -> dict[str, list[list[tuple[float, float, float, float]]]]:
    """Write the figure (its suffix says the format); the points of every panel's series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    look: Any = {"svg.hashsalt": "sampler_laws", "font.size": 9, "axes.titlesize": 9.5}
    results = {}
    with plt.rc_context(look):
        figure, axes = plt.subplots(3, 3, figsize=(10, 9), sharex=True, sharey=True)
        for axis, (title, group) in zip(axes.flat, PANELS.items(), strict=True):
            results[title] = [points(series, chains) for series in group]
            _panel(axis, title, group, results[title])
        for axis in axes[-1]:
            axis.set_xlabel("h·k")
        for axis in axes[:, 0]:
            axis.set_ylabel("variance / target")
        figure.suptitle(
            "Variance of each sampler on a quadratic over that of its target: derived (lines) and\n"
            f"measured ({chains:,} draws a point, bars of 2 standard errors); "
            "dotted: stability limit",
            fontsize=10.5,
        )
        figure.tight_layout(rect=(0, 0, 1, 0.985))
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, facecolor="white", dpi=90)
        plt.close(figure)
    return results


def _panel(axis: Any, title: str, group: list[Series], measured: list[list[Any]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.axhline(1.0, color="0.75", linewidth=0.8, zorder=0)
    worst = 0.0
    for series, rows, colour in zip(group, measured, ("#0b6fa4", "#c4501b"), strict=False):
        limit = series.stability()
        x = np.geomspace(0.02, 0.97 * limit, 60)
        line = [series.law(float(v) / (series.metric * K)) for v in x]
        axis.plot(x, line, color=colour, linewidth=1.3, label=series.label or None)
        axis.axvline(limit, color=colour, linewidth=1.0, linestyle=":")
        h, value, error, derived = (np.array(column) for column in zip(*rows, strict=True))
        style = {"fmt": "o", "color": colour, "markersize": 4, "elinewidth": 1.2}
        axis.errorbar(series.metric * K * h, value, 2 * error, **style)
        worst = max(worst, float(np.abs((value - derived) / error).max()))
    axis.set(xscale="log", yscale="log", xlim=(0.02, 5), ylim=(0.1, 25))
    axis.set_title(title)
    axis.text(0.03, 0.06, f"largest |z|: {worst:.1f}", transform=axis.transAxes, color="0.25")
    for ruler, ticks in ((axis.xaxis, (0.03, 0.1, 0.3, 1, 3)), (axis.yaxis, (0.1, 0.3, 1, 3, 10))):
        ruler.set_major_locator(FixedLocator(ticks))
        ruler.set_minor_locator(NullLocator())
        ruler.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    if any(series.label for series in group):
        axis.legend(loc="upper left", frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--chains", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".svg"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for title, group in draw(given.out, given.chains).items():
        for series, rows in zip(PANELS[title], group, strict=True):
            print(f"{title} {series.label}".strip())
            for h, value, error, derived in rows:
                z = (value - derived) / error
                print(
                    f"  hk {h * K:6.3f}: derived {derived:7.4f}, measured {value:7.4f}, z {z:5.2f}"
                )


if __name__ == "__main__":
    main()
