"""What the steps of a study share: its settings, what earlier steps made, data read once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bayesian_lora.composition.fit import Recipe
from bayesian_lora.composition.sources import Source, read_source
from bayesian_lora.composition.stack import Stack, StackTask
from bayesian_lora.composition.stack_evaluation import (
    TaskFigures,
    evaluate_stack,
    task_figures,
)
from bayesian_lora.composition.stack_files import read_stack
from bayesian_lora.composition.stack_model import load_tokenizer
from bayesian_lora.composition.task_data import TaskData, task_spec, tokenised
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import stratified_subset
from bayesian_lora.data.glue_datasets import load_split
from bayesian_lora.data.preparation import fixed_part
from bayesian_lora.data.token_cache import default_folder
from bayesian_lora.ensemble import Ensemble, load_model
from bayesian_lora.experiment.building import resolve_device
from bayesian_lora.experiment.setup import data_folder, load_training_data
from bayesian_lora.experiment.study_config import Study
from bayesian_lora.experiment.study_schema import RecipeConfig
from bayesian_lora.progress import Progress

Figures = dict[str, Any]
Sets = dict[str, dict[str, TokenisedSet]]


@dataclass(frozen=True)
class Step:
    """A part of a study: `make` writes into its folder and returns its figures, as JSON has them.

    settings: whatever they depend on, beside the steps in `needs`; resumes: whether `make` goes on
    with what an interrupted one has left in the folder, which else is removed.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    make: Callable[["Context", Path], Figures]
    needs: tuple[str, ...] = ()
    resumes: bool = False


class Context:
    """A study under way. `figures`: of each finished step, by its name."""

    def __init__(self, study: Study, progress: Progress) -> None:
        self.study, self.progress = study, progress
        self.figures: dict[str, Figures] = {}
        self._sources: dict[str, Source] = {}
        self._data: dict[tuple[Any, ...], TaskData] = {}
        self._sets: dict[str, dict[str, TokenisedSet]] = {}
        self._tokenizer: Any = None

    def folder(self, step: str) -> Path:
        """A step's folder."""
        return self.study.root / step

    @property
    def seed(self) -> int:
        """Of everything that is not a run."""
        return self.study.config.seed

    @cached_property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return resolve_device(self.study.config.device)

    @cached_property
    def data_dir(self) -> Path | None:
        """The folder of local data."""
        return data_folder(next(iter(self.study.baselines.values())))

    def source(self, task: str) -> Source:
        """A task's baseline, called as the task is."""
        if task not in self._sources:
            self._sources[task] = read_source(f"{task}={run_folder(self, f'baseline-{task}')}")
        return self._sources[task]

    def stack(self, name: str) -> Stack:
        """A stack of the study, exactly stacked."""
        return read_stack(self.folder(f"stack-{name}") / "exact")

    def tokenizer(self, stack: Stack) -> Any:
        """All of a study's stacks are on one base."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(stack)
        return self._tokenizer

    def sets(self, stack: Stack) -> Sets:
        """What the stack's tasks are evaluated on: `evaluation` of the config says how much."""
        return {name: self._evaluation(task, stack) for name, task in stack.tasks.items()}

    def _evaluation(self, task: StackTask, stack: Stack) -> dict[str, TokenisedSet]:
        if task.name not in self._sets:
            spec, given = task_spec(task), self.study.config.evaluation
            others = [s for s in spec.splits if s not in ("train", spec.default_split)]
            splits = [spec.default_split, *(others if given.splits == "all" else ())]
            self._sets[task.name] = {}
            for split in splits:
                data = load_split(spec, split, data_dir=self.data_dir)
                if given.examples is not None:
                    data = fixed_part(data, given.examples, self.seed)
                self._sets[task.name][split] = TokenisedSet(
                    data, self.tokenizer(stack), task.max_length, default_folder()
                )
        return self._sets[task.name]

    def data(self, stack: Stack, recipe: RecipeConfig) -> dict[str, TaskData]:
        """Train, held-out and evaluation sets of a stack's tasks."""
        return {name: self.task_data(task, stack, recipe) for name, task in stack.tasks.items()}

    def task_data(self, task: StackTask, stack: Stack, recipe: RecipeConfig) -> TaskData:
        """The sets of one task, which a stack of the same base says how to read."""
        key = (task.name, recipe.train_examples)
        if key not in self._data:
            spec, own = task_spec(task), self.study.baselines[task.name]
            # What its adapter was fitted on and what was held out of that, so that nothing held
            # out here has been seen by an adapter.
            train, held_out = load_training_data(own, spec, self.data_dir)
            assert held_out is not None
            if recipe.train_examples is not None and recipe.train_examples < len(train):
                train = stratified_subset(train, recipe.train_examples, self.seed)
            evaluation = self._evaluation(task, stack)
            self._data[key] = tokenised(task, train, held_out, self.tokenizer(stack), evaluation)
        return self._data[key]

    def evaluate(self, stack: Stack, tasks: Sequence[str] | None = None) -> TaskFigures:
        """task → split → figures of a stack, on all its tasks or those given."""
        sets = self.sets(stack)
        chosen = {task: sets[task] for task in tasks or stack.tasks}
        return evaluate_stack(stack, chosen, device=self.device, progress=self.progress)

    def evaluate_run(self, step: str, task: str, stack: Stack) -> dict[str, Figures]:
        """split → figures of the ensemble of a run's step, on what the stack is evaluated on."""
        ensemble = Ensemble.load(run_folder(self, step))
        model = load_model(ensemble.provenance, self.device)
        spec = task_spec(stack.tasks[task])
        return {
            split: task_figures(spec, ensemble.predict_set(model, data))
            for split, data in self._evaluation(stack.tasks[task], stack).items()
        }


def run_folder(context: Context, step: str) -> Path:
    """Where the run of a step that is one lies."""
    return context.folder(step) / "run"


def recipe_of(config: RecipeConfig) -> Recipe:
    """How chains are fitted, without what says which examples."""
    return Recipe(
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        patience=config.patience,
        prior_std=config.prior_std,
        steps_per_epoch=config.steps_per_epoch,
    )
