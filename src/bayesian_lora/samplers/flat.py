"""Flat tensors (M, d): all parameters of a chain in one row. And small things that samplers share.

Shapes: M chains, d parameters of one chain.
"""

import math
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


def along(scale: Scale, w: Tensor) -> Scale:
    """A scale's mean along unit vectors w (M, d)."""
    return (w.square() * scale).sum(1) if isinstance(scale, Tensor) else scale


def follow(watch: dict[str, Any], now: Tensor) -> Tensor | None:
    """Another projection (M,) of the gradient; its variance so far, None for the first.

    Batches are independent, so half the mean square of successive differences is the variance v.
    The chain moves between them, and by the last batch's noise: along curvature k the estimate is
    v(1 + hk) and (hk)²/2 of T too high, to second order; small where h is fit for sampling.
    """
    if watch["last"] is None:
        watch["last"], watch["sum"] = now, torch.zeros_like(now)
        return None
    watch["sum"] = watch["sum"] + 0.5 * (now - watch["last"]).square()
    watch["steps"] += 1
    watch["last"] = now
    return watch["sum"] / watch["steps"]


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for a step size, prior or temperature out of range."""
    h, sigma, t = group["lr"], group["prior_std"], group["temperature"]
    require("step_size", h, "finite and > 0", h > 0 and math.isfinite(h))
    require("prior_std", sigma, "> 0 (math.inf: flat prior)", sigma > 0)
    require("temperature", t, "finite and ≥ 0", t >= 0 and math.isfinite(t))
