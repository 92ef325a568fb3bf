"""The table of the baseline comparison: `metrics.json` of several seeds → markdown and verdicts.

A figure is the mean over seeds with two standard errors, which answer different questions: over
seeds (another fit), and, in brackets, over the evaluated examples (another test set; all seeds
share it, so that more seeds do not lower it). Shapes: S seeds.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]
Runs = Mapping[str, Sequence[Figures]]
"""By sampler, the `metrics.json` of every seed; all samplers of a seed share their fits."""

LAST, EARLY, DEEP = "map_last", "map_early_stopped", "map_ensemble"
SCALED, SCALED_LAST = "map_temperature_scaled", "map_last_temperature_scaled"
ENSEMBLE, OWN_SCALED = "ensemble", "ensemble_temperature_scaled"
BASELINES = {
    "MAP, last epoch": LAST,
    "MAP, early-stopped": EARLY,
    "MAP, last epoch, temperature-scaled": SCALED_LAST,
    "MAP, early-stopped, temperature-scaled": SCALED,
    "deep ensemble, last epoch": f"{LAST}_ensemble",
    "deep ensemble, early-stopped": DEEP,
    "deep ensemble, last epoch, temperature-scaled": f"{LAST}_ensemble_temperature_scaled",
    "deep ensemble, early-stopped, temperature-scaled": f"{DEEP}_temperature_scaled",
}
"""Sampling starts from the early-stopped fits, so that theirs are the starts' own rows."""
METRICS = {"accuracy": "accuracy", "f1": "F1", "mcc": "MCC", "nll": "NLL", "ece": "ECE"}
ECE_SHARE, NLL_SHARE = 0.5, 0.85
STRETCH = {"mrpc": 0.41}
MISSING = "n/a"


@dataclass(frozen=True)
class Figure:
    """A mean over seeds and its standard errors; what is None has a reason."""

    mean: float | None
    over_seeds: float | None = None
    over_examples: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.mean is None:
            return MISSING
        seeds = "" if self.over_seeds is None else f" ± {self.over_seeds:.4f}"
        examples = "" if self.over_examples is None else f" ({self.over_examples:.4f})"
        return f"{self.mean:.4f}{seeds}{examples}"

    @property
    def spread(self) -> float:
        """Both standard errors in quadrature, of those that are known."""
        return math.hypot(self.over_seeds or 0.0, self.over_examples or 0.0)


def figure(runs: Sequence[Figures], row: str, name: str) -> Figure:
    """One figure of one row of `metrics.json` over seeds; a seed without it leaves none."""
    values = [_value(m, row, name) for m in runs]
    if missing := [reason for value, reason in values if value is None]:
        return Figure(None, reason=f"missing in {len(missing)} of {len(runs)}: {missing[0]}")
    errors = [_number(m.get("standard_errors"), row, name) for m in runs]
    return _over_seeds([value for value, _ in values if value is not None], errors)


def difference(runs: Sequence[Figures], other: str, name: str) -> Figure:
    """The ensemble's figure less another row's, paired within each seed.

    Its standard error over examples is the paired one where `metrics.json` has it, else that of
    two independent rows, which is too large.
    """
    ours, theirs = ([_value(m, row, name) for m in runs] for row in (ENSEMBLE, other))
    if missing := [reason for value, reason in (*ours, *theirs) if value is None]:
        return Figure(None, reason=missing[0])
    pairs = zip(ours, theirs, strict=True)
    gaps = [a - b for (a, _), (b, _) in pairs if a is not None and b is not None]
    return _over_seeds(gaps, [_paired(m, other, name) for m in runs])


def _paired(m: Figures, other: str, name: str) -> float | None:
    errors = m.get("standard_errors")
    paired = _number(errors, "differences", f"{ENSEMBLE}-{other}", name)
    if paired is not None:
        return paired
    both = [_number(errors, row, name) for row in (ENSEMBLE, other)]
    known = [error for error in both if error is not None]
    return math.hypot(*known) if len(known) == 2 else None


def _over_seeds(values: Sequence[float], errors: Sequence[float | None]) -> Figure:
    known = [error for error in errors if error is not None]
    return Figure(
        statistics.fmean(values),
        statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
        statistics.fmean(known) if len(known) == len(values) else None,
    )


def _value(m: Figures, row: str, name: str) -> tuple[float | None, str]:
    part = m.get(row)
    if not isinstance(part, Mapping):
        return None, m.get(f"{row}_reason") or f"{row} is not in metrics.json: evaluate again"
    value, reason = part.get(name), part.get(f"{name}_reason") or part.get("reason")
    if isinstance(value, Mapping):  # mean and sd over the fits
        value, reason = value.get("mean"), value.get("reason") or reason
    return value, reason or f"{row} has no {name}"


def _number(tree: Any, *keys: str) -> float | None:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return float(tree) if isinstance(tree, int | float) and not isinstance(tree, bool) else None


def table(runs: Runs) -> list[str]:
    """Markdown: the baselines, all of the first sampler's runs, then two rows a sampler."""
    first = next(iter(runs.values()))
    own = [n for n in METRICS if any(_value(m, ENSEMBLE, n)[0] is not None for m in first)]
    titles = [METRICS[n] for n in own]
    expected = "ECE if calibrated"
    head = ["", *titles, expected, "Brier", "R-hat", "ESS", "T_eff", "chains", "seconds"]
    lines = [_row(head), "|---" * len(head) + "|"]

    def line(title: str, of: Sequence[Figures], key: str, further: Sequence[str]) -> str:
        cells = [str(figure(of, key, name)) for name in own]
        return _row([title, *cells, _expected(of, key), str(figure(of, key, "brier")), *further])

    for title, key in BASELINES.items():
        lines.append(line(title, first, key, [*[""] * 4, _seconds(first, ("train_s",))]))
    for sampler, of in runs.items():
        seconds = _sampled(first, of)
        lines.append(line(sampler, of, ENSEMBLE, [*_chains(of), seconds]))
        lines.append(line(f"{sampler}, temperature-scaled", of, OWN_SCALED, [*[""] * 4, seconds]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _expected(runs: Sequence[Figures], row: str) -> str:
    """The ECE that a calibrated model of these confidences scores at this N, where it is known."""
    paths = [(row, "expected_ece", "mean"), (row, "expected_ece")]
    paths += [("calibration", "expected_ece", "mean")] if row == ENSEMBLE else []
    found = [next((v for p in paths if (v := _number(m, *p)) is not None), None) for m in runs]
    known = [value for value in found if value is not None]
    return f"{statistics.fmean(known):.4f}" if len(known) == len(runs) else ""


def _chains(runs: Sequence[Figures]) -> list[str]:
    """The worst R-hat and ESS of all seeds, the mean T_eff, the verdicts."""
    figures = [m["diagnostics"] for m in runs]

    def one(name: str, pick: Callable[[list[float]], float], digits: int) -> str:
        values = [d[name] for d in figures if d.get(name) is not None]
        return f"{pick(values):.{digits}f}" if len(values) == len(figures) else MISSING

    verdicts = [str(d["verdict"]) for d in figures]
    words = ", ".join(
        verdict if len(set(verdicts)) == 1 else f"{verdict} ({verdicts.count(verdict)})"
        for verdict in dict.fromkeys(verdicts)
    )
    return [
        one("rhat_max", max, 2),
        one("ess_bulk_min", min, 0),
        one("t_eff", statistics.fmean, 2),
        words,
    ]


def _seconds(runs: Sequence[Figures], names: Sequence[str]) -> str:
    """Mean over seeds of the sum of some costs."""
    sums = [[_number(m, "cost", name) for name in names] for m in runs]
    known = [sum(v for v in row if v is not None) for row in sums if None not in row]
    return f"{statistics.fmean(known):.0f}" if len(known) == len(sums) else MISSING


def _sampled(first: Sequence[Figures], runs: Sequence[Figures]) -> str:
    """Seconds of the fits, which only the first sampler's runs made, and of the sampling."""
    fits, sampling = _seconds(first, ("train_s",)), _seconds(runs, ("sample_s",))
    return f"{fits} + {sampling}"


def sampler_lines(runs: Runs) -> list[str]:
    """Of every sampler, by seed: its step size, and the gradients a chain took after burn-in."""
    lines = []
    for name, of in runs.items():
        steps, gradients = (
            ", ".join(_short(_number(m, *keys)) for m in of)
            for keys in (("sampler", "step_size"), ("cost", "sampling_gradient_evaluations"))
        )
        lines.append(f"- {name}: step size {steps}; gradients of a chain after burn-in {gradients}")
    return lines


def _short(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.3g}" if value < 1 else f"{value:,.0f}"


def best(runs: Runs) -> str | None:
    """The sampler of the lowest mean NLL; None if none has one."""
    nll = {name: figure(of, ENSEMBLE, "nll").mean for name, of in runs.items()}
    known = {name: value for name, value in nll.items() if value is not None}
    return min(known, key=known.__getitem__) if known else None


def verdicts(task: str, runs: Runs) -> list[str]:
    """Every target of the best sampler in words: met, missed or not available, with figures."""
    name = best(runs)
    if name is None:
        return ["Targets: not available, no sampler has an NLL"]
    of = runs[name]
    lines = [f"Best sampler by mean NLL: {name}. Targets, of its mean over seeds:"]
    lines += [
        _ratio("ECE at least 50 % below the last epoch's MAP", of, "ece", ECE_SHARE),
        _ratio("NLL at least 15 % below the last epoch's MAP", of, "nll", NLL_SHARE),
        _within(of),
        _not_worse("NLL not worse than temperature-scaled early-stopped MAP", of, SCALED),
        _not_worse("NLL not worse than temperature-scaled MAP of the last epoch", of, SCALED_LAST),
        _not_worse("NLL not worse than the deep ensemble", of, DEEP),
    ]
    if task in STRETCH:
        nll, limit = figure(of, ENSEMBLE, "nll"), STRETCH[task]
        met = nll.mean is not None and nll.mean <= limit
        lines.append(_line(f"stretch: NLL ≤ {limit}", met, str(nll)))
    if excess := _excess(of):
        lines.append(excess)
    return lines


def _line(target: str, met: bool | None, figures: str) -> str:
    word = {True: "met", False: "missed", None: "not available"}[met]
    return f"- {target}: {word} ({figures})"


def _ratio(target: str, of: Sequence[Figures], name: str, share: float) -> str:
    ours, base = figure(of, ENSEMBLE, name), figure(of, LAST, name)
    if ours.mean is None or not base.mean:
        return _line(target, None, ours.reason or base.reason or f"the MAP's {name} is 0")
    change = 100 * (ours.mean / base.mean - 1)
    expected = _expected(of, ENSEMBLE) if name == "ece" else ""
    floor = f"; if calibrated {expected}" if expected else ""
    figures = f"{change:+.0f} %: {ours} for {base}{floor}"
    return _line(target, ours.mean <= share * base.mean, figures)


def _within(of: Sequence[Figures]) -> str:
    target = "accuracy not lower than the last epoch's MAP within one standard error"
    gap = difference(of, LAST, "accuracy")
    if gap.mean is None:
        return _line(target, None, gap.reason)
    return _line(target, gap.mean + gap.spread >= 0, f"difference {gap}")


def _not_worse(target: str, of: Sequence[Figures], other: str) -> str:
    gap = difference(of, other, "nll")
    if gap.mean is None:
        return _line(target, None, gap.reason)
    clear = "" if abs(gap.mean) > gap.spread else ", within one standard error of none"
    return _line(target, gap.mean <= 0, f"difference {gap}{clear}")


def _excess(of: Sequence[Figures]) -> str | None:
    """Where p(y | x) is known: what the ensemble's NLL is above the best possible."""
    optima = [_number(m, "truth", "bayes_nll") for m in of]
    nll = [_number(m, ENSEMBLE, "nll") for m in of]
    pairs = zip(nll, optima, strict=True)
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    if len(gaps) < len(of):
        return None
    return f"- NLL above the Bayes optimum of these labels: {_over_seeds(gaps, [None])}"


NOTES = (
    "Mean over seeds ± its standard error over seeds (in brackets: over the evaluated examples, "
    "by bootstrap, which all seeds share). MAP rows are means over the four fits, never the best; "
    "an ensemble has one temperature, fitted to its mixture on held-out examples. ECE if "
    "calibrated: what a calibrated model of these confidences scores at this number of examples. "
    "R-hat and ESS: the worst of all seeds and quantities. Seconds: of all fits at once (with the "
    "prior's search where one was made), and of sampling."
)
