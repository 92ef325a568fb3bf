"""Reliability and risk–coverage of MAP and ensemble, as `metrics.json` holds them.

Shapes: K members, M chains, N examples, C classes, B bins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bayesian_lora.assessment.evaluation import alone
from bayesian_lora.metrics import ECE_BINS, Array, uncertainty_per_example
from bayesian_lora.predict import Predictions
from bayesian_lora.scores import calibration, selective
from bayesian_lora.scores.bootstrap import replicate, standard_errors
from bayesian_lora.scores.calibration import Bins
from bayesian_lora.scores.resampled_figures import bin_statistic, risk_statistic

Figures = dict[str, Any]

POINTS = 100
"""Of a risk–coverage curve at most; fewer examples give one each."""
COVERAGES = (0.5, 0.8, 0.9, 0.95)
ACCURACY = ("accuracy_at", "map_accuracy_at")
SCORE = "predictive_entropy"
SEED = 0
"""Of resamples and of a calibrated model's labels: the same predictions, the same figures."""
REGRESSION = "a regression has no classes"


def calibration_figures(regression: bool, starts: Predictions, p: Predictions) -> Figures:
    """Reliability diagrams, and the ECE that a calibrated model would score at this N.

    Args:
        starts: of the warm starts (M, N, C); each answers alone and all their answers share the
            diagram ``map``.
        p: of the ensemble (K, N, C).

    Returns:
        ``bins``; ``expected_ece`` {mean, sd} of a model with the ensemble's probabilities whose
        labels are drawn from them; ``reliability`` {map, ensemble}: ``edges`` (B+1,), ``count``,
        ``confidence``, ``accuracy`` (B,) of the top label, null where a bin is empty, and
        ``accuracy_se`` (B,), its standard error over examples by bootstrap, null too where the
        answers in a bin are all right or all wrong.
    """
    if regression:
        names = ("bins", "expected_ece", "reliability")
        return {**dict.fromkeys(names), "reason": REGRESSION}
    each = [one.probs for one in alone(starts)]
    pooled = calibration.reliability(np.concatenate(each), np.tile(p.labels, len(each)))
    expected = calibration.expected_ece(p.probs, np.random.default_rng(SEED))
    own = calibration.reliability(p.probs, p.labels)
    probs = {"map": np.stack(each), "ensemble": p.probs[None]}
    drawn = replicate(
        {name: bin_statistic(x, p.labels) for name, x in probs.items()},
        len(p),
        np.random.default_rng(SEED),
    )
    return {
        "bins": ECE_BINS,
        "expected_ece": expected,
        "reliability": {
            name: {**_diagram(bins), "accuracy_se": _errors(drawn.values[name], len(p))}
            for name, bins in (("map", pooled), ("ensemble", own))
        },
    }


def selective_figures(regression: bool, starts: Predictions, p: Predictions) -> Figures:
    """Risk where only the surest share of the examples is answered (`selective`).

    Args and shapes as in `calibration_figures`.

    Returns:
        ``score``: what is doubted by; ``coverage``: at most `POINTS` shares; ``risk`` {map,
        ensemble}: the share of wrong answers at each, of MAP the mean over the warm starts;
        ``accuracy_at``: of the ensemble, and ``map_accuracy_at``, at `COVERAGES`; with ``_se``
        behind it the standard error over examples of each, by bootstrap, null where all resamples
        agree.
    """
    if regression:
        names = ("score", "coverage", *(x for n in ("risk", *ACCURACY) for x in (n, f"{n}_se")))
        return {**dict.fromkeys(names), "reason": REGRESSION}
    each, own = [doubt(one) for one in alone(starts)], doubt(p)
    n = len(p)
    points = min(n, POINTS)
    kept = -(-np.arange(1, points + 1) * n // points)
    curves = [selective.risk_coverage(*one)[1][kept - 1] for one in each]
    shares = (kept / n).tolist()
    return {
        "score": SCORE,
        "coverage": shares,
        "risk": {
            "map": np.mean(curves, axis=0).tolist(),
            "ensemble": selective.risk_coverage(*own)[1][kept - 1].tolist(),
        },
        "accuracy_at": selective.accuracy_at(*own, COVERAGES),
        "map_accuracy_at": _means([selective.accuracy_at(*one, COVERAGES) for one in each]),
        **_resampled(own, each, n, shares),
    }


Doubt = tuple[Array, np.ndarray]


def _resampled(own: Doubt, each: Sequence[Doubt], n: int, shares: Sequence[float]) -> Figures:
    """Standard errors of the accuracies and of the curves' risks, of the ensemble and of the mean
    over the warm starts.
    """
    wanted = (*COVERAGES, *shares)
    rows = {str(i): risk_statistic(*one, wanted) for i, one in enumerate((own, *each))}
    drawn = replicate(rows, n, np.random.default_rng(SEED))
    first, *others = rows
    found: Figures = {"risk_se": {}}
    for name, curve, chosen in zip(ACCURACY, ("ensemble", "map"), ([first], others), strict=True):
        risks = drawn.mean(chosen)
        # 1 − risk varies as much as the risk.
        at = {f"{x:g}": risks[str(i)] for i, x in enumerate(COVERAGES)}
        found[f"{name}_se"] = standard_errors(at, n)
        found["risk_se"][curve] = _errors(risks, n)[len(COVERAGES) :]
    return found


def _errors(values: Mapping[str, Array], n: int) -> list[Any]:
    """The standard errors alone, without their reasons."""
    found = standard_errors(values, n)
    return [found[name] for name in values]


def doubt(p: Predictions) -> Doubt:
    """The mixture's predictive entropy (N,) in nats, and whether its answer is wrong (N,)."""
    entropy = uncertainty_per_example(p.logits, p.weights)["predictive_entropy"]
    return entropy, p.probs.argmax(axis=1) != p.labels


def _diagram(bins: Bins) -> Figures:
    return {
        "edges": bins.edges.tolist(),
        "count": bins.count.astype(int).tolist(),
        "confidence": _known(bins.confidence),
        "accuracy": _known(bins.accuracy),
    }


def _known(values: Array) -> list[float | None]:
    return [float(x) if np.isfinite(x) else None for x in values]


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
