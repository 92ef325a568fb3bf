"""`bayesian-lora eval STACK`: every task that a stack carries, on its splits.

Shapes: K members, N examples.
"""

import time
from pathlib import Path
from typing import Any

import torch

from bayesian_lora.composition.column_files import is_grown, read_columns
from bayesian_lora.composition.growth_report import masked_figures
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_evaluation import TaskFigures, evaluate_stack, table
from bayesian_lora.composition.stack_files import read_stack
from bayesian_lora.composition.task_data import task_spec
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.building import resolve_device
from bayesian_lora.experiment.task_sets import Sets, load_sets
from bayesian_lora.predict import Predictions
from bayesian_lora.progress import Progress
from bayesian_lora.utils.files import write_json, write_npz

AllPredictions = dict[tuple[str, str], Predictions]
"""(task, split) → predictions."""


def evaluate_folder(
    folder: str | Path,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a stack on every task it carries, print the table and store figures and predictions.

    Args:
        folder: the stack's; `metrics.json` (with a split `metrics.<split>.json`) and
            `predictions/<task>.<split>.npz` are written there once everything is evaluated.
        split: of those tasks that have it; None is every split but train.
        data_dir: of real data; None is the environment's BAYESIAN_LORA_DATA, or else the hub.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:<number>`` or ``mps``.

    Returns:
        The contents of `metrics.json`: ``tasks`` {task: {split: figures}}, and what the stack is.

    Raises:
        InputError: no stack there or a damaged one, a split that no task has, no data, or another
            base model than the adapters'.
    """
    began = time.monotonic()
    root, progress = Path(folder), progress or Progress()
    stack = read_stack(root)
    splits = chosen_splits(stack, split)
    place = resolve_device(device)
    progress.say(f"Stack of {_count(len(stack.parts), 'adapter')} in {root}")
    sets = load_sets(stack, splits, data_dir)
    tasks, predictions = _evaluate(root, stack, sets, place, progress)
    value = {
        "stack": {"kind": stack.facts.get("kind"), "parts": [part.name for part in stack.parts]},
        "k": len(stack),
        "tasks": tasks,
        "eval_s": round(time.monotonic() - began, 2),
    }
    _store(root, split, value, predictions)
    for line in table(tasks):
        progress.say(line)
    return value


def _evaluate(
    root: Path, stack: Stack, sets: Sets, device: torch.device, progress: Progress
) -> tuple[TaskFigures, AllPredictions]:
    """{task: {split: figures}} and {(task, split): predictions} of the stack in the folder `root`:
    what lies beside `stack.json` says how its members predict, nothing there that they do so as
    they stand.
    """
    found: AllPredictions = {}

    def keep(task: str, split: str, predictions: Predictions) -> None:
        found[task, split] = predictions

    if is_grown(root):
        grown = read_columns(root)
        tasks = masked_figures(grown, sets, device=device, progress=progress, on_predictions=keep)
        return tasks, found
    tasks = evaluate_stack(stack, sets, device=device, progress=progress, on_predictions=keep)
    return tasks, found


def chosen_splits(stack: Stack, split: str | None) -> dict[str, list[str] | None]:
    """{task: its splits to be evaluated} of the tasks that have any; None is all but train.

    Raises:
        InputError: a task that is not in the registry, or a split that no task has.
    """
    specs = {name: task_spec(task) for name, task in stack.tasks.items()}
    if split is None:
        return dict.fromkeys(specs)
    if found := {name: [split] for name, spec in specs.items() if split in spec.splits}:
        return dict(found)
    known = "; ".join(f"{name}: {', '.join(spec.splits)}" for name, spec in specs.items())
    raise InputError(f"split {split!r}: no task of this stack has it; choose of {known}")


def _store(
    root: Path, split: str | None, value: dict[str, Any], predictions: AllPredictions
) -> None:
    """Figures and predictions into the stack's folder; a split alone leaves `metrics.json`."""
    for (task, name), found in predictions.items():
        arrays = {key: x for key, x in vars(found).items() if x is not None}
        write_npz(root / "predictions" / f"{task}.{name}.npz", arrays)
    write_json(root / ("metrics.json" if split is None else f"metrics.{split}.json"), value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
