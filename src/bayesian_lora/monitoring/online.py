"""Means, variances, effective sample sizes and Monte Carlo errors of long runs, as they come.

Shape letters: M chains, Q quantities, n rows so far, k sub-batches of a rows, w sub-batches a
window.

Memory is constant: what is kept has the same size after a million rows as after a thousand. State
dicts hold whole numbers and NumPy arrays; `load_state_dict` takes whatever NumPy can read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesian_lora.errors import InputError
from bayesian_lora.monitoring.welford import Welford, fitting
from bayesian_lora.scores.array_checks import Array

MIN_ROWS = 25  # the least of which five windows of √n rows can be made
LEAST_WINDOWS = 5  # as many of the widest windows must fit one after the other
ENOUGH_WINDOWS = 10  # fewer are so noisy that those found wide enough are so by luck
LENGTHS = 5.0  # autocorrelation times a window must span: the rest biases the variance by a tenth
CONSTANT = 1e-15  # a deviation from which on a trace varies
DISAGREE = 1e-3  # level at which chains' means are said to differ by more than their own errors


@dataclass(frozen=True)
class BatchFigures:
    """Effective sample sizes and Monte Carlo standard errors, (M, Q) by chain or (Q,) pooled.

    Where there is none, `ess` and `mcse` are NaN and `reason` says why (else it is None); `note`
    says what an existing figure rests on, where that is not the windows alone (else None).
    """

    ess: Array
    mcse: Array
    reason: NDArray[np.object_]
    note: NDArray[np.object_]


class OnlineBatchMeans:
    """ESS and MCSE of the means of M chains' Q quantities by overlapping batch means.

    The rows are averaged into sub-batches of a = 1, 2, 4, … rows: when `max_batches` are full,
    neighbours are joined and a doubles, so at most `max_batches` (M, Q) arrays are kept. Over
    windows of w sub-batches (b = w·a rows) that overlap, the long-run variance is
      σ² = k b / ((k − w)(k − w + 1)) Σ_j (mean of window j − mean of all)²
    (Meketon & Schmeiser 1984; Flegal & Jones 2010), mcse = √(σ²/n) and ess = n·variance/σ².

    b starts at √n and doubles until it spans 5 autocorrelation times σ²/variance as estimated with
    it (Sokal's 1997 self-consistent window), or n/5. If no b suffices, or only one above n/10, the
    rows are too few to show how slow the chain is, and a note says that its ess is at most about
    what is given. Without a note it is about a tenth too high where b just suffices (simulated,
    AR(1)), and more where luck alone spares a quantity the note. Above `max_batches`² rows, b is no
    less than one sub-batch.

    Pooled over chains, ess = (variance within + variance of the chains' means)/mcse². The mcse is
    that of independent chains, unless their means differ by more than it allows (an F test at level
    .001); then it is the one that these means show, √(variance of means/M), which makes the ess of
    chains in separate modes about M, and a note says so.

    Args:
        shape: (M, Q).
        max_batches: an even number, 64 or more; each takes 8·M·Q bytes.
    """

    def __init__(self, shape: tuple[int, int], max_batches: int = 512) -> None:
        if len(shape) != 2 or max_batches < 64 or max_batches % 2:
            raise InputError(
                f"batch means of shape {shape} in {max_batches} batches: give (chains, quantities) "
                "and an even number of batches, 64 or more"
            )
        self.moments = Welford(shape)
        self.size, self.filled = 1, 0  # rows a sub-batch, complete sub-batches
        self.batches: Array = np.zeros((max_batches, *shape))
        self.sum, self.rows = np.zeros(shape), 0  # of the sub-batch that is being filled
        self.bad = np.zeros(shape, dtype=np.int64)

    @property
    def count(self) -> int:
        """n, the rows seen."""
        return self.moments.count

    @property
    def mean(self) -> Array:
        """(M, Q); NaN where a value was not finite, or before the first row."""
        return np.where((self.bad > 0) | (self.count == 0), np.nan, self.moments.mean)

    @property
    def variance(self) -> Array:
        """(M, Q), with ddof 1; NaN where a value was not finite, or before the second row."""
        return np.where(self.bad > 0, np.nan, self.moments.variance)

    def update(self, x: ArrayLike) -> None:
        """Take in a row (M, Q). Raises InputError on another shape."""
        value = fitting(x, self.sum.shape)
        if not (ok := np.isfinite(value)).all():
            # It is counted and spoils its own figures; in the sums it would warn at every step.
            self.bad += ~ok
            value = np.where(ok, value, 0.0)
        # A run that diverges may overflow in its squares; `_reasons` then says so.
        with np.errstate(over="ignore", invalid="ignore"):
            self.moments.update(value)
            self.sum = self.sum + value
        self.rows += 1
        if self.rows == self.size:
            self._complete()

    def _complete(self) -> None:
        self.batches[self.filled] = self.sum / self.size
        self.filled += 1
        self.sum, self.rows = np.zeros_like(self.sum), 0
        if self.filled == len(self.batches):
            self.filled //= 2
            self.batches[: self.filled] = (self.batches[::2] + self.batches[1::2]) / 2
            self.size *= 2

    def keep(self, chains: Sequence[int]) -> None:
        """Go on with these of the chains, by their place 0..M−1 (the others were dropped)."""
        index = list(chains)
        self.moments.mean, self.moments.squares = (
            x[index] for x in (self.moments.mean, self.moments.squares)
        )
        self.batches, self.sum, self.bad = self.batches[:, index], self.sum[index], self.bad[index]

    def ess(self, pooled: bool = False) -> Array:
        """Effective sample sizes, (M, Q) or pooled (Q,); NaN where there is none."""
        return (self.pooled() if pooled else self.per_chain()).ess

    def mcse(self, pooled: bool = False) -> Array:
        """Monte Carlo standard errors of the means, (M, Q) or pooled (Q,); NaN where none."""
        return (self.pooled() if pooled else self.per_chain()).mcse

    def per_chain(self) -> BatchFigures:
        """The figures of each chain alone, (M, Q)."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._per_chain()

    def pooled(self) -> BatchFigures:
        """The figures of all chains together, (Q,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._pooled()

    def _per_chain(self) -> BatchFigures:
        reason = self._reasons()
        note = np.full(reason.shape, None, dtype=object)
        if self.count < MIN_ROWS:
            return _figures(self.variance, self.variance, reason, note)
        run = self._long_run(self.variance, lambda sigma: sigma)
        note[run.slow] = _SLOW
        return _figures(self.variance, run.sigma / self.count, reason, note)

    def _pooled(self) -> BatchFigures:
        chains, n = self.sum.shape[0], self.count
        reason = _first_of_chains(self._reasons())
        note = np.full(reason.shape, None, dtype=object)
        within = self.moments.variance.mean(axis=0)
        if n < MIN_ROWS or chains == 0:
            return _figures(within, within, reason, note)
        run = self._long_run(within, lambda sigma: sigma.mean(axis=0))
        note[run.slow] = _SLOW
        variance, squared_error = within, run.sigma / (n * chains)
        if chains > 1:
            between = self.moments.mean.var(axis=0, ddof=1)
            variance = within * (n - 1) / n + between
            apart = _differ(between, run.sigma / n, chains, run.windows)
            note[apart] = _APART
            squared_error = np.where(apart, between / chains, squared_error)
        return _figures(variance, squared_error, reason, note)

    def _reasons(self) -> NDArray[np.object_]:
        """Why a chain's quantity has no figures, (M, Q), or None."""
        n, sd = self.count, np.sqrt(np.maximum(self.moments.variance, 0.0))
        reason = np.full(self.sum.shape, None, dtype=object)
        # Rounding of a constant is no variation; nor is what diagnostics takes for none.
        eps = 4 * np.finfo(np.float64).eps * np.abs(self.moments.mean)
        reason[~(sd > np.maximum(eps, CONSTANT))] = "it is constant"
        reason[~np.isfinite(sd)] = "its variance overflows"
        for place in np.argwhere(self.bad > 0):
            m, q = (int(i) for i in place)
            reason[m, q] = f"{self.bad[m, q]} of {n} values are not finite"
        if n < MIN_ROWS:
            reason[...] = f"{n} rows: at least {MIN_ROWS} are needed"
        return reason

    def _long_run(self, variance: Array, join: Callable[[Array], Array]) -> _LongRun:
        """σ² with the window that each entry of `variance` needs; `join` is for its chains."""
        k, a = self.filled, self.size
        centred = self.batches[:k] - self.batches[:k].mean(axis=0)
        upto = np.concatenate([np.zeros_like(centred[:1]), centred.cumsum(axis=0)])
        run = _LongRun(
            np.zeros_like(variance), np.ones_like(variance), np.full(variance.shape, True)
        )
        for w in _widths(max(1, round(np.sqrt(self.count) / a)), k // LEAST_WINDOWS):
            squares = (((upto[w:] - upto[:-w]) / w) ** 2).sum(axis=0)
            sigma = join(squares) * k * w * a / ((k - w) * (k - w + 1))
            run.sigma[run.slow], run.windows[run.slow] = sigma[run.slow], k / w
            run.slow &= LENGTHS * sigma > w * a * variance
        run.slow |= run.windows < ENOUGH_WINDOWS
        # As in Stan, an ess above n log₁₀ n is not believed.
        run.sigma = np.maximum(run.sigma, variance / np.log10(self.count))
        return run

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that is kept; of the sub-batches those that are complete."""
        return {
            "moments": self.moments.state_dict(),
            "size": self.size,
            "batches": self.batches[: self.filled].copy(),
            "sum": self.sum.copy(),
            "rows": self.rows,
            "bad": self.bad.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Raises InputError on another shape or more sub-batches."""
        batches = np.asarray(state["batches"], dtype=np.float64)
        if len(batches) >= len(self.batches):
            raise InputError(
                f"a state of {len(batches)} sub-batches does not fit {len(self.batches)}: load it "
                "with the max_batches it was made with"
            )
        self.sum = fitting(state["sum"], self.sum.shape).copy()
        self.moments.load_state_dict(state["moments"])
        self.size, self.rows, self.filled = int(state["size"]), int(state["rows"]), len(batches)
        self.batches[: self.filled] = batches
        self.bad = np.array(state["bad"], dtype=np.int64)


_SLOW = "the rows are too few to show how slow the chain is: the ess is at most about this"
_APART = "the chains' means differ by more than their own errors: the ess is that of separate modes"


@dataclass
class _LongRun:
    """σ², how many windows fit one after the other, and where none or too few were wide enough."""

    sigma: Array
    windows: Array
    slow: NDArray[np.bool_]


def _widths(first: int, last: int) -> list[int]:
    """first, 2·first, … below last, and last."""
    widths = [first]
    while widths[-1] < last:
        widths.append(min(2 * widths[-1], last))
    return widths


def _differ(between: Array, squared_error: Array, chains: int, windows: Array) -> NDArray[np.bool_]:
    """Whether the variance of means exceeds their squared error by an F distribution's quantile."""
    from scipy.special import fdtrc

    ratio = np.divide(between, squared_error, out=np.zeros_like(between), where=squared_error > 0)
    # Overlapping windows give σ² half as many degrees of freedom again (Meketon & Schmeiser 1984).
    return np.asarray(fdtrc(chains - 1, chains * 1.5 * windows, ratio) < DISAGREE)


def _figures(
    variance: Array, squared_error: Array, reason: NDArray[np.object_], note: NDArray[np.object_]
) -> BatchFigures:
    known = _is_none(reason)
    note[~known] = None
    ess = np.divide(variance, squared_error, out=np.full_like(variance, np.nan), where=known)
    return BatchFigures(
        ess, np.sqrt(squared_error, out=np.full_like(variance, np.nan), where=known), reason, note
    )


def _first_of_chains(reason: NDArray[np.object_]) -> NDArray[np.object_]:
    """(Q,) of (M, Q): what the first chain that has a reason says."""
    found = np.full(reason.shape[1], None, dtype=object)
    for m in range(len(reason) - 1, -1, -1):
        for q in np.flatnonzero(~_is_none(reason[m])):
            found[q] = f"chain {m}: {reason[m, q]}"
    return found


def _is_none(reason: NDArray[np.object_]) -> NDArray[np.bool_]:
    return np.array([x is None for x in reason.flat], dtype=bool).reshape(reason.shape)
