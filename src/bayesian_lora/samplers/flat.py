"""Flat tensors (M, d): all parameters of a chain in one row. And small things that samplers share.

Shapes: M chains, d parameters of one chain.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Scale = float | Tensor
"""One value, or (d,) values where the parameter groups differ."""


def precise(x: Tensor) -> Tensor:
    """x in float32 at least: in bfloat16 a moving average of memory .999 would stand still."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chain_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ aᵢbᵢ of every chain, (M, 1), for flat tensors."""
    return (a * b).sum(1, keepdim=True)


def unit(x: Tensor) -> Tensor:
    """x/‖x‖ of every chain; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def require(name: str, value: float, rule: str, holds: bool) -> None:
    """Raises ValueError naming value and rule unless it holds."""
    if not holds:
        raise ValueError(f"{name}={value}: must be {rule}")


def mean(scale: Scale) -> float:
    """Over coordinates."""
    return float(scale.mean()) if isinstance(scale, Tensor) else scale


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in nested dicts."""
    if isinstance(value, dict):
        return {name: to_device(v, device) for name, v in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def keep_rows(value: Any, kept: Sequence[int]) -> Any:
    """These chains' rows of the tensors (M, …) in nested dicts."""
    if isinstance(value, dict):
        return {name: keep_rows(v, kept) for name, v in value.items()}
    return value[list(kept)] if isinstance(value, Tensor) else value


def move(params: Sequence[Tensor], x: Tensor, scale: Scale) -> None:
    """θ ← θ + scale·x for a flat x (M, d) in the order of the parameters (M, …)."""
    if isinstance(scale, Tensor):
        x, scale = x * scale, 1.0
    sizes = [p.numel() // len(x) for p in params]
    pieces = [
        piece.reshape(p.shape).to(p.dtype)
        for piece, p in zip(x.split(sizes, dim=1), params, strict=True)
    ]
    torch._foreach_add_(params, pieces, alpha=scale)  # type: ignore


def count_chains(groups: list[dict[str, Any]], chain_dim: int | None, generators: Any) -> int:
    """M of the parameters in groups; 1 without a chain dimension.

    Raises:
        ValueError: they disagree, or have no dimension at all, or have not a generator each.
    """
    sizes = {
        1 if chain_dim is None else (p.shape[0] if p.ndim else -1)
        for group in groups
        for p in group["params"]
    }
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError(f"parameters disagree on the number of chains: {sorted(sizes)}")
    chains = sizes.pop()
    if isinstance(generators, Sequence) and len(generators) != chains:
        raise ValueError(f"{len(generators)} generators for {chains} chains: one for each")
    return chains


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for a step size, prior or temperature out of range."""
    h, sigma, t = group["lr"], group["prior_std"], group["temperature"]
    require("step_size", h, "finite and > 0", h > 0 and math.isfinite(h))
    require("prior_std", sigma, "> 0 (math.inf: flat prior)", sigma > 0)
    require("temperature", t, "finite and ≥ 0", t >= 0 and math.isfinite(t))
