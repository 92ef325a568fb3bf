"""Convergence diagnostics against arviz-stats, theory and the cases where nothing can be said."""

import json
import re

import numpy as np
import pytest
from arviz_stats.base.array import array_stats
from scipy.signal import lfilter
from scipy.stats import norm, rankdata

from bayesian_lora.diagnostics import (
    Estimate,
    ess_bulk,
    ess_tail,
    mcse_mean,
    rhat,
    start_dispersion,
    summarise,
)
from bayesian_lora.errors import InputError

ALL = (rhat, ess_bulk, ess_tail, mcse_mean)
KEYS = {"rhat_max", "ess_bulk_min", "ess_tail_min", "quantities", "start_dispersion"}


def ar1(chains: int, draws: int, phi: float, seed: int = 0) -> np.ndarray:
    """Stationary x_t = φ x_{t−1} + √(1 − φ²) ε_t, variance 1."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((chains, draws)) * np.sqrt(1 - phi**2)
    noise[:, 0] /= np.sqrt(1 - phi**2)
    return np.asarray(lfilter([1.0], [1.0, -phi], noise, axis=1))


def number(estimate: Estimate) -> float:
    assert estimate.reason is None
    assert estimate.value is not None
    return estimate.value


@pytest.mark.parametrize(("chains", "draws"), [(2, 4), (4, 101), (3, 1000)])
def test_equal_to_arviz(chains: int, draws: int):
    x = ar1(chains, draws, 0.6) + np.arange(chains)[:, None]
    assert number(rhat(x)) == pytest.approx(array_stats.rhat(x), abs=1e-6)
    assert number(ess_bulk(x)) == pytest.approx(array_stats.ess(x, method="bulk"), rel=1e-6)
    tail = array_stats.ess(x, method="tail", prob=(0.05, 0.95))
    assert number(ess_tail(x)) == pytest.approx(tail, rel=1e-6)
    alike = x - x.mean(axis=1, keepdims=True) if draws > 4 else x[:1]
    wanted = array_stats.mcse(alike, method="mean")
    assert number(mcse_mean(alike)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("draws", [5, 50])
def test_the_error_of_a_mean_over_separate_modes_is_that_of_so_many_modes(draws: int):
    """Where every chain is in a mode of its own, the mean is one of four values, not of 4·T."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 4, draws)) + 5 * rng.standard_normal((300, 4, 1))
    told = np.sqrt(np.mean([number(mcse_mean(one)) ** 2 for one in x]))
    assert told == pytest.approx(x.mean(axis=(1, 2)).std(), rel=0.15)


def test_rhat_by_hand():
    """Rank-normalised split R-hat written out from the paper, for traces without ties."""
    x = ar1(4, 200, 0.5)
    halves = np.concatenate([x[:, :100], x[:, 100:]])

    def plain(values: np.ndarray) -> float:
        ranks = rankdata(values).reshape(values.shape)
        z = np.asarray(norm.ppf((ranks - 3 / 8) / (values.size + 1 / 4)))
        n = z.size // len(z)
        within, between = z.var(axis=1, ddof=1).mean(), n * z.mean(axis=1).var(ddof=1)
        return np.sqrt((between / within + n - 1) / n)

    expected = max(plain(halves), plain(np.abs(halves - np.median(halves))))
    assert number(rhat(x)) == pytest.approx(expected, abs=1e-9)


def test_ar1_effective_sample_size():
    x = ar1(10, 10_000, 0.9)
    ratio = (1 - 0.9) / (1 + 0.9)
    assert number(ess_bulk(x)) / x.size == pytest.approx(ratio, rel=0.1)
    assert number(mcse_mean(x)) == pytest.approx(1 / np.sqrt(ratio * x.size), rel=0.1)


def test_chains_and_draws_are_not_swapped():
    apart = np.random.default_rng(0).standard_normal((4, 500)) + 5 * np.arange(4)[:, None]
    assert number(rhat(apart)) > 2
    assert number(rhat(apart.T)) < 1.5


@pytest.mark.parametrize("figure", ALL)
@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.zeros((4, 0)), "empty"),
        (np.zeros((0, 10)), "empty"),
        (np.ones((4, 3)) * [1, 2, 3], "3 draws a chain: at least 4"),
        (np.full((4, 50), 0.25), "constant: every draw is 0.25"),
        (1e-16 * ar1(4, 50, 0.0), "constant"),
        (1000.1 + 2e-13 * np.eye(4, 50), "constant"),
        (np.where(np.eye(4, 50) == 1, np.nan, ar1(4, 50, 0.0)), "4 of 200 .* chain 0, draw 0"),
        (np.where(np.arange(50) == 7, np.inf, ar1(4, 50, 0.0)), "4 of 200 .* chain 0, draw 7"),
    ],
)
def test_not_available(figure, x: np.ndarray, reason: str):
    estimate = figure(x)
    assert estimate.value is None
    assert re.search(reason, estimate.reason)


def test_one_chain_has_ess_but_no_rhat():
    x = ar1(1, 400, 0.5)
    assert rhat(x).value is None
    assert "run 2 or more" in str(rhat(x).reason)
    assert number(ess_bulk(x)) > 50


def test_chains_that_never_move_are_not_converged():
    frozen = np.repeat([[0.0], [1.0]], 50, axis=1)
    assert rhat(frozen).value is None
    assert "no chain varies" in str(rhat(frozen).reason)
    one_frozen = ar1(4, 200, 0.0)
    one_frozen[2] = np.median(one_frozen)
    assert number(rhat(one_frozen)) > 1.1


def test_tail_ess_of_a_saturated_trace_is_not_the_number_of_draws():
    x = np.zeros((4, 500))
    x[:, ::100] = -1.0  # 1 % of draws differ: 5 % and 95 % quantiles are both 0
    assert ess_tail(x).value is None
    assert "no tails" in str(ess_tail(x).reason)
    assert ess_bulk(x).value is not None


def test_two_valued_trace_gives_no_warning():
    x = np.tile([0.0, 1.0], (4, 50))  # folded around its median it is constant
    assert number(rhat(x)) == pytest.approx(1.0, abs=0.02)


def test_wrong_dimensions():
    for figure in ALL:
        with pytest.raises(InputError, match=r"shape \(5,\): give \(chains, draws\)"):
            figure(np.arange(5.0))
    with pytest.raises(InputError, match="one start a chain"):
        start_dispersion(np.zeros(3), np.zeros((4, 10)))


def test_start_dispersion_uses_the_second_half():
    second = np.tile([-1.0, 1.0], (2, 50))
    draws = np.concatenate([np.linspace(1000, 0, 100) * np.ones((2, 1)), second], axis=1)
    got = number(start_dispersion(np.array([0.0, 6.0]), draws))
    assert got == pytest.approx(6 / np.sqrt(2) / np.sqrt(100 / 99))


def test_start_dispersion_not_available():
    draws = ar1(2, 50, 0.0)
    assert "not finite" in str(start_dispersion(np.array([0.0, np.nan]), draws).reason)
    assert "run 2 or more" in str(start_dispersion(np.zeros(1), draws[:1]).reason)
    draws[:, 20:] = 0.1  # whose variance NumPy rounds to 2e-34: the ratio would be 1e16
    assert "no chain varies" in str(start_dispersion(np.array([0.0, 1.0]), draws).reason)


# --- the verdict


def good(seed: int = 0) -> np.ndarray:
    return ar1(4, 500, 0.3, seed)


WIDE = np.array([-6.0, -2.0, 2.0, 6.0])


def test_mixed_needs_overdispersed_starts():
    got = summarise({"log_post": good()}, {"log_post": WIDE})
    assert got["verdict"] == "mixed"
    assert KEYS | {"verdict", "reason"} == set(got)
    assert got["start_dispersion"] == pytest.approx(WIDE.std(ddof=1), rel=0.1)
    json.dumps(got, allow_nan=False)


def test_quantities_hold_every_figure():
    x = good()
    row = summarise({"q": x}, {"q": WIDE})["quantities"]["q"]
    assert row == {
        "rhat": rhat(x).value,
        "ess_bulk": ess_bulk(x).value,
        "ess_tail": ess_tail(x).value,
        "mcse": mcse_mean(x).value,
        "mean": pytest.approx(x.mean()),
        "sd": pytest.approx(x.std(ddof=1)),
        "start_dispersion": start_dispersion(WIDE, x).value,
    }
    unknown = summarise({"q": x})["quantities"]["q"]
    assert unknown["start_dispersion"] is None
    assert unknown["start_dispersion_reason"] == "no starts were recorded"
    given = summarise({"q": x, "r": 2 * x}, {"q": WIDE, "r": 6 * WIDE})
    spreads = [given["quantities"][name]["start_dispersion"] for name in "qr"]
    assert spreads[1] == pytest.approx(3 * spreads[0])
    assert given["start_dispersion"] == pytest.approx(sum(spreads) / 2)


@pytest.mark.parametrize(
    ("starts", "reason"),
    [
        ({"a": 0.1 * WIDE}, r"were not overdispersed \(0.5\d* < 2, median of 1 q"),
        (None, "not available \\(no starts were recorded for a\\)"),
    ],
)
def test_close_or_unknown_starts_prove_nothing(starts: dict | None, reason: str):
    got = summarise({"a": good()}, starts)
    assert got["verdict"] == "not proven"
    assert re.search(reason, got["reason"])
    assert "cannot see modes that no chain visited" in got["reason"]
    assert (got["start_dispersion"] is None) == ("start_dispersion_reason" in got)


def test_separate_modes_are_named():
    stuck = good() + 3 * np.arange(4)[:, None]
    got = summarise({"a": good(1), "probe[3]": stuck}, {"a": WIDE, "probe[3]": WIDE})
    assert got["verdict"] == "not mixed"
    assert got["rhat_max"] == rhat(stuck).value
    assert got["reason"].startswith(f"R-hat {got['rhat_max']:.4g} on probe[3]; chains sit in")


@pytest.mark.parametrize("seed", [1, 3])  # 3: ESS 116 out of 64 draws, which must not reassure
def test_too_few_effective_draws(seed: int):
    short = ar1(4, 16, 0.0, seed=seed)
    got = summarise({"a": short}, {"a": WIDE})
    assert got["rhat_max"] < 1.05
    assert got["ess_bulk_min"] == ess_bulk(short).value
    assert got["verdict"] == "not mixed"
    assert re.match(r"bulk ESS [\d.]+ on a, of 64 draws: both must reach 100", got["reason"])


def test_an_unavailable_quantity_forbids_mixed():
    traces = {"a": good(), "saturated": np.zeros((4, 500))}
    got = summarise(traces, dict.fromkeys(traces, WIDE))
    assert got["verdict"] == "not proven"
    assert got["rhat_max"] == rhat(traces["a"]).value
    assert "1 of 2 quantities have no R-hat (saturated: the trace is constant" in got["reason"]
    row = got["quantities"]["saturated"]
    assert row["rhat"] is None
    assert "constant" in row["rhat_reason"]
    assert (row["mean"], row["sd"]) == (0.0, 0.0)


def test_unavailable_quantity_is_named_beside_a_bad_one():
    traces = {"bad": good() + 3 * np.arange(4)[:, None], "diverged": np.full((4, 500), np.nan)}
    got = summarise(traces)
    assert got["verdict"] == "not mixed"
    assert "diverged: 2000 of 2000 values are not finite" in got["reason"]
    assert got["quantities"]["diverged"]["mean"] is None
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize(
    ("traces", "reason"),
    [
        ({}, "nothing was traced"),
        ({"a": ar1(1, 500, 0.0)}, "run 2 or more"),
        ({"a": np.zeros((4, 0))}, "empty"),
        ({"raw/A": good()}, "nothing was traced"),
    ],
)
def test_not_available_verdict(traces: dict, reason: str):
    got = summarise(traces, verdict_on=lambda name: not name.startswith("raw/"))
    assert got["verdict"] == "not available"
    assert reason in got["reason"]
    assert got["rhat_max"] is None
    assert reason in got["rhat_max_reason"]
    assert set(got["quantities"]) == set(traces)


def test_no_verdict_rests_on_excluded_quantities():
    traces = {"log_post": good(), "raw/norm_A": good() + 3 * np.arange(4)[:, None]}
    starts = {"log_post": WIDE}
    got = summarise(traces, starts, verdict_on=lambda name: not name.startswith("raw/"))
    assert got["verdict"] == "mixed"
    assert got["rhat_max"] == rhat(traces["log_post"]).value
    assert got["quantities"]["raw/norm_A"]["rhat"] > 1.5


@pytest.mark.parametrize(
    ("wide", "said"),
    [
        (5, r"mixed R.*; starts 5\.\d+ within-chain sd apart \(median of 5 quantities\)"),
        (3, r"mixed R.*s; 2 below 2, the least 0\.5\d on q4: R-hat says less of those\)"),
        (1, r"not proven R.* < 2, median of 5 .*; 4 below 2, the least 0\.5\d on q4\), so .*"),
    ],
)
def test_close_starts_that_the_median_passes_over_are_told_of(wide: int, said: str):
    traces = {f"q{i}": good(i) for i in range(5)}
    sizes = [*[1.0] * wide, *[0.2] * (4 - wide), 0.1][:5]
    got = summarise(traces, {k: s * WIDE for k, s in zip(traces, sizes, strict=True)})
    assert re.fullmatch(said, f"{got['verdict']} {got['reason']}")
    ratios = [row["start_dispersion"] for row in got["quantities"].values()]
    assert got["start_dispersion"] == sorted(ratios)[2]
