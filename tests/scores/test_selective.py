"""Risk–coverage curves against brute force, and what thresholds promise by simulation.

Shapes: N examples.
"""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from bayesian_lora.errors import InputError
from bayesian_lora.scores.selective import (
    accuracy_at,
    aurc,
    risk_coverage,
    safe_threshold_for,
    threshold_for,
)


def test_risk_coverage_by_hand():
    coverage, risk = risk_coverage([0.3, 0.1, 0.2, 0.4], [1, 0, 1, 0])
    assert coverage == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert risk == pytest.approx([0, 1 / 2, 2 / 3, 1 / 2])
    assert aurc([0.3, 0.1, 0.2, 0.4], [1, 0, 1, 0]) == pytest.approx(risk.mean())


def test_ties_get_the_mean_over_all_their_orders():
    score = np.array([0.0, 1.0, 1.0, 1.0, 2.0, 2.0])
    wrong = np.array([0, 1, 0, 0, 1, 0])
    rng = np.random.default_rng(0)
    curves = []
    for _ in range(4000):
        order = np.lexsort([rng.random(6), score])
        curves.append(wrong[order].cumsum() / np.arange(1, 7))
    error = np.std(curves, axis=0) / np.sqrt(4000)
    assert (
        abs(risk_coverage(score, wrong)[1] - np.mean(curves, axis=0)) <= 4 * error + 1e-12
    ).all()


def test_curve_does_not_depend_on_the_order_of_the_examples():
    rng = np.random.default_rng(1)
    score, wrong = rng.integers(0, 5, 200) / 5, rng.integers(0, 2, 200)
    mixed = rng.permutation(200)
    again = risk_coverage(score[mixed], wrong[mixed])[1]
    assert risk_coverage(score, wrong)[1] == pytest.approx(again, abs=1e-14)


def test_all_equal_scores_have_the_whole_sets_risk_at_any_coverage():
    assert risk_coverage(np.zeros(4), [1, 0, 0, 0])[1] == pytest.approx([0.25] * 4)
    assert aurc([3.0], [1]) == 1.0


def test_perfect_ranking_has_the_least_area():
    wrong = np.r_[np.zeros(80), np.ones(20)]
    best, worst = aurc(np.arange(100), wrong), aurc(-np.arange(100), wrong)
    assert best == pytest.approx((1 - 80 / np.arange(81, 101)).sum() / 100)
    assert best < 0.2 < worst


def test_accuracy_at_coverage_keeps_the_fewest_that_are_enough():
    score, wrong = np.arange(400), np.r_[np.zeros(380), np.ones(20)]
    got = accuracy_at(score, wrong, (0.5, 0.95, 0.951, 1))
    assert list(got) == ["0.5", "0.95", "0.951", "1"]
    assert got["0.95"] == 1.0  # .95 · 400 is 380 and a little by rounding
    assert got["0.951"] == pytest.approx(1 - 1 / 381)
    assert got["1"] == pytest.approx(0.95)
    assert accuracy_at([1.0], [0], (0.1,)) == {"0.1": 1.0}


def test_threshold_is_the_largest_that_keeps_the_risk():
    score, wrong = np.array([1.0, 2, 3, 4, 5]), [0, 1, 0, 0, 1]
    assert threshold_for(score, wrong, 0.25) == 4.0  # although at 2 the risk is .5
    assert threshold_for(score, wrong, 0.0) == 1.0
    assert threshold_for(score, wrong, 0.4) == 5.0
    # 29 wrong of 100 are 29 %, although .29 · 100 is a little less by rounding.
    assert threshold_for(np.arange(100.0), np.arange(100) < 29, 0.29) == 99.0
    assert threshold_for([1.0, 1.0], [0, 1], 0.4) is None  # ties are kept or left together
    assert threshold_for([1.0, 1.0], [0, 1], 0.5) == 1.0


def upper(wrong: int, kept: int, level: float) -> float:
    """Clopper–Pearson, by SciPy."""
    test = binomtest(wrong, kept, alternative="less")
    return test.proportion_ci(1 - level, method="exact").high


@pytest.mark.parametrize("target", [0.15, 0.16, 0.17, 0.18, 0.2, 0.22, 0.25])
def test_safe_threshold_uses_clopper_pearson_bounds_of_those_kept(target: float):
    """The surest 60 of 100 are right, the others wrong. Ten right ones are too few to pass at
    coverage .1, so from .3 on the level is .01, from .5 .02, from .7 .03."""
    assert upper(0, 10, 0.01) > target > upper(0, 30, 0.01)
    level = {65: 0.02, 70: 0.03, 75: 0.03, 80: 0.03}
    expected = 60
    while upper(expected + 5 - 60, expected + 5, level[expected + 5]) <= target:
        expected += 5
    assert safe_threshold_for(np.arange(100.0), np.arange(100) >= 60, target) == expected - 1


def test_safe_threshold_starts_anew_after_an_early_error():
    """Two errors among the surest fail the first tests, not the later ones."""
    wrong = np.r_[np.ones(2), np.zeros(998)]
    assert safe_threshold_for(np.arange(1000.0), wrong, 0.02) == 999.0
    assert safe_threshold_for(np.arange(60.0), wrong[:60], 0.02) is None


def test_safe_threshold_edges():
    assert safe_threshold_for(np.arange(1000), np.zeros(1000), 0.1) == 999.0
    assert safe_threshold_for(np.arange(50), np.zeros(50), 0.01) is None  # too few to know
    assert safe_threshold_for([0.5], [0], 0.5) is None
    assert safe_threshold_for(np.zeros(1000), np.r_[np.ones(500), np.zeros(500)], 0.2) is None
    assert safe_threshold_for(np.zeros(1000), np.r_[np.ones(100), np.zeros(900)], 0.2) == 0.0
    assert safe_threshold_for(np.arange(100), np.ones(100), 0.5) is None


@pytest.mark.parametrize("levels", [None, 10])
def test_safe_thresholds_promise_holds_in_repeated_sets(levels: int | None):
    """P(wrong | s) = .6 s² of s uniform (or in ten steps): the risk up to t is known."""
    rng = np.random.default_rng(3)
    grid = (np.arange(2000) + 0.5) / 2000 if levels is None else np.arange(levels) / levels
    risk_up_to = (0.6 * grid**2).cumsum() / np.arange(1, len(grid) + 1)
    broken = found = plainly_broken = 0
    sets = 1000
    for _ in range(sets):
        score = rng.choice(grid, 400)
        wrong = rng.random(400) < 0.6 * score**2
        t = safe_threshold_for(score, wrong, 0.1, confidence=0.9)
        found += t is not None
        broken += t is not None and risk_up_to[np.searchsorted(grid, t)] > 0.1
        plain = threshold_for(score, wrong, 0.1)
        plainly_broken += plain is not None and risk_up_to[np.searchsorted(grid, plain)] > 0.1
    assert broken <= 0.1 * sets
    assert found > 0.8 * sets  # the promise is not kept by finding nothing
    # The plain threshold promises nothing of the kind, so this test can tell them apart.
    assert plainly_broken > 0.25 * sets


@pytest.mark.parametrize(
    ("score", "wrong", "message"),
    [
        ([np.nan, 1.0], [0, 1], "score: 1 of 2 values are not finite"),
        ([0.0, 1.0], [0, np.nan], "wrong: 1 of 2 values are not finite"),
        ([], [], r"score has shape \(0,\)"),
        ([0.0, 1.0], [0], r"wrong \(1,\) does not fit score \(2,\)"),
        ([0.0, 1.0], [0, 2], "values from 0 to 2: give only 0 and 1"),
    ],
)
def test_bad_input_is_one_clear_line(score, wrong, message: str):
    for call in (
        lambda: risk_coverage(score, wrong),
        lambda: aurc(score, wrong),
        lambda: accuracy_at(score, wrong, (0.5,)),
        lambda: threshold_for(score, wrong, 0.1),
        lambda: safe_threshold_for(score, wrong, 0.1),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("target", [-0.1, 1.0, math.nan])
def test_impossible_shares_are_refused(target: float):
    with pytest.raises(InputError, match=r"target_risk .* is outside \[0, 1\)"):
        threshold_for([1.0], [0], target)
    with pytest.raises(InputError, match=r"target_risk .* is outside \[0, 1\)"):
        safe_threshold_for([1.0], [0], target)
    with pytest.raises(InputError, match=r"confidence 1 is outside"):
        safe_threshold_for([1.0], [0], 0.1, 1.0)
    for coverage in (0.0, 1.1, math.nan):
        with pytest.raises(InputError, match="coverage"):
            accuracy_at([1.0], [0], (coverage,))
