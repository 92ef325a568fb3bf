"""Scores of a mixture of Gaussians as a prediction of a number.

Shape letters: K members, N examples, Q probabilities.

Means and labels are in the label's unit, as is each member's noise_std; weights are scaled to 1.
All functions raise InputError on wrong shapes, non-finite values or a noise_std not above 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from bayesian_lora.errors import InputError
from bayesian_lora.scores.array_checks import Array, checked_gaussians, checked_targets

LEVELS = (0.5, 0.9, 0.95)
HALVINGS = 60  # of a bracket a few deviations wide: beyond float64's 53 bits


def crps(means: ArrayLike, noise_std: ArrayLike, weights: ArrayLike, labels: ArrayLike) -> Array:
    """Continuous ranked probability score (N,), ∫ (F(z) − 1[z ≥ y])² dz, in the label's unit.

    `means` (K, N), `noise_std` (K,), `weights` (K,), `labels` (N,). For a mixture of Gaussians
      Σ_k w_k A(y − m_k, s_k²) − ½ Σ_k Σ_l w_k w_l A(m_k − m_l, s_k² + s_l²),
      A(m, v) = 2 √v φ(m/√v) + m (2 Φ(m/√v) − 1)
    (Grimit, Gneiting, Berrocal & Johnson 2006, equation 5). Less is better; of one certain value
    it is the absolute error.
    """
    m, s, w = checked_gaussians(means, noise_std, weights)
    y = checked_targets(labels, m)
    score = w @ _mean_distance(y - m, s[:, None])
    for k in range(len(m)):
        # Pairs are alike both ways round: each is taken once and counts twice, times a half.
        other = slice(k + 1, None)
        apart = _mean_distance(m[k] - m[other], np.hypot(s[k], s[other])[:, None])
        alone = w[k] * s[k] / np.sqrt(np.pi)  # A(0, 2 s²) = 2 s / √π, halved
        score = score - w[k] * (w[other] @ apart + alone)
    return np.maximum(score, 0.0)


def pit(means: ArrayLike, noise_std: ArrayLike, weights: ArrayLike, labels: ArrayLike) -> Array:
    """The mixture's distribution function at the label, (N,): uniform if it is well specified.

    Probability integral transform (Dawid 1984). Shapes as in `crps`.
    """
    m, s, w = checked_gaussians(means, noise_std, weights)
    return _cdf(m, s, w, checked_targets(labels, m))


def interval_coverage(
    means: ArrayLike,
    noise_std: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    levels: Sequence[float] = LEVELS,
) -> dict[str, float]:
    """{"coverage_0.9": share of labels in the mixture's central 90 % interval, …}.

    The label is in the central interval of level q if its `pit` is in [(1 − q)/2, (1 + q)/2].
    Shapes as in `crps`. Raises InputError also on a level outside (0, 1).
    """
    u = pit(means, noise_std, weights, labels)
    return {name: float(x.mean()) for name, x in covered(u, levels).items()}


def covered(pit_values: Array, levels: Sequence[float] = LEVELS) -> dict[str, Array]:
    """{"coverage_0.9": 1 where the label is in the central interval, else 0, (N,), …}."""
    for level in levels:
        _inside_unit("level", level)
    away = np.abs(pit_values - 0.5)
    return {f"coverage_{level:g}": (away <= level / 2).astype(np.float64) for level in levels}


def mixture_quantiles(
    means: ArrayLike, noise_std: ArrayLike, weights: ArrayLike, probabilities: Sequence[float]
) -> Array:
    """Quantiles (Q, N) of the mixture at `probabilities` (Q,) in (0, 1), by bisection.

    (0.05, 0.95) gives the ends of the central 90 % interval. Shapes as in `crps`. Raises InputError
    also on a probability outside (0, 1).
    """
    from scipy.special import ndtri

    m, s, w = checked_gaussians(means, noise_std, weights)
    rows: list[Array] = []
    for probability in probabilities:
        _inside_unit("probability", probability)
        # The mixture's quantile lies between the least and the greatest of its members'.
        ends = m + s[:, None] * ndtri(probability)
        low, high = ends.min(axis=0), ends.max(axis=0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = _cdf(m, s, w, middle) < probability
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        rows.append((low + high) / 2)
    return np.stack(rows) if rows else np.zeros((0, m.shape[1]))


def _cdf(m: Array, s: Array, w: Array, at: Array) -> Array:
    from scipy.special import ndtr

    return w @ ndtr((at - m) / s[:, None])


def _mean_distance(m: Array, s: Array) -> Array:
    """A(m, s²) = E|X| of X ~ N(m, s²)."""
    from scipy.special import erf

    z = m / s
    return s * np.sqrt(2 / np.pi) * np.exp(-0.5 * z**2) + m * erf(z / np.sqrt(2))


def _inside_unit(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name} {value:g} is outside (0, 1): give a share such as 0.9")
