"""Does an uncertainty score tell foreign inputs from familiar ones?

Shape letters: N inputs inside the distribution, M outside it, B replicates, G distinct scores.

Outside is the positive class and a high score speaks for it. Equal scores count half.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from bayesian_lora.errors import InputError
from bayesian_lora.scores.array_checks import Array, finite

Part = tuple[float | None, str | None]


def auroc(inside: ArrayLike, outside: ArrayLike) -> Part:
    """(P(a score of `outside` (M,) > one of `inside` (N,)) + ½ P(equal), None), or (None, reason).

    Area under the receiver operating characteristic (Hanley & McNeil 1982): .5 is chance, whatever
    the sizes of the sets. None if a set is empty. Raises InputError on non-finite scores.
    """
    return _part("auroc", inside, outside)


def aupr(inside: ArrayLike, outside: ArrayLike) -> Part:
    """(average precision, None), or (None, reason) if a set is empty.

    Σ over thresholds of (gain in recall) · precision, outside being the positive class (Davis &
    Goadrich 2006). Chance is the base rate M/(N + M), so it is to be told beside the figure.
    Raises InputError on non-finite scores.
    """
    return _part("aupr", inside, outside)


class Pooled:
    """Scores (N,) and (M,) in one order, ties in groups: areas of any resamples of the inputs."""

    def __init__(self, inside: Array, outside: Array) -> None:
        scores = np.concatenate([inside, outside])
        self.order = np.argsort(scores, kind="stable")
        ordered = scores[self.order]
        self.starts = np.flatnonzero(np.r_[True, ordered[1:] > ordered[:-1]])

    def areas(self, inside: Array, outside: Array) -> dict[str, Array]:
        """auroc and aupr (B,) of resamples: how often each input was drawn, (N, B) and (M, B)."""
        negative = self._grouped(np.concatenate([inside, np.zeros_like(outside)]))
        positive = self._grouped(np.concatenate([np.zeros_like(inside), outside]))
        n, m = negative.sum(axis=0), positive.sum(axis=0)
        below = negative.cumsum(axis=0) - negative / 2
        # Kept are the groups from a threshold upwards.
        true = positive[::-1].cumsum(axis=0)[::-1]
        kept = true + negative[::-1].cumsum(axis=0)[::-1]
        precision = np.divide(true, kept, out=np.zeros_like(true), where=kept > 0)
        return {
            "auroc": (positive * below).sum(axis=0) / (n * m),
            "aupr": (positive * precision).sum(axis=0) / m,
        }

    def _grouped(self, counts: Array) -> Array:
        return np.add.reduceat(counts[self.order], self.starts, axis=0)


def _part(name: str, inside: ArrayLike, outside: ArrayLike) -> Part:
    x, y = _scores("inside", inside), _scores("outside", outside)
    if reason := _empty(x, y):
        return None, reason
    return float(Pooled(x, y).areas(np.ones((len(x), 1)), np.ones((len(y), 1)))[name][0]), None


def _scores(name: str, values: ArrayLike) -> Array:
    x = finite(name, values)
    if x.ndim != 1:
        raise InputError(f"{name} scores have shape {x.shape}: give one an input, in one dimension")
    return x


def _empty(inside: Array, outside: Array) -> str | None:
    for name, x in (("inside", inside), ("outside", outside)):
        if len(x) == 0:
            return f"there are no {name} inputs: one class only has no ranking"
    return None
