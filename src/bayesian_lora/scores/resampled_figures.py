"""A row's figures: of the examples as they are, and of many resamples of them at once.

Shape letters: K members, N examples, C classes, B replicates, G groups of equal scores.

`classification_figures` and `regression_figures` are the rows; `classification_statistic` and
`regression_statistic` prepare one for `bootstrap.replicate`. What each example adds to a sum (its
loss, its hit, its share in a calibration bin) is laid down once, sparsely; a block of replicates is
then one product with their counts (N, B). Figures that rest on the order of the examples (adaptive
ECE, AURC, Spearman) sort once and work on the cumulated counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesian_lora import metrics
from bayesian_lora.metrics import ECE_BINS, Figures
from bayesian_lora.scores import calibration, regression_scores, selective
from bayesian_lora.scores.array_checks import Array
from bayesian_lora.scores.bootstrap import Statistic

Columns = dict[str, Array]


def classification_figures(
    log_probs: ArrayLike, labels: ArrayLike, own: tuple[str, ...] = ()
) -> Figures:
    """`metrics.classification_metrics` and adaptive_ece, classwise_ece, brier_… and aurc.

    `log_probs` (N, C) normalised, in nats, `labels` (N,), `own` of `f1`, `mcc`. The score of aurc
    is the entropy of the prediction. Raises InputError as the functions it calls do.
    """
    figures = metrics.classification_metrics(log_probs, labels, own)
    logp, y = np.asarray(log_probs, dtype=np.float64), np.asarray(labels)
    p = np.exp(logp)
    return figures | {
        "adaptive_ece": calibration.ece(calibration.reliability(p, y, adaptive=True)),
        "classwise_ece": calibration.classwise_ece(p, y),
        **calibration.brier_decomposition(p, y),
        "aurc": selective.aurc(-(p * logp).sum(axis=1), logp.argmax(axis=1) != y),
    }


def regression_figures(
    means: ArrayLike,
    noise_std: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    own: tuple[str, ...] = metrics.REGRESSION_OWN,
) -> Figures:
    """`metrics.regression_metrics` and crps and coverage_… of the central intervals.

    `means` (K, N), `noise_std` (K,), `weights` (K,), `labels` (N,). Raises InputError as the
    functions it calls do.
    """
    figures = metrics.regression_metrics(means, noise_std, weights, labels, own)
    crps = regression_scores.crps(means, noise_std, weights, labels)
    coverage = regression_scores.interval_coverage(means, noise_std, weights, labels)
    return figures | {"crps": float(crps.mean()), **coverage}


def classification_statistic(
    log_probs: ArrayLike, labels: ArrayLike, own: tuple[str, ...] = ()
) -> Statistic:
    """`classification_figures` of the same arguments, of every resample; NaN where undefined."""
    metrics.classification_metrics(log_probs, labels, own)  # for its checks
    logp, y = np.asarray(log_probs, dtype=np.float64), np.asarray(labels)
    p, predicted = np.exp(logp), logp.argmax(axis=1)
    confidence, hit = p.max(axis=1), (predicted == y).astype(np.float64)
    outcome = (np.arange(p.shape[1]) == y[:, None]).astype(np.float64)
    means = {
        "accuracy": hit,
        "nll": -logp[np.arange(len(y)), y],
        "brier": ((p - outcome) ** 2).sum(axis=1),
    }
    bins = calibration.equal_width_bins(confidence, ECE_BINS)
    gaps = _binned(bins[:, None], (hit - confidence)[:, None], ECE_BINS)
    by_class = _ClassBins(p, outcome)
    adaptive, risk = _AdaptiveEce(confidence, hit), _Aurc(-(p * logp).sum(axis=1), 1 - hit)

    def statistic(counts: Array) -> Columns:
        figures = _means(means, counts)
        figures["ece"] = np.abs(gaps @ counts).sum(axis=0) / len(y)
        figures["adaptive_ece"] = adaptive(counts)
        figures |= by_class(counts, figures["brier"])
        figures["aurc"] = risk(counts)
        return figures | (_binary(predicted, y, own, counts) if own else {})

    return statistic


def regression_statistic(
    means: ArrayLike,
    noise_std: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    own: tuple[str, ...] = metrics.REGRESSION_OWN,
) -> Statistic:
    """`regression_figures` of the same arguments, of every resample; NaN where undefined."""
    metrics.regression_metrics(means, noise_std, weights, labels, own)  # for its checks
    m, y = np.asarray(means, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    w = np.asarray(weights, dtype=np.float64)
    mean = (w / w.sum()) @ m
    pit = regression_scores.pit(means, noise_std, weights, labels)
    columns = {
        "nll": -metrics.mixture_log_density(means, noise_std, weights, labels),
        "rmse": (mean - y) ** 2,
        "crps": regression_scores.crps(means, noise_std, weights, labels),
        **regression_scores.covered(pit),
    }
    ranks = [_Ranks(x) for x in (mean, y)] if "spearman" in own else []

    def statistic(counts: Array) -> Columns:
        figures = _means(columns, counts)
        figures["rmse"] = np.sqrt(figures["rmse"])
        if "pearson" in own:
            figures["pearson"] = _correlation(mean[:, None], y[:, None], counts)
        if "spearman" in own:
            figures["spearman"] = _correlation(ranks[0](counts), ranks[1](counts), counts)
        return figures

    return statistic


def risk_statistic(score: ArrayLike, wrong: ArrayLike, coverages: Sequence[float]) -> Statistic:
    """{"0": risk, …}: 1 − `selective.accuracy_at` of each coverage, of every resample."""
    selective.accuracy_at(score, wrong, coverages)  # for its checks
    curve = _Aurc(np.asarray(score, dtype=np.float64), np.asarray(wrong, dtype=np.float64))
    return lambda counts: {str(i): x for i, x in enumerate(curve.risks(counts, coverages))}


def bin_statistic(probs: ArrayLike, labels: ArrayLike) -> Statistic:
    """{"0": accuracy, …} in each bin of `calibration.reliability`, of every resample; NaN in an
    empty bin. `probs` (M, N, C) of M predictors whose answers share the bins, `labels` (N,).
    """
    p, y = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    index = calibration.equal_width_bins(p.max(axis=2).T, ECE_BINS)
    hits = (p.argmax(axis=2) == y).T.astype(np.float64)
    right, all_of = (_binned(index, values, ECE_BINS) for values in (hits, np.ones_like(hits)))
    return lambda counts: {str(b): x for b, x in enumerate(_ratio(right @ counts, all_of @ counts))}


def _means(columns: Columns, counts: Array) -> Columns:
    values = np.stack(list(columns.values())) @ counts / counts.sum(axis=0)
    return dict(zip(columns, values, strict=True))


def _binned(index: NDArray[np.int64], values: Array, bins: int) -> Any:
    """Sparse (bins, N): `values` (N, J) laid where `index` (N, J) says."""
    from scipy.sparse import csr_array

    columns = np.arange(len(index)).repeat(index.shape[1])
    return csr_array((values.ravel(), (index.ravel(), columns)), shape=(bins, len(index)))


class _ClassBins:
    """classwise_ece and Brier's parts from each class's equal-width bins."""

    def __init__(self, p: Array, outcome: Array) -> None:
        self.classes = p.shape[1]
        bins = self.classes * ECE_BINS
        index = calibration.equal_width_bins(p, ECE_BINS) + ECE_BINS * np.arange(self.classes)
        self.count = _binned(index, np.ones_like(p), bins)
        self.gap = _binned(index, p - outcome, bins)
        happened = outcome.argmax(axis=1)[:, None]
        self.outcome = _binned(
            np.take_along_axis(index, happened, axis=1), np.ones(happened.shape), bins
        )

    def __call__(self, counts: Array, brier: Array) -> Columns:
        n = counts.sum(axis=0)
        count, gap, happened = (x @ counts for x in (self.count, self.gap, self.outcome))
        used = np.maximum(count, 1.0)
        share = happened.reshape(self.classes, ECE_BINS, -1).sum(axis=1) / n
        reliability = (gap**2 / used).sum(axis=0) / n
        resolution = (happened**2 / used).sum(axis=0) / n - (share**2).sum(axis=0)
        uncertainty = (share * (1 - share)).sum(axis=0)
        return {
            "classwise_ece": np.abs(gap).sum(axis=0) / (n * self.classes),
            "brier_reliability": reliability,
            "brier_resolution": resolution,
            "brier_uncertainty": uncertainty,
            "brier_within_bin": brier - reliability + resolution - uncertainty,
        }


class _Ordered:
    """Examples in order of rising `score` (N,), equal scores in one group."""

    def __init__(self, score: Array) -> None:
        self.order = np.argsort(score, kind="stable")
        ordered = score[self.order]
        new = np.r_[True, ordered[1:] > ordered[:-1]]
        self.starts, self.group = np.flatnonzero(new), np.cumsum(new) - 1

    def grouped(self, values: Array) -> Array:
        """Sums (G, B) over each group of `values` (N, B), which are in this order."""
        alone = len(self.starts) == len(self.order)
        return values if alone else np.add.reduceat(values, self.starts, axis=0)


class _AdaptiveEce(_Ordered):
    """ECE over equal-mass bins, which every resample lays anew."""

    def __init__(self, confidence: Array, hit: Array) -> None:
        super().__init__(confidence)
        self.gap = (hit - confidence)[self.order][:, None]

    def __call__(self, counts: Array) -> Array:
        ordered = counts[self.order]
        drawn, gap = self.grouped(ordered), self.grouped(ordered * self.gap)
        n, replicates = ordered.sum(axis=0), counts.shape[1]
        before = drawn.cumsum(axis=0) - drawn
        # A group that was not drawn may lie behind the last bin; its gap is 0.
        index = np.minimum((before * ECE_BINS // n).astype(np.int64), ECE_BINS - 1)
        index += ECE_BINS * np.arange(replicates)
        sums = np.bincount(index.ravel(), weights=gap.ravel(), minlength=ECE_BINS * replicates)
        return np.abs(sums).reshape(replicates, ECE_BINS).sum(axis=1) / n


class _Aurc(_Ordered):
    """Area under the risk–coverage curve; copies of an example tie with one another.

    A group of t examples, e of them wrong, that follows n₀ kept ones, E₀ of them wrong, adds
    Σ_{m=n₀+1}^{n₀+t} (E₀ + (m − n₀) e/t)/m = e + (E₀ − n₀ e/t)(H_{n₀+t} − H_{n₀}), where H are the
    harmonic numbers.
    """

    def __init__(self, score: Array, wrong: Array) -> None:
        super().__init__(score)
        self.wrong = wrong[self.order][:, None]
        self.harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, len(score) + 1))]

    def __call__(self, counts: Array) -> Array:
        ordered = counts[self.order]
        drawn, wrong = self.grouped(ordered), self.grouped(ordered * self.wrong)
        kept, errors = drawn.cumsum(axis=0), wrong.cumsum(axis=0)
        n = kept[-1]
        rate = wrong / np.maximum(drawn, 1.0)
        level = self.harmonic[kept.astype(np.int64)]
        rise = np.diff(level, axis=0, prepend=0.0)
        excess = errors - wrong - rate * (kept - drawn)
        return (wrong + excess * rise).sum(axis=0) / n

    def risks(self, counts: Array, coverages: Sequence[float]) -> Array:
        """Risks (shares, B) of the fewest examples, surest first, that are at least each share."""
        ordered = counts[self.order]
        drawn, wrong = self.grouped(ordered), self.grouped(ordered * self.wrong)
        kept, errors = drawn.cumsum(axis=0), wrong.cumsum(axis=0)
        wanted = np.ceil(np.round(np.multiply.outer(coverages, kept[-1]), 9))
        # The group in which that number is reached counts with its mean.
        columns = [np.searchsorted(*pair) for pair in zip(kept.T, wanted.T, strict=True)]
        last = np.stack(columns, axis=1)
        n, e, t, w = (np.take_along_axis(x, last, 0) for x in (kept, errors, drawn, wrong))
        return (e - w / t * (n - wanted)) / wanted


class _Ranks(_Ordered):
    """Ranks (N, B) in every resample, less their mean (n + 1)/2; copies share their mean rank."""

    def __call__(self, counts: Array) -> Array:
        drawn = self.grouped(counts[self.order])
        kept = drawn.cumsum(axis=0)
        ranks = (2 * kept - drawn - kept[-1]) / 2
        found = np.empty_like(counts)
        found[self.order] = ranks[self.group]
        return found


def _binary(predicted: NDArray, y: NDArray, own: tuple[str, ...], counts: Array) -> Columns:
    """f1 and mcc (B,), NaN where undefined."""
    both, said, true = np.stack([predicted * y, predicted, y]).astype(np.float64) @ counts
    n = counts.sum(axis=0)
    spread = said * (n - said) * true * (n - true)
    figures = {
        "f1": _ratio(2 * both, said + true),
        "mcc": _ratio(n * both - said * true, np.sqrt(spread)),
    }
    return {name: figures[name] for name in own}


def _correlation(x: Array, y: Array, counts: Array) -> Array:
    """Pearson's r (B,) of (N, 1 or B) under `counts`; NaN where either is constant."""
    n = counts.sum(axis=0)
    x, y = x - x[:, :1].mean(), y - y[:, :1].mean()
    mean_x, mean_y, xx, yy, xy = ((counts * z).sum(axis=0) / n for z in (x, y, x * x, y * y, x * y))
    spread = []
    for square, mean in ((xx, mean_x), (yy, mean_y)):
        variance = square - mean**2
        spread.append(np.where(variance > 1e-13 * square, variance, 0.0))  # less is rounding
    return _ratio(xy - mean_x * mean_y, np.sqrt(spread[0] * spread[1]))


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)
