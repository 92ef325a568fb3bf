"""The data of a stack's tasks: what is trained on, held out of it, and evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesian_lora.composition.stack import StackTask
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.glue_datasets import get_task, load_split
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.data.token_cache import default_folder
from bayesian_lora.errors import InputError


@dataclass(frozen=True)
class TaskData:
    """One task's sets; `evaluation` by split, the default one first."""

    spec: TaskSpec
    train: TokenisedSet
    validation: TokenisedSet
    evaluation: Mapping[str, TokenisedSet]


def task_spec(task: StackTask) -> TaskSpec:
    """The task of the registry.

    Raises:
        InputError: not in the registry, or with other labels than the stack's head.
    """
    spec = get_task(task.data)
    if spec.num_labels != task.num_labels:
        raise InputError(
            f"task {task.name!r}: its head has {task.num_labels} outputs, {spec.name} needs "
            f"{spec.num_labels}; name the task it was trained on"
        )
    return spec


def evaluation_sets(
    task: StackTask, tokenizer: Any, data_dir: Path | None, splits: Sequence[str] | None = None
) -> dict[str, TokenisedSet]:
    """The task's splits other than train, or those given, tokenised; the default one first.

    Raises:
        InputError: as `task_spec`, or a split that cannot be read.
    """
    spec = task_spec(task)
    others = [name for name in spec.splits if name not in ("train", spec.default_split)]
    names = [spec.default_split, *others] if splits is None else list(splits)
    cache = default_folder()
    return {
        name: TokenisedSet(
            load_split(spec, name, data_dir=data_dir), tokenizer, task.max_length, cache
        )
        for name in names
    }


def trainable_spec(task: StackTask) -> TaskSpec:
    """As `task_spec`, of a task that stacks are trained on.

    Raises:
        InputError: as `task_spec`, or a regression.
    """
    spec = task_spec(task)
    if spec.likelihood != "categorical":
        raise InputError(
            f"task {task.name!r} is a regression; stacks are trained and gated on classifications"
        )
    return spec


def tokenised(
    task: StackTask,
    train: Examples,
    held_out: Examples,
    tokenizer: Any,
    evaluation: Mapping[str, TokenisedSet],
) -> TaskData:
    """A task's data from its examples."""
    cache = default_folder()
    return TaskData(
        task_spec(task),
        TokenisedSet(train, tokenizer, task.max_length, cache),
        TokenisedSet(held_out, tokenizer, task.max_length, cache),
        evaluation,
    )
