"""Figures of merit against scikit-learn, SciPy, torchmetrics and values worked out by hand."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from torchmetrics.functional.classification import multiclass_calibration_error

from bayesian_lora.errors import InputError
from bayesian_lora.metrics import (
    classification_metrics,
    ensemble_log_probs,
    ensemble_probs,
    regression_metrics,
    softmax,
    temperature_scale,
    uncertainty,
    uncertainty_per_example,
)


def random_logits(*shape: int, seed: int = 0) -> np.ndarray:
    return 2 * np.random.default_rng(seed).standard_normal(shape)


def random_labels(n: int, classes: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, n)


def metrics_of(probs: list[list[float]], labels: list[int], own: tuple[str, ...] = ()) -> dict:
    return classification_metrics(np.log(probs), np.array(labels), own)


def test_ensemble_averages_probabilities_not_logits():
    logits = np.array([[[10.0, 0.0]], [[0.0, 1.0]]])
    first, second = 1 / (1 + np.exp(-10)), 1 / (1 + np.exp(1))
    expected = 0.75 * first + 0.25 * second
    probs = ensemble_probs(logits, np.array([3.0, 1.0]))  # not normalised
    assert probs[0] == pytest.approx([expected, 1 - expected], rel=1e-14)
    assert abs(probs[0, 0] - softmax(0.75 * logits[0] + 0.25 * logits[1])[0, 0]) > 0.1


def test_log_probs_do_not_underflow_and_keep_tiny_probabilities():
    logits = np.array([[[2000.0, 0.0]], [[1500.0, 0.0]]])
    log_probs = ensemble_log_probs(logits, np.ones(2))
    assert log_probs[0, 1] == pytest.approx(np.log(0.5) - 1500)
    small = ensemble_log_probs([[[40.0, 0.0]]], [1.0])
    assert small[0, 0] == pytest.approx(-np.exp(-40), rel=1e-12)


def test_member_of_weight_zero_is_ignored_without_a_warning():
    logits = random_logits(3, 5, 4)
    without = ensemble_log_probs(logits[:2], [1.0, 2.0])
    assert ensemble_log_probs(logits, [1.0, 2.0, 0.0]) == pytest.approx(without, abs=1e-14)
    assert uncertainty(logits, [1.0, 0.0, 0.0])["mutual_information"] is None


def test_classification_by_hand():
    # Confidences .9 right, .6 wrong, .8 right: each alone in its bin.
    got = metrics_of([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [0, 1, 1])
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert got["nll"] == pytest.approx(-np.log([0.9, 0.4, 0.8]).mean())
    assert got["ece"] == pytest.approx((0.1 + 0.6 + 0.2) / 3)
    assert got["brier"] == pytest.approx((2 * 0.01 + 2 * 0.36 + 2 * 0.04) / 3)
    assert not any(name.endswith("_reason") for name in got)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_classification_against_other_libraries(classes: int):
    n = 500
    log_probs = ensemble_log_probs(random_logits(4, n, classes), [0.1, 0.2, 0.3, 0.4])
    labels = random_labels(n, classes)
    probs, predicted = np.exp(log_probs), log_probs.argmax(1)
    own = ("f1", "mcc") if classes == 2 else ()
    got = classification_metrics(log_probs, labels, own)
    one_hot = np.eye(classes)[labels]
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-12)
    assert got["nll"] == pytest.approx(sk.log_loss(labels, probs), abs=1e-12)
    assert got["brier"] == pytest.approx(((probs - one_hot) ** 2).sum(1).mean(), abs=1e-12)
    ece = multiclass_calibration_error(
        torch.tensor(probs), torch.tensor(labels), num_classes=classes, n_bins=15
    )
    assert got["ece"] == pytest.approx(float(ece), abs=1e-6)
    if own:
        assert got["f1"] == pytest.approx(sk.f1_score(labels, predicted), abs=1e-12)
        assert got["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, predicted), abs=1e-12)


def test_ece_keeps_saturated_confidences_in_the_last_bin():
    # .94 (right) and nearly 1 (half wrong) share the bin [14/15, 1]; torchmetrics says .28.
    sure = 1 - 1e-9
    probs = [[sure, 1 - sure]] * 8 + [[0.94, 0.06]] * 8
    got = metrics_of(probs, [0] * 4 + [1] * 4 + [0] * 8)
    assert got["ece"] == pytest.approx(abs((sure + 0.94) / 2 - 12 / 16))
    certain = classification_metrics(ensemble_log_probs([[[800.0, 0.0]]], [1.0]), [0])
    assert (certain["ece"], certain["nll"], certain["brier"]) == (0.0, 0.0, 0.0)


def test_undefined_figures_are_none_with_a_reason():
    got = metrics_of([[0.9, 0.1], [0.8, 0.2]], [0, 0], ("f1", "mcc"))
    assert got["f1"] is None
    assert got["mcc"] is None
    assert "class 1" in str(got["f1_reason"])
    assert "predictions are constant" in str(got["mcc_reason"])
    one_class = metrics_of([[0.9, 0.1], [0.2, 0.8]], [1, 1], ("f1", "mcc"))
    assert one_class["f1"] == pytest.approx(2 / 3)
    assert one_class["mcc"] is None
    assert "labels are constant" in str(one_class["mcc_reason"])
    # No positive found although there is one: F1 is 0, and that is a figure.
    assert metrics_of([[0.9, 0.1]], [1], ("f1",))["f1"] == 0.0


def test_regression_against_scipy():
    rng = np.random.default_rng(3)
    y = rng.integers(0, 6, 80).astype(float)  # ties
    means, noise = y + rng.standard_normal((3, 80)), np.array([0.5, 1.0, 2.0])
    w = np.array([0.2, 0.3, 0.5])
    got = regression_metrics(means, noise, 10 * w, y)
    density = (w[:, None] * stats.norm.pdf(y, means, noise[:, None])).sum(0)
    assert got["nll"] == pytest.approx(-np.log(density).mean(), abs=1e-12)
    mean = w @ means
    assert got["rmse"] == pytest.approx(sk.root_mean_squared_error(y, mean), abs=1e-12)
    assert got["pearson"] == pytest.approx(stats.pearsonr(mean, y)[0], abs=1e-12)
    assert got["spearman"] == pytest.approx(stats.spearmanr(mean, y)[0], abs=1e-12)
    for name in ("accuracy", "ece", "brier"):
        assert got[name] is None
        assert "regression" in str(got[f"{name}_reason"])


def test_regression_nll_of_a_far_label_stays_finite():
    got = regression_metrics([[0.0], [0.0]], [0.01, 0.01], [1, 1], [100.0])
    assert got["nll"] == pytest.approx(0.5 * 1e8 + np.log(0.01 * np.sqrt(2 * np.pi)))
    assert got["pearson"] is None
    assert "constant" in str(got["pearson_reason"])


def test_constant_predictions_have_no_correlation_even_with_rounding():
    means = np.array([[0.1 + 0.2, 0.3, 0.3]])
    got = regression_metrics(means, [1.0], [1.0], [1.0, 2.0, 3.0], ("pearson",))
    assert got["pearson"] is None
    assert "spearman" not in got


@pytest.mark.parametrize("true_temperature", [0.3, 1.0, 4.0])
def test_temperature_recovers_the_one_labels_were_drawn_at(true_temperature: float):
    rng = np.random.default_rng(5)
    logits = 3 * rng.standard_normal((20_000, 3))
    probs = softmax(logits / true_temperature)
    labels = (rng.random((20_000, 1)) > probs.cumsum(1)).sum(1)
    fitted = temperature_scale(logits, labels)
    assert fitted == pytest.approx(true_temperature, rel=0.05)

    def nll(temperature: float) -> float:
        return sk.log_loss(labels, softmax(logits / temperature))

    assert nll(fitted) < min(nll(fitted * 1.01), nll(fitted / 1.01))


def test_temperature_stays_within_its_bounds():
    logits = np.array([[3.0, 0.0], [0.0, 3.0]])
    assert temperature_scale(logits, [0, 1]) == pytest.approx(0.05, rel=1e-3)
    assert temperature_scale(logits, [1, 0]) == pytest.approx(20, rel=1e-3)


def test_uncertainty_by_hand():
    far = 800.0  # certain members that disagree: all of log 2 is mutual information
    logits = np.array([[[far, 0.0]], [[0.0, far]]])
    got = uncertainty(logits, [1.0, 1.0])
    assert got["predictive_entropy"] == pytest.approx(np.log(2))
    assert got["expected_entropy"] == pytest.approx(0.0)
    assert got["mutual_information"] == pytest.approx(np.log(2))


def test_uncertainty_per_example_against_scipy():
    logits, w = random_logits(4, 9, 3), np.array([0.1, 0.2, 0.3, 0.4])
    got = uncertainty_per_example(logits, w)
    members = stats.entropy(softmax(logits), axis=-1)
    predictive = stats.entropy(np.einsum("k,knc->nc", w, softmax(logits)), axis=-1)
    assert got["predictive_entropy"] == pytest.approx(predictive, abs=1e-12)
    assert got["expected_entropy"] == pytest.approx(w @ members, abs=1e-12)
    assert got["mutual_information"] == pytest.approx(predictive - w @ members, abs=1e-12)
    means = uncertainty(logits, w)
    assert means["mutual_information"] == pytest.approx(got["mutual_information"].mean())


def test_equal_members_have_no_mutual_information_and_one_has_none():
    logits = random_logits(1, 50, 3)
    assert uncertainty(np.repeat(logits, 3, 0), np.ones(3))["mutual_information"] == pytest.approx(
        0.0, abs=1e-15
    )
    assert (
        uncertainty_per_example(np.repeat(logits, 3, 0), np.ones(3))["mutual_information"] >= 0
    ).all()
    single = uncertainty(logits, [1.0])
    assert single["mutual_information"] is None
    assert "one member" in str(single["mutual_information_reason"])
    assert single["predictive_entropy"] == pytest.approx(single["expected_entropy"])


def test_non_finite_logits_are_counted_and_located():
    logits = random_logits(2, 3, 2)
    logits[1, 2, 0], logits[1, 2, 1] = np.nan, np.inf
    with pytest.raises(InputError, match=r"logits: 2 of 12 .* first at \(1, 2, 0\)"):
        ensemble_probs(logits, np.ones(2))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], r"1 of 2 are outside 0\.\.1, the first \(-1\) at 1"),
        ([2, 2], r"2 of 2 are outside 0\.\.1"),
        ([0.0, 1.0], "integers"),
        ([0], "give 2 integers"),
    ],
)
def test_bad_labels(labels: list, message: str):
    log_probs = np.log([[0.5, 0.5], [0.5, 0.5]])
    with pytest.raises(InputError, match=message):
        classification_metrics(log_probs, labels)
    with pytest.raises(InputError, match=message):
        temperature_scale(log_probs, labels)


def test_other_bad_input():
    half = np.log([[0.5, 0.5]])
    with pytest.raises(InputError, match=r"shape \(0, 2\)"):
        classification_metrics(np.zeros((0, 2)), np.zeros(0, dtype=int))
    with pytest.raises(InputError, match="not logits"):
        classification_metrics([[1.0, 2.0]], [0])
    with pytest.raises(InputError, match="'f2' is not one of f1, mcc"):
        classification_metrics(half, [0], ("f2",))
    with pytest.raises(InputError, match="of 3 classes: needs 2"):
        classification_metrics(np.log(np.full((1, 3), 1 / 3)), [0], ("mcc",))
    for weights in ([1.0], [1.0, -0.5], [0.0, 0.0]):
        with pytest.raises(InputError, match="weights"):
            ensemble_probs(random_logits(2, 3, 2), weights)
    with pytest.raises(InputError, match="noise_std 0 is not above 0"):
        regression_metrics([[1.0]], [0.0], [1.0], [1.0])
    with pytest.raises(InputError, match="one label an example"):
        regression_metrics([[1.0]], [1.0], [1.0], [1.0, 2.0])
