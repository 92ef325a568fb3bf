"""AUROC and AUPR against scikit-learn, with ties, and of resamples.

Shapes: N inputs inside, M outside.
"""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from bayesian_lora.errors import InputError
from bayesian_lora.scores.detection import Pooled, aupr, auroc


def scores(n: int, m: int, steps: int | None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Outside lies higher by 1; rounded to `steps` values a unit there are ties."""
    rng = np.random.default_rng(seed)
    inside, outside = rng.standard_normal(n), 1 + rng.standard_normal(m)
    if steps is not None:
        inside, outside = np.round(inside * steps) / steps, np.round(outside * steps) / steps
    return inside, outside


def number(part: tuple[float | None, str | None]) -> float:
    value, reason = part
    assert reason is None
    assert value is not None
    return value


@pytest.mark.parametrize("steps", [None, 10, 1])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (200, 50), (30, 300)])
def test_areas_are_those_of_scikit_learn(n: int, m: int, steps: int | None):
    inside, outside = scores(n, m, steps)
    positive = np.r_[np.zeros(n), np.ones(m)]
    both = np.r_[inside, outside]
    value, reason = auroc(inside, outside)
    assert reason is None
    assert value == pytest.approx(roc_auc_score(positive, both), abs=1e-12)
    assert aupr(inside, outside)[0] == pytest.approx(
        average_precision_score(positive, both), abs=1e-12
    )


def test_order_of_ties_does_not_matter_and_equal_scores_are_chance():
    assert auroc(np.ones(7), np.ones(3)) == (0.5, None)
    assert aupr(np.ones(7), np.ones(3))[0] == pytest.approx(0.3)
    assert auroc([0.0, 1.0], [2.0]) == (1.0, None)
    assert auroc([2.0], [0.0, 1.0]) == (0.0, None)


def test_one_class_only_has_a_reason_and_no_figure():
    assert auroc([], [1.0])[0] is None
    assert "no inside inputs" in str(auroc([], [1.0])[1])
    assert "no outside inputs" in str(aupr([1.0], [])[1])


@pytest.mark.parametrize("steps", [None, 1])
def test_areas_of_resamples_are_those_of_the_drawn_scores(steps: int | None):
    inside, outside = scores(25, 15, steps)
    rng = np.random.default_rng(5)
    i, j = rng.integers(0, 25, (20, 25)), rng.integers(0, 15, (20, 15))
    counts = (
        np.stack([np.bincount(one, minlength=n) for one in index], axis=1).astype(float)
        for index, n in ((i, 25), (j, 15))
    )
    got = Pooled(inside, outside).areas(*counts)
    for name, area in (("auroc", auroc), ("aupr", aupr)):
        plain = [number(area(inside[i[b]], outside[j[b]])) for b in range(20)]
        assert got[name] == pytest.approx(plain, abs=1e-12)


def test_bad_input_is_one_clear_line():
    with pytest.raises(InputError, match="inside: 1 of 1 values are not finite"):
        auroc([np.nan], [1.0])
    with pytest.raises(InputError, match="outside: 1 of 2 values are not finite"):
        aupr([0.0], [1.0, np.inf])
    with pytest.raises(InputError, match=r"inside scores have shape \(1, 1\)"):
        auroc([[1.0]], [1.0])
