"""Mean and variance of what comes, in one pass.

State dicts hold whole numbers and NumPy arrays; `load_state_dict` takes whatever NumPy can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayesian_lora.errors import InputError
from bayesian_lora.scores.array_checks import Array


class Welford:
    """Mean and variance of arrays of one shape, in one pass (Welford 1962; Chan et al. 1983)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = 0
        self.mean: Array = np.zeros(shape)
        self.squares: Array = np.zeros(shape)
        """Σ (x − mean)²."""

    def update(self, x: ArrayLike) -> None:
        """Take in one array. Raises InputError on another shape."""
        value = fitting(x, self.mean.shape)
        self.count += 1
        delta = value - self.mean
        self.mean = self.mean + delta / self.count
        self.squares = self.squares + delta * (value - self.mean)

    def merge(self, other: Welford) -> None:
        """Take in what another one has seen. Raises InputError on another shape."""
        fitting(other.mean, self.mean.shape)
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.squares = self.squares + other.squares + delta**2 * (self.count * other.count / total)
        self.count = total

    @property
    def variance(self) -> Array:
        """With ddof 1; NaN before the second array."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        return self.squares / (self.count - 1)

    def state_dict(self) -> dict[str, Any]:
        """Copies of the count, the mean and the sum of squares."""
        return {"count": self.count, "mean": self.mean.copy(), "squares": self.squares.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Raises InputError on another shape."""
        mean = fitting(state["mean"], self.mean.shape)
        self.squares = fitting(state["squares"], self.mean.shape).copy()
        self.mean, self.count = mean.copy(), int(state["count"])


def fitting(x: ArrayLike, shape: tuple[int, ...]) -> Array:
    """`x` in float64 if it has this shape, else InputError."""
    value = np.asarray(x, dtype=np.float64)
    if value.shape != shape:
        raise InputError(f"an array of shape {value.shape} does not fit the {shape} so far")
    return value
