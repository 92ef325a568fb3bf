"""A stack's figures on the tasks it carries, and their table.

Shapes: K members, N examples, C classes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from bayesian_lora.assessment import evaluation, summary
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_model import build_stack_model, stack_state, task_predictions
from bayesian_lora.composition.task_data import task_spec
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.errors import InputError
from bayesian_lora.models.task_heads import TaskModel
from bayesian_lora.predict import Predictions
from bayesian_lora.progress import Progress
from bayesian_lora.utils.text_table import aligned

Figures = dict[str, Any]
TaskFigures = dict[str, dict[str, Figures]]
"""task → split → figures."""
NO_NOISE = "the stack does not know the regression's noise; evaluate the run it came from"


def evaluate_stack(
    stack: Stack,
    sets: Mapping[str, Mapping[str, TokenisedSet]],
    *,
    model: TaskModel | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    on_predictions: Callable[[str, str, Predictions], None] = lambda *_: None,
) -> TaskFigures:
    """Every set's figures: the task's own head on the shared factors, nothing of the other heads.

    Args:
        sets: {task: {split: set}}, of some or all of the stack's tasks.
        model: `build_stack_model(stack)`, to spare building it; the stack's members are loaded.
        device: of the model that is built where none is given.
        on_predictions: is given (task, split, predictions) of each, to be stored.

    Returns:
        As `task_figures`.

    Raises:
        InputError: no sets, a task the stack does not carry, or as `task_spec` and
            `build_stack_model`.
    """
    if not any(sets.values()):
        raise InputError(f"no sets to evaluate on; give some of {', '.join(stack.tasks)}")
    if unknown := sorted(sets.keys() - stack.tasks.keys()):
        raise InputError(
            f"task {unknown[0]!r} is none of the stack's: choose of {', '.join(stack.tasks)}"
        )
    specs = {task: task_spec(stack.tasks[task]) for task in sets}
    progress = progress or Progress(quiet=True)
    if model is None:
        model = build_stack_model(stack, device=device)
    else:
        model.load_chains(stack_state(stack))
    figures: TaskFigures = {task: {} for task in sets}
    progress.start("Evaluating", sum(len(splits) for splits in sets.values()))
    done = 0
    for task, splits in sets.items():
        for split, data in splits.items():
            found = task_predictions(model, stack, task, data)
            figures[task][split] = task_figures(specs[task], found)
            on_predictions(task, split, found)
            done += 1
            progress.update(done, lambda task=task, split=split: f"{task} {split}")
    progress.end()
    return figures


def task_figures(spec: TaskSpec, predictions: Predictions) -> Figures:
    """The mixture of the members as one predictor: n, k, accuracy, nll, ece, brier and the task's
    own figures; of several members also ``single`` ({figure: {mean, sd}} over the members alone)
    and ``uncertainty``; ``truth`` where the law is known.

    A regression's figures are rmse and correlations; its nll is null with the reason where the
    predictions have no noise_std.
    """
    regression = spec.likelihood == "gaussian"
    silent = regression and predictions.noise_std is None
    if silent:  # any will do for what does not depend on it
        ones = np.ones(predictions.num_members)
        predictions = dataclasses.replace(predictions, noise_std=ones)
    own = evaluation.evaluate(spec.metrics, regression, predictions)
    figures: Figures = {"n": len(predictions), "k": predictions.num_members, **own}
    if silent:
        figures |= {"nll": None, "nll_reason": NO_NOISE}
    if predictions.num_members > 1:
        figures["single"] = evaluation.single_members(spec.metrics, regression, predictions)
        if silent:
            figures["single"]["nll"] = {"mean": None, "sd": None, "reason": NO_NOISE}
        figures["uncertainty"] = evaluation.uncertainty(regression, predictions)
    return {**figures, **evaluation.against_truth(predictions)}


def table(figures: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """Lines for a person: a row per task and split, columns of those figures that any row has.

    Below stand the reasons of figures that a row should have and has not.
    """
    rows = [(task, split, f) for task, splits in figures.items() for split, f in splits.items()]
    names = [n for n in summary.SHOWN if any(f.get(n) is not None for *_, f in rows)]
    cells = [["task", "split", "n", *names]]
    for task, split, f in rows:
        cells.append([task, split, str(f["n"]), *(_cell(f, name) for name in names)])
    reasons = {
        f"{task} {split}: no {name}: {f[f'{name}_reason']}": None
        for task, split, f in rows
        for name in names
        if f.get(f"{name}_reason")
    }
    return [*aligned(cells, left=2), *reasons]


def _cell(figures: Figures, name: str) -> str:
    """A figure the task does not have is a dash, one that cannot be computed n/a."""
    if name not in figures:
        return "-"
    return "n/a" if figures[name] is None else f"{figures[name]:.4f}"
