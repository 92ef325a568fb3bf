"""Calibration figures against torchmetrics, hand-made cases, identities and simulation.

Shapes: N examples, C classes.
"""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from bayesian_lora.errors import InputError
from bayesian_lora.metrics import classification_metrics, softmax
from bayesian_lora.scores.calibration import (
    brier_decomposition,
    classwise_ece,
    ece,
    equal_mass_bins,
    expected_ece,
    reliability,
)


def made(n: int, classes: int, seed: int = 0, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C), and labels drawn from sharper ones, so that they are off."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((n, classes))
    return softmax(logits), drawn(softmax(1.5 * logits), rng)


def drawn(probs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.random((len(probs), 1)) > probs.cumsum(1)[:, :-1]).sum(1)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (17, 2), (1000, 3), (400, 11)])
def test_ece_of_equal_width_bins_is_that_of_the_metrics(n: int, classes: int):
    probs, labels = made(n, classes)
    got = ece(reliability(probs, labels))
    assert got == pytest.approx(classification_metrics(np.log(probs), labels)["ece"], abs=1e-15)
    other = multiclass_calibration_error(
        torch.tensor(probs), torch.tensor(labels), num_classes=classes, n_bins=15
    )
    assert got == pytest.approx(float(other), abs=1e-6)


def test_edges_of_bins_are_counted_as_in_the_metrics():
    # Confidences on edges k/15, where rounding decides, and 1.
    top = np.r_[np.arange(8, 16) / 15, 1.0]
    probs = np.stack([top, 1 - top], axis=1)
    labels = np.zeros(9, dtype=int)
    with np.errstate(divide="ignore"):
        log_probs = np.maximum(np.log(probs), -800)
    bins = reliability(probs, labels)
    assert bins.count[8:].tolist() == [1, 1, 1, 1, 1, 1, 3]
    assert ece(bins) == pytest.approx(classification_metrics(log_probs, labels)["ece"], abs=1e-15)


def test_reliability_by_hand():
    probs = np.array([[0.9, 0.1], [0.94, 0.06], [0.45, 0.55]])
    bins = reliability(probs, np.array([0, 1, 1]), bins=10)
    assert bins.count.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert bins.edges == pytest.approx(np.linspace(0, 1, 11))
    assert bins.confidence[[5, 9]] == pytest.approx([0.55, 0.92])
    assert bins.accuracy[[5, 9]] == pytest.approx([1.0, 0.5])
    assert np.isnan(bins.confidence[0])
    assert np.isnan(bins.accuracy[0])
    assert ece(bins) == pytest.approx((0.45 + 2 * 0.42) / 3)


def test_adaptive_bins_hold_equal_shares():
    probs, labels = made(1000, 3)
    bins = reliability(probs, labels, adaptive=True)
    assert bins.count.sum() == 1000
    assert set(bins.count) <= {66, 67}
    assert (np.diff(bins.edges) > 0).all()
    # Each bin's mean confidence lies between its edges.
    assert (bins.edges[:-1] < bins.confidence).all()
    assert (bins.confidence < bins.edges[1:]).all()
    top, right = probs.max(1), probs.argmax(1) == labels
    order = np.argsort(top)
    gaps = [
        abs((right[i] - top[i]).sum())
        for i in (order[np.arange(1000) * 15 // 1000 == b] for b in range(15))
    ]
    assert ece(bins) == pytest.approx(sum(gaps) / 1000, abs=1e-12)


def test_adaptive_bins_do_not_depend_on_the_order_of_ties():
    rng = np.random.default_rng(1)
    top = rng.choice([0.6, 0.7, 1.0], 300, p=[0.1, 0.2, 0.7])
    labels = rng.integers(0, 2, 300)
    probs = np.stack([top, 1 - top], axis=1)
    first = reliability(probs, labels, adaptive=True)
    mixed = rng.permutation(300)
    other = reliability(probs[mixed], labels[mixed], adaptive=True)
    assert first.count.tolist() == other.count.tolist()
    assert (first.count > 0).sum() == 3
    assert ece(first) == pytest.approx(ece(other), abs=1e-14)
    assert len(first.edges) == 16


@pytest.mark.parametrize("n", [1, 2, 15, 16])
def test_few_examples_have_equal_mass_bins_of_their_own(n: int):
    index = equal_mass_bins(np.linspace(0.5, 1, n), 15)
    assert index.max() <= 14
    assert len(set(index.tolist())) == min(n, 15)


def test_classwise_ece_by_loops():
    probs, labels = made(300, 4)
    total = 0.0
    for c in range(4):
        for b in range(15):
            inside = (probs[:, c] >= b / 15) & (probs[:, c] < (b + 1) / 15)
            if inside.any():
                share = (labels[inside] == c).mean()
                total += inside.sum() / 300 * abs(share - probs[inside, c].mean())
    assert classwise_ece(probs, labels) == pytest.approx(total / 4, abs=1e-12)


@pytest.mark.parametrize(("n", "classes", "bins"), [(1, 2, 15), (700, 2, 15), (900, 5, 4)])
def test_briers_parts_add_up(n: int, classes: int, bins: int):
    probs, labels = made(n, classes)
    got = brier_decomposition(probs, labels, bins)
    brier = ((probs - np.eye(classes)[labels]) ** 2).sum(1).mean()
    whole = (
        got["brier_reliability"]
        - got["brier_resolution"]
        + got["brier_uncertainty"]
        + got["brier_within_bin"]
    )
    assert whole == pytest.approx(brier, abs=1e-12)
    share = np.bincount(labels, minlength=classes) / n
    assert got["brier_uncertainty"] == pytest.approx(1 - (share**2).sum(), abs=1e-12)
    assert min(got["brier_reliability"], got["brier_resolution"]) >= 0


def test_forecasts_of_one_value_a_bin_have_nothing_within_bins():
    """Murphy's three terms alone, by hand: .8 of two classes, right 3 times of 4; and .5."""
    probs = np.array([[0.8, 0.2]] * 4 + [[0.5, 0.5]] * 2)
    got = brier_decomposition(probs, np.array([0, 0, 0, 1, 0, 1]))
    assert got["brier_within_bin"] == pytest.approx(0, abs=1e-15)
    assert got["brier_reliability"] == pytest.approx(2 * 4 / 6 * 0.05**2)
    mean = 4 / 6
    resolution = 2 * (4 / 6 * (0.75 - mean) ** 2 + 2 / 6 * (0.5 - mean) ** 2)
    assert got["brier_resolution"] == pytest.approx(resolution)


def test_expected_ece_is_what_calibrated_labels_score():
    probs, _ = made(400, 3)
    got = expected_ece(probs, np.random.default_rng(0), replicates=2000)
    rng = np.random.default_rng(1)
    seen = [ece(reliability(probs, drawn(probs, rng))) for _ in range(600)]
    assert got["mean"] == pytest.approx(np.mean(seen), abs=4 * got["sd"] / np.sqrt(600))
    assert got["sd"] == pytest.approx(np.std(seen), rel=0.15)
    assert got["mean"] > 0.01  # far from 0 at 400 examples


def test_expected_ece_falls_with_the_number_of_examples_and_not_with_blocks(monkeypatch):
    probs, _ = made(4000, 2)
    few = expected_ece(probs[:100], np.random.default_rng(0), 200)
    many = expected_ece(probs, np.random.default_rng(0), 200)
    assert many["mean"] < 0.25 * few["mean"]
    monkeypatch.setattr("bayesian_lora.scores.calibration.BLOCK", 300)
    again = expected_ece(probs[:100], np.random.default_rng(0), 200)
    assert again == pytest.approx(few, abs=1e-15)


def test_a_certain_model_expects_no_error():
    certain = np.eye(2)[np.array([0, 1, 1])]
    got = expected_ece(certain, np.random.default_rng(0), 10)
    assert got == {"mean": 0.0, "sd": 0.0}


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([[np.nan, 1.0]], [0], r"probs: 1 of 2 values are not finite"),
        ([[0.5, np.inf]], [0], r"probs: 1 of 2 values are not finite"),
        (np.zeros((0, 2)), np.zeros(0, dtype=int), r"shape \(0, 2\)"),
        ([[1.0]], [0], "probs of 1 class"),
        ([[2.0, -1.0]], [0], "the least is -1"),
        ([[2.0, 1.0]], [0], "sum is off 1 by 2"),
        ([[0.5, 0.5]], [2], r"outside 0\.\.1"),
    ],
)
def test_bad_input_is_one_clear_line(probs, labels, message: str):
    for figure in (reliability, classwise_ece, brier_decomposition):
        with pytest.raises(InputError, match=message) as caught:
            figure(probs, labels)
        assert "\n" not in str(caught.value)


def test_impossible_counts_are_refused():
    half = [[0.5, 0.5]]
    for figure in (reliability, classwise_ece, brier_decomposition):
        with pytest.raises(InputError, match="0 bins: give 1 or more"):
            figure(half, [0], bins=0)
    with pytest.raises(InputError, match="1 replicates have no spread"):
        expected_ece(half, np.random.default_rng(0), 1)
