"""`bayesian-lora gate`: a gate trained over a stack's adapters, measured without task labels."""

from pathlib import Path
from typing import Any

from bayesian_lora.composition.experts import experts_of
from bayesian_lora.composition.gate_files import load_gated, write_gated
from bayesian_lora.composition.gate_report import evaluate_gate, table
from bayesian_lora.composition.gates import Gated, GateOptions, train_gate
from bayesian_lora.composition.stack_files import read_stack
from bayesian_lora.composition.stack_model import load_tokenizer
from bayesian_lora.composition.task_data import evaluation_sets, task_spec
from bayesian_lora.data.preparation import data_folder
from bayesian_lora.experiment.building import resolve_device
from bayesian_lora.experiment.compose import HISTORY, Training, free_folder
from bayesian_lora.progress import Progress
from bayesian_lora.utils.files import write_json
from bayesian_lora.utils.metrics_log import MetricsLog

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
    stack = read_stack(Path(source))
    folder = free_folder(out, Path(f"{source.rstrip('/')}-gated"))
    experts_of(stack, options.top_k)
    recipe, device = training.recipe(), resolve_device(training.device)
    data = training.data(stack)
    names = ", ".join(part.name for part in stack.parts)
    progress.say(f"A {options.kind} gate over {names}, of {len(stack)} member(s)")
    for task, own in data.items():
        progress.say(f"  {task}: {len(own.train)} train, {len(own.validation)} held out")
    gated = train_gate(
        stack, data, options, recipe, seed=training.seed, progress=progress, device=device
    )
    sets = {task: next(iter(own.evaluation.values())) for task, own in data.items()}
    figures = evaluate_gate(gated.model(device=device), stack.weights, sets, _own_metrics(gated))
    write_gated(folder, gated)
    write_json(folder / METRICS_FILE, figures)
    if rows := gated.report.get("history"):
        log = MetricsLog(folder, HISTORY)
        for row in rows:
            log.log(row)
        log.close()
    _tell(figures, progress)
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
    progress = progress or Progress()
    gated, place = load_gated(folder), resolve_device(device)
    where, tokenizer = data_folder(data_dir, "--data-dir"), load_tokenizer(gated.stack)
    sets = {
        name: next(
            iter(evaluation_sets(task, tokenizer, where, [task_spec(task).default_split]).values())
        )
        for name, task in gated.stack.tasks.items()
    }
    model = gated.model(device=place)
    figures = evaluate_gate(model, gated.stack.weights, sets, _own_metrics(gated))
    write_json(Path(folder) / METRICS_FILE, figures)
    _tell(figures, progress)
    return figures


def _own_metrics(gated: Gated) -> dict[str, tuple[str, ...]]:
    return {name: task_spec(task).metrics for name, task in gated.stack.tasks.items()}


def _tell(figures: dict[str, Any], progress: Progress) -> None:
    progress.say("\nWithout being told the task:")
    for line in table(figures):
        progress.say(line)
