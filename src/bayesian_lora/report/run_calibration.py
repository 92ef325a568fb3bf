"""Sections of a run's report: calibration, selective prediction, how many samples are enough."""

from collections.abc import Mapping, Sequence
from typing import Any

from bayesian_lora.report.charts import Panel, Series, chart
from bayesian_lora.report.page import (
    Block,
    Chart,
    Missing,
    Section,
    Table,
    Text,
    cell,
    number,
    with_error,
)
from bayesian_lora.report.record import signed
from bayesian_lora.report.run_files import AGAIN, RunFiles, figure

Figures = Mapping[str, Any]

SHOWN = ("map", "ensemble")
CLASSES_ONLY = "a regression has no class probabilities"
BARS = " Bars: one standard error over the examples"
MOST_ROWS = 21
"""Of a table of a curve's points."""


def shown(files: RunFiles) -> dict[str, str]:
    """Titles of the rows in `SHOWN`; of a run that sampled nothing the members are MAP fits."""
    whole = "posterior ensemble" if files.sampled else "deep ensemble"
    return dict(zip(SHOWN, ("MAP", whole), strict=True))


def calibration(files: RunFiles) -> Section:
    """The reliability diagram of MAP and ensemble; of a regression the intervals' coverage."""
    if files.regression:
        return Section("Calibration", "calibration", [_coverage(files)])
    found, why = files.part("calibration")
    if found is None:
        missing = Missing("Reliability diagram", why)
        return Section("Calibration", "calibration", [missing])
    blocks: list[Block] = []
    reliability = found.get("reliability") or {}
    expected = found.get("expected_ece") or {}
    own = figure(files.metrics.get("ensemble"), "ece")
    if expected.get("mean") is not None and own is not None:
        mean, sd = expected["mean"], expected.get("sd") or 0.0
        judged = "more than" if own > mean + 2 * sd else "no more than"
        blocks.append(
            Text(
                f"The ensemble's ECE is {own:.4f}. A perfectly calibrated model with these very "
                f"probabilities would score {mean:.4f} ± {sd:.4f} on {files.metrics.get('n')} "
                f"examples by chance alone: its miscalibration is {judged} what chance explains "
                f"(two standard deviations).{_lean(reliability.get('ensemble'))}",
                "answer",
            )
        )
    rows = {k: reliability[k] for k in SHOWN if isinstance(reliability.get(k), Mapping)}
    if rows:
        blocks.append(_reliability(rows, shown(files)))
    else:
        blocks.append(Missing("Reliability diagram", f"no bins in metrics.json: {AGAIN}"))
    return Section("Calibration", "calibration", blocks)


def _coverage(files: RunFiles) -> Block:
    names = ("coverage_0.5", "coverage_0.9", "coverage_0.95")
    ensemble = files.metrics.get("ensemble") or {}
    if all(figure(ensemble, n) is None for n in names):
        return Missing("Coverage of predictive intervals", f"not in metrics.json: {AGAIN}")
    rows = []
    for name in names:
        asked = float(name.partition("_")[2])
        own = [cell(figure(files.metrics.get(row), name), 3) for row in SHOWN]
        rows.append([cell(f"{asked:.0%}"), *own])
    return Table(
        "Labels inside the central intervals of the predictive mixture",
        ["Asked for", *shown(files).values()],
        rows,
    )


def _reliability(rows: Mapping[str, Figures], titles: Mapping[str, str]) -> Chart:
    series = [Series("perfect", [0, 1], [0, 1], colour=None, style=1)]
    table = []
    for place, (name, row) in enumerate(rows.items()):
        full = [i for i, n in enumerate(row["count"]) if n]
        x, y = ([row[key][i] for i in full] for key in ("confidence", "accuracy"))
        # Older evaluations have no errors.
        errors = row.get("accuracy_se") or [None] * len(row["count"])
        bars = [errors[i] for i in full]
        series.append(Series(titles[name], x, y, "both", place, place, bars))
        series.append(_counts(titles[name], row, place))
        bins = len(row["count"])
        for i in full:
            span = f"{i / bins:.2f}–{(i + 1) / bins:.2f}"
            found = [
                cell(row["confidence"][i], 3),
                with_error(row["accuracy"][i], errors[i], "", 3),
            ]
            table.append([cell(f"{titles[name]}, {span}"), *found, cell(int(row["count"][i]))])
    gaps = {titles[k]: _largest_gap(row) for k, row in rows.items()}
    caption = (
        "Reliability of the top label in equal-width bins: below the dashed line the model is "
    )
    caption += "overconfident. The warm starts' predictions are pooled."
    if any(e is not None for row in rows.values() for e in row.get("accuracy_se") or ()):
        caption += f"{BARS}; where all answers of a bin agree there is none."
    text = "; ".join(f"{name}: {words}" for name, words in gaps.items())
    panels = [
        Panel("confidence", "accuracy", "Reliability", (0, 1), (0, 1.02)),
        Panel("confidence", "share of examples", "How often", (0, 1)),
    ]
    return chart(
        series,
        panels,
        text=f"Reliability diagram. {text}.",
        caption=caption,
        numbers=Table("bins", ["Bin", "Confidence", "Accuracy", "Examples"], table),
    )


def _lean(row: Any) -> str:
    """Whether probabilities are too high or too low on the whole; nothing where no bins are."""
    if not isinstance(row, Mapping) or not sum(row["count"]):
        return ""
    full = [i for i, n in enumerate(row["count"]) if n]
    total = sum(row["count"])
    claimed, right = (
        sum(row["count"][i] * row[key][i] for i in full) / total
        for key in ("confidence", "accuracy")
    )
    return f" On average its top label has probability {claimed:.3f} and is right on {right:.3f}."


def _counts(name: str, row: Figures, place: int) -> Series:
    total, bins = sum(row["count"]) or 1, len(row["count"])
    middles = [(i + 0.5) / bins for i in range(bins)]
    shares = [n / total for n in row["count"]]
    return Series(name, middles, shares, "bars", place, panel=1, legend=False)


def _largest_gap(row: Figures) -> str:
    known = [i for i, n in enumerate(row["count"]) if n]
    if not known:
        return "no examples"
    total = sum(row["count"])
    worst = max(
        known, key=lambda i: row["count"][i] * abs(row["accuracy"][i] - row["confidence"][i])
    )
    return (
        f"the bin that adds most to the ECE has confidence {row['confidence'][worst]:.2f}, "
        f"accuracy {row['accuracy'][worst]:.2f}, {row['count'][worst] / total:.0%} of the examples"
    )


def selective(files: RunFiles) -> Section:
    """Risk against coverage, and the accuracy where the least certain inputs are left out."""
    title, titles = "Selective prediction", shown(files)
    found, why = files.part("selective")
    curves = (found or {}).get("risk") or {}
    curves = {k: curves[k] for k in SHOWN if curves.get(k)}
    if found is None or not found.get("coverage") or not curves:
        given = (found or {}).get("reason") or why or f"no curve in metrics.json: {AGAIN}"
        reason = CLASSES_ONLY if files.regression else str(given)
        return Section(title, "selective", [Missing("Risk–coverage curve", reason)])
    coverage = found["coverage"]
    places = thinned(len(coverage))
    # Older evaluations have no errors.
    errors = {k: (found.get("risk_se") or {}).get(k) or [None] * len(coverage) for k in curves}
    bars = {k: _at(errors[k], places, shift) for shift, k in enumerate(curves)}
    series = [
        Series(titles[name], coverage, risk, "line", place, place, bars[name])
        for place, (name, risk) in enumerate(curves.items())
    ]
    rows = [
        [cell(f"{coverage[i]:.0%}"), *(with_error(curves[k][i], errors[k][i], "") for k in curves)]
        for i in places
    ]
    areas = {name: figure(files.metrics.get(name), "aurc") for name in curves}
    said = ", ".join(f"{titles[k]} {x:.4f}" for k, x in areas.items() if x is not None)
    score = str(found.get("score", "uncertainty")).replace("_", " ")
    caption = f"Inputs are answered from the least {score} on; lower is better. Area under the "
    caption += f"curve (AURC): {said or 'not recorded'}."
    if any(e is not None for some in bars.values() for e in some):
        caption += f"{BARS}, at some points."
    blocks: list[Block] = [
        chart(
            series,
            [
                Panel(
                    "coverage: share of inputs answered", "risk: share of them wrong", "", (0, 1.01)
                )
            ],
            text=f"Risk against coverage. At full coverage the risk is "
            f"{', '.join(f'{curves[k][-1]:.3f} ({titles[k]})' for k in curves)}.",
            caption=caption,
            numbers=Table("risk", ["Coverage", *(titles[k] for k in curves)], rows),
        )
    ]
    if table := _accuracy_at(found, titles):
        blocks.append(table)
    return Section(title, "selective", blocks)


def _at(errors: Sequence[float | None], places: Sequence[int], shift: int) -> list[float | None]:
    """Of a curve's errors every fourth of these places, so that two curves' bars stand apart."""
    chosen = set(places[2 + 2 * shift :: 4])
    return [error if i in chosen else None for i, error in enumerate(errors)]


def _accuracy_at(found: Figures, titles: Mapping[str, str]) -> Table | None:
    keys = {"map": "map_accuracy_at", "ensemble": "accuracy_at"}
    given = {name: key for name, key in keys.items() if found.get(key)}
    if not given:
        return None
    shares = list(found[next(iter(given.values()))])
    rows = []
    for name, key in given.items():
        row, errors = found[key], found.get(f"{key}_se") or {}
        cells = [with_error(row.get(s), errors.get(s), "not recorded") for s in shares]
        rows.append([cell(titles[name]), *cells])
    return Table(
        "Accuracy on the most certain inputs", ["", *(f"{float(s):.0%}" for s in shares)], rows
    )


def cumulative(files: RunFiles) -> Section:
    """Accuracy, NLL and ECE of the first k draws."""
    title = "How many samples are enough"
    if not files.sampled:
        return Section(title, "enough", [Missing("Cumulative curve", "nothing was sampled")])
    found, why = files.part("cumulative")
    names = [n for n in ("nll", "accuracy", "ece", "crps") if _drawn((found or {}).get(n))]
    if found is None or not found.get("k") or not names:
        reason = why or f"no curve in metrics.json: {AGAIN}"
        return Section(title, "enough", [Missing("Cumulative curve", reason)])
    titles = {"nll": "NLL", "accuracy": "accuracy", "ece": "ECE", "crps": "CRPS"}
    series, panels = [], []
    for place, name in enumerate(names):
        series.append(
            Series(titles[name], found["k"], found[name], "both", place, 0, None, "y", place)
        )
        panels.append(Panel("samples k", titles[name]))
    rows = [
        [cell(int(found["k"][i])), *(cell(found[name][i]) for name in names)]
        for i in thinned(len(found["k"]))
    ]
    enough = found.get("enough") or {}
    words = f"{enough['k']} samples are enough" if enough.get("k") else "Not settled"
    said = f"{words}: {enough['reason']}." if enough.get("reason") else f"{words}."
    # Older evaluations do not say how many were judged, and claim up to twice the gain.
    if (judged := enough.get("judged")) and (gain := enough["still_to_gain"]) > 0:
        change = f"{signed(-gain, 4)} ± {number(enough['still_to_gain_se'])}"
        said += f" Going by the first {judged} of the {found['k'][-1]}, more draws would change "
        said += f"NLL by about {change} in the end, if all are independent."
    last = ", ".join(f"{titles[n]} {_last(found[n]):.4f}" for n in names)
    return Section(
        title,
        "enough",
        [
            Text(said, "answer"),
            chart(
                series,
                panels,
                text=f"Figures of the first k samples, k from {found['k'][0]} to "
                f"{found['k'][-1]}, where they end at {last}.",
                caption="The ensemble of the first k samples, in the order they were stored.",
                numbers=Table("figures by k", ["k", *(titles[n] for n in names)], rows),
                panel_height=170,
            ),
        ],
    )


def _drawn(values: Any) -> bool:
    return isinstance(values, Sequence) and any(x is not None for x in values)


def _last(values: Sequence[float | None]) -> float:
    return next(x for x in reversed(values) if x is not None)


def thinned(count: int, most: int = MOST_ROWS) -> list[int]:
    """At most `most` places of `count`, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
