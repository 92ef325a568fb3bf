"""Examples: subsetting, division, fingerprints, and the checks between a raw table and a split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesian_lora.data.examples import (
    Examples,
    Table,
    check_columns,
    split_off,
    stratified_subset,
    to_examples,
)
from bayesian_lora.errors import InputError

labels_lists = st.lists(st.integers(0, 3), min_size=4, max_size=60)
seeds = st.integers(0, 2**32 - 1)


def make(labels: list[int] | list[float], dtype: type = np.int64) -> Examples:
    n = len(labels)
    probs = np.linspace(0, 1, n)[:, None] * np.ones((1, 2))
    texts = ([f"a{i}" for i in range(n)], [f"b{i}" for i in range(n)])
    return Examples(texts, np.array(labels, dtype=dtype), np.arange(n, dtype=np.int64) + 100, probs)


def test_take_keeps_every_column_aligned() -> None:
    part = make([0, 1, 2, 0]).take(np.array([3, 1]))
    assert part.texts == (["a3", "a1"], ["b3", "b1"])
    assert part.labels.tolist() == [0, 1]
    assert part.ids.tolist() == [103, 101]
    assert part.true_probs is not None
    assert part.true_probs[:, 0].tolist() == [1.0, 1 / 3]
    assert len(part) == 2


def test_columns_of_different_lengths_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="lengths"):
        Examples((["a"],), np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64))


def test_fingerprint_sees_texts_labels_ids_and_where_texts_end() -> None:
    def one(*texts: list[str], label: int = 0, row: int = 0) -> str:
        n = len(texts[0])
        labels, ids = np.full(n, label, np.int64), np.full(n, row, np.int64)
        return Examples(texts, labels, ids).fingerprint()

    base = one(["ab", "c"])
    assert base == one(["ab", "c"])
    assert len(base) == 64
    others = [
        one(["a", "bc"]),
        one(["ab", "d"]),
        one(["ab", "c"], label=1),
        one(["ab", "c"], row=1),
        one(["ab", "c"], ["", ""]),
    ]
    assert len({base, *others}) == 6
    assert one(["\ud800"]) != one(["\ud801"])  # lone surrogates, as JSON may hold


def test_fingerprint_is_the_same_on_every_machine() -> None:
    examples = Examples((["é"],), np.array([1], np.int64), np.array([0], np.int64))
    text = b"column" + bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"\xc3\xa9"
    numbers = b"int64" + bytes([1, 0, 0, 0, 0, 0, 0, 0]) + b"int64" + bytes(8)
    expected = hashlib.sha256(text + numbers).hexdigest()
    assert examples.fingerprint() == expected


@settings(max_examples=60, deadline=None)
@given(labels=labels_lists, seed=seeds, data=st.data())
def test_subset_keeps_class_shares_order_and_size(
    labels: list[int], seed: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(len(set(labels)), len(labels)))
    examples = make(labels)
    subset = stratified_subset(examples, n, seed)
    assert len(subset) == n
    assert (np.diff(subset.ids) > 0).all()
    assert (examples.labels[subset.ids - 100] == subset.labels).all()
    for label in set(labels):
        share = n * labels.count(label) / len(labels)
        assert abs((subset.labels == label).sum() - share) < 1
    assert stratified_subset(examples, n, seed).fingerprint() == subset.fingerprint()


def test_subset_gives_the_last_places_to_the_largest_remainders() -> None:
    # Shares of 5: 2.5, 1.4, 1.1 -> 2, 1, 1 and one place left, which is the 2.5's.
    subset = stratified_subset(make([0] * 25 + [1] * 14 + [2] * 11), 5, seed=0)
    assert np.bincount(subset.labels).tolist() == [3, 1, 1]


def test_subset_depends_on_the_seed_only() -> None:
    examples = make([0, 1] * 50)
    np.random.seed(0)  # noqa: NPY002 - global state must not matter
    first = stratified_subset(examples, 20, seed=1)
    assert first.ids.tolist() == stratified_subset(examples, 20, seed=1).ids.tolist()
    assert first.ids.tolist() != stratified_subset(examples, 20, seed=2).ids.tolist()


def test_subset_of_all_is_all() -> None:
    examples = make([0, 1, 1, 0, 2])
    assert stratified_subset(examples, 5, seed=3).fingerprint() == examples.fingerprint()


def test_subset_of_scores_is_stratified_by_quantile() -> None:
    scores = np.random.default_rng(0).permutation(100) / 20
    subset = stratified_subset(make(scores.tolist(), np.float32), 20, seed=0)
    per_decile = np.histogram(subset.labels, bins=np.arange(11) / 2)[0]
    assert per_decile.tolist() == [2] * 10
    assert subset.labels.dtype == np.float32


def test_subset_of_more_than_there_is_says_both_numbers() -> None:
    with pytest.raises(InputError, match=r"12 examples asked for, but the split has 3"):
        stratified_subset(make([0, 1, 0]), 12, seed=0)


@pytest.mark.parametrize("n", [2, 0, -1])
def test_subset_smaller_than_the_classes_is_refused(n: int) -> None:
    with pytest.raises(InputError, match=rf"{n} examples asked for.*3 classes"):
        stratified_subset(make([0, 1, 2, 0]), n, seed=0)


def test_empty_subset_of_scores_is_refused() -> None:
    with pytest.raises(InputError, match="0 examples asked for"):
        stratified_subset(make([0.5, 1.0], np.float32), 0, seed=0)


@settings(max_examples=60, deadline=None)
@given(labels=labels_lists, seed=seeds, share=st.floats(0.01, 0.99))
def test_split_off_is_disjoint_exhaustive_stratified(
    labels: list[int], seed: int, share: float
) -> None:
    examples = make(labels)
    kept, held_out = split_off(examples, share, seed)
    assert sorted([*kept.ids, *held_out.ids]) == examples.ids.tolist()
    assert len(kept) >= 1
    assert len(held_out) >= 1
    assert abs(len(held_out) - share * len(labels)) < 1
    for label in set(labels):
        expected = len(held_out) * labels.count(label) / len(labels)
        assert abs((held_out.labels == label).sum() - expected) < 1
    assert (np.diff(kept.ids) > 0).all()
    assert (np.diff(held_out.ids) > 0).all()
    again = split_off(examples, share, seed)
    assert again[1].fingerprint() == held_out.fingerprint()


def test_split_off_depends_on_the_seed() -> None:
    examples = make([0, 1] * 30)
    parts = [split_off(examples, 0.2, seed)[1].ids.tolist() for seed in (0, 1)]
    assert parts[0] != parts[1]
    assert len(parts[0]) == 12


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_split_off_refuses_a_share_outside_its_range(share: float) -> None:
    with pytest.raises(InputError, match=r"share .* strictly between 0 and 1"):
        split_off(make([0, 1]), share, seed=0)


def test_split_off_needs_two_examples() -> None:
    with pytest.raises(InputError, match=r"1 example\(s\) in two"):
        split_off(make([0]), 0.5, seed=0)


def table(labels: Sequence[object], texts: Sequence[object] | None = None) -> Table:
    columns = {"text": texts or ["t"] * len(labels), "label": labels}
    return Table("f.csv", columns, range(2, 2 + len(labels)))


def test_labels_are_names_or_numbers() -> None:
    for labels in (["no", "yes"], [0, 1], ["0", "1"], [np.int64(0), "yes"]):
        examples = to_examples(table(labels), ["text"], "label", label_names=("no", "yes"))
        assert examples.labels.tolist() == [0, 1]
        assert examples.labels.dtype == np.int64
        assert examples.ids.tolist() == [0, 1]


def test_integer_class_names_are_never_taken_for_numbers() -> None:
    names = ("1", "2", "3")
    examples = to_examples(table([1, "3"]), ["text"], "label", label_names=names)
    assert examples.labels.tolist() == [0, 2]
    with pytest.raises(InputError, match=r"f\.csv:2: label 0 is not one of 1, 2, 3"):
        to_examples(table([0]), ["text"], "label", label_names=names)


@pytest.mark.parametrize("label", ["maybe", 2, -1, None, 0.5, "", "-"])
def test_a_label_outside_the_task_is_named_with_its_line(label: object) -> None:
    with pytest.raises(InputError) as raised:
        to_examples(table(["yes", label]), ["text"], "label", label_names=("no", "yes"))
    assert f"f.csv:3: label {label!r} is not one of no, yes, 0, 1" in str(raised.value)


@pytest.mark.parametrize("label", ["5.1", -0.1, "nan", None, "high"])
def test_a_score_outside_its_range_is_named_with_its_line(label: object) -> None:
    with pytest.raises(InputError) as raised:
        to_examples(table(["5", label]), ["text"], "label", label_names=(), label_range=(0, 5))
    assert f"f.csv:3: label {label!r} is not a number from 0 to 5" in str(raised.value)


def test_scores_without_a_range_must_be_finite() -> None:
    examples = to_examples(table([-7, "1e3"]), ["text"], "label", label_names=())
    assert examples.labels.tolist() == [-7.0, 1000.0]
    assert examples.labels.dtype == np.float32
    for label in (float("inf"), 1e300):
        with pytest.raises(InputError, match="not a finite number"):
            to_examples(table([label]), ["text"], "label", label_names=())


def test_an_empty_text_is_kept_and_a_missing_one_refused() -> None:
    examples = to_examples(table([0, 1], ["", " x "]), ["text"], "label", label_names=("a", "b"))
    assert examples.texts == (["", " x "],)
    with pytest.raises(InputError, match=r"f\.csv:3: text is None, must be text"):
        to_examples(table([0, 1], ["x", None]), ["text"], "label", label_names=("a", "b"))


def test_a_split_without_rows_is_refused() -> None:
    with pytest.raises(InputError, match=r"f\.csv: the split has no rows"):
        to_examples(table([]), ["text"], "label", label_names=("a", "b"))


def test_a_missing_column_is_named_with_those_found() -> None:
    with pytest.raises(InputError, match=r"f: no column 'body', columns found: text, label"):
        check_columns("f", ["text", "label"], ["text", "body"])
