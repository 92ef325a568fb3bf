"""Stochastic gradient Hamiltonian Monte Carlo (Chen et al. 2014), two integrators."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.flat import Scale, require

Integrator = Literal["euler", "baoab"]


class SGHMC(Sampler):
    """``euler``:  v ← (1−f)v − h g + √(2fhT/N) z,  θ ← θ + v.

    Stationary law on a quadratic, full batch: Var = T/(Nk) · 1/(1 − hk/(2(2−f))); stable while
    hk < 2(2−f). Minibatch variance v makes T_eff = T + N h v/(2f).

    ``baoab``:  v ← v − h g,  θ ← θ + v/2,  v ← (1−f)v + √(f(2−f)hT/N) z,  θ ← θ + v/2.

    The two half kicks of Leimkuhler & Matthews' BAOAB around a step's end use the same gradient
    and are joined. Var = T/(Nk) exactly on quadratics for any stable h (hk < 4);
    T_eff = T + N h v(2−f)/(4f). Both: one gradient a step.
    Source: Chen, Fox & Guestrin (2014), eq. 15; Leimkuhler & Matthews (2013), eq. 9.

    Args:
        friction: f in (0, 1]; f = 1 forgets the velocity (``euler`` is then SGLD).
        integrator: ``euler`` or ``baoab``.
        others, errors: `bayesian_lora.samplers.base.Sampler`.
    """

    law = "Var = T/(Nk) · 1/(1 − hk/(2(2−f)))"

    def __init__(
        self,
        params: Any,
        *,
        step_size: float,
        num_examples: int,
        friction: float = 0.1,
        integrator: Integrator = "euler",
        **common: Any,
    ) -> None:
        require("friction", friction, "in (0, 1]", 0 < friction <= 1)
        if integrator not in get_args(Integrator):
            raise ValueError(f"integrator={integrator!r}: choose euler or baoab")
        self.friction, self.integrator = friction, integrator
        f = friction
        self.bias_gain, self.heat_gain = 0.5 / (2 - f), 1 / f
        if integrator == "baoab":
            self.heat_gain = (2 - f) / (2 * f)  # α stays euler's: off quadratics it has a bias
            self.law = "Var = T/(Nk) on quadratics at any stable h"
        super().__init__(params, step_size=step_size, num_examples=num_examples, **common)

    @property
    def stability(self) -> float:
        return 4.0 if self.integrator == "baoab" else 2 * (2 - self.friction)

    def variance_factor(self, h: float, k: float) -> float:
        return 1.0 if self.integrator == "baoab" else super().variance_factor(h, k)

    def relaxation_steps(self, h: float, k: float) -> float:
        # baoab: λ² − (1 + c − (1+c)hk/2)λ + c = 0, so hk counts (1+c)/2 = (2−f)/2 times
        gain = (2 - self.friction) / 2 if self.integrator == "baoab" else 1.0
        return relaxation_of(1 - self.friction, gain * h * k)

    def update(self, g: Tensor, h: Scale) -> None:
        v, f = self.buffer("v", g), self.friction
        if self.integrator == "euler":
            noise = f**0.5 * self.noise_std(h) * self.normal(g)
            v.mul_(1 - f).sub_(h * g).add_(noise)
            self.shift(v)
        else:
            noise = (f * (2 - f) / 2) ** 0.5 * self.noise_std(h) * self.normal(g)
            self.shift(v.sub_(h * g), 0.5)
            self.shift(v.mul_(1 - f).add_(noise), 0.5)
        self.stats["noise_norm"] = torch.linalg.vector_norm(noise, dim=1)


def relaxation_of(retention: float, hk: float) -> float:
    """Steps to 1/e of v ← cv − hkθ, θ ← θ + v: −1/ln of its largest eigenvalue's modulus.

    λ² − (1 + c − hk)λ + c = 0, c the retention.
    """
    half = (1 + retention - hk) / 2
    square = half**2 - retention
    largest = math.sqrt(retention) if square <= 0 else abs(half) + math.sqrt(square)
    return math.inf if largest >= 1 else (-1 / math.log(largest) if largest > 0 else 1.0)
