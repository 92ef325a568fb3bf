"""The tasks, their label orders (pinned as on the hub), and the loading of their splits.

A split comes from the hub, from a local folder, from the user's own files, or (synthetic) from
the program itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from bayesian_lora.data.examples import Examples, to_examples
from bayesian_lora.data.hub import read_hub
from bayesian_lora.data.local_files import LocalLayout, read_file, read_layout
from bayesian_lora.data.tasks import TaskSpec, custom_task
from bayesian_lora.errors import InputError

__all__ = ["TASKS", "TaskSpec", "custom_task", "get_task", "load_split"]

_GLUE_SPLITS = {
    "train": ("train", "train.tsv"),
    "validation": ("validation", "dev.tsv"),
}


def _glue(
    name: str,
    title: str,
    kind: str,
    text_columns: tuple[str, ...],
    label_names: tuple[str, ...],
    folder: str,
    *,
    metrics: tuple[str, ...] = ("accuracy",),
    splits: Mapping[str, tuple[str, ...]] = _GLUE_SPLITS,
    default_split: str = "validation",
    columns: Mapping[str, tuple[str, ...]] | None = None,
    header: tuple[str, ...] | None = None,
    label_range: tuple[float, float] | None = None,
) -> TaskSpec:
    """A GLUE task; splits: ours -> (the hub's, file, stand-in file …), files in GLUE's TSV."""
    files = {
        split: tuple(f"glue/{folder}/{file}" for file in names)
        for split, (_, *names) in splits.items()
    }
    return TaskSpec(
        name=name,
        title=title,
        kind=kind,
        text_columns=text_columns,
        label_column="label",
        label_names=label_names,
        likelihood="categorical" if label_names else "gaussian",
        metrics=metrics,
        hub_path="nyu-mll/glue",
        hub_config=name,
        splits={split: names[0] for split, names in splits.items()},
        default_split=default_split,
        label_range=label_range,
        local=LocalLayout(files, columns or {}, header),
    )


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

_ALL = (
    _glue(
        "sst2",
        "Stanford Sentiment Treebank v2",
        "sentiment_analysis",
        ("sentence",),
        ("negative", "positive"),
        "SST-2",
    ),
    _glue(
        "cola",
        "Corpus of Linguistic Acceptability",
        "linguistic_acceptability",
        ("sentence",),
        ("unacceptable", "acceptable"),
        "CoLA",
        metrics=("mcc",),
        header=("source", "label", "original_mark", "sentence"),
    ),
    _glue(
        "mnli",
        "Multi-Genre Natural Language Inference",
        "natural_language_inference",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "MNLI",
        splits={
            "train": ("train", "train.tsv"),
            "matched": ("validation_matched", "dev_matched.tsv"),
            "mismatched": (
                "validation_mismatched",
                "dev_mismatched.tsv",
                "dev_mismatched_1k_tokenised.tsv",
            ),
        },
        default_split="matched",
        columns={
            "premise": ("sentence1",),
            "hypothesis": ("sentence2",),
            "label": ("gold_label",),
        },
    ),
    _glue(
        "mrpc",
        "Microsoft Research Paraphrase Corpus",
        "paraphrase_detection",
        _PAIR,
        ("not_equivalent", "equivalent"),
        "MRPC",
        metrics=("accuracy", "f1"),
        columns={
            "sentence1": ("#1 String",),
            "sentence2": ("#2 String",),
            "label": ("Quality",),
        },
    ),
    _glue(
        "qnli",
        "Question-answering NLI",
        "natural_language_inference",
        ("question", "sentence"),
        _ENTAILMENT,
        "QNLI",
    ),
    _glue(
        "rte",
        "Recognizing Textual Entailment",
        "natural_language_inference",
        _PAIR,
        _ENTAILMENT,
        "RTE",
    ),
    _glue(
        "stsb",
        "Semantic Textual Similarity Benchmark",
        "semantic_similarity",
        _PAIR,
        (),
        "STS-B",
        metrics=("pearson", "spearman"),
        columns={"label": ("score",)},
        label_range=(0.0, 5.0),
    ),
    TaskSpec(
        name="imdb",
        title="IMDB movie reviews",
        kind="sentiment_analysis",
        text_columns=("text",),
        label_column="label",
        label_names=("neg", "pos"),
        likelihood="categorical",
        metrics=("accuracy",),
        hub_path="stanfordnlp/imdb",
        hub_config=None,
        splits={"train": "train", "test": "test"},
        default_split="test",
        local=LocalLayout({"train": ("imdb/train.csv",), "test": ("imdb/test.csv",)}),
    ),
    TaskSpec(
        name="ag_news",
        title="AG News topic classification",
        kind="topic_classification",
        text_columns=("text",),
        label_column="label",
        label_names=("World", "Sports", "Business", "Sci/Tech"),
        likelihood="categorical",
        metrics=("accuracy",),
        hub_path="fancyzhx/ag_news",
        hub_config=None,
        splits={"train": "train", "test": "test"},
        default_split="test",
        local=LocalLayout(
            {"train": ("ag_news/train.csv",), "test": ("ag_news/test.csv",)},
            columns={"text": ("title", "description")},
            header=("label", "title", "description"),
            label_names=("1", "2", "3", "4"),
        ),
    ),
    TaskSpec(
        name="synthetic",
        title="Synthetic sentences with known class probabilities",
        kind="synthetic",
        text_columns=("text",),
        label_column="label",
        label_names=("negative", "positive"),
        likelihood="categorical",
        metrics=("accuracy",),
        hub_path=None,
        hub_config=None,
        splits={"train": "train", "validation": "validation", "shifted": "shifted"},
        default_split="validation",
    ),
)
TASKS: dict[str, TaskSpec] = {task.name: task for task in _ALL}


def get_task(name: str) -> TaskSpec:
    """The task called `name`: "sst2", "SST-2", "glue/sst2", or its own hub id ("stanfordnlp/imdb").

    Raises InputError for an unknown name, with the nearest known ones.
    """
    by_key = {_key(task.name): task for task in _ALL}
    by_key |= {_key(task.hub_path): task for task in _ALL if task.hub_path and not task.hub_config}
    key = _key(name)
    if key not in by_key:
        nearest = [by_key[match].name for match in difflib.get_close_matches(key, by_key, n=2)]
        hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
        raise InputError(
            f"data.name {name!r} is unknown: {hint}known are {', '.join(TASKS)}; any other data "
            "set needs data.text_columns, data.label_column and data.label_names"
        )
    return by_key[key]


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower()).removeprefix("glue/")


def load_split(
    task: TaskSpec,
    split: str,
    *,
    data_dir: Path | None = None,
    seed: int = 0,
    notify: Callable[[str], None] = lambda _: None,
) -> Examples:
    """A split: embedded, from the task's own files, from data_dir, else from the hub.

    data_dir: a folder glue/SST-2/train.tsv …, ag_news/train.csv, imdb/train.csv; it holds the
    known tasks only. seed: of the synthetic data. notify: gets one line when another file than
    the official one is read.

    Raises InputError for an unknown split and for anything wrong in the data.
    """
    if split not in task.splits:
        raise InputError(f"split {split!r} of {task.name}: must be one of {', '.join(task.splits)}")
    label_names = task.label_names
    wanted = [*task.text_columns, task.label_column]
    if task.files is not None:
        table = read_file(task.files[task.splits[split]], wanted)
    elif task.hub_path is None:
        from bayesian_lora.data.synthetic import generate

        return generate(split, seed=seed)
    elif data_dir is not None and task.local is not None:
        table = read_layout(task.local, data_dir, split, wanted, notify)
        label_names = task.local.label_names or label_names
    else:
        table = read_hub(
            task.hub_path,
            task.hub_config,
            task.splits[split],
            task.text_columns,
            task.label_column,
            label_names,
        )
    return to_examples(
        table,
        task.text_columns,
        task.label_column,
        label_names=label_names,
        label_range=task.label_range,
    )
