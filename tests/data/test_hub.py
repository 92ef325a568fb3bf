"""The hub's data sets, played by in-memory ones with the hub's columns and classes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from bayesian_lora.data.glue_datasets import custom_task, get_task, load_split
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.errors import InputError

ENTAIL = ["entailment", "not_entailment"]
# task -> hub path, hub config, text columns, classes: as the hub shows them.
HUB: dict[str, tuple[str, str | None, list[str], list[str]]] = {
    "sst2": ("nyu-mll/glue", "sst2", ["sentence"], ["negative", "positive"]),
    "cola": ("nyu-mll/glue", "cola", ["sentence"], ["unacceptable", "acceptable"]),
    "mnli": (
        "nyu-mll/glue",
        "mnli",
        ["premise", "hypothesis"],
        ["entailment", "neutral", "contradiction"],
    ),
    "mrpc": (
        "nyu-mll/glue",
        "mrpc",
        ["sentence1", "sentence2"],
        ["not_equivalent", "equivalent"],
    ),
    "qnli": ("nyu-mll/glue", "qnli", ["question", "sentence"], ENTAIL),
    "rte": ("nyu-mll/glue", "rte", ["sentence1", "sentence2"], ENTAIL),
    "imdb": ("stanfordnlp/imdb", None, ["text"], ["neg", "pos"]),
    "ag_news": ("fancyzhx/ag_news", None, ["text"], ["World", "Sports", "Business", "Sci/Tech"]),
}


def dataset(texts: list[str], names: list[str] | None, labels: list[Any]) -> Dataset:
    feature = ClassLabel(names=names) if names else Value("float32")
    features = Features({**{text: Value("string") for text in texts}, "label": feature})
    columns = {text: [f"{text} {row}" for row in range(len(labels))] for text in texts}
    return Dataset.from_dict({**columns, "label": labels}, features=features)


def serve(monkeypatch: pytest.MonkeyPatch, answer: Dataset | Exception) -> list[tuple]:
    calls: list[tuple] = []

    def load_dataset(path: str, name: str | None = None, *, split: str) -> Dataset:
        calls.append((path, name, split))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", HUB)
def test_every_classification_task_agrees_with_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config, texts, names = HUB[name]
    labels = list(range(len(names)))[::-1]
    calls = serve(monkeypatch, dataset(texts, names, labels))
    task = get_task(name)
    examples = load_split(task, task.default_split)
    assert calls == [(path, config, task.splits[task.default_split])]
    assert examples.labels.tolist() == labels
    assert examples.texts == tuple([f"{text} {row}" for row in labels[::-1]] for text in texts)
    assert list(task.label_names) == names


def test_scores_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, dataset(["sentence1", "sentence2"], None, [0.0, 5.0, 2.5]))
    examples = load_split(get_task("stsb"), "train")
    assert calls == [("nyu-mll/glue", "stsb", "train")]
    assert examples.labels.tolist() == [0.0, 5.0, 2.5]


@pytest.mark.parametrize(
    ("split", "hub_split"),
    [
        ("train", "train"),
        ("matched", "validation_matched"),
        ("mismatched", "validation_mismatched"),
    ],
)
def test_mnli_splits_by_their_hub_names(
    split: str, hub_split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = serve(monkeypatch, dataset(HUB["mnli"][2], HUB["mnli"][3], [1]))
    load_split(get_task("mnli"), split)
    assert calls == [("nyu-mll/glue", "mnli", hub_split)]


def test_another_class_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, dataset(["sentence1", "sentence2"], ENTAIL[::-1], [0, 1]))
    with pytest.raises(InputError, match="classes are not_entailment, entailment in this order, "):
        load_split(get_task("rte"), "train")


def test_classes_where_scores_are_expected_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, dataset(["sentence1", "sentence2"], ENTAIL, [0, 1]))
    with pytest.raises(InputError, match="expected real numbers"):
        load_split(get_task("stsb"), "train")


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_a_split_without_labels_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = get_task(name)
    names = list(task.label_names) or None
    serve(monkeypatch, dataset(list(task.text_columns), names, [-1, -1]))
    with pytest.raises(InputError, match=r"glue/\w+ \[validation\]: the split has no labels"):
        load_split(task, "validation")


def test_one_row_without_a_label_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, dataset(["sentence"], HUB["sst2"][3], [1, -1]))
    with pytest.raises(InputError, match=r"\[train\], row 1: label -1 is not one of"):
        load_split(get_task("sst2"), "train")


def test_an_empty_split_and_a_missing_column_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, dataset(["sentence"], HUB["sst2"][3], []))
    with pytest.raises(InputError, match="the split has no rows"):
        load_split(get_task("sst2"), "train")
    serve(monkeypatch, dataset(["phrase"], HUB["sst2"][3], [0]))
    with pytest.raises(InputError, match="no column 'sentence', columns found: phrase, label"):
        load_split(get_task("sst2"), "train")


def custom(**changes: Any) -> TaskSpec:
    arguments = {"text_columns": ["body"], "label_column": "label", "label_names": ["no", "yes"]}
    return custom_task("me/set", **(arguments | changes))


def test_a_data_set_of_ones_own_even_beside_a_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = custom(hub_config="c", train_split="tr", eval_split="dev")
    calls = serve(monkeypatch, dataset(["body"], ["no", "yes"], [1, 0]))
    examples = load_split(task, "train", data_dir=tmp_path)
    assert calls == [("me/set", "c", "tr")]
    assert examples.labels.tolist() == [1, 0]


def test_class_names_stored_as_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Dataset.from_dict({"body": ["a", "b"], "label": ["yes", "no"]}))
    assert load_split(custom(), "train").labels.tolist() == [1, 0]


def test_a_local_data_set_through_the_real_load_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "a", "label": 1}\n{"body": "b", "label": 0}\n')
    task = custom_task(
        str(folder), text_columns=["body"], label_column="label", label_names=["no", "yes"]
    )
    examples = load_split(task, "train")
    assert examples.texts == (["a", "b"],)
    assert examples.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"split validation\) cannot be loaded: Unknown split"):
        load_split(task, "validation")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hub"),
        OfflineModeIsEnabled("offline"),
        LocalEntryNotFoundError("not cached"),
        TimeoutError("timed out"),
        type("ConnectError", (Exception,), {"__module__": "httpx"})("refused"),
        type("ConnectionError", (OSError,), {"__module__": "requests.exceptions"})("refused"),
    ],
)
def test_an_unreachable_hub_says_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, error)
    with pytest.raises(InputError) as raised:
        load_split(get_task("sst2"), "train")
    message = str(raised.value)
    assert "the hub is not reachable" in message
    for option in ("data.dir", "BAYESIAN_LORA_DATA", "data.name=synthetic", "data.files"):
        assert option in message
    assert "\n" not in message


def test_offline_mode_for_real(tmp_path: Path) -> None:
    program = (
        "from bayesian_lora.data.glue_datasets import get_task, load_split\n"
        "from bayesian_lora.errors import InputError\n"
        "try:\n    load_split(get_task('rte'), 'train')\n"
        "except InputError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("the hub is not reachable, so nyu-mll/glue cannot be loaded")


def test_an_unknown_data_set_is_not_called_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = DatasetNotFoundError("Dataset 'me/set' doesn't\nexist on the Hub")
    serve(monkeypatch, missing)
    with pytest.raises(InputError) as raised:
        load_split(custom(), "train")
    assert "'me/set' (configuration None, split train) cannot be loaded" in str(raised.value)
    assert str(raised.value).endswith("doesn't exist on the Hub")
