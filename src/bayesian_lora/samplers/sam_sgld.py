"""SGLD on sharpness-aware gradients (Foret et al. 2021 within Langevin dynamics)."""

from typing import Any

import torch
from torch import Tensor

from bayesian_lora.samplers.base import Closure, Sampler
from bayesian_lora.samplers.flat import Scale, require


class SAMSGLD(Sampler):
    """e = ρ∇L_B(θ)/(‖∇L_B(θ)‖ + λ),  g_ρ = ∇L_B(θ + e) + θ/(Nσ²),  θ ← θ − h g_ρ + s z.

    The norm is global over a chain's parameters, the prior stays at θ, both gradients are of the
    same batch (the closure is called twice). A control variate corrects the second gradient only,
    so that the target stays what it is.
    It targets a *different* posterior: with full batches the potential N(L + ρ‖∇L‖) + prior
    (exact on quadratics, else to first order in ρ), with minibatches N·E_B[L_B + ρ‖∇L_B‖] + prior.
    Compare ρ with √(dT/(Nk)). Law about that potential, for ρ small against √(T/(Nk)):
    Var = T/(Nk) · 1/(1 − hk/2); stable while hk < 2.
    Source: Foret et al. (2021), eq. 2; m-sharpness: ibid., section 4.1.

    Args:
        rho: radius ρ ≥ 0 of the perturbation, in units of θ.
        lambd: λ > 0 in the denominator.
        full_batch: whether every batch is the whole training set; it only names the target.
        others, errors: `bayesian_lora.samplers.base.Sampler`.
    """

    exactness = "m-sharpness posterior"
    law = "potential N·E_B[L_B + ρ‖∇L_B‖] + prior; Var = T/(Nk) · 1/(1 − hk/2) about it"

    def __init__(
        self,
        params: Any,
        *,
        step_size: float,
        num_examples: int,
        rho: float = 0.05,
        lambd: float = 1e-12,
        full_batch: bool = False,
        **common: Any,
    ) -> None:
        require("rho", rho, "finite and ≥ 0", 0 <= rho < float("inf"))
        require("lambd", lambd, "> 0", lambd > 0)
        self.rho, self.lambd = rho, lambd
        if full_batch:
            self.exactness = "flat posterior"
            self.law = self.law.replace("N·E_B[L_B + ρ‖∇L_B‖]", "N(L + ρ‖∇L‖)")
        self._perturbation = torch.zeros(0)
        super().__init__(params, step_size=step_size, num_examples=num_examples, **common)

    def gradient(self, closure: Closure) -> Tensor:
        loss = super().gradient(getattr(closure, "plain", closure))
        with torch.no_grad():
            g = self.drift(prior=False)
            e = self.rho * g / (torch.linalg.vector_norm(g, dim=1, keepdim=True) + self.lambd)
            params = self.present
            here = [p.clone() for p in params]
            self.shift(e)
        try:
            super().gradient(closure)
        finally:
            with torch.no_grad():
                for p, value in zip(params, here, strict=True):
                    p.copy_(value)
        self._perturbation = torch.linalg.vector_norm(e, dim=1)
        return loss

    def update(self, g: Tensor, h: Scale) -> None:
        self.stats["perturbation_norm"] = self._perturbation
        self.shift(g, -h)
        self.add_noise(self.noise_std(h) * self.normal(g))
