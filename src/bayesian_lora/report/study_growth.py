"""The observations' section on a stack grown task by task."""

from collections.abc import Mapping
from typing import Any

from bayesian_lora.report.page import Block, Cell, Missing, Section, Table, Text, cell
from bayesian_lora.report.record import (
    NO_MCC,
    Figures,
    Record,
    difference,
    finished,
    first_split,
    listed,
    measured,
    places,
    signed,
    standard_error,
    title,
    unfinished,
    value,
)
from bayesian_lora.report.study_subspaces import NO_DIRECTION, degrees


def sequential(record: Record) -> Section:
    """Growth task by task: what stays, what is forgotten without masks, what transfers."""
    steps = finished(record, "sequential")
    blocks: list[Block] = []
    for step in steps.values():
        blocks += [Text(words, "answer") for words in (_kept(step), _helped(step)) if words]
        blocks += [_growth_table(step, measured(record))]
        blocks += _later_table(step) + _angle_table(step)
    blocks += unfinished(record, "sequential", "Sequential growth")
    return Section("Sequential growth", "sequential", blocks)


def _kept(step: Figures) -> str:
    later = [row for task in step["tasks"].values() for row in task["later"].values()]
    if not later:
        return "One task alone has grown, so there is nothing to forget."
    largest = max(row["largest_difference"] for row in later)
    if all(row["identical"] for row in later):
        return (
            "With masks every earlier task's predictions are bit for bit what they were after its "
            "own training."
        )
    return f"With masks no logit of an earlier task moved by more than {largest:.2g}."


def _helped(step: Figures) -> str:
    """What earlier columns gave the later tasks, beside the accuracies' own error."""
    gains = []
    for task in step["order"]:
        gain = (step["tasks"][task]["transfer"] or {}).get("accuracy", {}).get("mean")
        if gain is not None:
            error = standard_error(first_split(step["tasks"][task]["after"]))
            gains.append(f"{title(task)}'s by {signed(gain)} (standard error {error:.3f})")
    if not gains:
        return ""
    return f"On top of earlier columns, against alone, accuracy changes: {listed(gains)}."


def _growth_table(step: Figures, seen: str) -> Table:
    rows = []
    for task in step["order"]:
        row = step["tasks"][task]
        for n, (split, own) in enumerate(row["after"].items()):
            adds = row["parameters"]["columns"] + row["parameters"]["head"]
            rows.append(
                [
                    cell(places({task: row["after"]})[task, split]),
                    cell(_columns(*row["columns"])),
                    cell(adds),
                    cell(own["n"]),
                    value(own, "accuracy"),
                    value(own, "mcc", reason=NO_MCC),
                    value(own, "nll"),
                    *(_transfer(row, name, first=n == 0) for name in ("accuracy", "mcc", "nll")),
                ]
            )
    columns = ["Task", "Columns", "Parameters added", "n", "Accuracy", "MCC", "NLL"]
    return Table(
        f"Grown in the order {', '.join(map(title, step['order']))}",
        [*columns, *(f"Forward transfer: {name}" for name in ("accuracy", "MCC", "NLL"))],
        rows,
        note="Columns are counted from 1. Forward transfer: the figure on top of the earlier "
        "columns less that of the same start trained alone; an accuracy above 0 and an NLL below 0 "
        f"say that they helped. NLL in nats. {seen}.",
    )


def _columns(start: int, stop: int) -> str:
    """Of ``start`` to ``stop − 1``, counted from 0, as a person counts."""
    return str(stop) if stop == start + 1 else f"{start + 1}–{stop}"


def _transfer(row: Figures, name: str, *, first: bool) -> Cell:
    if not first:
        return cell(None, reason="forward transfer is measured on the default split alone")
    if row["transfer"] is None:
        return cell(None, reason=row.get("transfer_reason") or "the task alone was not trained")
    gain = row["transfer"].get(name) or {"mean": None, "reason": NO_MCC if name == "mcc" else ""}
    return value(gain, "mean", reason=gain.get("reason", ""))


def _later_table(step: Figures) -> list[Block]:
    rows = []
    for task, row in step["tasks"].items():
        for after, found in row["later"].items():
            then, masked, without = first_split(row["after"]), found["masked"], found["unmasked"]
            rows.append(
                [
                    cell(title(task)),
                    cell(title(after)),
                    cell(found["identical"]),
                    cell(found["largest_difference"]),
                    cell(masked["n"]),
                    value(masked, "accuracy"),
                    value(without, "accuracy"),
                    difference(without["accuracy"], then["accuracy"]),
                    value(masked, "mcc", reason=NO_MCC),
                    value(without, "mcc", reason=NO_MCC),
                    difference(without["nll"], then["nll"], better=-1),
                ]
            )
    if not rows:
        return [Missing("Forgetting", "one task alone has grown")]
    columns = ["Task", "After", "Identical with mask", "Largest difference of a logit", "n"]
    columns += ["Accuracy with mask", "without", "change without", "MCC with mask", "without"]
    return [
        Table(
            "What later tasks change for earlier ones",
            [*columns, "NLL change without"],
            rows,
            note="On each task's default split; NLL in nats.",
        )
    ]


def _angle_table(step: Figures) -> list[Block]:
    rows = []
    for task, found in step["tasks"].items():
        for against in found["angles"]:
            mean: Mapping[str, Any] = against["mean"]
            chance = mean["random"]
            rows.append(
                [
                    cell(title(task)),
                    cell(title(against["against"])),
                    value(mean, "cosine", reason=NO_DIRECTION),
                    cell(chance["cosine"]),
                    degrees(mean["angle_left"]),
                    degrees(mean["angle_right"]),
                    value(mean, "phi_left", reason=NO_DIRECTION),
                    cell(chance["phi_left"]),
                    value(mean, "phi_right", reason=NO_DIRECTION),
                    cell(chance["phi_right"]),
                ]
            )
    columns = ["New columns", "Earlier columns", "Cosine of ΔW", "by chance (rms)"]
    columns += ["Angle left", "Angle right", "φ left", "by chance", "φ right"]
    caption = "How new columns lie to earlier ones, means over the modules"
    return [Table(caption, [*columns, "by chance"], rows)] if rows else []
