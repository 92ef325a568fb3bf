"""Data of several tasks: what cannot be is said before any of it is tokenised."""

from pathlib import Path
from typing import Any

import pytest

from bayesian_lora.composition import task_data
from bayesian_lora.composition.stack import StackTask
from bayesian_lora.data.preparation import load_train
from bayesian_lora.errors import InputError
from bayesian_lora.experiment import task_sets
from bayesian_lora.experiment.task_sets import raw_training, training_sets
from bayesian_lora.models.sources import resolve_model

LABELS = ("negative", "positive")
TASKS = {name: StackTask(name, "synthetic", LABELS, "categorical", 32) for name in ("one", "two")}


def test_sizes_are_checked_before_anything_is_tokenised(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def second_is_small(*args: Any, train_examples: int, **options: Any) -> Any:
        asked.append(train_examples)
        most = 90000 if len(asked) == 2 else 40
        return load_train(*args, train_examples=most, **options)

    def tokenised(*_: object) -> None:
        raise AssertionError("tokenised")

    monkeypatch.setattr(task_sets, "load_train", second_is_small)
    monkeypatch.setattr(task_data, "TokenisedSet", tokenised)
    with pytest.raises(InputError, match=r"^task 'two': examples=90000: 90000 .* ask for less$"):
        training_sets(TASKS, resolve_model(str(tiny_models["bert"])), None, 40, 0)


def test_training_sets_are_what_was_asked_for(tiny_models: dict[str, Path]) -> None:
    source = resolve_model(str(tiny_models["bert"]))
    found = training_sets(TASKS, source, None, 40, 0)
    for name, own in found.items():
        assert (len(own.train), len(own.validation)) == (36, 4)
        assert list(own.evaluation) == ["validation", "shifted"]
        texts = raw_training({name: TASKS[name]}, None, 40, 0)[name][0].texts
        assert own.train.examples.texts == texts
    whole = raw_training(TASKS, None, 40, 0, held_out=0.0)
    assert {name: len(own) for name, (own, _) in whole.items()} == {"one": 40, "two": 40}
