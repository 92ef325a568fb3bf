"""Reliability and risk–coverage as `metrics.json` holds them.

Shapes: M chains, K members, N examples.
"""

import numpy as np
import pytest

from bayesian_lora.assessment import evaluation
from bayesian_lora.assessment.diagrams import (
    COVERAGES,
    POINTS,
    calibration_figures,
    doubt,
    selective_figures,
)
from bayesian_lora.predict import Predictions

from .predictors import classifiers, gaussians, nulls_without_reason

M, N = 3, 250


@pytest.fixture
def starts() -> Predictions:
    return classifiers(M, N, scale=2.0)


@pytest.fixture
def members() -> Predictions:
    return classifiers(5, N, seed=1)


def test_the_diagrams_hold_every_answer_and_its_error(
    starts: Predictions, members: Predictions
) -> None:
    found = calibration_figures(False, starts, members)
    diagrams = found["reliability"]
    for name, answers in (("map", M * N), ("ensemble", N)):
        one = diagrams[name]
        assert len(one["edges"]) == found["bins"] + 1 == 16
        assert sum(one["count"]) == answers
        filled = [
            (a, c)
            for a, c, k in zip(one["accuracy"], one["confidence"], one["count"], strict=True)
            if k
        ]
        assert all(0 <= x <= 1 for pair in filled for x in pair)
        empty = [one["accuracy"][b] for b, k in enumerate(one["count"]) if not k]
        assert empty  # below one half a top label of two classes cannot lie
        assert set(empty) == {None}
    one = diagrams["ensemble"]
    gaps = [
        k * abs(a - c)
        for a, c, k in zip(one["accuracy"], one["confidence"], one["count"], strict=True)
        if k
    ]
    ece = evaluation.evaluate((), False, members)["ece"]
    assert sum(gaps) / N == pytest.approx(ece)


def test_the_expected_error_is_that_of_labels_drawn_from_the_probabilities(
    starts: Predictions, members: Predictions
) -> None:
    expected = calibration_figures(False, starts, members)["expected_ece"]
    rng = np.random.default_rng(5)
    right = (rng.random((400, N)) > members.probs[:, 0]).astype(np.int64)
    found = [
        evaluation.evaluate(
            (), False, Predictions(members.logits, y, members.weights, members.example_id)
        )["ece"]
        for y in right
    ]
    assert expected["mean"] == pytest.approx(np.mean(found), rel=0.1)
    assert expected["sd"] == pytest.approx(np.std(found), rel=0.2)


def test_risk_over_all_examples_is_the_error_rate(
    starts: Predictions, members: Predictions
) -> None:
    found = selective_figures(False, starts, members)
    assert found["score"] == "predictive_entropy"
    assert len(found["coverage"]) == len(found["risk"]["map"]) == POINTS
    assert found["coverage"][-1] == 1
    accuracy = evaluation.evaluate((), False, members)["accuracy"]
    assert found["risk"]["ensemble"][-1] == pytest.approx(1 - accuracy)
    each = [row["accuracy"] for row in evaluation.evaluate_members((), False, starts)]
    assert found["risk"]["map"][-1] == pytest.approx(1 - np.mean(each))
    entropy, wrong = doubt(members)
    kept = np.argsort(entropy)[: round(0.8 * N)]
    assert found["accuracy_at"]["0.8"] == pytest.approx(1 - wrong[kept].mean())
    assert [float(x) for x in found["map_accuracy_at"]] == list(COVERAGES)
    assert found["accuracy_at"]["0.5"] > found["accuracy_at"]["0.95"]


def test_accuracies_at_coverages_have_the_error_of_an_accuracy_of_so_many(
    starts: Predictions, members: Predictions
) -> None:
    found = selective_figures(False, starts, members)
    assert found["accuracy_at_se"].keys() == found["accuracy_at"].keys()
    for share, error in found["accuracy_at_se"].items():
        accuracy = found["accuracy_at"][share]
        alone = np.sqrt(accuracy * (1 - accuracy) / (float(share) * N))
        # Which examples are kept varies as well.
        assert 0.8 * alone < error < 2 * alone
        # The starts share most of what they say: their mean varies hardly less than one of them.
        mean = found["map_accuracy_at"][share]
        alone = np.sqrt(mean * (1 - mean) / (float(share) * N))
        assert 0.5 * alone < found["map_accuracy_at_se"][share] < 2 * alone


def test_one_example_has_no_error_of_its_accuracy() -> None:
    one = classifiers(3, 1)
    found = selective_figures(False, one, one)
    assert found["accuracy_at_se"]["0.5"] is None
    assert "one example" in found["accuracy_at_se"]["0.5_reason"]
    assert nulls_without_reason(found) == []


def test_accuracies_in_bins_have_the_error_of_so_many_answers(
    starts: Predictions, members: Predictions
) -> None:
    found = calibration_figures(False, starts, members)["reliability"]
    seen = 0
    for name, sharers in (("ensemble", 1), ("map", M)):
        one = found[name]
        assert len(one["accuracy_se"]) == len(one["accuracy"])
        rows = zip(one["accuracy"], one["count"], one["accuracy_se"], strict=True)
        for accuracy, count, error in rows:
            if accuracy in (None, 0.0, 1.0):
                assert error is None
            elif count >= 20 * sharers:
                alone = np.sqrt(accuracy * (1 - accuracy) * sharers / count)
                # Starts that share an example err alike, and others are independent.
                assert alone / np.sqrt(sharers) * 0.7 < error < 1.4 * alone
                seen += 1
    assert seen > 6


def test_risks_along_the_curve_have_the_errors_of_the_accuracies(
    starts: Predictions, members: Predictions
) -> None:
    found = selective_figures(False, starts, members)
    for name, prefix in (("ensemble", ""), ("map", "map_")):
        errors = found["risk_se"][name]
        assert len(errors) == POINTS
        at = dict(zip(found["coverage"], errors, strict=True))
        same = {share: at[share] for share in COVERAGES if share in at}
        assert len(same) > 1
        for share, error in same.items():
            assert error == found[f"{prefix}accuracy_at_se"][f"{share:g}"]
    certain = Predictions(
        np.array([[[0.0, 9.0], [9.0, 0.0]]]), np.array([1, 0]), np.ones(1), np.arange(2)
    )
    assert selective_figures(False, certain, certain)["risk_se"]["ensemble"] == [None, None]


def test_the_area_is_that_of_the_curve() -> None:
    p = classifiers(3, 80)
    risk = selective_figures(False, p, p)["risk"]["ensemble"]
    assert len(risk) == 80
    assert np.mean(risk) == pytest.approx(evaluation.evaluate_in_full((), False, p)["aurc"])


def test_a_regression_has_neither() -> None:
    p = gaussians()
    for found in (calibration_figures(True, p, p), selective_figures(True, p, p)):
        assert nulls_without_reason(found) == []
        assert "no classes" in found.pop("reason")
        assert set(found.values()) == {None}
