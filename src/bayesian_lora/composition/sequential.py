"""Sequential growth: each task adds columns to the factors and a head; earlier ones stay.

Task t is trained with the columns of the tasks before it active and frozen. A mask takes the
columns after it away again, so that no task's predictions ever change.

Shapes: K members (one grown from each seed), R rank, r columns of one task, N examples, C classes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayesian_lora.composition.column_files import (
    KIND,
    Grown,
    begin,
    check_baselines,
    check_names,
    resumable,
    write_columns,
)
from bayesian_lora.composition.columns import (
    angles,
    appended,
    check_frozen,
    is_factor,
    masked,
    own_part,
    parameters,
    part_of,
)
from bayesian_lora.composition.fit import ChainPlan, FitReport, Recipe, fit
from bayesian_lora.composition.growth_report import FIRST, LEFT_OUT, data_facts, later, transfer
from bayesian_lora.composition.stack import Part, Stack, StackTask
from bayesian_lora.composition.stack_evaluation import task_figures
from bayesian_lora.composition.stack_model import build_stack_model, task_predictions, updated
from bayesian_lora.composition.task_data import TaskData
from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import Precision, build_huggingface_lora_model
from bayesian_lora.models.sources import ModelSource, resolve_model
from bayesian_lora.predict import Predictions
from bayesian_lora.progress import Progress
from bayesian_lora.utils.lock import locked
from bayesian_lora.utils.rng import chain_generators, derive_seed


@dataclass(frozen=True)
class Growth:
    """What grows, and how each task's columns are fitted.

    model: what `resolve_model` takes; rank: r, columns a task; alpha: of one task's columns, so
    that s = α/r for all (None: 8r); members: K, grown side by side from as many seeds;
    target_modules, dtype: as in `build_huggingface_lora_model`.
    """

    model: str
    recipe: Recipe = field(default_factory=Recipe)
    rank: int = 1
    alpha: float | None = None
    target_modules: str | tuple[str, ...] = ("query", "key", "value")
    members: int = 1
    seed: int = 0
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.members < 1 or not self.target_modules:
            raise InputError(
                f"rank {self.rank} a task, {self.members} seeds, layers "
                f"{self.target_modules!r}: give at least 1 of each"
            )
        if self.alpha is not None and not 1e-9 < self.alpha < 1e9:  # also not NaN
            raise InputError(f"alpha={self.alpha}: must be a positive number, such as 8")

    @property
    def scaling(self) -> float:
        """s, a number of 24 bits: s·R/R is then s itself for every rank R, to the last bit."""
        return float(np.float32(8.0 if self.alpha is None else self.alpha / self.rank))

    def settings(self, first: Stack) -> dict[str, Any]:
        """What every task of a growth shares; `first` is the first task's start."""
        return {
            "fingerprint": first.model["fingerprint"],
            "target_modules": list(first.spec.target_modules),
            "rank_per_task": self.rank,
            "scaling": self.scaling,
            "members": self.members,
            "seed": self.seed,
            "dtype": self.dtype,
            **dataclasses.asdict(self.recipe),
        }


def grow(
    growth: Growth,
    tasks: Sequence[StackTask],
    data: Mapping[str, TaskData] | Callable[[], Mapping[str, TaskData]],
    *,
    folder: Path | None = None,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    alone: bool = True,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Grown:
    """Grow task by task; with a folder, each task is kept there once it is done.

    Given again with a longer list of tasks, a folder's growth goes on from the tasks it has.

    Args:
        data: of every task, under its name; or what loads it, called once all else is checked.
        baselines: task → {figure: value} of the task trained alone, which spares that training.
        alone: whether each task from the second on is also trained alone, from the same start and
            in the same order of batches, to measure the forward transfer.

    Raises:
        InputError: tasks that cannot be grown, a total rank over the width of a layer, a folder
            that holds something else or a growth that began otherwise; nothing has been written.
    """
    progress = progress or Progress(quiet=True)
    check_names([task.name for task in tasks])
    if wrong := [task.name for task in tasks if task.likelihood != "categorical"]:
        raise InputError(f"task {wrong[0]!r} is a regression; only classifications are grown")
    source = resolve_model(growth.model)
    first = start(growth, tasks[0], source)
    check_rank(growth, first, len(tasks))
    settings = growth.settings(first)
    if folder is not None:
        resumable(folder, settings, [task.name for task in tasks])
    sets = data() if callable(data) else data
    check_baselines(baselines or {}, {name: found.spec.metrics for name, found in sets.items()})
    facts = {task.name: data_facts(sets[task.name]) for task in tasks}
    work = _Work(growth, source, sets, settings, facts, baselines or {}, alone, device, progress)
    if folder is None:
        return work.run(tasks, None, None)
    resumable(folder, settings, list(facts), facts)  # once more before the folder is made
    with locked(folder):
        grown = resumable(folder, settings, list(facts), facts)
        begin(folder, settings)
        return work.run(tasks, grown, folder)


def start(growth: Growth, task: StackTask, source: ModelSource | None = None) -> Stack:
    """A stack of one task as LoRA starts: A uniform, B zero, the head N(0, initializer_range²).

    Each member's are drawn from (seed, member, task), whatever has grown before.

    Raises:
        InputError: a model or targets that are not to be had.
    """
    purpose, count = f"columns of {task.name}", growth.members
    model = build_huggingface_lora_model(
        source or resolve_model(growth.model),
        task.num_labels,
        rank=growth.rank,
        alpha=growth.scaling * growth.rank,
        target_modules=growth.target_modules,
        chains=count,
        generators=chain_generators(growth.seed, range(count), purpose),
        dtype=growth.dtype,
    )
    state = {n: p.detach().clone() for n, p in model.chain_parameters().items()}
    facts = {
        "name": growth.model,
        "base": model.info.source.public_id,
        "fingerprint": model.fingerprint(),
        "dtype": growth.dtype,
    }
    return Stack(
        facts,
        model.info.spec,
        {task.name: task},
        (Part(task.name, KIND, (0, growth.rank), task=task.name),),
        {name: tensor for name, tensor in state.items() if is_factor(name)},
        {task.name: {name: tensor for name, tensor in state.items() if not is_factor(name)}},
        np.full(count, 1 / count),
        {"kind": KIND},
    )


def check_rank(growth: Growth, first: Stack, tasks: int) -> None:
    """Raises InputError where the columns of so many tasks are more than a layer is wide."""
    for name, tensor in first.factors.items():
        width = tensor.shape[1 if name.endswith(".lora_B") else 2]
        if growth.rank * tasks > width:
            raise InputError(
                f"{tasks} tasks of rank {growth.rank} make rank {growth.rank * tasks}, but "
                f"{name.rpartition('.')[0]} is {width} wide; take a lower --rank-per-task"
            )


@dataclass
class _Work:
    growth: Growth
    source: ModelSource
    data: Mapping[str, TaskData]
    settings: dict[str, Any]
    facts: dict[str, dict[str, Any]]
    baselines: Mapping[str, Mapping[str, float]]
    alone: bool
    device: torch.device | str
    progress: Progress

    def run(self, tasks: Sequence[StackTask], grown: Grown | None, folder: Path | None) -> Grown:
        done = 0 if grown is None else len(grown.stack.tasks)
        for task in tasks[:done]:
            self.progress.say(f"{task.name}: has grown already")
        for task in tasks[done:]:
            grown = self._add(grown, task)
            if folder is not None:
                write_columns(folder, grown)
        assert grown is not None
        return grown

    def _add(self, grown: Grown | None, task: StackTask) -> Grown:
        """One task more."""
        name, spec = task.name, self.data[task.name].spec
        fresh = start(self.growth, task, self.source)
        begun = fresh if grown is None else appended(grown.stack, fresh)
        self.progress.say(f"{name}: {self.growth.rank} of rank {begun.spec.rank}, and a head")
        fitted, report = self._fit(begun, name)
        new = own_part(fitted, name)
        stack = new if grown is None else appended(grown.stack, new)
        found = self._predict(masked(stack, name), name)
        first = found[spec.default_split]
        row = {
            "columns": list(part_of(stack, name).columns),
            "parameters": parameters(stack, name),
            "fit": dataclasses.asdict(report),
            "after": {split: task_figures(spec, p) for split, p in found.items()},
            **self._transfer(grown, fresh, first),
            "angles": angles(stack, name),
            "later": {},
        }
        rows = {} if grown is None else self._later(grown, stack, name)
        logits = {} if grown is None else grown.logits
        facts = {t: self.facts[t] for t in stack.tasks}
        return Grown(
            stack, {**rows, name: row}, self.settings, facts, {**logits, name: first.logits}
        )

    def _fit(self, stack: Stack, task: str) -> tuple[Stack, FitReport]:
        """The stack up to a task, whose own columns and head are fitted; all else is as it was."""
        own = masked(stack, task)
        model = build_stack_model(own, device=self.device, source=self.source)
        plan = ChainPlan(tasks=(task,), columns=part_of(own, task).columns)
        report = fit(
            model,
            self.data,
            [plan] * len(own),
            self.growth.recipe,
            seed=derive_seed(self.growth.seed, 0, f"growth of {task}"),
            progress=self.progress,
        )
        fitted = updated(own, model.chain_parameters())
        check_frozen(own, fitted, part_of(own, task).columns[0])
        return fitted, report

    def _predict(self, own: Stack, task: str) -> dict[str, Predictions]:
        """A task's predictions by split, from the columns it knows."""
        model = build_stack_model(own, device=self.device, source=self.source)
        sets = self.data[task].evaluation
        return {split: task_predictions(model, own, task, data) for split, data in sets.items()}

    def _transfer(self, grown: Grown | None, fresh: Stack, top: Predictions) -> dict[str, Any]:
        """What the earlier columns gave a task: against the same start fitted without them."""
        (name,) = fresh.tasks
        spec, baseline = self.data[name].spec, self.baselines.get(name)
        if grown is None or (baseline is None and not self.alone):
            why = FIRST if grown is None else LEFT_OUT
            return {"alone": None, "transfer": None, "transfer_reason": why}
        if baseline is not None:
            given = transfer(spec.metrics, top, None, baseline)
            return {"alone": dict(baseline), "transfer": given}
        self.progress.say(f"{name} alone, from the same start")
        own, _ = self._fit(fresh, name)
        alone = self._predict(own, name)[spec.default_split]
        return {
            "alone": task_figures(spec, alone),
            "transfer": transfer(spec.metrics, top, alone, None),
        }

    def _later(self, grown: Grown, stack: Stack, new: str) -> dict[str, dict[str, Any]]:
        """The earlier tasks' rows, each with what the new task has done to it."""
        whole = build_stack_model(stack, device=self.device, source=self.source)
        rows = {}
        for task, row in grown.report.items():
            spec = self.data[task].spec
            data = self.data[task].evaluation[spec.default_split]
            own = masked(stack, task)
            model = build_stack_model(own, device=self.device, source=self.source)
            with_mask = task_predictions(model, own, task, data)
            without = task_predictions(whole, stack, task, data)
            entry = later(spec, grown.logits[task], with_mask, without)
            rows[task] = {**row, "later": {**row["later"], new: entry}}
        return rows
