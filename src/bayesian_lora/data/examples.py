"""One split of a data set, how a raw table becomes one, and how it is subset and divided.

Shapes: N examples in a set, C classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayesian_lora.errors import InputError

REGRESSION_STRATA = 10


@dataclass(frozen=True, eq=False)
class Examples:
    """One split.

    texts: one list per text column (1 or 2), each of length N;
    labels: (N,) int64 (classification) or float32 (regression);
    ids: (N,) int64, the row number in the source split, kept through subsetting;
    true_probs: (N, C) float64 known class probabilities, or None (synthetic data only have them).
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    ids: np.ndarray
    true_probs: np.ndarray | None = None

    def __post_init__(self) -> None:
        sizes = {len(column) for column in self.texts} | {len(self.labels), len(self.ids)}
        assert len(sizes) == 1, f"columns of different lengths: {sizes}"
        assert self.labels.dtype in (np.int64, np.float32), self.labels.dtype
        assert self.true_probs is None or len(self.true_probs) == len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Examples:
        """The rows at the positions `index` (K,), in that order, with their ids."""
        return Examples(
            texts=tuple([column[i] for i in index] for column in self.texts),
            labels=self.labels[index],
            ids=self.ids[index],
            true_probs=None if self.true_probs is None else self.true_probs[index],
        )

    def fingerprint(self) -> str:
        """sha256 (hex) over texts, labels and ids; equal on every machine."""
        digest = hashlib.sha256()
        for column in self.texts:
            digest.update(b"column")
            for text in column:
                # surrogatepass: JSON can hold lone surrogates, which plain UTF-8 refuses.
                encoded = text.encode("utf-8", "surrogatepass")
                # The length in front keeps ("ab", "c") apart from ("a", "bc").
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        for array in (self.labels, self.ids):
            digest.update(array.dtype.name.encode())
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Table:
    """The wanted columns of one split as they were read, unchecked: what every source yields.

    columns: name -> N raw values; source: the file or hub split, for messages;
    lines: the line in the file of each row, or None where the source has no lines.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] | None = None

    def place(self, row: int) -> str:
        """Where row `row` (from 0) stands, for a message: "file:line" or "source, row n"."""
        return (
            f"{self.source}, row {row}"
            if self.lines is None
            else f"{self.source}:{self.lines[row]}"
        )


def check_columns(source: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise InputError unless every wanted column is among those found in the source."""
    for name in wanted:
        if name not in found:
            raise InputError(
                f"{source}: no column {name!r}, columns found: {', '.join(found)}; for a data set "
                "of your own name them in data.text_columns and data.label_column"
            )


def to_examples(
    table: Table,
    text_columns: Sequence[str],
    label_column: str,
    *,
    label_names: Sequence[str],
    label_range: tuple[float, float] | None = None,
) -> Examples:
    """Check a raw table: texts are text, labels are class names or numbers 0..C-1.

    Without label_names the labels are real numbers, within label_range where one is given.
    Class names that are themselves integers (AG News files: "1".."4") are only read as names.

    Raises InputError for an empty split, a value that is not text, a label outside the task.
    """
    if not table.columns[label_column]:
        raise InputError(f"{table.source}: the split has no rows, at least one is needed")
    for name in text_columns:
        for row, text in enumerate(table.columns[name]):
            if not isinstance(text, str):
                raise InputError(
                    f"{table.place(row)}: {name} is {text!r}, must be text: mend the row or "
                    "choose another column in data.text_columns"
                )
    raw = table.columns[label_column]
    labels = (
        _class_labels(table, raw, label_names) if label_names else _scores(table, raw, label_range)
    )
    return Examples(
        texts=tuple(list(table.columns[name]) for name in text_columns),
        labels=labels,
        ids=np.arange(len(raw), dtype=np.int64),
    )


def _class_labels(table: Table, raw: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    classes = {name: index for index, name in enumerate(names)}
    if not any(name.isdecimal() for name in names):
        classes |= {str(index): index for index in range(len(names))}
    for row, value in enumerate(raw):
        if str(value) not in classes:
            allowed = ", ".join(classes)
            raise InputError(
                f"{table.place(row)}: label {value!r} is not one of {allowed}: mend the row "
                "(or, for a data set of your own, data.label_names)"
            )
    return np.array([classes[str(value)] for value in raw], dtype=np.int64)


def _scores(
    table: Table, raw: Sequence[Any], label_range: tuple[float, float] | None
) -> np.ndarray:
    largest = float(np.finfo(np.float32).max)
    low, high = label_range or (-largest, largest)
    rule = f"a number from {low:g} to {high:g}" if label_range else "a finite number"
    scores = np.empty(len(raw), dtype=np.float32)
    for row, value in enumerate(raw):
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not low <= score <= high:  # false for nan too
            raise InputError(f"{table.place(row)}: label {value!r} is not {rule}: mend the row")
        scores[row] = score
    return scores


def stratified_subset(examples: Examples, n: int, seed: int) -> Examples:
    """`n` of the examples, in their original order, drawn by `seed` with the class shares kept.

    Each class gets its share n·count/N rounded by largest remainder, so every class is within
    one example of its share (a class rarer than 1/n may get none). Real-valued labels are
    stratified by ten quantile bins.

    Raises InputError when n exceeds N or is below the number of classes present.
    """
    if n > len(examples):
        raise InputError(f"{n} examples asked for, but the split has {len(examples)}: ask for less")
    strata = _strata(examples.labels)
    least = len(np.unique(strata)) if examples.labels.dtype.kind == "i" else 1
    if n < least:
        raise InputError(
            f"{n} examples asked for, but the split has {least} classes: ask for at least {least}"
        )
    return examples.take(_stratified_index(strata, n, seed))


def split_off(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """(kept, held_out): a stratified `share` of the examples held out, drawn by `seed`.

    The two parts are disjoint, together they are everything, both are in the original order,
    and each has at least one example.

    Raises InputError when share is not strictly between 0 and 1 or there are fewer than 2 examples.
    """
    if not 0 < share < 1:
        raise InputError(f"share {share} to hold out: must lie strictly between 0 and 1")
    if len(examples) < 2:
        raise InputError(f"cannot divide {len(examples)} example(s) in two: at least 2 are needed")
    n = min(max(round(share * len(examples)), 1), len(examples) - 1)
    held_out = np.zeros(len(examples), dtype=bool)
    held_out[_stratified_index(_strata(examples.labels), n, seed)] = True
    return examples.take(np.flatnonzero(~held_out)), examples.take(np.flatnonzero(held_out))


def _strata(labels: np.ndarray) -> np.ndarray:
    if labels.dtype.kind == "i":
        return labels
    rank = np.empty(len(labels), dtype=np.int64)
    rank[np.argsort(labels, kind="stable")] = np.arange(len(labels))
    return rank * REGRESSION_STRATA // max(len(labels), 1)


def _stratified_index(strata: np.ndarray, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values, counts = np.unique(strata, return_counts=True)
    sizes, remainders = np.divmod(counts * n, len(strata))
    largest_first = np.argsort(-remainders, kind="stable")
    sizes[largest_first[: n - sizes.sum()]] += 1
    parts = [
        rng.permutation(np.flatnonzero(strata == value))[:size]
        for value, size in zip(values, sizes, strict=True)
    ]
    return np.sort(np.concatenate(parts))


def unlabelled(texts: Sequence[Any]) -> Examples:
    """Texts, or pairs of texts, as examples with the labels −1 (unknown).

    Raises:
        InputError: no texts, or something else among them.
    """
    rule = "give a list of texts, or of pairs of texts"
    if isinstance(texts, str) or not len(texts):
        raise InputError(f"texts={texts!r}: {rule}, at least one")
    rows = [[text] if isinstance(text, str) else text for text in texts]
    for i, row in enumerate(rows):
        known = isinstance(row, list | tuple) and all(isinstance(text, str) for text in row)
        if not (known and len(row) in (1, 2) and len(row) == len(rows[0])):
            raise InputError(f"texts: number {i} is {row!r}; {rule}")
    columns = tuple([row[j] for row in rows] for j in range(len(rows[0])))
    return Examples(columns, np.full(len(rows), -1, dtype=np.int64), np.arange(len(rows)))
