"""Standard errors of rows and of their differences: means over predictors, pairs, what is missing.

Shapes: K members, N examples, R replicates.
"""

from typing import Any

import numpy as np
import pytest

from bayesian_lora.assessment import evaluation
from bayesian_lora.assessment.standard_errors import standard_errors
from bayesian_lora.predict import Predictions
from tests.scores.plain_bootstrap import plain_errors

from .predictors import CLASSES, PARTS, SCORES, classifiers, gaussians, nulls_without_reason

N = 250
MANY = 1500


def drawn(p: Predictions, index: np.ndarray) -> Predictions:
    """The examples of an index (N,)."""
    return Predictions(
        p.logits[:, index], p.labels[index], p.weights, p.example_id[index], p.noise_std
    )


@pytest.mark.parametrize("regression", [False, True])
def test_a_rows_error_is_that_of_the_mean_over_its_predictors(regression: bool) -> None:
    """Against the plain bootstrap, which evaluates every predictor on every resample."""
    own = ("pearson",) if regression else ("accuracy", "mcc")
    p = gaussians(3, N) if regression else classifiers(3, N)
    each = evaluation.alone(p)
    found = standard_errors(own, regression, {"map": each}, replicates=MANY)["map"]

    def statistic(index: np.ndarray) -> dict[str, Any]:
        rows = [evaluation.evaluate_in_full(own, regression, drawn(one, index)) for one in each]
        return {n: np.mean([row[n] for row in rows]) for n in found}

    names = (*SCORES, "pearson") if regression else (*CLASSES, *PARTS, "mcc")
    assert set(found) == set(names)
    plain = plain_errors(statistic, N, np.random.default_rng(7), 400)
    assert found == pytest.approx(plain, rel=0.2)


def test_the_error_of_a_mean_over_examples_is_the_textbooks() -> None:
    p = classifiers(2, N)
    found = standard_errors((), False, {"ensemble": [p]}, replicates=MANY)["ensemble"]
    loss = -np.log(p.probs[np.arange(N), p.labels])
    assert found["nll"] == pytest.approx(loss.std() / np.sqrt(N), rel=0.07)
    right = p.probs.argmax(1) == p.labels
    assert found["accuracy"] == pytest.approx(right.std() / np.sqrt(N), rel=0.07)


def test_differences_are_paired() -> None:
    a, b = classifiers(4, N), classifiers(4, N, scale=1.3)
    rows = {"ensemble": [a], "map": [b]}
    found = standard_errors((), False, rows, [("ensemble", "map")], MANY)
    gap = np.log(b.probs) - np.log(a.probs)
    loss = gap[np.arange(N), a.labels]
    error = found["differences"]["ensemble-map"]["nll"]
    assert error == pytest.approx(loss.std() / np.sqrt(N), rel=0.07)
    apart = np.hypot(found["ensemble"]["nll"], found["map"]["nll"])
    assert error < apart / 2


def test_a_row_does_not_differ_from_itself() -> None:
    p = classifiers(2, N)
    found = standard_errors((), False, {"a": [p], "b": [p]}, [("a", "b")])
    assert found["a"] == found["b"]
    gap = found["differences"]["a-b"]
    assert gap["nll"] is None
    assert "the same" in gap["nll_reason"]


def test_rows_that_are_not_there_say_why() -> None:
    rows = {"ensemble": [classifiers(2, 40)], "map_last": "nothing was held out"}
    found = standard_errors((), False, rows, [("ensemble", "map_last")])
    assert found["map_last"] is None
    assert found["map_last_reason"] == "nothing was held out"
    assert found["differences"]["ensemble-map_last"] is None
    assert found["differences"]["ensemble-map_last_reason"] == "nothing was held out"
    assert found["ensemble"]["nll"] > 0
    assert (found["replicates"], found["over"]) == (200, "examples")


@pytest.mark.parametrize("regression", [False, True])
def test_one_example_has_no_error(regression: bool) -> None:
    p = gaussians(2, 1) if regression else classifiers(2, 1)
    found = standard_errors((), regression, {"a": [p]}, [("a", "a")])
    assert found["a"]["nll"] is None
    assert "one example" in found["a"]["nll_reason"]
    assert nulls_without_reason(found) == []


def test_resamples_without_a_figure_are_left_out_and_counted() -> None:
    """Of 20 labels one is positive, and a third of the resamples miss it."""
    p = classifiers(2, 20)
    labels = np.r_[1, np.zeros(19, dtype=np.int64)]
    rare = Predictions(p.logits, labels, p.weights, p.example_id)
    found = standard_errors(("mcc",), False, {"a": [rare]}, replicates=MANY)["a"]
    assert found["mcc_left_out"] / MANY == pytest.approx((1 - 1 / 20) ** 20, rel=0.15)
    assert found["mcc"] > 0
    none = Predictions(p.logits, np.zeros(20, dtype=np.int64), p.weights, p.example_id)
    without = standard_errors(("mcc",), False, {"a": [none]})["a"]
    assert without["mcc"] is None
    assert without["mcc_reason"]


def test_the_same_predictions_have_the_same_errors() -> None:
    rows = [standard_errors((), False, {"a": [classifiers(2, 60)]}) for _ in range(2)]
    assert rows[0] == rows[1]


def test_groups_of_predictors_see_the_same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    p = classifiers(3, 60)
    rows = {"map": evaluation.alone(p), "ensemble": [p]}
    pairs = [("ensemble", "map")]
    whole = standard_errors((), False, rows, pairs)
    monkeypatch.setattr("bayesian_lora.assessment.standard_errors.AT_ONCE", 1)
    assert standard_errors((), False, rows, pairs) == whole
