"""`benchmarks/baselines_modes.py`: NLL by the number of chains."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def modes(load: Callable[[str], Any]) -> Any:
    return load("baselines_modes")


def test_chains_that_disagree_gain_from_each_other(modes: Any) -> None:
    """One chain says .9, the other .1, of two examples of which each is right once."""
    odds = np.log(9)
    logits = np.array([[[0, odds], [0, odds]], [[0, -odds], [0, -odds]]]).repeat(3, axis=0)
    chains, labels = np.array([0, 0, 0, 1, 1, 1]), np.array([1, 0])
    alone, both = modes.by_chains(logits, labels, chains)
    assert alone == pytest.approx(-(np.log(0.9) + np.log(0.1)) / 2)
    assert both == pytest.approx(np.log(2))


def test_every_choice_of_chains_counts_alike(modes: Any) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 50, 3)), rng.integers(0, 3, 50)
    found = modes.by_chains(logits, labels, np.array([7, 2, 5, 2]))
    again = modes.by_chains(logits[[1, 3, 0, 2]], labels, np.array([2, 2, 7, 5]))
    assert len(found) == 3
    assert found == pytest.approx(again)
    assert found[0] > found[1] > found[2], "averaging probabilities never costs, by Jensen"


def test_the_limit_is_that_of_a_law_in_one_over_the_chains(modes: Any) -> None:
    assert modes.limit([0.55 + 0.02 / m for m in (1, 2, 3, 4)]) == pytest.approx(0.55)


def test_independent_chains_approach_the_limit(modes: Any) -> None:
    """Sixteen chains land where the first four point, to a fifth of what they still gain."""
    rng = np.random.default_rng(1)
    mean, labels = rng.normal(size=(400, 2)), rng.integers(0, 2, 400)
    logits = mean + 0.5 * rng.normal(size=(16, 400, 2))
    fours = [modes.by_chains(logits[i : i + 4], labels, np.arange(4)) for i in range(0, 16, 4)]
    four = np.mean(fours, axis=0)
    each = np.full(16, 1 / 16)
    log_probs = modes.ensemble_log_probs(logits, each)
    whole = modes.classification_metrics(log_probs, labels)["nll"]
    still = four[3] - whole
    assert still > 0
    predicted = modes.limit(four) + (four[0] - modes.limit(four)) / 16
    assert predicted == pytest.approx(whole, abs=still / 5)
