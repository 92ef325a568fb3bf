"""Sets that a task's model was not trained on, by name: splits, other tasks, the UCI files, files.

Shapes: N examples in a set, C classes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bayesian_lora.data.examples import Examples, to_examples
from bayesian_lora.data.glue_datasets import TASKS, get_task, load_split
from bayesian_lora.data.local_files import read_glue_tsv
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.data.text_files import EXTENSIONS, read_texts
from bayesian_lora.errors import InputError

UCI_FOLDER = "uci_sentiment"
UCI_FILES = {
    "uci_amazon": "amazon_cells_labelled.tsv",
    "uci_imdb": "imdb_labelled.tsv",
    "uci_yelp": "yelp_labelled.tsv",
}
UCI = "uci"
_UCI_CLASSES = ("negative", "positive")
_SAME_CLASS = {"neg": "negative", "pos": "positive"}
"""Of the registry's class names, those that say the same: IMDB's are SST-2's."""
Notify = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Shifted:
    """A set for a task's model.

    name: of the set, and of the files that its figures are stored under; file: where the set is a
    file, its absolute path (two of them may have one name);
    examples: as many texts each as the task reads; labels (N,) of the task, or −1 (unknown);
    labelled: whether the labels are the task's classes in its order, so that accuracy means
    something; why: the reason where they are not, else "".
    """

    name: str
    examples: Examples
    labelled: bool
    why: str = ""
    file: Path | None = None


def load_shifted(
    task: TaskSpec, name_or_path: str, data_dir: Path | None, notify: Notify = lambda _: None
) -> Shifted:
    """The set called `name_or_path`, its labels kept where they are the task's own.

    Args:
        task: whose model is to read the set.
        name_or_path: a split of the task itself (``shifted``, ``mismatched``); ``uci`` (Kotzias et
            al. 2015, all three files), ``uci_amazon``, ``uci_imdb``, ``uci_yelp``; a task of the
            registry (its default split) or ``task:split``; or a .csv, .tsv, .json, .jsonl or
            .parquet file with the task's text columns, or with no other columns than its texts, a
            label and an id. Names go before files.
        data_dir: of real data, None is the hub (which has no UCI files).
        notify: gets a line where another file than the official one is read.

    Integers as labels of a file are taken for the task's own class numbers.

    Raises:
        InputError: unknown name (the nearest known ones are named), no such file, a file without
            the columns, another number of texts than the task reads, or whatever is wrong with the
            data.
    """
    found = (
        _own_split(task, name_or_path, data_dir, notify)
        or _uci(task, name_or_path, data_dir)
        or _other_task(task, name_or_path, data_dir, notify)
    )
    return found or replace(_file(task, name_or_path), file=Path(name_or_path).resolve())


def _own_split(task: TaskSpec, name: str, data_dir: Path | None, notify: Notify) -> Shifted | None:
    own, _, split = name.rpartition(":")
    if split not in task.splits or own not in ("", task.name):
        return None
    examples = load_split(task, split, data_dir=data_dir, notify=notify)
    return Shifted(split, examples, labelled=True)


def _uci(task: TaskSpec, name: str, data_dir: Path | None) -> Shifted | None:
    chosen = UCI_FILES if name == UCI else {n: f for n, f in UCI_FILES.items() if n == name}
    if not chosen:
        return None
    place = "data.dir or BAYESIAN_LORA_DATA"
    if data_dir is None:
        raise InputError(
            f"ood {name!r}: the UCI sentiment files are not on the hub, and no local folder is "
            f"given: set {place} to a folder with {UCI_FOLDER}/{next(iter(chosen.values()))}"
        )
    paths = [data_dir / UCI_FOLDER / file for file in chosen.values()]
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError(
            f"ood {name!r}: {missing[0]} is not there; add the file, or set {place} to a folder "
            f"that has {UCI_FOLDER}/{missing[0].name}"
        )
    parts = [
        to_examples(
            read_glue_tsv(path, ("sentence", "label")),
            ("sentence",),
            "label",
            label_names=_UCI_CLASSES,
        )
        for path in paths
    ]
    return _fitted(task, name, ("sentence",), _UCI_CLASSES, _joined(parts))


def _joined(parts: Sequence[Examples]) -> Examples:
    texts = [text for part in parts for text in part.texts[0]]
    labels = np.concatenate([part.labels for part in parts])
    return Examples((texts,), labels, np.arange(len(texts), dtype=np.int64))


def _other_task(task: TaskSpec, name: str, data_dir: Path | None, notify: Notify) -> Shifted | None:
    own, _, split = name.partition(":")
    try:
        other = get_task(own)
    except InputError:
        return None
    _check_texts(task, name, other.text_columns)  # before it is read
    examples = load_split(other, split or other.default_split, data_dir=data_dir, notify=notify)
    called = other.name if split in ("", other.default_split) else f"{other.name}_{split}"
    return _fitted(task, called, other.text_columns, other.label_names, examples)


def _check_texts(task: TaskSpec, name: str, columns: Sequence[str]) -> None:
    if len(columns) == len(task.text_columns):
        return
    own = " and ".join(task.text_columns)
    raise InputError(
        f"ood {name!r}: has {len(columns)} text{'s'[: len(columns) - 1]} an example "
        f"({' and '.join(columns)}), but the model of {task.name} reads {len(task.text_columns)} "
        f"({own}): name a set of as many, or a file of your own with {own}"
    )


def _fitted(
    task: TaskSpec,
    name: str,
    columns: Sequence[str],
    classes: Sequence[str],
    examples: Examples,
) -> Shifted:
    """The set with its labels, if its classes are the task's in the task's order, else without."""
    _check_texts(task, name, columns)
    ours, theirs = ([_SAME_CLASS.get(c.lower(), c) for c in g] for g in (task.label_names, classes))
    if ours and ours == theirs:
        return Shifted(name, examples, labelled=True)
    words = [", ".join(given) or "real numbers" for given in (classes, task.label_names)]
    why = f"other label space: {name} has {words[0]}, the task {task.name} has {words[1]}"
    return Shifted(name, _without_labels(examples), labelled=False, why=why)


def _without_labels(examples: Examples) -> Examples:
    unknown = np.full(len(examples), -1, dtype=np.int64)
    return replace(examples, labels=unknown, true_probs=None)


def _file(task: TaskSpec, given: str) -> Shifted:
    path = Path(given)
    if not path.is_file():
        raise _not_found(task, given)
    columns = [task.text_columns]
    label = {task.label_column: None, "label": None}
    if task.local is not None:
        known = {name: files[0] for name, files in task.local.columns.items() if len(files) == 1}
        columns.append(tuple(known.get(name, name) for name in task.text_columns))
        label[known.get(task.label_column, "label")] = None
    found = read_texts(path, columns, tuple(label), reader=f"the model of {task.name}")
    table, text_columns, label_column = found
    # The texts are checked with labels that are no question; theirs may be another task's.
    checked = replace(table, columns={**table.columns, "": [0] * found.size})
    unlabelled = _without_labels(to_examples(checked, text_columns, "", label_names=("0",)))
    name = _file_name(task, path)
    if label_column is None:
        why = f"{path} has no column {' or '.join(map(repr, label))}, so no labels"
        return Shifted(name, unlabelled, labelled=False, why=why)
    try:
        examples = to_examples(
            table,
            text_columns,
            label_column,
            label_names=task.label_names,
            label_range=task.label_range,
        )
    except InputError as error:
        found = str(error).partition(": mend the row")[0]  # here they need not be the task's
        why = f"other label space than {task.name}'s: {found}"
        return Shifted(name, unlabelled, labelled=False, why=why)
    return Shifted(name, examples, labelled=True)


def _file_name(task: TaskSpec, path: Path) -> str:
    """A file's name as that of a set, never one that a split or a known set has."""
    name = re.sub(r"[^\w.-]+", "_", path.stem)
    parts = (f"{other.name}_{split}" for other in TASKS.values() for split in other.splits)
    taken = {*task.splits, UCI, *UCI_FILES, *TASKS, *parts}
    return f"file_{name}" if name in taken else name


def _not_found(task: TaskSpec, given: str) -> InputError:
    path = Path(given)
    if path.is_dir():
        return InputError(f"ood {given!r}: a folder; name a file of {', '.join(EXTENSIONS)} in it")
    if path.suffix.lower() in EXTENSIONS or len(path.parts) > 1:
        return InputError(f"ood {given!r}: no such file; the path counts from {Path.cwd()}")
    known = [*task.splits, UCI, *UCI_FILES, *TASKS]
    near = difflib.get_close_matches(given.lower(), known, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InputError(
        f"ood {given!r}: no such set: {hint}known are the splits of {task.name} "
        f"({', '.join(task.splits)}), {', '.join([UCI, *UCI_FILES])}, the tasks "
        f"{', '.join(TASKS)} (also task:split), or a file of {', '.join(EXTENSIONS)}"
    )
