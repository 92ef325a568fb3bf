"""The observations' section on a stack grown task by task."""

from collections.abc import Mapping
from typing import Any

from bayesian_lora.report.page import Block, Missing, Section, Table, Text, cell
from bayesian_lora.report.record import (
    Figures,
    Record,
    difference,
    finished,
    first_split,
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
        blocks += [Text(_kept(step), "answer"), _growth_table(step)]
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


def _growth_table(step: Figures) -> Table:
    rows = []
    for task in step["order"]:
        row = step["tasks"][task]
        own, transfer = first_split(row["after"]), row["transfer"]
        why = row.get("transfer_reason") or "the task alone was not trained"
        gains = [(transfer or {}).get(n) or {} for n in ("accuracy", "nll")]
        rows.append(
            [
                cell(title(task)),
                cell("–".join(str(n) for n in row["columns"])),
                cell(row["parameters"]["columns"] + row["parameters"]["head"]),
                value(own, "accuracy"),
                value(own, "nll"),
                *(value(gain, "mean", reason=why) for gain in gains),
            ]
        )
    columns = ["Task", "Columns", "Parameters added", "Accuracy", "NLL"]
    return Table(
        f"Grown in the order {', '.join(map(title, step['order']))}",
        [*columns, "Forward transfer: accuracy", "Forward transfer: NLL"],
        rows,
        note="Forward transfer: the figure on top of the earlier columns less that of the same "
        "start trained alone; an accuracy above 0 and an NLL below 0 say that they helped.",
    )


def _later_table(step: Figures) -> list[Block]:
    rows = []
    for task, row in step["tasks"].items():
        for after, found in row["later"].items():
            then = first_split(row["after"])
            rows.append(
                [
                    cell(title(task)),
                    cell(title(after)),
                    cell(found["identical"]),
                    cell(found["largest_difference"]),
                    value(found["masked"], "accuracy"),
                    value(found["unmasked"], "accuracy"),
                    difference(found["unmasked"]["accuracy"], then["accuracy"]),
                    difference(found["unmasked"]["nll"], then["nll"], better=-1),
                ]
            )
    if not rows:
        return [Missing("Forgetting", "one task alone has grown")]
    columns = ["Task", "After", "Identical with mask", "Largest difference of a logit"]
    columns += ["Accuracy with mask", "without", "change without", "NLL change without"]
    return [Table("What later tasks change for earlier ones", columns, rows)]


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
                    value(mean, "phi_right", reason=NO_DIRECTION),
                    cell(chance["phi_left"]),
                ]
            )
    columns = ["New columns", "Earlier columns", "Cosine of ΔW", "by chance (rms)"]
    columns += ["Angle left", "Angle right", "φ left", "φ right", "φ by chance"]
    caption = "How new columns lie to earlier ones, means over the modules"
    return [Table(caption, columns, rows)] if rows else []
