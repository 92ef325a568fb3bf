"""Memory of the online estimators over a long run: 1,000,000 steps of SGLD on a toy.

    python benchmarks/online_memory.py
    python benchmarks/online_memory.py --steps 100000 --chains 8

Chains of 8 independent coordinates of curvature .1 to 1, full batch; every step is a row of the
traces, which goes to `online.Welford` and `milestones.Milestones`. On a quadratic SGLD is an AR(1)
process with φ = 1 − hk, so what the estimators say can be held against the truth: variance
T/(Nk)/(1 − hk/2) and ESS/n = (1 − φ)/(1 + φ). Memory is read after 10,000 steps and at the end.
Shapes: M chains, Q quantities (the coordinates).
"""

import argparse
import os
import pickle
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.errors import InputError
from bayesian_lora.monitoring.milestones import Milestones
from bayesian_lora.monitoring.online import Welford
from bayesian_lora.samplers.sgld import SGLD
from bayesian_lora.utils.rng import chain_generators

QUANTITIES, H, NUM_EXAMPLES = 8, 0.2, 50
SETTLED = 10_000
"""Steps after which every buffer has been filled once."""
ALLOWED_MB = 1.0
"""Growth of the process that is noise of the allocator."""


@dataclass(frozen=True)
class Reading:
    """The process and what the estimators hold, after so many steps."""

    step: int
    resident_mb: float
    peak_mb: float
    state_bytes: int

    def line(self) -> str:
        return (
            f"| {self.step:,} | {self.resident_mb:.1f} | {self.peak_mb:.1f} | "
            f"{self.state_bytes:,} |"
        )


@dataclass(frozen=True)
class Outcome:
    """Readings early and at the end; the milestones; measured and derived figures by coordinate."""

    readings: list[Reading]
    milestones: list[dict[str, Any]]
    variance: np.ndarray
    derived_variance: np.ndarray
    seconds: float

    @property
    def growth_mb(self) -> float:
        return self.readings[-1].resident_mb - self.readings[0].resident_mb

    @property
    def state_growth(self) -> int:
        return self.readings[-1].state_bytes - self.readings[0].state_bytes


def curvatures() -> np.ndarray:
    """k of every coordinate, (Q,)."""
    return np.geomspace(0.1, 1.0, QUANTITIES)


def run(steps: int, chains: int, settled: int = SETTLED) -> Outcome:
    """So many steps, with a reading at `settled` and at the end.

    Raises:
        InputError: too few steps or chains for two readings.
    """
    if not 0 < settled < steps or chains < 1:
        raise InputError(
            f"--steps {steps}, --chains {chains}: memory is compared after {settled:,} steps and "
            f"at the end, so give more than {settled:,} steps, and one chain or more"
        )
    began = time.perf_counter()
    k = torch.from_numpy(curvatures())
    theta = torch.nn.Parameter(torch.zeros(chains, QUANTITIES, dtype=torch.float64))
    sampler = SGLD(
        [theta],
        step_size=H,
        num_examples=NUM_EXAMPLES,
        chain_dim=0,
        generators=chain_generators(0, range(chains), "toy"),
    )
    moments, milestones = Welford((chains, QUANTITIES)), Milestones(chains)
    readings = []
    closure = quadratic(theta, k)
    for step in range(1, steps + 1):
        sampler.step(closure)
        values = theta.detach().numpy()
        moments.update(values)
        milestones.record({f"theta[{q}]": values[:, q].copy() for q in range(QUANTITIES)})
        milestones.stepped(step)
        milestones.take()  # as a run does, which writes them to its log
        if step in (settled, steps):
            readings.append(_read(step, moments, milestones))
    pooled = moments.variance.mean(0) + moments.mean.var(0)
    derived = 1.0 / (NUM_EXAMPLES * curvatures()) / (1.0 - H * curvatures() / 2)
    spent = time.perf_counter() - began
    return Outcome(readings, milestones.facts(), pooled, derived, spent)


def quadratic(theta: Tensor, k: Tensor) -> Callable[[], Tensor]:
    """L = Σ k θ²/2 of every chain, (M,); its gradient by hand, which a million steps feel."""

    def closure() -> Tensor:
        with torch.no_grad():
            theta.grad = k * theta
            return 0.5 * (theta.grad * theta).sum(1)

    return closure


def derived_ess_share() -> np.ndarray:
    """ESS/n of every coordinate's mean, (Q,): (1 − φ)/(1 + φ) with φ = 1 − hk."""
    phi = 1.0 - H * curvatures()
    return (1.0 - phi) / (1.0 + phi)


def _read(step: int, moments: Welford, milestones: Milestones) -> Reading:
    held = pickle.dumps([moments.state_dict(), milestones.state_dict()])
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGESIZE") / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return Reading(step, resident, peak, len(held))


def lines(found: Outcome, chains: int) -> list[str]:
    """Markdown: memory, milestones against the truth, and whether anything grew."""
    out = [
        "| steps | resident, MB | peak, MB | the estimators' state, bytes |",
        "|---|---|---|---|",
    ]
    out += [reading.line() for reading in found.readings]
    out += ["", "| steps | least ESS | per chain-step | derived | quantity |"]
    out.append("|---|---|---|---|---|")
    least = float(derived_ess_share().min())
    for row in found.milestones:
        ess, per_step = (_shown(row[name]) for name in ("ess_min", "ess_per_step"))
        out.append(f"| {row['step']:,} | {ess} | {per_step} | {least:.4g} | {row['quantity']} |")
    ratio = found.variance / found.derived_variance
    out += ["", f"variance, measured over derived: {ratio.min():.4f} to {ratio.max():.4f}"]
    word = "no growth" if found.growth_mb <= ALLOWED_MB else "GROWTH"
    out.append(
        f"{word}: {found.growth_mb:+.2f} MB of the process, {found.state_growth:+,} bytes held, "
        f"whose buffers are half full to full; {chains} chains, {found.seconds:.0f} s"
    )
    return out


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if memory has grown, or after wrong input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--chains", type=int, default=4)
    args = parser.parse_args(arguments)
    try:
        found = run(args.steps, args.chains)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines(found, args.chains)))
    return 0 if found.growth_mb <= ALLOWED_MB else 1


if __name__ == "__main__":
    sys.exit(main())
