"""Figures of many resamples at once, against the plain functions on the drawn examples.

Shapes: N examples, C classes, B replicates.
"""

import time

import numpy as np
import pytest

from bayesian_lora.metrics import ensemble_log_probs
from bayesian_lora.scores import selective
from bayesian_lora.scores.bootstrap import replicate
from bayesian_lora.scores.calibration import reliability
from bayesian_lora.scores.resampled_figures import (
    bin_statistic,
    classification_figures,
    classification_statistic,
    regression_figures,
    regression_statistic,
    risk_statistic,
)

ADDED = {
    "adaptive_ece",
    "classwise_ece",
    "brier_reliability",
    "brier_resolution",
    "brier_uncertainty",
    "brier_within_bin",
    "aurc",
}


def made(n: int, classes: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n + classes)
    logits = 2 * rng.standard_normal((1, n, classes))
    if ties:
        logits = np.round(logits)
    return ensemble_log_probs(logits, [1.0]), rng.integers(0, classes, n)


def resampled(n: int, replicates: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Indices (B, N), and as counts (N, B)."""
    index = np.random.default_rng(9).integers(0, n, (replicates, n))
    return index, np.stack([np.bincount(i, minlength=n) for i in index], axis=1).astype(float)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (2, 2), (50, 2), (200, 2), (60, 5), (9, 3)])
def test_classification_equals_the_plain_figures_of_the_drawn_examples(
    n: int, classes: int, ties: bool
):
    log_probs, labels = made(n, classes, ties)
    own = ("f1", "mcc") if classes == 2 else ()
    index, counts = resampled(n)
    got = classification_statistic(log_probs, labels, own)(counts)
    for b, i in enumerate(index):
        plain = classification_figures(log_probs[i], labels[i], own)
        assert got.keys() == {k for k in plain if not k.endswith("_reason")}
        for name, values in got.items():
            if plain[name] is None:
                assert np.isnan(values[b]), name
            else:
                assert values[b] == pytest.approx(plain[name], abs=1e-12), name


def test_classification_row_has_the_new_figures_beside_the_old():
    log_probs, labels = made(100, 3)
    got = classification_figures(log_probs, labels)
    assert got.keys() == {"accuracy", "nll", "ece", "brier"} | ADDED
    assert all(isinstance(value, float) for value in got.values())


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("n", [1, 2, 30, 150])
def test_regression_equals_the_plain_figures_of_the_drawn_examples(n: int, rounded: bool):
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 6, n).astype(float)
    means = labels + rng.standard_normal((3, n))
    if rounded:
        means = np.round(means[:1] * 0.5).repeat(3, axis=0)
    noise, weights = np.array([0.5, 1.0, 2.0]), np.array([2.0, 3.0, 5.0])
    index, counts = resampled(n)
    got = regression_statistic(means, noise, weights, labels)(counts)
    for b, i in enumerate(index):
        plain = regression_figures(means[:, i], noise, weights, labels[i])
        for name, values in got.items():
            if plain[name] is None:
                assert np.isnan(values[b]), name
            else:
                assert values[b] == pytest.approx(plain[name], abs=1e-10), name
    assert set(got) == {
        "nll",
        "rmse",
        "pearson",
        "spearman",
        "crps",
        "coverage_0.5",
        "coverage_0.9",
        "coverage_0.95",
    }


def test_own_figures_of_a_regression_are_those_asked_for():
    labels = np.arange(10.0)
    means = labels[None] + 0.1
    counts = np.ones((10, 1))
    got = regression_statistic(means, [1.0], [1.0], labels, ("spearman",))(counts)
    assert "pearson" not in got
    assert got["spearman"] == pytest.approx([1.0])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 7, 40, 400])
def test_accuracy_at_coverages_equals_the_plain_one_of_the_drawn_examples(n: int, ties: bool):
    rng = np.random.default_rng(n)
    score, wrong = rng.random(n), rng.random(n) < 0.3
    if ties:
        score = np.round(score, 1)
    shares = (0.05, 0.5, 0.95, 1.0)
    index, counts = resampled(n)
    got = risk_statistic(score, wrong, shares)(counts)
    for b, i in enumerate(index):
        plain = list(selective.accuracy_at(score[i], wrong[i], shares).values())
        assert plain == pytest.approx([1 - got[str(s)][b] for s in range(len(shares))], abs=1e-12)


def test_accuracy_in_bins_equals_the_plain_one_of_the_drawn_examples():
    n, (log_probs, labels) = 60, made(60, 3)
    probs = np.exp(np.stack([log_probs, log_probs[:, ::-1]]))
    index, counts = resampled(n)
    got = bin_statistic(probs, labels)(counts)
    empty = 0
    for b, i in enumerate(index):
        pooled = reliability(np.concatenate(probs[:, i]), np.tile(labels[i], 2))
        found = np.array([values[b] for values in got.values()])
        np.testing.assert_allclose(found, pooled.accuracy, atol=1e-12)
        empty += np.isnan(found).sum()
    assert empty > 0


def test_a_large_row_is_quick():
    """10,000 examples of 4 classes, 200 replicates: 1.5 s of processor time, with a margin of 2."""
    log_probs, labels = made(10_000, 4)
    statistic = classification_statistic(log_probs, labels)
    began = time.process_time()
    got = replicate({"row": statistic}, 10_000, np.random.default_rng(0), 200).se("row")
    assert time.process_time() - began < 3
    share = float((log_probs.argmax(1) == labels).mean())
    assert got["accuracy"] == pytest.approx(np.sqrt(share * (1 - share) / 10_000), rel=0.2)
    assert all(isinstance(value, float) for value in got.values())
