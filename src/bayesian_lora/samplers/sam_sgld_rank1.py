"""SAM-SGLD with rank-1 directional noise, in three ways to choose its direction."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesian_lora.samplers.flat import Scale, chain_dot, require, unit
from bayesian_lora.samplers.sam_sgld import SAMSGLD

UMode = Literal["frozen", "cross_chain", "current"]


class SAMSGLDRank1(SAMSGLD):
    """θ ← θ − hP g_ρ + s(I + σ_dir u uᵀ)z,  P = I + c u uᵀ,  c = (1 + σ_dir)² − 1,  ‖u‖ = 1.

    u decides whether the law is right:
        ``frozen``       normalised moving average of the drift over burn-in (in which u = 0),
                         fixed while sampling
        ``cross_chain``  the previous chain's drift of this step, chains in a ring: P_m does not
                         depend on θ_m, so no correction arises; needs two chains
        ``current``      this chain's own drift, and P left out of the drift: the seed's rule,
                         **not invariant**
    Stationary law about SAM's potential (curvature K): Σ = (T/N)(K − hKPK/2)⁻¹, along u, if it is
    an eigenvector, T/(Nk) · 1/(1 − h(1+c)k/2); stable while h(1+c)k < 2.
    Source: the seed's directional noise, with the drift its noise needs.

    Args:
        sigma_dir: σ_dir > −1; negative values narrow the noise along u.
        u_mode: ``frozen``, ``cross_chain`` or ``current``.
        beta1: in [0, 1), memory of the moving average (``frozen``).
        burn_in: its steps, ≥ 1 for ``frozen``.
        others, errors: `SAMSGLD`.
    """

    law = (
        "potential as sam_sgld; Σ = (T/N)(K − hKPK/2)⁻¹, along an eigenvector u "
        "T/(Nk) · 1/(1 − h(1+c)k/2)"
    )

    def __init__(
        self,
        params: Any,
        *,
        step_size: float,
        num_examples: int,
        sigma_dir: float = 0.5,
        u_mode: UMode = "frozen",
        beta1: float = 0.9,
        burn_in: int = 1000,
        **common: Any,
    ) -> None:
        rule = "> −1, so that the noise keeps full rank"
        require("sigma_dir", sigma_dir, rule, -1 < sigma_dir < float("inf"))
        require("beta1", beta1, "in [0, 1)", 0 <= beta1 < 1)
        if u_mode not in get_args(UMode):
            raise ValueError(f"u_mode={u_mode!r}: choose frozen, cross_chain or current")
        rule = "≥ 1: u is averaged in it, then fixed (or choose another u_mode)"
        require("burn_in", burn_in, rule, burn_in >= 1 or u_mode != "frozen")
        self.sigma_dir, self.u_mode = sigma_dir, u_mode
        self._u: Tensor | None = None
        self.beta1, self.burn_in = beta1, burn_in
        self.c = (1 + sigma_dir) ** 2 - 1
        self.bias_gain = 0.5 * max(1.0, 1.0 + self.c)
        if u_mode != "current":
            self.planned_heat_gain = max(1.0, 1.0 + self.c)  # u is stiff: √P acts on its noise
        super().__init__(params, step_size=step_size, num_examples=num_examples, **common)
        if u_mode == "cross_chain" and self.num_chains < 2:
            raise ValueError("u_mode=cross_chain takes u from another chain: needs two chains")
        if u_mode == "current":
            self.exactness = "not invariant"
            self.law = "none: u depends on θ, and P is missing from the drift"

    def update(self, g: Tensor, h: Scale) -> None:
        u = self.direction(g)
        self._u = None if self.u_mode == "current" else u
        self.stats["perturbation_norm"] = self._perturbation
        P_g = g if self.u_mode == "current" else g + self.c * u * chain_dot(u, g)
        self.shift(P_g, -h)
        z = self.normal(g)
        self.add_noise(self.noise_std(h) * (z + self.sigma_dir * u * chain_dot(u, z)))

    def direction(self, g: Tensor) -> Tensor:
        """u (M, d) of this step; zeros while it is being averaged."""
        if self.u_mode == "current":
            return unit(g)
        if self.u_mode == "cross_chain":
            return unit(g.roll(1, dims=0))
        m = self.buffer("m", g)
        if self.memory["step"] >= self.burn_in:
            return unit(m)
        m.mul_(self.beta1).add_(g, alpha=1 - self.beta1)
        return torch.zeros_like(g)

    def keep_chains(self, kept: Sequence[int]) -> None:
        if self.u_mode == "cross_chain" and len(kept) < 2:
            raise ValueError("u_mode=cross_chain takes u from another chain: needs two chains")
        super().keep_chains(kept)
        self._u = None if self._u is None else self._u[list(kept)]

    def whitened(self, g: Tensor) -> Tensor:
        """√P g = (I + σ_dir u uᵀ)g with this step's u; g where P is not in the drift."""
        u = self._u
        return g if u is None else g + self.sigma_dir * u * chain_dot(u, g)

    def dual(self, w: Tensor) -> Tensor:
        """P^(−½) w."""
        u, share = self._u, self.sigma_dir / (1 + self.sigma_dir)
        return w if u is None else w - share * u * chain_dot(u, w)
