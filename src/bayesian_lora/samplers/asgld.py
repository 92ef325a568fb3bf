"""SGLD with an adaptive drift (Kim, Song & Liang 2020), annealed away before sampling."""

from typing import Any

from torch import Tensor

from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.flat import Scale, require


class ASGLD(Sampler):
    """θ ← θ − h(g + a_t m/√(V + λ)) + s z, with m and V moving averages of *previous* gradients:
    m ← β₁m + (1−β₁)g,  V ← β₂V + (1−β₂)g².

    By default a_t = a(1 − t/burn_in), so that from the end of burn-in on it is plain SGLD from an
    adapted start: exact as h → 0, Var = T/(Nk) · 1/(1 − hk/2), stable while hk < 2.
    ``anneal=False`` is the paper's rule, a constant: **biased**, as h → 0 (where m keeps up with
    g) too narrow, T_eff ≈ T/(1 + a/√V), and dependent on the loss's units.
    Source: Kim, Song & Liang (2020), Algorithm 1, on the mean-loss scale.

    Args:
        a: strength of the adaptive drift, ≥ 0; h·a is comparable to Adam's learning rate.
        beta1, beta2: in [0, 1), memories of m and V.
        lambd: λ > 0 under the root.
        burn_in: steps in which a falls to 0, ≥ 1 unless ``anneal=False``.
        anneal: whether it falls.
        others, errors: `bayesian_lora.samplers.base.Sampler`.
    """

    law = "Var = T/(Nk) · 1/(1 − hk/2)"

    def __init__(
        self,
        params: Any,
        *,
        step_size: float,
        num_examples: int,
        a: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.999,
        lambd: float = 1e-8,
        burn_in: int = 1000,
        anneal: bool = True,
        **common: Any,
    ) -> None:
        require("a", a, "finite and ≥ 0", 0 <= a < float("inf"))
        require("beta1", beta1, "in [0, 1)", 0 <= beta1 < 1)
        require("beta2", beta2, "in [0, 1)", 0 <= beta2 < 1)
        require("lambd", lambd, "> 0", lambd > 0)
        rule = "≥ 1: a is annealed to 0 in it (or anneal=False, the paper's biased rule)"
        require("burn_in", burn_in, rule, burn_in >= 1 or not anneal)
        self.a, self.beta1, self.beta2, self.lambd = a, beta1, beta2, lambd
        self.burn_in, self.anneal = burn_in, anneal
        if not anneal and a > 0:
            self.exactness = "biased"
            self.law = "too narrow as h → 0: T_eff ≈ T/(1 + a/√V), dependent on the loss's units"
        super().__init__(params, step_size=step_size, num_examples=num_examples, **common)

    def update(self, g: Tensor, h: Scale) -> None:
        a = self.strength()
        m, V = self.buffer("m", g), self.buffer("V", g)
        self.shift(g + a * m / (V + self.lambd).sqrt() if a > 0 else g, -h)
        self.add_noise(self.noise_std(h) * self.normal(g))
        if a > 0:
            m.mul_(self.beta1).add_(g, alpha=1 - self.beta1)
            V.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)

    def strength(self) -> float:
        """a_t of the coming step."""
        if not self.anneal:
            return self.a
        return self.a * max(0.0, 1 - self.memory["step"] / self.burn_in)
