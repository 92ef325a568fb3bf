"""`bayesian-lora gate`: a gate trained over a stack's adapters, measured without task labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bayesian_lora.composition.experts import experts_of
from bayesian_lora.composition.gate_files import (
    SECTION,
    is_gated,
    load_gated,
    write_gated,
)
from bayesian_lora.composition.gate_report import evaluate_gate, table
from bayesian_lora.composition.gates import Gated, GateOptions, train_gate
from bayesian_lora.composition.stack_files import is_stack, read_extra
from bayesian_lora.composition.task_data import task_spec
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.experiment.building import resolve_device
from bayesian_lora.experiment.compose import Training, free_folder, read_ordinary, write_history
from bayesian_lora.experiment.task_sets import load_sets
from bayesian_lora.progress import Progress
from bayesian_lora.utils.files import write_json

METRICS_FILE = "gate_metrics.json"


def gate_folder(
    source: str,
    out: str | None,
    *,
    options: GateOptions,
    training: Training,
    progress: Progress | None = None,
) -> Path:
    """Read a stack, train a gate, measure it, write both; the new folder.

    Raises:
        InputError: as `train_gate`, no stack at `source`, or `out` holds something.
    """
    progress = progress or Progress()
    stack = read_ordinary(source)
    folder = free_folder(out, f"{source.rstrip('/')}-gated")
    experts_of(stack, options.top_k)
    recipe, device = training.recipe(), resolve_device(training.device)
    names = ", ".join(part.name for part in stack.parts)
    progress.say(f"A {options.kind} gate over {names}, of {len(stack)} member(s)")
    data, sets = training.data(stack, list(stack.tasks), progress)
    gated = train_gate(
        stack, data, options, recipe, seed=training.seed, progress=progress, device=device
    )
    write_gated(folder, gated)
    if rows := gated.report.get("history"):
        write_history(folder, rows)
    _measure(folder, gated, sets, device, progress)
    again = f"bayesian-lora gate {folder} --eval"
    progress.say(f"\nWritten: {folder}\nEvaluate it again: {again}")
    return folder


def evaluate_gated(
    folder: str | Path,
    *,
    data_dir: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A gated stack on the mixture of its tasks' default splits, told and stored in its folder.

    Returns:
        As `evaluate_gate`.

    Raises:
        InputError: as `load_gated`, no data, or another base model than the adapters'.
    """
    gated, place = load_gated(folder), resolve_device(device)
    tasks = gated.stack.tasks.items()
    splits = {name: [task_spec(task).default_split] for name, task in tasks}
    sets = load_sets(gated.stack, splits, data_dir)
    return _measure(Path(folder), gated, sets, place, progress or Progress())


def has_gate(folder: str | Path) -> bool:
    """Whether a folder is a gated stack's, also one that a file of it is missing from."""
    return is_gated(folder) or (is_stack(folder) and SECTION in read_extra(folder))


def _measure(
    folder: Path,
    gated: Gated,
    sets: Mapping[str, Mapping[str, TokenisedSet]],
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """On each task's first split."""
    own = {name: task_spec(task).metrics for name, task in gated.stack.tasks.items()}
    first = {name: next(iter(splits.values())) for name, splits in sets.items()}
    figures = evaluate_gate(gated.model(device=device), gated.stack.weights, first, own)
    write_json(folder / METRICS_FILE, figures)
    progress.say("\nWithout being told the task:")
    for line in table(figures):
        progress.say(line)
    return figures
