"""Stochastic gradient Langevin dynamics (Welling & Teh 2011)."""

from torch import Tensor

from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.flat import Scale


class SGLD(Sampler):
    """θ ← θ − h g + s z,  g = ∇L_B + θ/(Nσ²),  s = √(2hT/N),  z ~ N(0, I).

    Stationary law on a quadratic of mean-loss curvature k, full batch:
    Var = T/(Nk) · 1/(1 − hk/2); stable while hk < 2. With i.i.d. minibatches of B and gradient
    variance c per example, T/N becomes T/N + h c/(2B). Units: see `Sampler`.
    Source: Welling & Teh (2011), eq. 4, with their ε = 2h/N.

    Arguments and errors: `bayesian_lora.samplers.base.Sampler`.
    """

    law = "Var = T/(Nk) · 1/(1 − hk/2)"

    def update(self, g: Tensor, h: Scale) -> None:
        self.shift(g, -h)
        self.add_noise(self.noise_std(h) * self.normal(g))
