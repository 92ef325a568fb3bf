"""Have the chains converged? R-hat, effective sample sizes and a verdict in words.

Shape letters: M chains, T draws of one traced quantity.

Thin over `arviz_stats.base.array_stats` (methods `rhat(method="rank")`, `ess(method="bulk"|"tail")`
and `mcse(method="mean")`), the part of arviz-stats that needs NumPy and SciPy alone. What that
library answers with a number or a warning although nothing can be said (a constant trace has "ESS"
M·T there) is caught before it is asked, and becomes an `Estimate` without value and with a reason.

LoRA's factors are known only up to (BM, M⁻¹A): let verdicts rest on quantities in function space
(log-probabilities of a probe set, the log-posterior, ‖ΔW‖_F), never on raw parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from arviz_stats.base.array import array_stats
from numpy.typing import ArrayLike, NDArray

from bayesian_lora.errors import InputError

Array = NDArray[np.float64]

RHAT_LIMIT = 1.05  # a quantity above it has not mixed
ESS_BULK_LIMIT = 100.0  # of all chains together; below it R-hat itself is too noisy to trust
DISPERSION_LIMIT = 2.0  # starts closer than this, in within-chain deviations, prove nothing
MIN_DRAWS = 4  # two halves of two draws: the least that split R-hat can use
TAILS = (0.05, 0.95)
NO_STARTS = "no starts were recorded"


@dataclass(frozen=True)
class Estimate:
    """A figure, or `None` and the reason why there is none."""

    value: float | None
    reason: str | None = None

    def figures(self, name: str) -> dict[str, float | str | None]:
        """`{name: value}`, with `<name>_reason` beside a value that is None."""
        out: dict[str, float | str | None] = {name: self.value}
        return out if self.reason is None else out | {f"{name}_reason": self.reason}


def rhat(x: ArrayLike) -> Estimate:
    """Rank-normalised split R-hat of a trace (M, T), the larger of bulk and folded.

    Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), section 4. Needs two chains or more.
    Raises InputError if `x` has not two dimensions (all functions of this module do).
    """
    return _estimate(x, lambda a: array_stats.rhat(a, chain_axis=0, draw_axis=1), chains=2)


def ess_bulk(x: ArrayLike) -> Estimate:
    """Rank-normalised split effective sample size of all M·T draws (Vehtari et al. 2021)."""
    return _estimate(x, lambda a: array_stats.ess(a, chain_axis=0, draw_axis=1, method="bulk"))


def ess_tail(x: ArrayLike) -> Estimate:
    """The smaller effective sample size of the 5 % and 95 % quantiles (Vehtari et al. 2021)."""
    a = _trace(x)
    if _unusable(a) is None and array_stats.quantile(a.ravel(), TAILS[0]) == a.max():
        # Both tail indicators would be constant, and their "ESS" M·T.
        return Estimate(
            None, f"over {TAILS[1]:.0%} of the draws have one value: there are no tails"
        )
    return _estimate(
        a, lambda a: array_stats.ess(a, chain_axis=0, draw_axis=1, method="tail", prob=TAILS)
    )


def mcse_mean(x: ArrayLike) -> Estimate:
    """Monte Carlo standard error of the mean over all draws, in the quantity's unit.

    sd/√ESS (Vehtari et al. 2021), and where R-hat exceeds its limit at least what the means of the
    chains show, √(variance of means/M): for chains in separate modes the halves that ESS splits
    them into are not independent, and alone it would be up to 2.5 times too small.
    """

    def error(a: Array) -> float:
        within: Any = array_stats.mcse(a, chain_axis=0, draw_axis=1, method="mean")
        mixing = rhat(a).value
        if mixing is None or mixing <= RHAT_LIMIT:
            return float(within)
        return max(float(within), float(a.mean(axis=1).std(ddof=1) / np.sqrt(len(a))))

    return _estimate(x, error)


def start_dispersion(starts: ArrayLike, draws: ArrayLike) -> Estimate:
    """Spread of the starts (M,) in within-chain standard deviations of the draws (M, T).

    sd(starts) / √(mean over chains of the variance of the second half), both with ddof = 1. R-hat
    can see modes only if the starts were wider than what one chain explores, so well above 1.
    """
    x, s = _trace(draws), np.asarray(starts, dtype=np.float64)
    if s.shape != x.shape[:1]:
        raise InputError(f"starts have shape {s.shape}, draws {x.shape}: give one start a chain")
    if not np.isfinite(s).all():
        return Estimate(None, f"{int((~np.isfinite(s)).sum())} of {s.size} starts are not finite")

    def ratio(a: Array) -> float:
        late = a[:, a.shape[1] // 2 :]
        if all(_constant(row) for row in late):
            return np.nan
        return s.std(ddof=1) / np.sqrt(late.var(axis=1, ddof=1).mean())

    return _estimate(x, ratio, chains=2)


def summarise(
    traces: Mapping[str, ArrayLike],
    starts: Mapping[str, ArrayLike] | None = None,
    *,
    verdict_on: Callable[[str], bool] = lambda name: True,
) -> dict[str, Any]:
    """The `diagnostics` of metrics.json from `traces` (M, T) and `starts` (M,), by quantity.

    Returns rhat_max, ess_bulk_min, ess_tail_min, start_dispersion (the median), all over the
    quantities whose name `verdict_on` accepts; `quantities`, with rhat, ess_bulk, ess_tail, mcse,
    mean, sd and start_dispersion of every one; `verdict` and `reason`. What is None has a
    `<key>_reason` beside it.

    The verdicts: "not mixed" (an R-hat above 1.05 or a bulk ESS below 100), "not available" (no
    R-hat at all), "not proven" (nothing speaks against mixing, but a quantity has no figures, or
    the starts were within 2 within-chain deviations or unknown), and otherwise "mixed". Where the
    starts have a say, the reason tells of the quantities that their median passes over.
    """
    given = starts or {}
    rows = {name: _quantity(x, given.get(name)) for name, x in traces.items()}
    judged = {name: row for name, row in rows.items() if verdict_on(name)}
    dispersion = _median_dispersion(judged)
    fewest = min((np.size(traces[name]) for name in judged), default=0)
    verdict, reason = _verdict(judged, fewest, dispersion)
    return {
        **_extreme(judged, "rhat", max).figures("rhat_max"),
        **_extreme(judged, "ess_bulk", min).figures("ess_bulk_min"),
        **_extreme(judged, "ess_tail", min).figures("ess_tail_min"),
        "quantities": {
            name: {k: v for key, e in row.items() for k, v in e.figures(key).items()}
            for name, row in rows.items()
        },
        **dispersion.figures("start_dispersion"),
        "verdict": verdict,
        "reason": reason,
    }


def _trace(x: ArrayLike) -> Array:
    a = np.asarray(x, dtype=np.float64)
    if a.ndim != 2:
        raise InputError(
            f"a trace of shape {a.shape}: give (chains, draws), one chain as (1, draws)"
        )
    return a


def _constant(a: Array) -> bool:
    """No spread beyond rounding, nor beyond the 1e-15 below which arviz-stats takes it for none."""
    eps = 4 * np.finfo(np.float64).eps * np.abs(a).max()
    return bool(np.ptp(a) <= max(eps, np.finfo(np.float64).resolution))


def _unusable(a: Array, chains: int = 1) -> str | None:
    """Why nothing can be said about the trace, or None."""
    if a.size == 0:
        return f"the trace is empty: {a.shape[0]} chains of {a.shape[1]} draws"
    if len(a) < chains:
        return f"{len(a)} chain: the figure compares chains, so run {chains} or more"
    if not (ok := np.isfinite(a)).all():
        chain, draw = np.argwhere(~ok)[0]
        return (
            f"{(~ok).sum()} of {a.size} values are not finite, first in chain {chain}, draw {draw}"
        )
    if a.shape[1] < MIN_DRAWS:
        return f"{a.shape[1]} draws a chain: at least {MIN_DRAWS} are needed"
    if _constant(a):
        return f"the trace is constant: every draw is {a[0, 0]:.6g}"
    return None


def _estimate(x: ArrayLike, statistic: Callable[[Array], Any], chains: int = 1) -> Estimate:
    a = _trace(x)
    if reason := _unusable(a, chains):
        return Estimate(None, reason)
    # What NumPy would warn of here ends as a non-finite value, which is reported below.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = float(statistic(a))
    if not np.isfinite(value):
        return Estimate(
            None, f"it comes out as {value}: no chain varies within itself, or overflow"
        )
    return Estimate(value)


def _quantity(x: ArrayLike, starts: ArrayLike | None) -> dict[str, Estimate]:
    a = _trace(x)
    row = {"rhat": rhat(a), "ess_bulk": ess_bulk(a), "ess_tail": ess_tail(a), "mcse": mcse_mean(a)}
    row["start_dispersion"] = (
        Estimate(None, NO_STARTS) if starts is None else start_dispersion(starts, a)
    )
    if a.size == 0 or not np.isfinite(a).all():
        missing = Estimate(None, _unusable(a))
        return row | {"mean": missing, "sd": missing}
    sd = Estimate(float(a.std(ddof=1))) if a.size > 1 else Estimate(None, "one draw has no spread")
    return row | {"mean": Estimate(float(a.mean())), "sd": sd}


def _median_dispersion(rows: Mapping[str, Mapping[str, Estimate]]) -> Estimate:
    """The median, because the least of many noisy ratios of M starts falls with their number."""
    values: list[float] = []
    for name, row in rows.items():
        value, reason = row["start_dispersion"].value, row["start_dispersion"].reason
        if value is None:
            told = f"{reason} for {name}" if reason == NO_STARTS else f"{name}: {reason}"
            return Estimate(None, told)
        values.append(value)
    return Estimate(float(np.median(values))) if values else Estimate(None, "nothing was traced")


def _close_starts(rows: dict[str, dict[str, Estimate]]) -> str:
    """How many quantities had starts closer than the limit, and the closest; "" if none."""
    values = {name: row["start_dispersion"].value for name, row in rows.items()}
    close = [(x, name) for name, x in values.items() if x is not None and x < DISPERSION_LIMIT]
    if not close:
        return ""
    least, name = min(close)
    return f"; {len(close)} below {DISPERSION_LIMIT:g}, the least {least:.2g} on {name}"


def _worst(
    rows: dict[str, dict[str, Estimate]], key: str, pick: Callable[[Iterable], Any]
) -> tuple[float, str] | None:
    """(value, name) of the worst quantity that has a value."""
    known = [(row[key].value, name) for name, row in rows.items() if row[key].value is not None]
    return pick(known) if known else None


def _extreme(rows: dict[str, dict[str, Estimate]], key: str, pick: Callable) -> Estimate:
    if worst := _worst(rows, key, pick):
        return Estimate(worst[0])
    first = next((f"{name}: {row[key].reason}" for name, row in rows.items()), "nothing was traced")
    return Estimate(None, first)


def _verdict(
    rows: dict[str, dict[str, Estimate]], draws: int, dispersion: Estimate
) -> tuple[str, str]:
    worst, least = _worst(rows, "rhat", max), _worst(rows, "ess_bulk", min)
    if worst is None or least is None:
        return "not available", f"no R-hat: {_extreme(rows, 'rhat', max).reason}"
    doubts = []
    if missing := [
        n for n, row in rows.items() if None in (row["rhat"].value, row["ess_bulk"].value)
    ]:
        why = rows[missing[0]]["rhat"].reason or rows[missing[0]]["ess_bulk"].reason
        doubts.append(
            f"{len(missing)} of {len(rows)} quantities have no R-hat ({missing[0]}: {why})"
        )
    if worst[0] > RHAT_LIMIT:
        found = (
            f"R-hat {worst[0]:.4g} on {worst[1]}; chains sit in separate modes or have not run "
            "long enough: treat as an ensemble of modes, not as one posterior"
        )
        return "not mixed", "; ".join([found, *doubts])
    # An estimated ESS may exceed the number of draws; it must not make up for too few of them.
    if min(least[0], draws) < ESS_BULK_LIMIT:
        found = (
            f"bulk ESS {least[0]:.4g} on {least[1]}, of {draws} draws: both must reach "
            f"{ESS_BULK_LIMIT:g}; run longer"
        )
        return "not mixed", "; ".join([found, *doubts])
    found = (
        f"R-hat at most {worst[0]:.4g} ({worst[1]}), bulk ESS at least {least[0]:.0f} ({least[1]})"
    )
    blind, close = "so R-hat cannot see modes that no chain visited", _close_starts(rows)
    over = f"median of {len(rows)} quantities{close}"
    if dispersion.value is None:
        doubts.append(f"start dispersion is not available ({dispersion.reason}), {blind}")
    elif dispersion.value < DISPERSION_LIMIT:
        figure = f"{dispersion.value:.3g} < {DISPERSION_LIMIT:g}"
        doubts.append(f"starts were not overdispersed ({figure}, {over}), {blind}")
    else:
        less = ": R-hat says less of those" if close else ""
        found += f"; starts {dispersion.value:.3g} within-chain sd apart ({over}{less})"
    return ("not proven" if doubts else "mixed"), "; ".join([found, *doubts])
