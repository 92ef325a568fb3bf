"""How many samples are enough: the mixture of the first k members, for growing k.

Shapes: K members, N examples, C classes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from bayesian_lora import metrics
from bayesian_lora.metrics import Array
from bayesian_lora.predict import Predictions

Figures = dict[str, Any]

POINTS = 100
"""Of the curve at most; fewer members give one a member."""
ROUNDING = 1e-12
"""Nats: mixtures of equal members differ by no more."""
REGRESSION = "a regression has no classes"
ONE = "one sample alone has no curve: draw two or more"
ONE_EXAMPLE = "one example has no standard error: evaluate on more"


def cumulative(regression: bool, p: Predictions, chains: int = 1) -> Figures:
    """accuracy, NLL and ECE of the first k members in the order they are stored in, for k = 1, 2, …

    Members are stored draw by draw, so the first k are spread over the chains; evenly at whole
    draws, the multiples of `chains`, and only there it is judged what is enough. Members of weight
    0 are left out. Of more than `POINTS` members about so many k are looked at, all whole draws.

    Returns:
        ``k``; ``accuracy``, ``nll``, ``ece`` (lists beside it); ``difference`` and
        ``difference_se``: the mean over examples of the first k's NLL less the whole's, in nats,
        and its standard error; and ``enough``:

        - ``k``: the smallest whole draw's k from which on the NLL differs from the whole's by no
          more than one standard error of that difference over examples (paired, so the harder of
          the two). The bootstrap's standard error of a mean is σ/√N exactly (Efron & Tibshirani
          1993, section 5.2), so none is drawn. None with the reason if only the whole is.
        - ``k_within_nll_se``: the same with ``nll_se``, the standard error of the whole's NLL
          itself: from there on more samples change it less than another test set would.
    """
    kept = np.flatnonzero(p.weights > 0)
    ks = _points(len(kept), chains)
    rows, losses = [], []
    for k, (row, loss) in enumerate(_growing(regression, p, kept), 1):
        if k in ks:
            rows.append(row)
            losses.append(loss)
    names = ("accuracy", "nll", "ece")
    found: Figures = {"k": ks, **{name: [row[name] for row in rows] for name in names}}
    if regression:
        found |= dict.fromkeys(("accuracy", "ece"))
        found |= {f"{name}_reason": REGRESSION for name in ("accuracy", "ece")}
    gaps = [loss - losses[-1] for loss in losses]
    found["difference"] = [float(gap.mean()) for gap in gaps]
    found["difference_se"] = [_se(gap) for gap in gaps]
    judged = [i for i, k in enumerate(ks) if k % chains == 0 or k == ks[-1]]
    if len(judged) == 1:  # one draw a chain, or none of some
        judged = list(range(len(ks)))
    return {**found, "enough": _enough(ks, judged, found, _se(losses[-1]), len(p))}


def _points(members: int, chains: int) -> list[int]:
    if members <= POINTS:
        return list(range(1, members + 1))
    step = chains * -(-members // (chains * POINTS))
    return sorted({1, *range(step, members, step), members})


def _growing(regression: bool, p: Predictions, kept: np.ndarray) -> Iterator[tuple[Figures, Array]]:
    """(figures, NLL of each example (N,)) of the first member, the first two, …"""
    mixed: Array | None = None
    for k in range(1, len(kept) + 1):
        new, weight = kept[k - 1], p.weights[kept[:k]].sum()
        if regression:
            part = _log_density(p, new)
        else:
            part = metrics.ensemble_log_probs(p.logits[new : new + 1], np.ones(1))
        part = part + np.log(p.weights[new])
        mixed = part if mixed is None else np.logaddexp(mixed, part)
        log_mixture = mixed - np.log(weight)
        if regression:
            row: Figures = {"accuracy": None, "nll": float(-log_mixture.mean()), "ece": None}
            yield row, -log_mixture
        else:
            row = dict(metrics.classification_metrics(log_mixture, p.labels))
            yield row, -log_mixture[np.arange(len(p)), p.labels]


def _log_density(p: Predictions, k: int) -> Array:
    """log N(y; m_k, s_k²) of each example, (N,)."""
    assert p.noise_std is not None
    given = (p.logits[k : k + 1, :, 0], p.noise_std[k : k + 1], np.ones(1))
    return metrics.mixture_log_density(*given, p.labels)


def _se(values: Array) -> float:
    """Of the mean over examples."""
    return float(values.std() / np.sqrt(len(values)))


def _enough(
    ks: list[int], judged: list[int], found: Figures, nll_se: float, examples: int
) -> Figures:
    if len(ks) == 1 or examples == 1:
        why = ONE if len(ks) == 1 else ONE_EXAMPLE
        return {**dict.fromkeys(("k", "k_within_nll_se", "nll_se")), "reason": why}
    gaps = [abs(found["difference"][i]) for i in judged]
    errors = [found["difference_se"][i] for i in judged]
    at = [ks[i] for i in judged]
    paired = _settled(at, gaps, errors)
    alone = _settled(at, gaps, [nll_se] * len(at))
    before = f"at {at[-2]} of {at[-1]} samples NLL still differs by {gaps[-2]:.2g}"
    reason = (
        f"{before}, more than its standard error of {errors[-2]:.2g}: draw more"
        if paired is None
        else f"from {paired} of {at[-1]} samples on NLL stays within one standard error of its "
        "difference from the whole's"
    )
    enough = {"k": paired, "reason": reason, "k_within_nll_se": alone, "nll_se": nll_se}
    if alone is None:
        enough["k_within_nll_se_reason"] = f"{before}, more than NLL's own standard error"
    return enough


def _settled(ks: list[int], gaps: list[float], errors: list[float]) -> int | None:
    """The smallest k from which every gap is within its error; None if the whole's alone is."""
    first = len(ks) - 1
    while first > 0 and gaps[first - 1] <= errors[first - 1] + ROUNDING:
        first -= 1
    return ks[first] if first < len(ks) - 1 else None
