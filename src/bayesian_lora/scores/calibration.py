"""Do the probabilities mean what they say? Reliability bins, calibration errors, Brier's parts.

Shape letters: N examples, C classes, B bins.

Equal-width bins are [lo, hi) over [0, 1], the last one closed, as in `metrics`. Equal-mass
("adaptive") bins hold about N/B examples each; equal confidences always share a bin, so no figure
here depends on the order of the examples.

A calibration error estimated from N examples is biased upwards: even a perfectly calibrated model
does not score 0. `expected_ece` says what it does score. Brier's reliability and resolution have
that bias too, both upwards and by about as much (Bröcker 2012).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesian_lora.errors import InputError
from bayesian_lora.metrics import ECE_BINS
from bayesian_lora.scores.array_checks import Array, checked_labels, checked_probs

Index = NDArray[np.int64]
BLOCK = 1_000_000  # random numbers held at a time, 8 MB


@dataclass(frozen=True)
class Bins:
    """A reliability diagram: edges (B+1,), and by bin count, mean confidence and accuracy (B,).

    Confidence and accuracy are NaN in an empty bin.
    """

    edges: Array
    count: Array
    confidence: Array
    accuracy: Array


def reliability(
    probs: ArrayLike, labels: ArrayLike, bins: int = ECE_BINS, adaptive: bool = False
) -> Bins:
    """The top label's probability against how often it is right, in bins.

    `probs` (N, C), `labels` (N,) integers. `adaptive` takes equal-mass bins (Nixon et al. 2019),
    whose edge is the least confidence in the bin to its right, and otherwise 0 and 1 at the ends.
    Raises InputError on bad probabilities or labels, or fewer than one bin.
    """
    confidence, correct = _top(probs, labels)
    _at_least_one(bins)
    if adaptive:
        index = equal_mass_bins(confidence, bins)
        inner = np.searchsorted(np.sort(index), np.arange(1, bins))
        edges = np.r_[0.0, np.append(np.sort(confidence), 1.0)[inner], 1.0]
    else:
        index, edges = equal_width_bins(confidence, bins), np.linspace(0, 1, bins + 1)
    count = np.bincount(index, minlength=bins).astype(np.float64)
    sums = [np.bincount(index, weights=x, minlength=bins) for x in (confidence, correct)]
    nothing = np.full(bins, np.nan)
    mean = [np.divide(x, count, out=nothing.copy(), where=count > 0) for x in sums]
    return Bins(edges, count, *mean)


def ece(bins: Bins) -> float:
    """Expected calibration error Σ_b n_b |accuracy_b − confidence_b| / N of a diagram.

    Of equal-width bins it is the `ece` of `metrics` (Naeini et al. 2015; Guo et al. 2017), of
    equal-mass bins the adaptive ECE (Nixon et al. 2019).
    """
    used = bins.count > 0
    gap = np.abs(bins.accuracy[used] - bins.confidence[used])
    return float(bins.count[used] @ gap / bins.count.sum())


def classwise_ece(probs: ArrayLike, labels: ArrayLike, bins: int = ECE_BINS) -> float:
    """Mean over classes of Σ_b n_b |share of class c in b − mean p_c in b| / N (Kull et al. 2019).

    `probs` (N, C), `labels` (N,); each class has equal-width bins of its own probability.
    Raises InputError as `reliability` does.
    """
    p, outcome = _forecasts(probs, labels)
    _at_least_one(bins)
    total = 0.0
    for f, o in zip(p.T, outcome.T, strict=True):
        gap = np.bincount(equal_width_bins(f, bins), weights=o - f, minlength=bins)
        total += float(np.abs(gap).sum())
    return total / p.size


def brier_decomposition(
    probs: ArrayLike, labels: ArrayLike, bins: int = ECE_BINS
) -> dict[str, float]:
    """Brier = reliability − resolution + uncertainty + within-bin, exactly.

    `probs` (N, C), `labels` (N,). Derivation: the Brier score of C classes is the sum over classes
    of (1/N) Σ_i (f_i − o_i)², with f the class's probability and o its 0/1 outcome. Let bin b of
    that class's equal-width bins hold n_b examples with means f̄_b and ō_b. Then in b
      f_i − o_i = (f̄_b − ō_b) + (f_i − f̄_b) − (o_i − ō_b),
    and squared and summed over b the products with the constant vanish:
      Σ (f_i − o_i)² = n_b (f̄_b − ō_b)² + Σ (f_i − f̄_b)² − 2 Σ (f_i − f̄_b)(o_i − ō_b)
                       + Σ (o_i − ō_b)².
    The last sum is n_b ō_b (1 − ō_b), and over the bins (1/N) Σ_b n_b ō_b (1 − ō_b) =
    ō (1 − ō) − (1/N) Σ_b n_b (ō_b − ō)². So, each summed over classes,
      brier_reliability = (1/N) Σ_b n_b (f̄_b − ō_b)²  (less is better calibrated),
      brier_resolution = (1/N) Σ_b n_b (ō_b − ō)²  (more is better),
      brier_uncertainty = ō (1 − ō)  (of the labels alone),
      brier_within_bin = (1/N) Σ_b [Σ (f_i − f̄_b)² − 2 Σ (f_i − f̄_b)(o_i − ō_b)],
    Murphy's (1973) three terms and the two of Stephenson, Coelho & Jolliffe (2008) that bins wider
    than one forecast value need; the last may be negative.
    Raises InputError as `reliability` does.
    """
    p, outcome = _forecasts(probs, labels)
    _at_least_one(bins)
    parts = np.zeros(4)
    for f, o in zip(p.T, outcome.T, strict=True):
        index = equal_width_bins(f, bins)
        count = np.maximum(np.bincount(index, minlength=bins), 1)
        f_mean = (np.bincount(index, weights=f, minlength=bins) / count)[index]
        o_mean = (np.bincount(index, weights=o, minlength=bins) / count)[index]
        inside = f - f_mean
        parts += (
            ((f_mean - o_mean) ** 2).mean(),
            ((o_mean - o.mean()) ** 2).mean(),
            o.mean() * (1 - o.mean()),
            (inside**2 - 2 * inside * (o - o_mean)).mean(),
        )
    names = ("reliability", "resolution", "uncertainty", "within_bin")
    return {f"brier_{name}": float(x) for name, x in zip(names, parts, strict=True)}


def expected_ece(
    probs: ArrayLike, rng: np.random.Generator, replicates: int = 500, bins: int = ECE_BINS
) -> dict[str, float]:
    """Mean and sd of the ECE that a perfectly calibrated model with these very `probs` scores.

    `probs` (N, C). In each replicate an example's top label is right with its own probability, and
    the ECE over equal-width bins is taken at this N; labels are not needed. A model's ECE within
    about two sd of the mean says nothing against its calibration (Vaicenavicius et al. 2019).
    Raises InputError on bad probabilities or fewer than two replicates.
    """
    confidence = np.sort(checked_probs(probs).max(axis=1))
    _at_least_one(bins)
    if replicates < 2:
        raise InputError(f"{replicates} replicates have no spread: give 2 or more")
    index = equal_width_bins(confidence, bins)
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    expected = np.add.reduceat(confidence, starts)
    found: list[Array] = []
    size = max(1, BLOCK // len(confidence))
    for first in range(0, replicates, size):
        shape = (min(size, replicates - first), len(confidence))
        right = (rng.random(shape) < confidence).astype(np.float64)
        gap = np.add.reduceat(right, starts, axis=1) - expected
        found.append(np.abs(gap).sum(axis=1) / len(confidence))
    values = np.concatenate(found)
    return {"mean": float(values.mean()), "sd": float(values.std(ddof=1))}


def equal_width_bins(p: Array, bins: int) -> Index:
    """The bin, 0..B−1, of each probability, as `numpy.histogram` over (0, 1) counts them."""
    edges = np.linspace(0, 1, bins + 1)
    return np.minimum(np.searchsorted(edges, p, side="right") - 1, bins - 1).astype(np.int64)


def equal_mass_bins(confidence: Array, bins: int) -> Index:
    """⌊B · share of examples with a smaller confidence⌋, 0..B−1, of each example."""
    before = np.searchsorted(np.sort(confidence), confidence, side="left")
    return (before * bins // len(confidence)).astype(np.int64)


def _top(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """The top label's probability (N,) and whether it is right, 0 or 1 (N,)."""
    p = checked_probs(probs)
    y = checked_labels(labels, *p.shape)
    return p.max(axis=1), (p.argmax(axis=1) == y).astype(np.float64)


def _forecasts(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Probabilities (N, C) and the label's 0/1 outcomes (N, C)."""
    p = checked_probs(probs)
    y = checked_labels(labels, *p.shape)
    return p, (np.arange(p.shape[1]) == y[:, None]).astype(np.float64)


def _at_least_one(bins: int) -> None:
    if bins < 1:
        raise InputError(f"{bins} bins: give 1 or more, {ECE_BINS} as a rule")
