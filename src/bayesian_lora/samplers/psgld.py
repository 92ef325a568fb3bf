"""Preconditioned SGLD with a preconditioner frozen after burn-in (Li et al. 2016)."""

from typing import Any

from torch import Tensor

from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.flat import Scale, require


class PSGLD(Sampler):
    """V ← βV + (1−β)g²,  G = 1/(λ + √V),  θ ← θ − hGg + s√G z;  V is frozen after burn-in.

    With G constant the omitted term Γ = ∇·G is exactly 0. While V moves (burn-in) the law is too
    wide, and the textbook Γ does not mend it, because it ignores V's memory: no draw is kept then.
    V starts at 0 and is used as V/(1 − βᵗ), so that a short burn-in is not dominated by that 0.

    Stationary law: Σ = (T/N)(K − hKGK/2)⁻¹, scalar Var = T/(Nk) · 1/(1 − hGk/2); stable while
    h·λmax(GK) < 2. Curvatures `k` of the methods are those of √G K √G.
    Source: Li, Chen, Carlson & Carin (2016), Algorithm 1, on the mean-loss scale.

    Args:
        beta2: β in [0, 1), memory of the squared gradient.
        lambd: λ > 0, so that 1/λ bounds G. It should not be far below the gradients of the mean
            loss, or coordinates that the data leave free become the stiffest of all.
        burn_in: steps after which V is frozen, ≥ 1.
        others, errors: `bayesian_lora.samplers.base.Sampler`.
    """

    law = "Σ = (T/N)(K − hKGK/2)⁻¹, scalar Var = T/(Nk) · 1/(1 − hGk/2)"

    def __init__(
        self,
        params: Any,
        *,
        step_size: float,
        num_examples: int,
        beta2: float = 0.99,
        lambd: float = 1e-3,
        burn_in: int = 1000,
        **common: Any,
    ) -> None:
        require("beta2", beta2, "in [0, 1)", 0 <= beta2 < 1)
        rule = "finite and > 0 (it bounds the preconditioner)"
        require("lambd", lambd, rule, 0 < lambd < float("inf"))
        require("burn_in", burn_in, "≥ 1: V is estimated in it, then frozen", burn_in >= 1)
        self.beta2, self.lambd, self.burn_in = beta2, lambd, burn_in
        super().__init__(params, step_size=step_size, num_examples=num_examples, **common)

    def update(self, g: Tensor, h: Scale) -> None:
        if self.memory["step"] < self.burn_in and not self.memory.get("frozen"):
            self.adapt(g)
        G = self.metric(g)
        self.shift(G * g, -h)
        self.add_noise(self.noise_std(h) * G.sqrt() * self.normal(g))

    def freeze(self) -> None:
        """Keep V as it is from now on, even in burn-in."""
        self.memory["frozen"] = True

    def adapt(self, g: Tensor) -> None:
        """V ← βV + (1−β)g²."""
        V = self.buffer("V", g)
        V.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        self.memory["adapted"] = self.memory.get("adapted", 0) + 1

    def metric(self, like: Tensor) -> Tensor:
        """G = 1/(λ + √V), (M, d)."""
        weight = 1 - self.beta2 ** self.memory.get("adapted", 0)
        V = self.buffer("V", like) / (weight or 1.0)
        return 1 / (self.lambd + V.sqrt())

    def whitened(self, g: Tensor) -> Tensor:
        return self.metric(g).sqrt() * g

    def dual(self, w: Tensor) -> Tensor:
        return w / self.metric(w).sqrt()
