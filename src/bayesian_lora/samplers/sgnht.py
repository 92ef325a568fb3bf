"""Stochastic gradient Nosé–Hoover thermostat (Ding et al. 2014)."""

import math
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.failures import Diverged
from bayesian_lora.samplers.flat import Scale, require
from bayesian_lora.samplers.sghmc import relaxation_of

LARGEST_FRICTION = 1.9
"""ξ at which a step is refused: at 2 the velocity no longer contracts."""


class SGNHT(Sampler):
    """v ← (1−ξ)v − h g + √(2fhT/N) z,  θ ← θ + v,
    ξ ← ξ + γ[(‖v‖²/d)·((2−ξ)/2)/(hT/N) − 1],  one ξ per chain, ξ₀ = f.

    The thermostat raises ξ until the kinetic energy is that of T, so isotropic minibatch noise is
    absorbed: the mean of T_eff over coordinates is T. Along one direction with gradient variance
    v, T_eff = (fT + N h v/2)/ξ. The factor (2−ξ)/2 is the finite-step kinetic energy's; without it
    the law is several per cent narrow.
    Stationary law: Var = T/(Nk) at finite h on isotropic quadratics. Stable while
    hk < 2(√2 − √f)²: at friction ξ the kinetic temperature is T(f/ξ)/(1 − hk/(2(2−ξ))), which no ξ
    makes T beyond it (2.41 for f = .1; SGHMC's limit 2(2−f) is 3.8).
    Source: Ding et al. (2014), eq. 9, in SGHMC's variables.

    Args:
        friction: f in (0, 1], noise strength and first friction.
        thermostat_rate: γ > 0, how fast the friction follows.
        others, errors: `bayesian_lora.samplers.base.Sampler`; T = 0 has no thermostat.
    """

    law = "Var = T/(Nk) on isotropic quadratics at any stable h"

    def __init__(
        self,
        params: Any,
        *,
        step_size: float,
        num_examples: int,
        friction: float = 0.1,
        thermostat_rate: float = 0.01,
        **common: Any,
    ) -> None:
        require("friction", friction, "in (0, 1]", 0 < friction <= 1)
        rate = thermostat_rate
        require("thermostat_rate", rate, "finite and > 0", 0 < rate < math.inf)
        self.friction, self.rate = friction, thermostat_rate
        self.bias_gain, self.heat_gain = 0.5 / (2 - friction), 1 / friction
        super().__init__(params, step_size=step_size, num_examples=num_examples, **common)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        t = {**self.defaults, **param_group}["temperature"]
        require("temperature", t, "> 0: a thermostat holds a temperature (or use sghmc)", t > 0)
        super().add_param_group(param_group)

    @property
    def stability(self) -> float:
        return 2 * (math.sqrt(2) - math.sqrt(self.friction)) ** 2

    def variance_factor(self, h: float, k: float) -> float:
        return 1.0

    def relaxation_steps(self, h: float, k: float) -> float:
        return relaxation_of(1 - self.friction, h * k)

    def update(self, g: Tensor, h: Scale) -> None:
        v, f = self.buffer("v", g), self.friction
        xi = self.memory.setdefault("xi", g.new_full((self.num_chains, 1), f))
        lost = [m for m, x in enumerate(xi[:, 0].tolist()) if not x < LARGEST_FRICTION]  # also NaN
        if lost:
            raise Diverged(
                f"the thermostat's friction reached {float(xi.max()):.3g} (limit "
                f"{LARGEST_FRICTION}): gradients are too noisy for this step size",
                lost,
            )
        noise = f**0.5 * self.noise_std(h) * self.normal(g)
        v.mul_(1 - xi).sub_(h * g).add_(noise)
        self.shift(v)
        kinetic = (v.square() / (h * self.temperature / self.num_examples)).mean(1, keepdim=True)
        xi += self.rate * (kinetic * (2 - xi) / 2 - 1)
        self.stats["noise_norm"] = torch.linalg.vector_norm(noise, dim=1)
        self.stats["friction"] = xi[:, 0].clone()

    def effective_temperature(self, t: Scale, h: Scale, variance: Tensor) -> Tensor:
        heat = 0.5 * self.num_examples * h * variance
        return (self.friction * t + heat) / self.memory["xi"][:, 0]
