"""Figures of merit of one model or of a weighted ensemble.

Shape letters: K members, N examples in a set, C classes.

Arrays go in, are computed on in float64, and Python floats come out. A figure that is undefined for
the data at hand is `None`, and the key `<figure>_reason` beside it says why.

Nothing here rests on torchmetrics 1.9, which serves the tests as a second opinion: it rounds to
float32 (so a confidence that rounds to 1 falls into a 16th calibration bin), sums ranks in int32
(Spearman overflows on large ties), and gives the MCC of constant predictions a number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesian_lora.errors import InputError
from bayesian_lora.scores.array_checks import (
    Array,
    checked_gaussians,
    checked_labels,
    checked_targets,
    checked_weights,
    finite,
    shaped,
)

Figures = dict[str, float | str | None]

ECE_BINS = 15
TEMPERATURE_BOUNDS = (0.05, 20.0)
CLASSIFICATION_OWN = ("f1", "mcc")
REGRESSION_OWN = ("pearson", "spearman")


def softmax(logits: ArrayLike) -> Array:
    """Probabilities (…, C) of `logits` (…, C). Raises InputError on a non-finite logit."""
    return np.exp(_log_softmax(finite("logits", logits)))


def ensemble_log_probs(logits: ArrayLike, weights: ArrayLike) -> Array:
    """log Σ_k w_k softmax(logits_k), shape (N, C), for `logits` (K, N, C) and `weights` (K,).

    The mean is of probabilities, never of logits; log-sum-exp keeps the smallest from underflow.
    Weights are normalised to sum to 1. Raises InputError on wrong shapes or values.
    """
    x = shaped("logits", logits, 3, "(K, N, C)")
    return _log_mean(_log_softmax(x), checked_weights(weights, len(x)))


def ensemble_probs(logits: ArrayLike, weights: ArrayLike) -> Array:
    """Weighted mean over members of the probabilities, (N, C): exp of `ensemble_log_probs`."""
    return np.exp(ensemble_log_probs(logits, weights))


def classification_metrics(
    log_probs: ArrayLike, labels: ArrayLike, own: tuple[str, ...] = ()
) -> Figures:
    """accuracy, nll, ece, brier and the task's `own` figures.

    `log_probs` (N, C) are normalised log-probabilities in nats, `labels` (N,) integers in 0..C−1,
    `own` names of `f1` and `mcc`, which need two classes and take class 1 for the positive one.
    - nll: mean over examples of −log p(label).
    - ece: Σ_bins |Σ_{i in bin} (correct_i − confidence_i)| / N over 15 equal-width bins [lo, hi) of
      the top label's probability, the last one closed (Naeini et al. 2015; Guo et al. 2017).
    - brier: mean over examples of Σ_c (p_c − 1[c = label])², so from 0 to 2 (Brier 1950).

    Raises InputError on non-finite or unnormalised input, no examples, or a label out of range.
    """
    logp = shaped("log_probs", log_probs, 2, "(N, C)")
    y = checked_labels(labels, *logp.shape)
    excess = float(np.abs(np.logaddexp.reduce(logp, axis=1)).max())
    if excess > 1e-5:
        raise InputError(
            f"log_probs: a row's probabilities sum to exp(±{excess:.3g}), not 1; "
            "pass ensemble_log_probs(logits, weights), not logits"
        )
    _known(own, CLASSIFICATION_OWN)
    if own and logp.shape[1] != 2:
        raise InputError(
            f"{', '.join(own)} of {logp.shape[1]} classes: needs 2; leave it out of the metrics"
        )
    p, predicted = np.exp(logp), logp.argmax(axis=1)
    correct = (predicted == y).astype(np.float64)
    error = p - (np.arange(p.shape[1]) == y[:, None])
    figures: Figures = {
        "accuracy": float(correct.mean()),
        "nll": float(-logp[np.arange(len(y)), y].mean()),
        "ece": _ece(p.max(axis=1), correct),
        "brier": float((error**2).sum(axis=1).mean()),
    }
    parts = {"f1": _f1, "mcc": _correlation}
    for name in own:
        _put(figures, name, parts[name](predicted, y))
    return figures


def regression_metrics(
    means: ArrayLike,
    noise_std: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    own: tuple[str, ...] = REGRESSION_OWN,
) -> Figures:
    """nll, rmse and the `own` correlations (`pearson`, `spearman`) of an ensemble of Gaussians.

    `means` (K, N) and `labels` (N,) are in the label's unit, as is `noise_std` (K,), each member's
    own; `weights` (K,). nll is that of the mixture, −mean_i log Σ_k w_k N(y_i; m_ki, s_k²), nats;
    the others judge the weighted mean prediction. accuracy, ece and brier are None.
    Raises InputError on wrong shapes, non-finite values, no examples or a noise_std not above 0.
    """
    m, s, w = checked_gaussians(means, noise_std, weights)
    y = checked_targets(labels, m)
    _known(own, REGRESSION_OWN)
    figures: Figures = {}
    for name in ("accuracy", "ece", "brier"):
        _put(figures, name, (None, "a regression has no classes"))
    mean = w @ m
    figures["nll"] = float(-_log_density(m, s, w, y).mean())
    figures["rmse"] = float(np.sqrt(((mean - y) ** 2).mean()))
    parts = {"pearson": _correlation, "spearman": _rank_correlation}
    for name in own:
        _put(figures, name, parts[name](mean, y))
    return figures


def mixture_log_density(
    means: ArrayLike, noise_std: ArrayLike, weights: ArrayLike, labels: ArrayLike
) -> Array:
    """log Σ_k w_k N(y_i; m_ki, s_k²) in nats, (N,). Arguments and errors: `regression_metrics`."""
    m, s, w = checked_gaussians(means, noise_std, weights)
    return _log_density(m, s, w, checked_targets(labels, m))


def temperature_scale(logits: ArrayLike, labels: ArrayLike) -> float:
    """The T in [.05, 20] that minimises the NLL of softmax(logits / T) on held-out data.

    `logits` (N, C), `labels` (N,) integers. Guo et al. (2017). The NLL is convex in 1/T, so the
    search over log T finds its one minimum; a T at a bound means that these data do not settle it
    (all right: T falls to .05; no better than chance: it rises to 20).
    """
    from scipy.optimize import minimize_scalar

    x = shaped("logits", logits, 2, "(N, C)")
    y = checked_labels(labels, *x.shape)

    def nll(log_t: float) -> float:
        return float(-_log_softmax(x / np.exp(log_t))[np.arange(len(y)), y].mean())

    low, high = np.log(TEMPERATURE_BOUNDS)
    fit = minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(fit.x))


def uncertainty_per_example(logits: ArrayLike, weights: ArrayLike) -> dict[str, Array]:
    """Entropies in nats, each (N,), of `logits` (K, N, C) under `weights` (K,).

    predictive_entropy H[Σ_k w_k p_k] = expected_entropy Σ_k w_k H[p_k] + mutual_information, the
    last being what the members disagree on (Depeweg et al. 2018; 0 for a single member).
    """
    x = shaped("logits", logits, 3, "(K, N, C)")
    w = checked_weights(weights, len(x))
    logp = _log_softmax(x)
    predictive = _entropy(_log_mean(logp, w))
    expected = w @ _entropy(logp)
    # Never negative by Jensen's inequality; rounding could make it so.
    mutual = np.maximum(predictive - expected, 0.0)
    return {
        "predictive_entropy": predictive,
        "expected_entropy": expected,
        "mutual_information": mutual,
    }


def uncertainty(logits: ArrayLike, weights: ArrayLike) -> Figures:
    """Means over examples of `uncertainty_per_example`; one member has no mutual information."""
    figures: Figures = {
        name: float(value.mean())
        for name, value in uncertainty_per_example(logits, weights).items()
    }
    if np.count_nonzero(np.asarray(weights)) == 1:
        reason = "one member alone cannot disagree with itself: use two or more"
        _put(figures, "mutual_information", (None, reason))
    return figures


def _log_softmax(x: Array) -> Array:
    # logaddexp keeps what log(1 + tiny) would round away.
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.logaddexp.reduce(shifted, axis=-1, keepdims=True)


def _log_mean(log_values: Array, weights: Array) -> Array:
    """log Σ_k w_k exp(log_values_k) over the first axis."""
    # A member of weight 0 has log-weight −∞ and drops out of the sum.
    with np.errstate(divide="ignore"):
        log_w = np.log(weights).reshape(-1, *[1] * (log_values.ndim - 1))
    return np.logaddexp.reduce(log_values + log_w, axis=0)


def _log_density(m: Array, s: Array, w: Array, y: Array) -> Array:
    density = -0.5 * ((y - m) / s[:, None]) ** 2 - np.log(s * np.sqrt(2 * np.pi))[:, None]
    return _log_mean(density, w)


def _entropy(log_p: Array) -> Array:
    return -(np.exp(log_p) * log_p).sum(axis=-1)


def _ece(confidence: Array, correct: Array) -> float:
    # Rounding may lift a confidence above 1, and histogram drops what lies outside its range.
    confidence = np.minimum(confidence, 1.0)
    gap, _ = np.histogram(confidence, ECE_BINS, range=(0.0, 1.0), weights=correct - confidence)
    return float(np.abs(gap).sum() / len(confidence))


Part = tuple[float | None, str | None]


def _f1(predicted: NDArray, y: NDArray) -> Part:
    # F1 = 2TP / (2TP + FP + FN): the denominator counts the ones on either side.
    ones = int(predicted.sum() + y.sum())
    if ones == 0:
        return None, "class 1 is neither among the labels nor predicted"
    return float(2 * (predicted * y).sum() / ones), None


def _correlation(predicted: NDArray, y: NDArray) -> Part:
    """Pearson's r; of two 0/1 vectors it is the Matthews correlation coefficient."""
    unit = []
    for name, values in (("predictions", predicted), ("labels", y)):
        x = np.asarray(values, dtype=np.float64)
        spread = np.ptp(x)
        if spread <= 4 * np.finfo(np.float64).eps * np.abs(x).max():
            return None, f"the {name} are constant ({x[0]:g}), so a correlation is undefined"
        centred = (x - x.mean()) / spread
        unit.append(centred / np.linalg.norm(centred))
    return float(np.clip(unit[0] @ unit[1], -1.0, 1.0)), None


def _rank_correlation(predicted: NDArray, y: NDArray) -> Part:
    """Spearman's ρ: Pearson's r of the ranks, ties sharing their mean rank."""
    from scipy.stats import rankdata

    return _correlation(rankdata(predicted), rankdata(y))


def _put(figures: Figures, name: str, part: Part) -> None:
    figures[name], reason = part
    if reason is not None:
        figures[f"{name}_reason"] = reason


def _known(own: tuple[str, ...], known: tuple[str, ...]) -> None:
    if unknown := [name for name in own if name not in known]:
        raise InputError(f"metric {unknown[0]!r} is not one of {', '.join(known)}: choose of these")
