"""The observations' section on the single adapters, and curves of training."""

from collections.abc import Mapping
from typing import Any

from bayesian_lora.report import anchors
from bayesian_lora.report.page import Block, Code, Picture, Section, Table, cell, number, plot
from bayesian_lora.report.record import (
    NO_MCC,
    Figures,
    Record,
    data_sets,
    finished,
    has,
    listed,
    measured,
    title,
    unfinished,
    value,
)


def baselines(record: Record) -> Section:
    """The single adapters: the seed's tables, what they were trained on, their curves."""
    steps, data = finished(record, "baseline"), data_sets(record)
    blocks: list[Block] = []
    if steps:
        blocks.append(_sizes(steps))
    for task, step in steps.items():
        blocks += [_as_logged(task, step, data.get(task, "")), _as_code(task, step["logged"])]
    if steps:
        blocks += [
            _single_figures(steps, measured(record)),
            *curves({title(t): s["history"] for t, s in steps.items()}, "the baselines"),
        ]
    blocks += unfinished(record, "baseline", "Baselines")
    return Section("Baselines: one adapter a task", "baselines", blocks)


def _sizes(steps: Mapping[str, Figures]) -> Table:
    rows = []
    for task, step in steps.items():
        evaluated = listed(f"{n:,} {split}" for split, n in step["sizes"]["evaluation"].items())
        rows.append(
            [
                cell(title(task)),
                cell(step["title"]),
                cell(step["sizes"]["train"]),
                cell(step["sizes"]["validation"]),
                cell(evaluated),
                cell(step["model"]),
                cell(f"{step['rank']} on {', '.join(step['modules'])}"),
                cell(step["parameters"]),
                cell(step["seconds"], 0),
            ]
        )
    columns = ["Task", "Data set", "Trained on", "Held out of train", "Evaluated on"]
    return Table(
        "Examples of each task, and the adapter",
        [*columns, "Model", "Rank", "Parameters trained", "Seconds"],
        rows,
        note="Early stopping and the schedule look at what is held out of train; no figure below "
        "chose anything.",
    )


def _as_logged(task: str, step: Figures, data_set: str) -> Table:
    logged, original = step["logged"], anchors.BASELINE.get(data_set)
    rows = [
        [
            cell(name),
            value(logged, name),
            value(original, name, reason="the original has no such figure"),
        ]
        for name in logged
    ]
    seen = listed(f"{n:,} of {split}" for split, n in step["sizes"]["evaluation"].items())
    return Table(
        f"{title(task)}: as the original logs it",
        ["Quantity", "Here", f"Original ({anchors.MODEL})"],
        rows,
        note="train/… are means over the steps of the epoch that was kept, val… are of the "
        f"task's validation split ({seen}).",
    )


def _as_code(task: str, logged: Figures) -> Code:
    return Code(f"{task}_baseline = {dict(logged)!r}", f"{title(task)} in the original's form")


def _single_figures(steps: Mapping[str, Figures], note: str) -> Table:
    every = [row for step in steps.values() for row in step["splits"].values()]
    names = [n for n in ("accuracy", "mcc", "nll", "ece", "brier") if has(every, n)]
    rows = [
        [
            cell(title(task)),
            cell(split),
            cell(row["n"]),
            *(value(row, n, reason=NO_MCC) for n in names),
        ]
        for task, step in steps.items()
        for split, row in step["splits"].items()
    ]
    heads = [{"mcc": "MCC", "nll": "NLL", "ece": "ECE"}.get(n, n.capitalize()) for n in names]
    columns = ["Task", "Split", "n", *heads]
    return Table("The single adapters on every split", columns, rows, note=f"{note}. NLL in nats.")


def curves(histories: Mapping[str, list[Figures]], what: str) -> list[Block]:
    """train/loss and val/acc against trainer/global_step, a line for each."""
    known = {name: rows for name, rows in histories.items() if rows}
    if not known:
        return []
    return [_curves(known, what)]


def _curves(histories: Mapping[str, list[Figures]], what: str) -> Picture:
    quantities = ("train/loss", "val/loss", "val/acc")

    def draw(panels: Any) -> None:
        for axes, quantity in zip(panels, quantities, strict=True):
            for name, rows in histories.items():
                points = [r for r in rows if r.get(quantity) is not None]
                steps = [r["trainer/global_step"] for r in points]
                axes.plot(steps, [r[quantity] for r in points], label=name)
            axes.set_xlabel("trainer/global_step")
            axes.set_ylabel("nats" if quantity.endswith("loss") else "accuracy")
            axes.set_title(quantity, fontsize=10)
        panels[-1].figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
        )

    ends = [f"{name} {_end(rows)}" for name, rows in histories.items()]
    return plot(
        draw,
        text=f"Training curves of {what}; val/acc at the end: {', '.join(ends)}",
        caption=f"Training curves of {what}, epoch by epoch",
        size=(9.6, 3.8),
        panels=3,
    )


def _end(rows: list[Figures]) -> str:
    last = rows[-1].get("val/acc")
    return "not recorded" if last is None else number(last, 3)
