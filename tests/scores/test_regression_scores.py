"""Scores of Gaussian mixtures against numerical integration, SciPy and simulation.

Shapes: K members, N examples.
"""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import kstest, norm

from bayesian_lora.errors import InputError
from bayesian_lora.scores.regression_scores import (
    crps,
    interval_coverage,
    mixture_quantiles,
    pit,
)

MEANS = np.array([[0.0, 1.0, -2.0, 5.0], [0.5, -1.0, 2.0, 5.0], [3.0, 1.0, 0.0, 5.0]])
NOISE = np.array([0.3, 1.0, 2.0])
WEIGHTS = np.array([2.0, 1.0, 1.0])  # not normalised
LABELS = np.array([0.2, 4.0, -0.5, 5.0])


def cdf(z: float, i: int) -> float:
    return float(WEIGHTS / 4 @ norm.cdf(z, MEANS[:, i], NOISE))


def test_crps_is_the_integral_of_the_squared_distance_of_distribution_functions():
    got = crps(MEANS, NOISE, WEIGHTS, LABELS)
    for i, y in enumerate(LABELS):
        below = quad(lambda z, i=i: cdf(z, i) ** 2, -30, y, limit=200)[0]
        above = quad(lambda z, i=i: (1 - cdf(z, i)) ** 2, y, 40, limit=200)[0]
        assert got[i] == pytest.approx(below + above, abs=1e-7)


def test_crps_of_one_gaussian_is_the_known_closed_form():
    z = 0.7
    expected = 2.0 * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    assert crps([[1.0]], [2.0], [1.0], [1.0 + 2 * z])[0] == pytest.approx(expected)


def test_crps_of_a_certain_value_is_the_absolute_error():
    assert crps([[1.0, 3.0]], [1e-12], [1.0], [4.0, 3.0]) == pytest.approx([3.0, 0.0], abs=1e-11)


def test_equal_members_score_as_one_and_a_weight_of_0_drops_out():
    one = crps(MEANS[:1], NOISE[:1], [1.0], LABELS)
    twice = crps(MEANS[[0, 0]], NOISE[[0, 0]], [0.3, 0.7], LABELS)
    assert twice == pytest.approx(one, abs=1e-12)
    assert crps(MEANS, NOISE, [1.0, 0.0, 0.0], LABELS) == pytest.approx(one, abs=1e-12)


def test_crps_is_proper():
    """The true law scores less on average than a wider or a shifted one."""
    y = np.random.default_rng(0).standard_normal(20_000)
    score = {
        (m, s): crps(np.full((1, y.size), m), [s], [1.0], y).mean()
        for m, s in [(0.0, 1.0), (0.0, 1.3), (0.0, 0.7), (0.2, 1.0)]
    }
    assert min(score, key=lambda k: score[k]) == (0.0, 1.0)
    assert score[0.0, 1.0] == pytest.approx(1 / np.sqrt(np.pi), rel=0.02)  # E CRPS of N(0, 1)


def made(n: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Means (3, N), and labels drawn from the mixture itself."""
    rng = np.random.default_rng(seed)
    means = 3 * rng.standard_normal((3, n))
    k = rng.choice(3, n, p=WEIGHTS / 4)
    return means, means[k, np.arange(n)] + NOISE[k] * rng.standard_normal(n)


def test_intervals_of_a_well_specified_model_cover_their_level():
    means, labels = made(20_000)
    got = interval_coverage(means, NOISE, WEIGHTS, labels, (0.5, 0.9, 0.95))
    assert list(got) == ["coverage_0.5", "coverage_0.9", "coverage_0.95"]
    for level, share in zip((0.5, 0.9, 0.95), got.values(), strict=True):
        assert share == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 20_000))
    assert kstest(pit(means, NOISE, WEIGHTS, labels), "uniform").pvalue > 1e-3


def test_intervals_of_an_overconfident_model_cover_less():
    means, labels = made(5000)
    got = interval_coverage(means, NOISE / 3, WEIGHTS, labels)
    assert got["coverage_0.9"] < 0.8


def test_quantiles_invert_the_distribution_function_and_bound_the_same_intervals():
    means, labels = made(500)
    low, middle, high = mixture_quantiles(means, NOISE, WEIGHTS, (0.05, 0.5, 0.95))
    for q, z in ((0.05, low), (0.5, middle), (0.95, high)):
        assert pit(means, NOISE, WEIGHTS, z) == pytest.approx(np.full(500, q), abs=1e-12)
    inside = ((low <= labels) & (labels <= high)).mean()
    assert interval_coverage(means, NOISE, WEIGHTS, labels, (0.9,)) == {"coverage_0.9": inside}


def test_quantiles_of_one_gaussian_are_its_own():
    got = mixture_quantiles([[1.0, 2.0]], [0.5], [1.0], (0.025, 0.975))
    assert got == pytest.approx(norm.ppf([[0.025], [0.975]], [[1.0, 2.0]], 0.5), abs=1e-12)
    assert mixture_quantiles([[1.0]], [0.5], [1.0], ()).shape == (0, 1)


@pytest.mark.parametrize("figure", [crps, pit, interval_coverage])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[np.nan]], [1.0], [1.0], [1.0]), "means: 1 of 1 values are not finite"),
        (([[1.0]], [1.0], [1.0], [np.inf]), "labels: 1 of 1 values are not finite"),
        (([[1.0]], [0.0], [1.0], [1.0]), "noise_std 0 is not above 0"),
        (([[1.0]], [1.0, 2.0], [1.0], [1.0]), "give one a member"),
        (([[1.0]], [1.0], [1.0], [1.0, 2.0]), "give one label an example"),
        (([[1.0]], [1.0], [0.0], [1.0]), "weights"),
        ((np.zeros((1, 0)), [1.0], [1.0], []), r"means has shape \(1, 0\)"),
        ((np.zeros((0, 2)), [], [], [1.0, 2.0]), r"means has shape \(0, 2\)"),
    ],
)
def test_bad_input_is_one_clear_line(figure, arguments: tuple, message: str):
    with pytest.raises(InputError, match=message):
        figure(*arguments)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, np.nan])
def test_levels_are_inside_the_unit_interval(level: float):
    with pytest.raises(InputError, match=r"outside \(0, 1\)"):
        interval_coverage([[1.0]], [1.0], [1.0], [1.0], (level,))
    with pytest.raises(InputError, match=r"outside \(0, 1\)"):
        mixture_quantiles([[1.0]], [1.0], [1.0], (level,))
