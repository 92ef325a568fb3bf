"""What a study's record says, step by step: figures where a step is done, a reason where not."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from bayesian_lora.data.glue_datasets import TASKS
from bayesian_lora.report.page import Block, Cell, Missing, cell

Record = Mapping[str, Any]
Figures = Mapping[str, Any]

WRITTEN = {"sst2": "SST-2", "cola": "CoLA", "mnli": "MNLI"}
"""Data sets as the original writes them."""
NO_MCC = "MCC is given for the tasks whose own metric it is"
_NAMES: ContextVar[Mapping[str, str] | None] = ContextVar("names of tasks", default=None)


def finished(record: Record, kind: str) -> dict[str, Figures]:
    """The figures of every finished step of a kind, by what follows the kind in its name."""
    return {
        name.partition("-")[2]: entry["figures"]
        for name, entry in record["steps"].items()
        if name.partition("-")[0] == kind and entry["status"] == "finished"
    }


def unfinished(record: Record, kind: str, what: str) -> list[Block]:
    """Why a kind of step has no figures: not asked for, failed, waiting, not made yet."""
    own = {n: e for n, e in record["steps"].items() if n.partition("-")[0] == kind}
    if not own:
        return [Missing(what, "the study's config does not ask for it")]
    found: list[Block] = []
    for entry in own.values():
        if entry["status"] != "finished":
            why = entry["error"] or "this step has not been made yet"
            found.append(Missing(entry["title"], why))
    return found


def first_split(figures: Mapping[str, Figures]) -> Figures:
    """Of a task's {split: figures} those of the default split, which stands first."""
    return next(iter(figures.values()))


def value(figures: Figures | None, name: str, digits: int = 4, reason: str = "") -> Cell:
    """A figure of a mapping, or why it is not there."""
    if figures is None:
        return cell(None, reason=reason)
    why = figures.get(f"{name}_reason") or reason or f"{name} was not recorded"
    return cell(figures.get(name), digits, reason=why)


def difference(
    new: float | None, old: float | None, digits: int = 4, better: int = 1, least: float = 0.0
) -> Cell:
    """new − old with its sign; `better` 1 where more is better, −1 where less is.

    least: a change of this size or less is marked neither good nor bad.
    """
    if new is None or old is None:
        return cell(None, reason="one of the two figures is not there")
    change = new - old
    small = round(change, digits) == 0 or abs(change) <= least
    tone = "" if small else ("good" if change * better > 0 else "bad")
    return Cell(signed(change, digits), tone=tone)


def signed(change: float, digits: int = 3) -> str:
    """With its sign, which a change that rounds to nothing does not have."""
    shown = f"{change:+.{digits}f}"
    return shown[1:] if float(shown) == 0 else shown


def has(figures: Iterable[Figures], name: str) -> bool:
    """Whether one of them knows a figure."""
    return any(row.get(name) is not None for row in figures)


def listed(words: Iterable[str]) -> str:
    """``a, b and c``."""
    given = list(words)
    return " and ".join([", ".join(given[:-1]), given[-1]] if len(given) > 1 else given)


def data_sets(record: Record) -> dict[str, str]:
    """Task → the registry's name of the data set that its baseline was fitted on."""
    known = {spec.title: name for name, spec in TASKS.items()}
    steps = finished(record, "baseline").items()
    return {task: known[step["title"]] for task, step in steps if step["title"] in known}


@contextmanager
def naming(record: Record) -> Iterator[None]:
    """Within it `title` knows the study's tasks: one that only shares a data set's name keeps its
    own."""
    found = data_sets(record)
    foreign = {task: task for task, data in found.items() if task != data}
    token = _NAMES.set({**WRITTEN, **foreign})
    try:
        yield
    finally:
        _NAMES.reset(token)


def title(name: str) -> str:
    """A task's name as it is written where the original writes it otherwise."""
    return (_NAMES.get() or WRITTEN).get(name, name)


def places(figures: Mapping[str, Mapping[str, Figures]]) -> dict[tuple[str, str], str]:
    """(task, split) of {task: {split: figures}} → what the place is called."""
    return {
        (task, split): title(task) if len(splits) == 1 else f"{title(task)} {split}"
        for task, splits in figures.items()
        for split in splits
    }


def standard_error(row: Figures) -> float:
    """Of an accuracy p on n examples: √(p(1 − p)/n)."""
    return math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["n"])


def measured(record: Record) -> str:
    """What the column n says, for a table's note."""
    most = (record["config"].get("evaluation") or {}).get("examples")
    words = "n: examples measured on"
    if most is None:
        return words
    return (
        f"{words}; of a split of more than {most:,}, stacks, growth, gates and what stands alone "
        f"beside them see one fixed part of {most:,}; single runs (baselines, posterior ensembles, "
        "ranks) see all"
    )


def drawn(sizes: Mapping[str, int], recipe: Figures | None) -> str:
    """What a fit saw: of how many examples, in how many batches at most."""
    words = f"Drawn from {listed(f'{n:,} of {title(task)}' for task, n in sizes.items())}"
    if recipe is None:
        return f"{words}; epochs and batches were not recorded"
    steps = recipe["steps_per_epoch"]
    each = f"{steps:,} batches" if steps else "one pass over the largest of them, in batches"
    return f"{words}: at most {recipe['epochs']} epochs of {each} of {recipe['batch_size']}"
