"""Cyclical SGLD (Zhang et al. 2020)."""

import math
from typing import Any

from torch import Tensor

from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.flat import Scale, require
from bayesian_lora.samplers.schedules import CYCLE_STEPS, EXPLORE_FRACTION, Cycle


class CSGLD(Sampler):
    """θ ← θ − h_t g + [sampling] s(h_t) z,  h_t = (h₀/2)(cos(π·mod(t, C)/C) + 1).

    In the first share of each cycle of C steps (exploration) there is no noise; in the rest the
    chain samples, and draws are kept. h₀ is the group key ``lr``; t counts the steps made.
    Law at curvature k: v ← (1 − h_t k)² v + [sampling] 2h_tT/N. "Exact" only if
    k_min·Σh_t over a sampling share ≫ 1; stable while h₀k < 2.
    Source: Zhang et al. (2020), eq. 1 and Algorithm 1, on the mean-loss scale.

    Args:
        cycle_steps: C ≥ 2.
        explore_fraction: share of a cycle without noise, in [0, 1).
        others, errors: `bayesian_lora.samplers.base.Sampler`.
    """

    exactness = "exact if cycles are long enough"
    law = "v ← (1 − h_t k)² v + [sampling] 2h_tT/N"

    def __init__(
        self,
        params: Any,
        *,
        step_size: float,
        num_examples: int,
        cycle_steps: int = CYCLE_STEPS,
        explore_fraction: float = EXPLORE_FRACTION,
        **common: Any,
    ) -> None:
        require("cycle_steps", cycle_steps, "≥ 2", cycle_steps >= 2)
        rule = "in [0, 1), and leave sampling steps in a cycle"
        require("explore_fraction", explore_fraction, rule, 0 <= explore_fraction < 1)
        self.cycle = Cycle(cycle_steps, explore_fraction)
        require("explore_fraction", explore_fraction, rule, self.cycle.sampling_steps > 0)
        sampling = [t for t in range(cycle_steps) if self.cycle.sampling(t)]
        # T_eff at the mean step size of the sampling share, where draws are kept
        self.heat_gain = sum(self.cycle.factor(t) for t in sampling) / len(sampling)
        super().__init__(params, step_size=step_size, num_examples=num_examples, **common)

    def update(self, g: Tensor, h: Scale) -> None:
        t = self.memory["step"]
        h_t = self.cycle.factor(t) * h
        self.stats["step_size"] *= self.cycle.factor(t)
        self.shift(g, -h_t)
        std = self.noise_std(h_t) if self.cycle.sampling(t) else 0.0
        self.add_noise(std * self.normal(g))

    def variance_factor(self, h: float, k: float) -> float:
        """At the end of a cycle, once cycles repeat."""
        factor = 1.0
        for _ in range(math.ceil(20 / (h * k * self.cycle.steps)) + 1):
            for t in range(self.cycle.steps):
                h_t = h * self.cycle.factor(t)
                factor = (1 - h_t * k) ** 2 * factor + 2 * h_t * k * self.cycle.sampling(t)
        return factor

    def relaxation_steps(self, h: float, k: float) -> float:
        return 2.0 / (h * k)  # the mean step size is h₀/2
