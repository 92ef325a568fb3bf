"""Minibatch noise along one direction, from the gradients that a run's steps use anyway.

Shapes: M chains, d parameters of one chain. A *watch* is a plain dict, so that it is saved with
the rest of a sampler's memory.
"""

from typing import Any

import torch
from torch import Tensor

from bayesian_lora.samplers.flat import Scale


def begin_watch(direction: Tensor, curvature: Tensor | float) -> dict[str, Any]:
    """Of unit vectors (M, d) and the curvature (M,) of U/N along them."""
    # Sums of many small terms; MPS has no float64.
    dtype = torch.float32 if direction.device.type == "mps" else torch.float64
    zeros = torch.zeros(len(direction), device=direction.device, dtype=dtype)
    state = {"moved": zeros, "gap": zeros, "sum": zeros, "last": None, "steps": 0}
    return {"direction": direction.clone(), "curvature": zeros + curvature, **state}


def follow(watch: dict[str, Any], now: Tensor) -> Tensor | None:
    """Another projection (M,) of the gradient; its variance so far, None for the first.

    Batches are independent, so half the mean square of successive differences is the variance,
    once the curvature times the chain's motion between them is taken off: on a quadratic exactly.
    """
    last, gap = watch["last"], watch["gap"]
    now = now.to(watch["sum"].dtype)
    watch["last"], watch["gap"] = now, watch["moved"]
    if last is None:
        return None
    noise = now - last - watch["curvature"] * gap
    watch["sum"] = watch["sum"] + 0.5 * noise.square()
    watch["steps"] += 1
    return watch["sum"] / watch["steps"]


def along(scale: Scale, w: Tensor) -> Scale:
    """A scale's mean along unit vectors w (M, d)."""
    return (w.square() * scale).sum(1) if isinstance(scale, Tensor) else scale
