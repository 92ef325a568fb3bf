"""What `Predictions` say beside logits: labels, confidence, uncertainty; a regression's mixture.

Shapes: K members, N examples, C classes.
"""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from bayesian_lora.errors import InputError
from bayesian_lora.predict import Predictions

RNG = np.random.default_rng(0)
CLASSES = Predictions(
    RNG.normal(0, 3, (3, 20, 4)), np.full(20, -1), np.array([0.6, 0.4, 0.0]), np.arange(20)
)
NUMBERS = Predictions(
    RNG.normal(1, 2, (3, 8, 1)),
    np.zeros(8, np.float32),
    np.array([0.7, 0.3, 0.0]),
    np.arange(8),
    noise_std=np.array([0.2, 1.5, 9.0]),
)


def test_the_label_is_that_of_the_mean_probability() -> None:
    odds = np.exp(CLASSES.logits)
    probs = np.tensordot(CLASSES.weights, odds / odds.sum(-1, keepdims=True), 1)
    np.testing.assert_array_equal(CLASSES.predicted, probs.argmax(1))
    np.testing.assert_allclose(CLASSES.confidence, probs.max(1))
    assert (CLASSES.predicted != CLASSES.logits.mean(0).argmax(1)).any()


def test_uncertainty_is_what_members_share_and_what_they_dispute() -> None:
    found = CLASSES.uncertainty
    entropy = stats.entropy(CLASSES.probs, axis=1)
    np.testing.assert_allclose(found["predictive_entropy"], entropy)
    both = found["expected_entropy"] + found["mutual_information"]
    np.testing.assert_allclose(both, entropy)
    assert found["mutual_information"].min() > 0


def test_a_regressions_mean_and_deviation_are_the_mixtures() -> None:
    w, m, s = NUMBERS.weights, NUMBERS.logits[..., 0], NUMBERS.noise_std
    assert s is not None
    mean = w @ m
    second = w @ (m**2 + s[:, None] ** 2)
    np.testing.assert_allclose(NUMBERS.predicted, mean)
    assert NUMBERS.sd is not None
    np.testing.assert_allclose(NUMBERS.sd, np.sqrt(second - mean**2))
    np.testing.assert_allclose(NUMBERS.members_sd, np.sqrt(w @ m**2 - mean**2))


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_an_interval_leaves_the_same_on_either_side(level: float) -> None:
    found = NUMBERS.interval(level)
    assert found is not None
    assert NUMBERS.noise_std is not None
    for end, share in zip(found, ((1 - level) / 2, (1 + level) / 2), strict=True):
        own = stats.norm.cdf(end, NUMBERS.logits[..., 0], NUMBERS.noise_std[:, None])
        np.testing.assert_allclose(NUMBERS.weights @ own, share, atol=1e-12)


def test_one_gaussian_has_its_own_interval() -> None:
    one = dataclasses.replace(NUMBERS, weights=np.array([0.0, 1.0, 0.0]))
    found = one.interval(0.95)
    assert found is not None
    low, high = found
    mean = NUMBERS.logits[1, :, 0]
    np.testing.assert_allclose(low, mean + 1.5 * stats.norm.ppf(0.025))
    np.testing.assert_allclose(high, mean + 1.5 * stats.norm.ppf(0.975))
    np.testing.assert_allclose(one.members_sd, 0, atol=1e-12)


def test_without_noise_there_is_a_mean_alone() -> None:
    bare = dataclasses.replace(NUMBERS, noise_std=None)
    assert bare.sd is None
    assert bare.interval() is None
    np.testing.assert_allclose(bare.predicted, NUMBERS.predicted)


def test_a_regression_has_no_classes() -> None:
    for p in (NUMBERS, dataclasses.replace(NUMBERS, noise_std=None)):
        with pytest.raises(InputError, match="confidence: a regression has no classes"):
            _ = p.confidence
        with pytest.raises(InputError, match="uncertainty: a regression has no classes"):
            _ = p.uncertainty
