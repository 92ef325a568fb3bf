"""Answering only where the model is sure: risk against coverage, and thresholds to abstain above.

Shape letters: N examples.

A score is an uncertainty, so examples with a low score are kept first; `wrong` is 1 where the
answer is wrong and 0 where it is right. Risk is the share of wrong answers among those kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from bayesian_lora.errors import InputError
from bayesian_lora.scores.array_checks import Array, finite, shaped

GRID = 20  # coverages 1/20, 2/20, …, 1 are tested by `safe_threshold_for`
STARTS = (2, 6, 10, 14, 18)  # of them, those at which a share of the level enters


def risk_coverage(score: ArrayLike, wrong: ArrayLike) -> tuple[Array, Array]:
    """(coverage (N,), risk (N,)) of keeping the 1, 2, …, N examples of the lowest `score` (N,).

    Equal scores have no order, so among them the risk is the one expected if they were kept in
    random order (El-Yaniv & Wiener 2010; Geifman & El-Yaniv 2017 for the curve).
    Raises InputError on non-finite scores, no examples, or `wrong` other than 0 and 1.
    """
    s, w = _checked(score, wrong)
    order = np.argsort(s, kind="stable")
    s, w = s[order], w[order]
    starts = np.flatnonzero(np.r_[True, s[1:] > s[:-1]])
    sizes = np.diff(np.append(starts, len(s)))
    # Each of a group of ties counts the group's mean.
    errors = np.repeat(np.add.reduceat(w, starts) / sizes, sizes).cumsum()
    kept = np.arange(1, len(s) + 1)
    return kept / len(s), errors / kept


def aurc(score: ArrayLike, wrong: ArrayLike) -> float:
    """Area under the risk–coverage curve: the mean of `risk_coverage`'s N risks.

    Geifman, Uziel & El-Yaniv (2019). Raises InputError as `risk_coverage` does.
    """
    return float(risk_coverage(score, wrong)[1].mean())


def accuracy_at(score: ArrayLike, wrong: ArrayLike, coverages: Sequence[float]) -> dict[str, float]:
    """{"0.9": accuracy, …}: of the fewest examples that are at least that share, surest first.

    Raises InputError as `risk_coverage` does, and on a coverage outside (0, 1].
    """
    _, risk = risk_coverage(score, wrong)
    found: dict[str, float] = {}
    for coverage in coverages:
        if not 0 < coverage <= 1:
            raise InputError(f"coverage {coverage:g} is outside (0, 1]: give the share to keep")
        # Rounding must not make 0.95 · 400 into 381 examples.
        kept = math.ceil(round(coverage * len(risk), 9))
        found[f"{coverage:g}"] = float(1 - risk[kept - 1])
    return found


def threshold_for(score: ArrayLike, wrong: ArrayLike, target_risk: float) -> float | None:
    """The largest score t at which the examples with score ≤ t have risk ≤ `target_risk`.

    None if there is none. Nothing is promised for other examples than these: see
    `safe_threshold_for`. Raises InputError as `risk_coverage` does, and on a target outside [0, 1).
    """
    s, w = _checked(score, wrong)
    _check_share("target_risk", target_risk)
    order = np.argsort(s, kind="stable")
    s, errors = s[order], w[order].cumsum()
    last = np.flatnonzero(np.r_[s[1:] > s[:-1], True])  # of each group of ties
    good = last[errors[last] / (last + 1) <= target_risk]
    return float(s[good[-1]]) if len(good) else None


def safe_threshold_for(
    score: ArrayLike, wrong: ArrayLike, target_risk: float, confidence: float = 0.95
) -> float | None:
    """A threshold t that keeps the risk of new inputs with score ≤ t at most `target_risk`.

    The guarantee: with probability at least `confidence` over these examples, the population's
    share of wrong answers among inputs with score ≤ t is at most `target_risk`. It is about the
    average over the inputs kept, not each of them, and it holds if
    - the examples are independent draws of the population that is met later (no shift), and
      neither model nor score was fitted to them or chosen by them;
    - the chance of a wrong answer does not fall as the score rises. A score that ranks worse than
      that makes it approximate.

    As in selection with guaranteed risk (Geifman & El-Yaniv 2017), a Clopper–Pearson upper bound
    must not exceed the target. It is tested at the coverages 1/20, 2/20, …, 1 in this order, each
    test passing on its level to the next if it succeeds and losing it otherwise; a fifth of
    1 − `confidence` enters at the coverages .1, .3, .5, .7 and .9 (a fallback procedure, Wiens
    2003, whose levels add up to 1 − `confidence`). Why it holds: let u be the score up to which the
    risk is the target. All n examples at or below a tested threshold t > u comprise those below u,
    whose errors are binomial with the target as probability, and others that are no less often
    wrong; so their errors are stochastically no fewer than Binomial(n, target), whatever scores
    have set t, and the test of t errs with at most its level.

    Returns the largest t that passed, a score of one of the examples, or None: too few examples or
    too many errors. Raises InputError as `threshold_for` does.
    """
    s, w = _checked(score, wrong)
    _check_share("target_risk", target_risk)
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence:g} is outside (0, 1): 0.95 is usual")
    order = np.argsort(s, kind="stable")
    s, errors = s[order], w[order].cumsum()
    found, level = None, 0.0
    for step in range(1, GRID + 1):
        if step in STARTS:
            level += (1 - confidence) / len(STARTS)
        threshold = float(s[math.ceil(len(s) * step / GRID) - 1])
        kept = int(np.searchsorted(s, threshold, side="right"))
        if level > 0 and _upper_bound(int(errors[kept - 1]), kept, level) <= target_risk:
            found = threshold
        else:
            level = 0.0
    return found


def _upper_bound(wrong: int, kept: int, alpha: float) -> float:
    """Clopper & Pearson's (1934) one-sided upper bound of a binomial's probability."""
    from scipy.special import betaincinv

    return 1.0 if wrong == kept else float(betaincinv(wrong + 1, kept - wrong, 1 - alpha))


def _checked(score: ArrayLike, wrong: ArrayLike) -> tuple[Array, Array]:
    s = shaped("score", score, 1, "(N,)")
    w = finite("wrong", wrong)
    if w.shape != s.shape:
        raise InputError(f"wrong {w.shape} does not fit score {s.shape}: give one an example")
    if not np.isin(w, (0.0, 1.0)).all():
        raise InputError(f"wrong has values from {w.min():g} to {w.max():g}: give only 0 and 1")
    return s, w


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"{name} {value:g} is outside [0, 1): give the share of wrong answers")
