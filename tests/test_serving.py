"""Answers to texts as they come: right, in order, at once, and in the memory of one block.

Shapes: K members, N texts, C classes.
"""

import dataclasses
import json
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest

from bayesian_lora.abstention import Abstention
from bayesian_lora.errors import InputError
from bayesian_lora.predict import Predictions
from bayesian_lora.serving import BESIDE, CLASSES, EMPTY, NUMBERS, Service, in_blocks

K, C = 3, 2
LABELS = ("bad", "good")


def logits_of(text: str) -> np.ndarray:
    """(K, C) of their own for every text."""
    rng = np.random.default_rng(list(text.encode()))
    return rng.normal(0, 2, (K, C))


class Stub:
    """Predicts of a text alone, and counts what it is given."""

    def __init__(self, **fields: Any) -> None:
        self.blocks: list[int] = []
        self.fields = fields

    def __call__(self, texts: Sequence[Any]) -> Predictions:
        self.blocks.append(len(texts))
        logits = np.stack([logits_of("".join(text)) for text in texts], axis=1)
        n = len(texts)
        fields = {name: make(n) for name, make in self.fields.items()}
        weights = np.full(K, 1 / K)
        return Predictions(logits, np.full(n, -1), weights, np.arange(n), **fields)


class Numbers(Stub):
    """The same as a regression."""

    def __call__(self, texts: Sequence[Any]) -> Predictions:
        p = super().__call__(texts)
        noise = np.array([0.1, 0.2, 0.3])
        return dataclasses.replace(p, logits=p.logits[..., :1], noise_std=noise)


def service(stub: Stub | None = None, **options: Any) -> Service:
    return Service(stub or Stub(), C, K, label_names=LABELS, **options)


def test_an_answer_says_what_the_predictions_say() -> None:
    texts = [f"text {i}" for i in range(20)]
    p = Stub()(texts)
    answers = service().answer(texts)
    assert [LABELS.index(a["label"]) for a in answers] == p.predicted.tolist()
    for name, values in (
        ("probability", p.probs.max(1)),
        ("entropy", p.uncertainty["predictive_entropy"]),
        ("mutual_information", p.uncertainty["mutual_information"]),
    ):
        np.testing.assert_allclose([a[name] for a in answers], values, rtol=1e-6)
    both = [[a["probabilities"][label] for label in LABELS] for a in answers]
    np.testing.assert_allclose(both, p.probs, rtol=1e-6)
    assert {a["abstain"] for a in answers} == {None}
    assert tuple(answers[0]) == service().names[:-1] == (*CLASSES, "abstain")
    json.dumps(answers, allow_nan=False)


def test_without_names_labels_are_numbers() -> None:
    texts = ["a", "b", "c"]
    answers = Service(Stub(), C, K).answer(texts)
    assert [a["label"] for a in answers] == Stub()(texts).predicted.tolist()
    assert set(answers[0]["probabilities"]) == {"0", "1"}


def test_names_must_be_as_many_as_classes() -> None:
    with pytest.raises(InputError, match="the model has 3 outputs; name each"):
        Service(Stub(), 3, K, label_names=LABELS)


@pytest.mark.parametrize("score", ["predictive_entropy", "mutual_information", "max_probability"])
def test_abstains_above_the_threshold_and_not_at_it(score: str) -> None:
    texts = [f"text {i}" for i in range(30)]
    p = Stub()(texts)
    value = 1 - p.probs.max(1) if score == "max_probability" else p.uncertainty[score]
    above = float(np.sort(value)[12])
    answers = service(abstention=Abstention(above, score)).answer(texts)
    assert [a["abstain"] for a in answers] == (value > above).tolist()
    assert sum(a["abstain"] for a in answers) == 30 - 13
    never = service(abstention=Abstention(math.inf, score)).answer(texts)
    assert {a["abstain"] for a in never} == {False}


def test_a_regression_gives_mean_deviation_and_interval() -> None:
    texts = [f"text {i}" for i in range(9)]
    p = Numbers()(texts)
    own = Service(Numbers(), 1, K, regression=True, abstention=Abstention(1.0))
    answers = own.answer(texts)
    assert p.sd is not None
    np.testing.assert_allclose([a["mean"] for a in answers], p.predicted, rtol=1e-6)
    np.testing.assert_allclose([a["sd"] for a in answers], p.sd, rtol=1e-6)
    ends = np.array([[a["lower"], a["upper"]] for a in answers]).T
    np.testing.assert_allclose(ends, p.interval(0.95) or (), rtol=1e-6)
    assert [a["abstain"] for a in answers] == (p.sd > 1.0).tolist()
    assert tuple(answers[0]) == (*NUMBERS, "abstain")


def test_one_member_has_no_disagreement_and_says_null() -> None:
    one = Service(Stub(), C, 1, label_names=LABELS).answer(["a"])[0]
    assert one["mutual_information"] is None
    assert one["entropy"] > 0
    with pytest.raises(InputError, match="mutual_information: not available, one member"):
        Service(Stub(), C, 1, abstention=Abstention(0.1, "mutual_information"))


def test_where_members_were_left_out_their_disagreement_is_null() -> None:
    used = Stub(members_used=lambda n: np.array([K, K - 1, K])[:n])
    answers = service(used, with_used=True).answer(["a", "b", "c"])
    assert [a["members"] for a in answers] == [K, K - 1, K]
    assert [a["mutual_information"] is None for a in answers] == [False, True, False]
    assert tuple(answers[0]) == (*CLASSES, *BESIDE[:2])


def test_an_empty_text_keeps_its_place_and_is_never_shown_to_the_model() -> None:
    stub = Stub()
    texts = ["", "a", " \t\u3000", "b"]
    answers = service(stub, abstention=Abstention(9.0)).answer(texts)
    assert stub.blocks == [2]
    assert [a.get("reason") for a in answers] == [EMPTY, None, EMPTY, None]
    assert [a["abstain"] for a in answers] == [True, False, True, False]
    assert answers[0]["label"] is answers[0]["probabilities"] is answers[0]["entropy"] is None
    assert tuple(answers[0]) == service().names
    assert [answers[1], answers[3]] == service(abstention=Abstention(9.0)).answer(["a", "b"])
    assert service(stub).answer(["", ""])[0]["abstain"] is None
    assert stub.blocks == [2]
    pairs = service(stub).answer([("a", ""), ("a", "b")])
    assert [p.get("reason") for p in pairs] == [EMPTY, None]


def test_blocks_change_no_answer() -> None:
    texts = [f"text {i}" for i in range(23)]
    whole = service().answer(texts)
    for block in (1, 5, 23, 100):
        stub = Stub()
        assert list(service(stub).stream(iter(texts), block)) == whole
        assert max(stub.blocks) == min(block, 23)
        assert len(stub.blocks) == -(-23 // block)


def test_the_first_answers_come_before_the_input_ends() -> None:
    asked = []

    def endless() -> Iterator[str]:
        for i in range(10**9):
            asked.append(i)
            yield f"text {i}"

    first = list(islice(service().stream(endless(), 8), 8))
    assert len(first) == len(asked) == 8


def test_what_comes_before_a_mistake_is_answered_first() -> None:
    def broken() -> Iterator[str]:
        yield from ("a", "b", "c")
        raise InputError("in:4: damaged")

    answers = service().stream(broken(), 2)
    found = list(islice(answers, 3))
    assert found == service().answer(["a", "b", "c"])
    with pytest.raises(InputError, match="in:4: damaged"):
        next(answers)


def test_another_failure_is_not_held_back() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(in_blocks(broken(), 2))


def test_nothing_in_nothing_out() -> None:
    stub = Stub()
    assert list(service(stub).stream([])) == []
    assert stub.blocks == []


def test_memory_does_not_grow_with_the_input() -> None:
    def flat(texts: Sequence[Any]) -> Predictions:
        n = len(texts)
        logits = np.zeros((K, n, C))
        return Predictions(logits, np.full(n, -1), np.full(K, 1 / K), np.arange(n))

    def texts(n: int) -> Iterator[str]:
        return (f"text number {i} " + "x" * 200 for i in range(n))

    def peak(n: int) -> int:
        tracemalloc.start()
        count = sum(1 for _ in Service(flat, C, K).stream(texts(n), 100))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == n
        return highest

    peak(100)  # imports and caches
    short, long = peak(500), peak(20_000)
    assert long < 1.2 * short
    assert long < 20_000 * 200, "smaller than the texts themselves"
