"""The data of a stack's tasks: where they come from, what is trained on, what is evaluated."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bayesian_lora.composition.stack import Stack, StackTask
from bayesian_lora.composition.task_data import (
    TaskData,
    evaluation_sets,
    task_spec,
    tokenised,
    trainable_spec,
)
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.preparation import data_folder, load_train
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.setup import ask_hub_once
from bayesian_lora.models.sources import ModelSource, load_pretrained, resolve_model

HELD_OUT = 0.1
"""Of each task's training examples."""
Sets = dict[str, dict[str, TokenisedSet]]
"""task → split → set."""


def find_sources(
    model: str, specs: Iterable[TaskSpec], data_dir: str | None
) -> tuple[ModelSource, Path | None]:
    """The base model and the folder of local data; a hub that is needed is asked once, now.

    Raises:
        InputError: no such model, or a folder that is none.
    """
    source, folder = resolve_model(model), data_folder(data_dir)
    for spec in specs:
        ask_hub_once(spec, source, folder)
    return source, folder


def raw_training(
    tasks: Mapping[str, StackTask],
    folder: Path | None,
    count: int | None,
    seed: int,
    *,
    said_as: str = "examples",
    held_out: float = HELD_OUT,
) -> dict[str, tuple[Examples, Examples | None]]:
    """What each task is trained on and what is held out of it, before any of it is tokenised.

    `said_as`: what a user calls `count`.

    Raises:
        InputError: the first task that cannot be had, or has not `count` examples.
    """
    found = {}
    for name, task in tasks.items():
        try:
            found[name] = load_train(
                trainable_spec(task),
                data_dir=folder,
                train_examples=count,
                validation_share=held_out,
                seed=seed,
            )
        except InputError as error:  # which knows the number by its name in configs
            words = str(error).replace("data.train_examples=", f"{said_as}=")
            raise InputError(f"task {name!r}: {words}") from error
    return found


def training_sets(
    tasks: Mapping[str, StackTask],
    source: ModelSource,
    folder: Path | None,
    count: int | None,
    seed: int,
) -> dict[str, TaskData]:
    """Of each task what is trained on, held out and evaluated.

    Raises:
        InputError: as `raw_training`; sizes before anything is tokenised.
    """
    from transformers import AutoTokenizer

    raw = raw_training(tasks, folder, count, seed)
    tokenizer = load_pretrained(AutoTokenizer, source)
    found = {}
    for name, task in tasks.items():
        train, held_out = raw[name]
        assert held_out is not None
        evaluation = evaluation_sets(task, tokenizer, folder)
        found[name] = tokenised(task, train, held_out, tokenizer, evaluation)
    return found


def load_sets(
    stack: Stack, splits: Mapping[str, Sequence[str] | None], data_dir: str | None
) -> Sets:
    """What the tasks named in `splits` are evaluated on; None is every split but train.

    Raises:
        InputError: a folder that is none, or data or tokenizer that cannot be had.
    """
    from transformers import AutoTokenizer

    specs = [task_spec(stack.tasks[name]) for name in splits]
    source, folder = find_sources(stack.model["name"], specs, data_dir)
    tokenizer = load_pretrained(AutoTokenizer, source)
    return {
        name: evaluation_sets(stack.tasks[name], tokenizer, folder, wanted)
        for name, wanted in splits.items()
    }
