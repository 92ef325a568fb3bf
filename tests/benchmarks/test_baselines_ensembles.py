"""`benchmarks/baselines_ensembles.py`: deep ensembles, pooled and scaled."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bayesian_lora.metrics import softmax
from bayesian_lora.predict import Predictions


@pytest.fixture(scope="module")
def ensembles(load: Callable[[str], Any]) -> Any:
    return load("baselines_ensembles")


def predictions(logits: np.ndarray, labels: np.ndarray) -> Predictions:
    k, n, _ = logits.shape
    return Predictions(logits, labels, np.full(k, 1 / k), np.arange(n))


def test_pooling_keeps_the_mean_of_the_probabilities(ensembles: Any) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 30, 3))
    p = ensembles.pooled(predictions(logits, np.zeros(30, int)))
    assert p.num_members == 1
    np.testing.assert_allclose(p.probs, softmax(logits).mean(0), atol=1e-12)


def test_the_temperature_is_the_one_that_the_labels_were_drawn_at(ensembles: Any) -> None:
    """Labels of a mixture at temperature 2.5 are scaled back by it, on other examples too."""
    rng = np.random.default_rng(1)
    n, t = 20_000, 2.5
    logits = 3 * rng.normal(size=(3, 2 * n, 2))
    mixed = np.log(softmax(logits).mean(0))
    p = softmax(mixed / t)
    labels = (rng.random(2 * n) < p[:, 1]).astype(int)
    first = predictions(logits[:, :n], labels[:n])
    scaled, found = ensembles.with_one_temperature(first, predictions(logits[:, n:], labels[n:]))
    assert found == pytest.approx(t, rel=0.05)
    np.testing.assert_allclose(scaled.probs, p[:n], atol=0.02)
