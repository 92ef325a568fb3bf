"""What is reported of a growth: what later tasks cost a task, and what earlier ones gave it.

Shapes: K members, N examples, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bayesian_lora.assessment.evaluation import Figures, evaluate_members, mean_and_sd
from bayesian_lora.composition.column_files import Grown
from bayesian_lora.composition.columns import masked
from bayesian_lora.composition.stack_evaluation import TaskFigures, task_figures
from bayesian_lora.composition.stack_model import build_stack_model, task_predictions
from bayesian_lora.composition.task_data import TaskData, task_spec
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.models.sources import resolve_model
from bayesian_lora.predict import Predictions
from bayesian_lora.progress import Progress
from bayesian_lora.utils.text_table import aligned, span

FIRST = "the first task has no earlier columns"
LEFT_OUT = "the task was not trained alone"


def differences(own: Sequence[str], a: Predictions, b: Predictions) -> Figures:
    """{figure: {mean, sd}} of a member's figure under `a` less its own under `b`."""
    pairs = zip(evaluate_members(own, False, a), evaluate_members(own, False, b), strict=True)
    return mean_and_sd([_difference(x, y) for x, y in pairs])


def _difference(x: Figures, y: Figures) -> Figures:
    row: Figures = {}
    for name in (n for n in x if not n.endswith("_reason")):
        known = x[name] is not None and y[name] is not None
        row[name] = x[name] - y[name] if known else None
        if not known:
            row[f"{name}_reason"] = x.get(f"{name}_reason") or y.get(f"{name}_reason")
    return row


def transfer(
    own: Sequence[str],
    p: Predictions,
    alone: Predictions | None,
    baseline: Mapping[str, float] | None,
) -> Figures | None:
    """{figure: {mean, sd}} of a task on top of earlier columns less those of it trained alone.

    Accuracies above zero and an NLL below say that the earlier tasks helped. None where neither
    predictions nor a `baseline` {figure: value} of the task alone are given.
    """
    if alone is not None:
        return differences(own, p, alone)
    if baseline is None:
        return None
    rows = evaluate_members(own, False, p)
    return mean_and_sd([_difference({n: row[n] for n in baseline}, {**baseline}) for row in rows])


def later(
    spec: TaskSpec, first: np.ndarray, with_mask: Predictions, without: Predictions
) -> dict[str, Any]:
    """An earlier task's entry after a later one.

    first: the logits (K, N, C) right after its own training. Forgetting is the figure then less
    the figure now, so of an accuracy positive, and of an NLL negative, where something was lost.
    """
    then = Predictions(first, with_mask.labels, with_mask.weights, with_mask.example_id)
    return {
        "identical": bool(np.array_equal(first, with_mask.logits)),
        "largest_difference": largest_difference(first, with_mask.logits),
        "masked": task_figures(spec, with_mask),
        "unmasked": task_figures(spec, without),
        "forgetting_masked": differences(spec.metrics, then, with_mask),
        "forgetting_unmasked": differences(spec.metrics, then, without),
    }


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets of logits of one shape."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def masked_figures(
    grown: Grown,
    sets: Mapping[str, Mapping[str, TokenisedSet]],
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    on_predictions: Callable[[str, str, Predictions], None] = lambda *_: None,
) -> TaskFigures:
    """The figures of a growth's tasks, each with its own mask; in all else as `evaluate_stack`.

    On the split whose predictions were kept right after a task's training, and on the same
    examples, ``largest_difference`` is that of any logit from what it was then.
    """
    progress = progress or Progress(quiet=True)
    source = resolve_model(grown.stack.model["name"])
    found: TaskFigures = {}
    progress.start("Evaluating", len(sets))
    for name, own_sets in sets.items():
        own, spec = masked(grown.stack, name), task_spec(grown.stack.tasks[name])
        model, found[name] = build_stack_model(own, device=device, source=source), {}
        for split, data in own_sets.items():
            p = task_predictions(model, own, name, data)
            figures = task_figures(spec, p)
            known = grown.data[name]["evaluation"].get(split) == data.examples.fingerprint()
            if known and split == spec.default_split:
                figures["largest_difference"] = largest_difference(grown.logits[name], p.logits)
            found[name][split] = figures
            on_predictions(name, split, p)
        progress.update(len(found), lambda name=name: name)
    progress.end()
    return found


def data_facts(data: TaskData) -> dict[str, Any]:
    """What a growth remembers of a task's data: sizes, and fingerprints by split."""
    train, held_out = data.train.examples, data.validation.examples
    return {
        "examples": {"train": len(train), "held_out": len(held_out)},
        "train": train.fingerprint(),
        "held_out": held_out.fingerprint(),
        "evaluation": {split: s.examples.fingerprint() for split, s in data.evaluation.items()},
    }


def table(report: Mapping[str, Any]) -> list[str]:
    """Lines for a person: figures, transfer, forgetting and angles of a growth's tasks."""
    found = aligned(_own_rows(report), left=None)
    if any(row["transfer"] for row in report.values()):
        found += ["", "Forward transfer: on top of earlier columns, less the task alone"]
        found += aligned(_transfer_rows(report), left=None)
    if len(report) > 1:
        found += ["", "After later tasks: with the task's mask, and with all columns on"]
        found += aligned(_later_rows(report), left=None)
        found += ["", "New columns to old (in brackets: in random position)"]
        found += aligned(_angle_rows(report), left=None)
    return found


def _own_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for task, row in report.items():
        added = row["parameters"]
        for split, figures in row["after"].items():
            own = [f"{name} {_value(figures, name):.4f}" for name in _names(figures)]
            columns = span(*row["columns"])
            rows.append([task, columns, f"{added['columns']:,} + {added['head']:,}", split, *own])
    return [["task", "columns", "added (columns + head)", "split", "right after training"], *rows]


def _transfer_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for task, row in report.items():
        gains = row["transfer"] or {}
        rows.append([task, *(f"{name} {_signed(gains[name])}" for name in _names(gains))])
    return [row for row in rows if len(row) > 1]


def _later_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for task, row in report.items():
        for after, entry in row["later"].items():
            lost = entry["forgetting_unmasked"]
            same = "identical" if entry["identical"] else f"{entry['largest_difference']:.2g} off"
            own = [f"{name} {_signed(lost[name], -1)}" for name in _names(lost)]
            rows.append([task, after, same, *own])
    return [["task", "after", "its mask", "no mask: change"], *rows]


def _angle_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = [["new", "old", "cosine of the updates", "overlap left", "overlap right"]]
    for task, row in report.items():
        for entry in row["angles"]:
            mean, random = entry["mean"], entry["mean"]["random"]
            cells = [
                f"{_digits(mean[name])} ({sign}{_digits(random[name])})"
                for name, sign in (("cosine", "±"), ("phi_left", ""), ("phi_right", ""))
            ]
            rows.append([task, entry["against"], *cells])
    return rows


def _names(figures: Mapping[str, Any]) -> list[str]:
    """The figures shown, of those that are known."""
    known = [name for name in ("accuracy", "f1", "mcc", "nll") if name in figures]
    return [name for name in known if _value(figures, name) is not None]


def _value(figures: Mapping[str, Any], name: str) -> Any:
    """A figure; of several members the mean of theirs."""
    value = figures.get("single", figures)[name]
    return value["mean"] if isinstance(value, dict) else value


def _signed(spread: Mapping[str, Any], sign: int = 1) -> str:
    sd = "" if spread["sd"] is None else f" (sd {spread['sd']:.4f})"
    return f"{sign * spread['mean'] + 0.0:+.4f}{sd}"


def _digits(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
