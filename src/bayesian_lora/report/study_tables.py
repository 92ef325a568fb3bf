"""The observations' sections on stacks: without training, and trained further."""

import math
from collections.abc import Mapping
from typing import Any

from bayesian_lora.report import anchors
from bayesian_lora.report.page import Block, Cell, Section, Table, Text, cell
from bayesian_lora.report.record import (
    Figures,
    Record,
    difference,
    finished,
    first_split,
    listed,
    signed,
    title,
    unfinished,
    value,
)
from bayesian_lora.report.study_baselines import NO_MCC, curves

LOGGED = (
    "epoch",
    "lr-Adam",
    "train/acc",
    "train/loss",
    "trainer/global_step",
    "val/acc",
    "val/loss",
)


CHANGES = (
    "Changes are against the adapter alone; of an accuracy those beyond two standard errors are "
    "marked"
)
WHOLE = ("epoch", "trainer/global_step")


def stacks(record: Record) -> Section:
    """What stacking without any further training costs, way by way."""
    steps = finished(record, "stack")
    blocks: list[Block] = []
    for name, step in steps.items():
        blocks += [Text(sentence, "answer") for sentence in stacking_answers(name, step)]
        blocks.append(_stack_table(name, step))
    if steps:
        blocks.append(_original_stacks())
    blocks += unfinished(record, "stack", "Stacks")
    return Section("Stacked without further training", "stacked", blocks)


def stacking_answers(name: str, step: Figures) -> list[str]:
    """What exact stacking loses on each task, against what the original lost."""
    found = []
    for task, alone in step["alone"].items():
        gone = lost(step, "exact", task)
        original = anchors.lost_by_stacking(task)
        if gone is None:
            continue
        words = (
            f"{name}: exact stacking changes {title(task)}'s accuracy from "
            f"{first_split(alone)['accuracy']:.3f} by {signed(-gone)}"
        )
        if (halved := lost(step, "original", task)) is not None:
            words += f", at the original's scaling by {signed(-halved)}"
        if original is not None:
            met = "met" if gone <= anchors.SHARE_OF_LOSS * original else "not met"
            words += (
                f"; the original's stacking lost {original:.3f}, and the target, at most "
                f"{anchors.SHARE_OF_LOSS:.0%} of that, is {met}"
            )
        found.append(words + ".")
    return found


def lost(step: Figures, way: str, task: str) -> float | None:
    """Accuracy lost on a task's default split against the adapter alone."""
    figures = step["ways"].get(way, {}).get("figures", {}).get(task)
    if figures is None:
        return None
    return first_split(step["alone"][task])["accuracy"] - first_split(figures)["accuracy"]


def _stack_table(name: str, step: Figures) -> Table:
    rows = []
    for task, alone in step["alone"].items():
        for split, own in alone.items():
            where = title(task) if len(alone) == 1 else f"{title(task)} {split}"
            rows.append(
                [
                    cell(where),
                    cell("the adapter alone"),
                    cell(step["ranks"][task]),
                    *_against(own, None),
                ]
            )
            for way in step["ways"].values():
                if (row := way["figures"][task].get(split)) is not None:
                    rows.append(
                        [cell(where), cell(way["title"]), cell(way["rank"]), *_against(row, own)]
                    )
    notes = [f"{way['title']}: {way['note']}" for way in step["ways"].values() if way["note"]]
    return Table(
        f"Stack {name} of {listed(map(title, step['alone']))}",
        ["Task", "How", "Rank", "Accuracy", "change", "MCC", "NLL", "change"],
        rows,
        note=". ".join([*notes, CHANGES]) + ".",
    )


def _against(row: Figures, own: Figures | None) -> list[Cell]:
    if own is None:
        changes = [cell("–"), cell("–")]
    else:
        changes = [
            difference(row["accuracy"], own["accuracy"], least=2 * _standard_error(own)),
            difference(row["nll"], own["nll"], better=-1),
        ]
    mcc = value(row, "mcc", reason=NO_MCC)
    return [value(row, "accuracy"), changes[0], mcc, value(row, "nll"), changes[1]]


def _standard_error(row: Figures) -> float:
    """Of an accuracy p on n examples: √(p(1 − p)/n)."""
    return math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["n"])


def _original_stacks() -> Table:
    rows = []
    for task, stacked in anchors.STACKED.items():
        base, trained = anchors.BASELINE[task], anchors.TRAINED[task]
        for name in ("val/acc", "val/loss"):
            figures = [base[name], stacked[name], trained[name]]
            rows.append([cell(f"{title(task)} {name}"), *(cell(x, 3) for x in figures)])
    return Table(
        f"The original's figures ({anchors.MODEL})",
        ["Quantity", "Baseline", "Stacked without training", "Stacked and trained on it"],
        rows,
        note="It stacked at a changed alpha/rank, which halved both adapters.",
    )


def further(record: Record) -> Section:
    """What training a stack further changes, on the task it was trained on and on the others."""
    steps = finished(record, "further")
    blocks: list[Block] = []
    for name, step in steps.items():
        blocks += [Text(generalisation(step), "answer"), _variants_table(name, step)]
        blocks += [_summaries(step), *_original_summaries()]
        blocks += curves(
            {v: row["history"] for v, row in step["variants"].items()}, f"stack {name}"
        )
    blocks += unfinished(record, "further", "Further training")
    return Section("Stacks trained further", "further", blocks)


def generalisation(step: Figures) -> str:
    """Whether further training is better on all the stack's tasks, from the figures."""

    def gains(reference: Mapping[str, Any]) -> dict[str, list[float]]:
        return {
            name: [
                first_split(row["figures"][task])["accuracy"] - first_split(own)["accuracy"]
                for task, own in reference.items()
            ]
            for name, row in step["variants"].items()
        }

    tasks = listed(title(task) for task in step["alone"])
    over_alone, over_stack = gains(step["alone"]), gains(step["before"])
    both = [name for name, change in over_alone.items() if min(change) >= 0]
    least = max(over_alone, key=lambda name: min(over_alone[name]))
    improved = [name for name, change in over_stack.items() if min(change) > 0]
    words = [
        f"Better generalisability on {tasks}? "
        + (
            f"At least the single adapters' accuracy on every one of them: {listed(both)}."
            if both
            else "No variant reaches the single adapters' accuracy on every one of them."
        ),
        f"Above the untrained exact stack on every one: {listed(improved) or 'none'}.",
        f"The variant whose worst change against the single adapters is best is {least} "
        f"({signed(min(over_alone[least]))}).",
    ]
    return " ".join(words)


def _variants_table(name: str, step: Figures) -> Table:
    tasks = list(step["alone"])
    heads = [
        f"{title(t)} {what}" for t in tasks for what in ("accuracy", "change", "NLL", "change")
    ]
    rows = [
        [cell("the adapters alone"), cell("–"), *_wide(step["alone"], None, tasks)],
        [cell("exact stack, untrained"), cell("–"), *_wide(step["before"], step["alone"], tasks)],
    ]
    for variant, row in step["variants"].items():
        rows.append(
            [cell(variant), cell(row["what"]), *_wide(row["figures"], step["alone"], tasks)]
        )
    sizes = listed(f"{title(t)} {n:,}" for t, n in step["sizes"].items())
    errors = listed(
        f"{title(t)} ±{_standard_error(first_split(own)):.3f}" for t, own in step["alone"].items()
    )
    return Table(
        f"Stack {name} after further training, on every task it carries",
        ["Variant", "What is trained", *heads],
        rows,
        note=f"{CHANGES}. Trained on {sizes} examples for at most "
        f"{step['recipe']['epochs']} epochs, learning rate {step['recipe']['lr']:g}; standard "
        f"error of an accuracy: {errors}.",
    )


def _wide(figures: Figures, own: Figures | None, tasks: list[str]) -> list[Cell]:
    cells: list[Cell] = []
    for task in tasks:
        row = first_split(figures[task])
        accuracy, change, _, nll, nll_change = _against(row, own and first_split(own[task]))
        cells += [accuracy, change, nll, nll_change]
    return cells


def _summaries(step: Figures) -> Table:
    """The last epoch of every variant under the names of the original's run summaries."""
    variants = step["variants"]
    last = {name: dict(row["history"][-1]) for name, row in variants.items()}
    for row in last.values():
        row |= {name: int(row[name]) for name in WHOLE}
    rows = [[cell(q), *(value(row, q, 5) for row in last.values())] for q in LOGGED]
    return Table(
        "Run summaries, as the original lists them",
        ["Quantity", *variants],
        rows,
        note="Of the last epoch; val/… here is the share held out of train of the tasks trained "
        "on, by which the epoch that is kept was chosen.",
    )


def _original_summaries() -> list[Block]:
    rows = [
        [cell(q), *(cell(figures[q], 5) for figures in anchors.TRAINED.values())] for q in LOGGED
    ]
    heads = [f"trained on {title(task)}" for task in anchors.TRAINED]
    caption = f"The original's run summaries ({anchors.MODEL}, one epoch)"
    return [Table(caption, ["Quantity", *heads], rows)]
