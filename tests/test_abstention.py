"""Thresholds to abstain above: what may be asked for, and what is promised of those found.

Shapes: K members, N examples, C classes.
"""

import dataclasses
import math

import numpy as np
import pytest

from bayesian_lora.abstention import (
    SCORES,
    Abstention,
    RiskThreshold,
    check_score,
    risk_threshold,
    scores,
)
from bayesian_lora.errors import InputError
from bayesian_lora.metrics import uncertainty_per_example
from bayesian_lora.predict import Predictions

K, N, C = 3, 400, 3


@pytest.fixture
def made() -> Predictions:
    """Logits whose top label is right as often as it says, so that scores rank the mistakes."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (1, N, C)) + rng.normal(0, 0.5, (K, N, C))
    p = Predictions(logits, np.zeros(N, np.int64), np.array([0.5, 0.3, 0.2]), np.arange(N))
    labels = [rng.choice(C, p=row / row.sum()) for row in p.probs]
    return dataclasses.replace(p, labels=np.array(labels))


def test_scores_are_those_of_the_metrics(made: Predictions) -> None:
    expected = uncertainty_per_example(made.logits, made.weights)
    for name in ("predictive_entropy", "mutual_information"):
        np.testing.assert_array_equal(scores(made, name), expected[name])
    np.testing.assert_allclose(scores(made, "max_probability"), 1 - made.probs.max(1))


def test_an_unknown_score_names_those_there_are() -> None:
    with pytest.raises(InputError, match=f"score='entropy': choose {', '.join(SCORES)}"):
        check_score("entropy")


def test_one_member_and_members_left_out_have_no_mutual_information(made: Predictions) -> None:
    one = dataclasses.replace(made, weights=np.array([1.0, 0.0, 0.0]))
    with pytest.raises(InputError, match="not available, one member alone cannot disagree"):
        scores(one, "mutual_information")
    near = dataclasses.replace(made, members_used=np.full(N, 2))
    with pytest.raises(InputError, match="not available where members are left out"):
        scores(near, "mutual_information")
    assert np.isfinite(scores(one, "predictive_entropy")).all()


@pytest.mark.parametrize("above", [-0.1, math.nan])
def test_a_threshold_is_a_number_from_zero(above: float) -> None:
    with pytest.raises(InputError, match="a threshold is a number from 0 upwards"):
        Abstention(above)


@pytest.mark.parametrize("score", SCORES)
def test_the_plain_threshold_is_the_largest_that_holds_on_the_examples(
    made: Predictions, score: str
) -> None:
    target = 0.1
    found = risk_threshold(made, target, 0, score)
    value, wrong = scores(made, score), made.predicted != made.labels
    kept = value <= found.above
    assert found.n == N
    assert 0 < found.kept == kept.mean() < 1
    assert found.risk == pytest.approx(wrong[kept].mean())
    assert found.risk <= target
    larger = value[value > found.above]
    assert all(wrong[value <= t].mean() > target for t in larger)


def test_a_guarantee_keeps_fewer(made: Predictions) -> None:
    plain, safe = risk_threshold(made, 0.2, 0), risk_threshold(made, 0.2, 0.95)
    assert 0 < safe.kept < plain.kept
    assert safe.risk < plain.risk <= 0.2
    assert (safe.confidence, plain.confidence) == (0.95, 0)


def test_nothing_is_left_out_where_nothing_is_wrong(made: Predictions) -> None:
    right = dataclasses.replace(made, labels=made.predicted)
    found = risk_threshold(right, 0.05)
    assert (found.above, found.kept, found.risk) == (
        scores(right, "predictive_entropy").max(),
        1.0,
        0.0,
    )


def test_too_few_examples_say_what_would_do(made: Predictions) -> None:
    wrong = (made.predicted + 1) % C
    none = dataclasses.replace(made, labels=wrong)
    with pytest.raises(InputError, match=r"target_risk=0.1: no threshold .* on 400 examples"):
        risk_threshold(none, 0.1)
    few = Predictions(made.logits[:, :10], made.predicted[:10], made.weights, made.example_id[:10])
    with pytest.raises(
        InputError, match=r"with confidence 0.95, for which 10 examples .* \(with 0 the "
    ):
        risk_threshold(few, 0.05)
    assert risk_threshold(few, 0.05, 0).kept == 1


@pytest.mark.parametrize(
    ("target", "confidence", "message"),
    [
        (1.0, 0.95, "target_risk=1.0: a share"),
        (-0.1, 0.95, "target_risk=-0.1: a share"),
        (math.nan, 0.95, "target_risk=nan: a share"),
        (0.1, 1.0, "confidence=1.0: from 0"),
        (0.1, math.nan, "confidence=nan: from 0"),
    ],
)
def test_targets_and_confidences_that_there_are_not(
    made: Predictions, target: float, confidence: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        risk_threshold(made, target, confidence)


def test_a_regression_has_no_wrong_labels() -> None:
    p = Predictions(
        np.zeros((1, 2, 1)), np.zeros(2, np.float32), np.ones(1), np.arange(2), np.ones(1)
    )
    with pytest.raises(InputError, match="a regression has no wrong labels"):
        risk_threshold(p, 0.1)


def test_a_threshold_says_what_holds_of_it() -> None:
    found = RiskThreshold(0.5, "predictive_entropy", 0.1, 0.95, 400, 0.75, 0.05)
    assert found.said("validation") == (
        "Abstains where predictive_entropy > 0.5: of the 400 examples of validation 75.0% are "
        "kept, 5.0% of them wrong; with confidence 0.95 at most 0.1 of the labels given to texts "
        "drawn as these were."
    )
    bare = dataclasses.replace(found, confidence=0.0).said("validation")
    assert bare.endswith("5.0% of them wrong. Other texts may differ: no guarantee.")
