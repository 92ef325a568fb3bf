"""Stochastic gradient Langevin dynamics (Welling & Teh 2011)."""

import torch
from torch import Tensor

from bayesian_lora.samplers.base import Closure, Sampler, noise_std


class SGLD(Sampler):
    """θ ← θ − h g + s z,  g = ∇L_B + θ/(Nσ²),  s = √(2hT/N),  z ~ N(0, I).

    Stationary law on a quadratic of mean-loss curvature k, full batch:
    Var = T/(Nk) · 1/(1 − hk/2); stable while hk < 2. With i.i.d. minibatches of B and gradient
    variance c per example, T/N becomes T/N + h c/(2B). Units: see `Sampler`.
    Source: Welling & Teh (2011), eq. 4, with their ε = 2h/N.

    Arguments and errors: `bayesian_lora.samplers.base.Sampler`.
    """

    exactness = "exact as h → 0"

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """One step of every chain.

        Args:
            closure: zeroes gradients, computes the mean NLL per chain, (M,) or a scalar for one
                chain, calls ``.sum().backward()`` and returns it detached. Called once.

        Returns:
            The closure's value.
        """
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            self.stats = {}
            for group in self.param_groups:
                params, drift = self.drift(group)
                if params:
                    h = group["lr"]
                    torch._foreach_add_(params, drift, alpha=-h)  # type: ignore
                    self.add_noise(params, noise_std(h, group["temperature"], self.num_examples))
                    self.record(h, drift)
        return loss
