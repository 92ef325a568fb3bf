"""Tasks made of data sets outside the registry, and loading them from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bayesian_lora.data.glue_datasets import load_split
from bayesian_lora.data.tasks import TaskSpec, custom_task
from bayesian_lora.errors import InputError


def make(**changes: Any) -> TaskSpec:
    arguments: dict[str, Any] = {
        "text_columns": ["body"],
        "label_column": "y",
        "label_names": ["no", "yes"],
    }
    return custom_task("me/set", **(arguments | changes))


def test_a_classification_on_the_hub() -> None:
    task = make(hub_config="small", train_split="tr", eval_split="dev")
    assert (task.hub_path, task.hub_config) == ("me/set", "small")
    assert task.splits == {"train": "tr", "dev": "dev"}
    assert task.default_split == "dev"
    assert (task.likelihood, task.num_labels, task.metrics) == ("categorical", 2, ("accuracy",))
    assert task.files is None


def test_a_regression() -> None:
    task = make(label_names=[], regression=True)
    assert (task.likelihood, task.num_labels) == ("gaussian", 1)
    assert task.metrics == ("pearson", "spearman")


def test_files_add_splits_beside_the_two() -> None:
    files = {"train": "a.csv", "validation": "b.csv", "shifted": "c.csv"}
    task = make(files=files)
    assert task.splits == {"train": "train", "validation": "validation", "shifted": "shifted"}
    assert task.files == {split: Path(path) for split, path in files.items()}
    assert task.hub_path is None
    assert make(files={}).hub_path == "me/set"


def test_training_reads_the_named_training_split_even_beside_one_called_train() -> None:
    files = {"train": "a.csv", "small": "b.csv", "dev": "c.csv"}
    task = make(files=files, train_split="small", eval_split="dev")
    assert task.splits == {"train": "small", "dev": "dev"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_columns": []}, r"data\.text_columns \[\]: must name 1 or 2"),
        ({"text_columns": ["a", "b", "c"]}, r"must name 1 or 2 columns"),
        ({"label_names": []}, r"data\.label_names \[\]: a classification needs at least 2"),
        ({"label_names": ["one"]}, r"at least 2 different class names"),
        ({"label_names": ["same", "same", "other"]}, r"at least 2 different class names"),
        ({"regression": True}, r"data\.label_names \['no', 'yes'\]: leave it out"),
        ({"eval_split": "train"}, r"data\.eval_split 'train': must differ"),
        ({"eval_split": "train", "train_split": "x"}, r"data\.eval_split 'train': must differ"),
        ({"files": {"train": "a.csv"}}, r"data\.files has train: it needs a file for validation"),
        ({"files": {"x": "a.csv"}}, r"needs a file for train and validation"),
    ],
)
def test_arguments_that_describe_no_task(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)


def write(root: Path, name: str, content: str) -> Path:
    (root / name).write_bytes(content.encode())
    return root / name


def test_files_of_ones_own(tmp_path: Path) -> None:
    files = {
        "train": write(tmp_path, "a.csv", 'q,body,y\n"a, b",c,yes\n,d,no\n'),
        "validation": write(tmp_path, "b.tsv", 'q\tbody\ty\n"a\tb"\tc\t1\n'),
        "shifted": write(tmp_path, "c.jsonl", '{"q": "e", "body": "f", "y": 0}\n'),
    }
    task = custom_task(
        "mine", text_columns=["q", "body"], label_column="y", label_names=["no", "yes"], files=files
    )
    train, validation, shifted = (load_split(task, split) for split in task.splits)
    assert train.texts == (["a, b", ""], ["c", "d"])
    assert train.labels.tolist() == [1, 0]
    assert validation.texts == (["a\tb"], ["c"])
    assert validation.labels.tolist() == [1]
    assert (shifted.texts, shifted.labels.tolist()) == ((["e"], ["f"]), [0])


def test_a_regression_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '[{"t": "a", "y": -1.5}, {"t": "b", "y": 2}]')
    task = custom_task(
        "mine",
        text_columns=["t"],
        label_column="y",
        label_names=(),
        regression=True,
        files={"train": path, "validation": path},
    )
    assert load_split(task, "train").labels.tolist() == [-1.5, 2.0]


def test_text_columns_that_do_not_exist(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "t,y\na,no\n")
    task = custom_task(
        "mine",
        text_columns=["body"],
        label_column="y",
        label_names=("no", "yes"),
        files={"train": path, "validation": path},
    )
    with pytest.raises(InputError, match=r"no column 'body', columns found: t, y; .*text_columns"):
        load_split(task, "train")
