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
ERRORS = 2.0
"""Standard errors of a paired difference that count as none: by chance one in twenty is beyond."""
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

        - ``judged``: j, the last whole draw's k of at most half of the whole's K.
        - ``k``: the smallest whole draw's k from which on, up to j, the NLL differs from the
          whole's by no more than `ERRORS` standard errors of that difference over examples (paired,
          so the harder of the two). The bootstrap's standard error of a mean is σ/√N exactly (Efron
          & Tibshirani 1993, section 5.2), so none is drawn.
        - ``k_within_nll_se``: the same with one ``nll_se``, the standard error of the whole's NLL
          itself: from there on more samples change it less than another test set would.
        - ``still_to_gain``, ``still_to_gain_se``: NLL of the whole less that of infinitely many
          members, as the first j tell it. Of independent members that of k is about c/k above, so
          the first j are c(1/j − 1/K) above the whole; j/(K − j) times as much is c/K.

        None with a reason where even the first j are too far off. Beyond j nothing is judged:
        such k share most of their members with the whole, so they come near it whatever is still
        to be gained. The order is that of the draws, so if the chains still move, early k say what
        early draws are worth.
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
    return {**found, "enough": _enough(ks, chains, found, _se(losses[-1]), len(p))}


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


def _enough(ks: list[int], chains: int, found: Figures, nll_se: float, examples: int) -> Figures:
    if len(ks) == 1 or examples == 1:
        why = ONE if len(ks) == 1 else ONE_EXAMPLE
        names = ("judged", "k", "k_within_nll_se", "nll_se", "still_to_gain", "still_to_gain_se")
        return {**dict.fromkeys(names), "reason": why}
    half = [i for i, k in enumerate(ks) if 2 * k <= ks[-1]]
    # One draw a chain has no whole draws before the last: any of its members count.
    judged = [i for i in half if ks[i] % chains == 0] or half
    gaps = [found["difference"][i] for i in judged]
    errors = [found["difference_se"][i] for i in judged]
    at = [ks[i] for i in judged]
    paired = _settled(at, gaps, [ERRORS * error for error in errors])
    alone = _settled(at, gaps, [nll_se] * len(at))
    last, whole = at[-1], ks[-1]
    ahead = last / (whole - last)
    gain = {"still_to_gain": ahead * gaps[-1], "still_to_gain_se": ahead * errors[-1]}
    before = f"NLL of the first {last} of {whole} samples still differs by {gaps[-1]:+.2g}"
    advice = (
        f"of independent draws about {gain['still_to_gain']:.2g} is still to be gained: draw more"
        if gaps[-1] > 0
        else "the later samples are worse than the first: see whether the chains still move"
    )
    reason = (
        f"{before} from the whole's, more than {ERRORS:g} standard errors ({errors[-1]:.2g}) of "
        f"that; {advice}"
        if paired is None
        else f"from {paired} samples on, judged up to {last} of the {whole}, NLL is within "
        f"{ERRORS:g} standard errors of the whole's, paired"
    )
    enough = {"k": paired, "reason": reason, "k_within_nll_se": alone, "nll_se": nll_se}
    if alone is None:
        enough["k_within_nll_se_reason"] = f"{before}, more than NLL's own standard error"
    return {**enough, "judged": last, **gain}


def _settled(ks: list[int], gaps: list[float], errors: list[float]) -> int | None:
    """The smallest k from which every gap is within its error; None if the last is not."""
    first = len(ks)
    while first > 0 and abs(gaps[first - 1]) <= errors[first - 1] + ROUNDING:
        first -= 1
    return ks[first] if first < len(ks) else None
