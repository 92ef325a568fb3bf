"""Standard errors by resampling the examples (Efron 1979).

Shape letters: N examples, R replicates in all, B of them at a time.

A replicate is how often it drew each example, `counts` (N, B), and a `Statistic` gives its figures
for B replicates at once, NaN where one is undefined. All rows see the same replicates, so their
differences are paired.

The error is over examples alone: the model, its draws, its training and a fitted temperature are
held fixed. Errors of figures that are sums of absolute or squared gaps in bins are too large near
the least that a calibrated model scores: by a third for ECE and by two thirds for Brier's
reliability at 400 examples. Their resamples also lie above the figure itself (each adds its own
noise to the gaps), so no interval is read off them: the error alone is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bayesian_lora.errors import InputError
from bayesian_lora.metrics import Figures
from bayesian_lora.scores.array_checks import Array

Statistic = Callable[[Array], Mapping[str, Array]]
REPLICATES = 200
BLOCK = 1_000_000  # counts held at a time, 8 MB
ROUNDING = 1e-14  # what figures of order 1 that are equal may differ by


@dataclass(frozen=True)
class Replicates:
    """Figures (R,) of each row in each replicate: `values[row][figure]`; NaN where undefined.

    `se` and `difference_se` return {figure: standard error}, None with `<figure>_reason` where
    there is none, and `<figure>_left_out`, the number of replicates in which the figure was
    undefined, where there were any.
    """

    n: int
    values: dict[str, dict[str, Array]]

    def se(self, row: str) -> Figures:
        """Standard deviation (ddof 1) over replicates of each figure of `row`."""
        return standard_errors(self.values[row], self.n)

    def difference_se(self, row: str, other: str) -> Figures:
        """Standard error of `row` − `other`, paired: for the figures that both have."""
        first, second = self.values[row], self.values[other]
        return standard_errors({k: first[k] - second[k] for k in first if k in second}, self.n)

    def mean(self, rows: Sequence[str]) -> dict[str, Array]:
        """Mean over `rows` (of warm starts, say) of each figure (R,) that all have."""
        names = [k for k in self.values[rows[0]] if all(k in self.values[row] for row in rows)]
        return {k: np.mean([self.values[row][k] for row in rows], axis=0) for k in names}


def replicate(
    rows: Mapping[str, Statistic], n: int, rng: np.random.Generator, replicates: int = REPLICATES
) -> Replicates:
    """The figures of every row in `replicates` resamples of the `n` examples, the same for all.

    Raises InputError on no examples or fewer than two replicates.
    """
    _check(n, replicates)
    found: dict[str, dict[str, list[Array]]] = {row: {} for row in rows}
    for counts in resample_counts(n, rng, replicates):
        for row, statistic in rows.items():
            for name, values in statistic(counts).items():
                found[row].setdefault(name, []).append(values)
    return Replicates(
        n, {row: {k: np.concatenate(v) for k, v in x.items()} for row, x in found.items()}
    )


def resample_counts(
    n: int, rng: np.random.Generator, replicates: int, size: int | None = None
) -> Iterator[Array]:
    """`replicates` resamples in blocks (N, B): how often each example was drawn, n draws in all.

    `size` is the most of a block; it bounds the memory and does not change the draws.
    """
    size = size or max(1, BLOCK // n)
    for first in range(0, replicates, size):
        block = min(size, replicates - first)
        drawn = rng.integers(n, size=(block, n)) * block + np.arange(block)[:, None]
        yield np.bincount(drawn.ravel(), minlength=n * block).reshape(n, block).astype(np.float64)


def standard_errors(values: Mapping[str, Array], n: int) -> Figures:
    """{figure: sd} (ddof 1) of the replicates `values` (R,), from `n` examples.

    None with the reason where n = 1, where a figure is undefined (NaN) in more than half of the
    replicates, and where it is the same in all of them, which would come out as an error of 0.
    """
    figures: Figures = {}
    for name, x in values.items():
        known = x[np.isfinite(x)]
        reason = None
        if n < 2:
            reason = "one example has no spread: evaluate on more"
        elif 2 * len(known) < len(x) or len(known) < 2:
            reason = f"undefined in {len(x) - len(known)} of {len(x)} resamples"
        elif np.ptp(known) <= max(ROUNDING, 8 * np.finfo(np.float64).eps * np.abs(known).max()):
            reason = "the same in every resample: these examples do not show how it varies"
        figures[name] = float(known.std(ddof=1)) if reason is None else None
        if reason is not None:
            figures[f"{name}_reason"] = reason
        elif len(known) < len(x):
            figures[f"{name}_left_out"] = len(x) - len(known)
    return figures


def _check(n: int, replicates: int) -> None:
    if n < 1:
        raise InputError("no examples to resample: evaluate on a split that has some")
    if replicates < 2:
        raise InputError(f"{replicates} replicates have no spread: give 2 or more, as a rule 200")
