"""Arrays that come from outside: finite, of the right shape, or one clear error.

Shape letters: K members, N examples in a set, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesian_lora.errors import InputError

Array = NDArray[np.float64]


def finite(name: str, values: ArrayLike) -> Array:
    """`values` in float64. Raises InputError that counts and locates what is not finite."""
    x = np.asarray(values, dtype=np.float64)
    if not (ok := np.isfinite(x)).all():
        first = tuple(int(i) for i in np.argwhere(~ok)[0])
        raise InputError(
            f"{name}: {int((~ok).sum())} of {x.size} values are not finite, the first at {first}; "
            "leave out the diverged members or lower the step size"
        )
    return x


def shaped(name: str, values: ArrayLike, ndim: int, letters: str) -> Array:
    """`finite` values of `ndim` dimensions, none of them 0; `letters` name them in the error."""
    x = finite(name, values)
    if x.ndim != ndim or x.size == 0:
        raise InputError(f"{name} has shape {x.shape}: give {letters}, none of them 0")
    return x


def checked_weights(weights: ArrayLike, members: int) -> Array:
    """Weights (K,), none negative and not all 0, scaled to sum to 1."""
    w = finite("weights", weights)
    if w.shape != (members,) or (w < 0).any() or w.sum() <= 0:
        raise InputError(
            f"weights of shape {w.shape}, sum {w.sum():g}: give {members} of them, one a member, "
            "none negative and not all 0"
        )
    return w / w.sum()


def checked_labels(labels: ArrayLike, examples: int, classes: int) -> NDArray[np.int64]:
    """Labels (N,), integers in 0..C−1."""
    y = np.asarray(labels)
    if y.shape != (examples,) or not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"labels {y.dtype}{y.shape}: give {examples} integers, one an example")
    if (wrong := (y < 0) | (y >= classes)).any():
        first = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"labels: {int(wrong.sum())} of {examples} are outside 0..{classes - 1}, the first "
            f"({int(y[first])}) at {first}; use a labelled split, or a model with enough classes"
        )
    return y.astype(np.int64)


def checked_probs(probs: ArrayLike) -> Array:
    """Probabilities (N, C) of two classes or more: rows of numbers in [0, 1] that sum to 1."""
    p = shaped("probs", probs, 2, "(N, C)")
    if p.shape[1] < 2:
        raise InputError("probs of 1 class: nothing can be uncertain; give 2 classes or more")
    excess = float(np.abs(p.sum(axis=1) - 1).max())
    if p.min() < 0 or excess > 2e-5:
        raise InputError(
            f"probs: the least is {p.min():.3g} and a row's sum is off 1 by {excess:.3g}; pass "
            "softmax(logits) or ensemble_probs(logits, weights)"
        )
    return np.minimum(p, 1.0)


def checked_gaussians(
    means: ArrayLike, noise_std: ArrayLike, weights: ArrayLike
) -> tuple[Array, Array, Array]:
    """`means` (K, N), `noise_std` (K,) above 0 and `weights` (K,) scaled to sum to 1."""
    m = shaped("means", means, 2, "(K, N)")
    w = checked_weights(weights, len(m))
    s = shaped("noise_std", noise_std, 1, "(K,)")
    if s.shape != w.shape:
        raise InputError(f"noise_std {s.shape} does not fit means {m.shape}: give one a member")
    if s.min() <= 0:
        raise InputError(f"noise_std {s.min():g} is not above 0: give the likelihood's deviation")
    return m, s, w


def checked_targets(labels: ArrayLike, means: Array) -> Array:
    """A regression's labels (N,) that fit `means` (K, N)."""
    y = shaped("labels", labels, 1, "(N,)")
    if y.shape != means.shape[1:]:
        raise InputError(
            f"labels {y.shape} do not fit means {means.shape}: give one label an example"
        )
    return y
