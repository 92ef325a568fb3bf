"""Predictions → figures: mixtures, means over members, temperature scaling, truth, null and why.

Shapes: K members, N examples, C classes.
"""

import math
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from scipy.stats import norm
from sklearn.metrics import log_loss, matthews_corrcoef

from bayesian_lora.assessment import evaluation
from bayesian_lora.assessment.run_rows import Given, Predicted, rows
from bayesian_lora.metrics import uncertainty_per_example
from bayesian_lora.predict import Predictions

K, N = 4, 50


def predictions(classes: int = 2, scale: float = 2.0, seed: int = 0, **other: Any) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=N)
    logits = rng.normal(size=(K, N, classes)) + scale * np.eye(classes)[labels]
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    parts = {"logits": logits, "labels": labels, "weights": weights, "example_id": np.arange(N)}
    return Predictions(**{**parts, **other})


def temperature_scaled(
    own: tuple[str, ...], regression: bool, p: Predictions, held_out: Predictions | None
) -> dict[str, Any]:
    """The row of fits that predict `p`."""
    fits = Predicted(p, held_out)
    given = Given(own, regression, fits, np.arange(p.num_members), fits)
    return rows(given)["map_temperature_scaled"]


def scores(seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.uniform(0, 5, N).astype(np.float32)
    logits = labels[None, :, None] + rng.normal(size=(K, N, 1))
    weights, noise = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.5, 1.0, 1.5, 2.0])
    return Predictions(logits, labels, weights, np.arange(N), noise)


def test_the_mixture_of_probabilities_is_evaluated() -> None:
    p = predictions(classes=3)
    mixture = np.einsum("k,knc->nc", p.weights, softmax(p.logits, axis=-1))
    found = evaluation.evaluate(("accuracy",), False, p)
    assert found["nll"] == pytest.approx(log_loss(p.labels, mixture))
    assert found["accuracy"] == (mixture.argmax(1) == p.labels).mean()
    of_logits = softmax(np.einsum("k,knc->nc", p.weights, p.logits), axis=-1)
    assert abs(found["nll"] - log_loss(p.labels, of_logits)) > 1e-3


def test_the_mixture_of_gaussians_is_evaluated() -> None:
    p = scores()
    assert p.noise_std is not None
    density = norm.logpdf(p.labels, p.logits[..., 0], p.noise_std[:, None])
    expected = -np.mean(logsumexp(density, axis=0, b=p.weights[:, None]))
    found = evaluation.evaluate(("pearson", "spearman"), True, p)
    assert found["nll"] == pytest.approx(expected)
    mean = p.weights @ p.logits[..., 0]
    assert found["pearson"] == pytest.approx(np.corrcoef(mean, p.labels)[0, 1])
    assert found["accuracy"] is None
    assert found["accuracy_reason"]


def test_members_alone_have_weight_one_and_their_own_noise() -> None:
    for regression, p in ((False, predictions()), (True, scores())):
        rows = evaluation.evaluate_members((), regression, p)
        assert len(rows) == K
        alone = evaluation.member(p, 2)
        assert (alone.num_members, alone.weights.tolist()) == (1, [1.0])
        assert rows[2] == evaluation.evaluate((), regression, alone)
        if regression:
            assert alone.noise_std is not None
            assert alone.noise_std.tolist() == [1.5]
            expected = -norm.logpdf(p.labels, p.logits[2, :, 0], 1.5).mean()
            assert rows[2]["nll"] == pytest.approx(expected)


def test_mean_and_deviation_over_members() -> None:
    rows = [{"nll": 1.0}, {"nll": 2.0}, {"nll": 6.0}]
    found = evaluation.mean_and_sd(rows)["nll"]
    assert found == {"mean": pytest.approx(3.0), "sd": pytest.approx(math.sqrt(7.0))}
    single = evaluation.mean_and_sd(rows[:1])["nll"]
    assert (single["mean"], single["sd"]) == (1.0, None)
    assert single["sd_reason"]


@pytest.mark.parametrize("place", [0, 1])
def test_a_figure_that_one_member_lacks_has_no_mean(place: int) -> None:
    rows: list[dict[str, Any]] = [{"mcc": 0.5}, {"mcc": 0.7}]
    rows[place] = {"mcc": None, "mcc_reason": "the predictions are constant"}
    found = evaluation.mean_and_sd(rows)
    assert found.keys() == {"mcc"}
    assert (found["mcc"]["mean"], found["mcc"]["sd"]) == (None, None)
    assert found["mcc"]["reason"] == "missing in 1 of 2: the predictions are constant"


def test_each_warm_start_gets_its_own_temperature() -> None:
    """Logits twice too large for their labels need T = 2, whatever the evaluation split holds."""
    rng = np.random.default_rng(1)
    true = rng.normal(scale=2.0, size=(20_000, 2))
    labels = (rng.random(len(true)) < softmax(true, axis=-1)[:, 1]).astype(np.int64)
    logits = np.stack([2.0 * true, 0.5 * true])
    ids = np.arange(len(true))
    held = Predictions(logits, labels, np.full(2, 0.5), ids)
    p = predictions(seed=3)
    two = Predictions(p.logits[:2], p.labels, np.full(2, 0.5), p.example_id)
    found = temperature_scaled(("accuracy",), False, two, held)
    assert found["temperature"] == pytest.approx((2.0 + 0.5) / 2, rel=0.05)
    nll = [log_loss(p.labels, softmax(two.logits[k] / t, axis=-1)) for k, t in ((0, 2), (1, 0.5))]
    assert found["nll"] == pytest.approx(np.mean(nll), rel=0.02)


def test_a_temperature_that_the_held_out_data_do_not_settle_is_told() -> None:
    """All right: the colder the better. The row would make any ensemble look good beside it."""
    p = predictions()
    right = predictions(scale=20.0)
    found = temperature_scaled((), False, p, right)
    assert found["temperature"] == pytest.approx(0.05, rel=1e-3)
    assert f"{K} of {K} temperatures stopped at a bound" in found["temperature_note"]
    settled = temperature_scaled((), False, p, predictions(seed=1))
    assert "temperature_note" not in settled


@pytest.mark.parametrize("constant", [0, 1])
def test_a_warm_start_that_always_says_the_same_has_no_mcc(constant: int) -> None:
    p = predictions()
    p.logits[constant] = [3.0, 0.0]
    found = temperature_scaled(("mcc",), False, p, predictions(seed=1))
    assert found["mcc"] is None
    assert "constant" in found["mcc_reason"]
    assert found["nll"] > 0
    ensemble = evaluation.evaluate(("mcc",), False, p)
    mixture = np.einsum("k,knc->nc", p.weights, softmax(p.logits, axis=-1))
    assert ensemble["mcc"] == pytest.approx(matthews_corrcoef(p.labels, mixture.argmax(1)))


@pytest.mark.parametrize(("regression", "part"), [(True, "Gaussian"), (False, "validation_share")])
def test_without_held_out_classes_there_is_no_temperature(regression: bool, part: str) -> None:
    found = temperature_scaled((), regression, scores() if regression else predictions(), None)
    names = {"accuracy", "nll", "ece", "brier", "temperature", evaluation.FITTED_ON, "reason"}
    assert set(found) == names
    assert part in found.pop("reason")
    assert set(found.values()) == {None}


def test_uncertainty_splits_into_expected_entropy_and_disagreement() -> None:
    found = evaluation.uncertainty(False, predictions())
    assert found["mutual_information"] > 0
    parts = found["expected_entropy"] + found["mutual_information"]
    assert found["predictive_entropy"] == pytest.approx(parts)
    assert found["predictive_entropy"] < math.log(2)
    each = uncertainty_per_example(predictions().logits, predictions().weights)
    for name, values in each.items():
        assert found[f"{name}_se"] == pytest.approx(values.std() / math.sqrt(N))
    for_scores = evaluation.uncertainty(True, scores())
    assert for_scores.pop("reason")
    assert set(for_scores.values()) == {None}


def test_what_needs_every_member_is_null_where_some_were_left_out() -> None:
    whole, part = predictions(), predictions(members_used=np.full(N, K - 1))
    found = evaluation.uncertainty(False, part)
    assert found["predictive_entropy"] == evaluation.uncertainty(False, whole)["predictive_entropy"]
    for name in ("expected_entropy", "mutual_information"):
        assert found[name] is None
        assert found[f"{name}_reason"] == evaluation.LEFT_OUT
    single = evaluation.single_members(("accuracy", "mcc"), False, part)
    assert single.keys() == evaluation.evaluate(("accuracy", "mcc"), False, whole).keys()
    assert single["mcc"] == {"mean": None, "sd": None, "reason": evaluation.LEFT_OUT}
    # Where every input got all of them nothing is missing.
    for given in (whole, predictions(members_used=np.full(N, K))):
        assert evaluation.uncertainty(False, given)["mutual_information"] > 0
        rows = evaluation.evaluate_members((), False, whole)
        assert evaluation.single_members((), False, given) == evaluation.mean_and_sd(rows)


def test_truth_is_beaten_by_nothing() -> None:
    rng = np.random.default_rng(2)
    law = rng.dirichlet([1.0, 1.0], size=N)
    labels = (rng.random(N) < law[:, 1]).astype(np.int64)
    other = {"labels": labels, "true_probs": law, "weights": np.full(K, 1 / K)}
    perfect = predictions(logits=np.log(law)[None].repeat(K, axis=0), **other)
    found = evaluation.against_truth(perfect)["truth"]
    assert found["excess"] == pytest.approx(0.0, abs=1e-12)
    assert found["bayes_nll"] == pytest.approx(log_loss(labels, law))
    assert found["bayes_nll"] == pytest.approx(evaluation.evaluate((), False, perfect)["nll"])
    assert found["bayes_accuracy"] == (law.argmax(1) == labels).mean()
    blurred = predictions(logits=0.5 * perfect.logits, **other)
    worse = evaluation.against_truth(blurred)["truth"]
    q = softmax(0.5 * np.log(law), axis=-1)
    assert worse["excess"] == pytest.approx((law * np.log(law / q)).sum(1).mean())
    assert worse["expected_nll"] == pytest.approx(-(law * np.log(q)).sum(1).mean())
    assert worse["bayes_nll"] == found["bayes_nll"]
    each = (law * np.log(law / q)).sum(1)
    assert worse["excess_se"] == pytest.approx(each.std() / math.sqrt(N))


def test_labels_that_cannot_occur_add_nothing_to_the_truth() -> None:
    law = np.eye(2)[np.arange(N) % 2]
    labels = law.argmax(1)
    p = predictions(labels=labels, true_probs=law, weights=np.full(K, 1 / K))
    found = evaluation.against_truth(p)["truth"]
    assert found["bayes_nll"] == 0
    assert found["excess"] == pytest.approx(evaluation.evaluate((), False, p)["nll"])


def test_without_a_known_law_there_is_no_truth() -> None:
    assert evaluation.against_truth(predictions()) == {}


def test_norms_are_summed_up_as_the_seed_does() -> None:
    found = evaluation.parameter_statistics(np.array([1.0, 3.0]))
    assert found == {"num_samples": 2, "norm_mean": 2.0, "norm_std": 1.0, "norm_cv": 0.5}
    zero = evaluation.parameter_statistics(np.zeros(3))
    assert zero["norm_cv"] is None
    assert zero["norm_cv_reason"]


def test_the_figures_in_full_begin_with_the_usual_ones() -> None:
    for regression, p in ((False, predictions()), (True, scores())):
        own = ("pearson",) if regression else ("accuracy", "f1")
        usual = evaluation.evaluate(own, regression, p)
        full = evaluation.evaluate_in_full(own, regression, p)
        assert {name: full[name] for name in usual} == usual
    density = norm(p.logits[..., 0], np.asarray(p.noise_std)[:, None])
    below = p.weights @ density.cdf(p.labels)
    assert full["coverage_0.9"] == np.mean(np.abs(below - 0.5) <= 0.45)
    grid = np.linspace(-15.0, 20.0, 4001)[:, None, None]
    steps = (p.weights[:, None] * density.cdf(grid)).sum(1) - (grid[:, 0] >= p.labels)
    assert full["crps"] == pytest.approx((steps**2).sum(0).mean() * 35.0 / 4000, rel=1e-3)


def test_the_parts_of_the_brier_score_add_up_to_it() -> None:
    full = evaluation.evaluate_in_full((), False, predictions(classes=3))
    parts = full["brier_reliability"] - full["brier_resolution"] + full["brier_uncertainty"]
    assert parts + full["brier_within_bin"] == pytest.approx(full["brier"], rel=1e-12)
    assert 0 < full["aurc"] < 1 - full["accuracy"]


def test_scaling_leaves_all_but_the_logits() -> None:
    p = predictions()
    found = evaluation.scale(False, p, predictions(seed=1))
    assert not isinstance(found, str)
    scaled, temperatures = found
    np.testing.assert_allclose(scaled.logits * np.array(temperatures)[:, None, None], p.logits)
    assert len(set(temperatures)) == K
    assert scaled.labels is p.labels
    assert "Gaussian" in str(evaluation.scale(True, p, p))
    assert "validation_share" in str(evaluation.scale(False, p, None))
