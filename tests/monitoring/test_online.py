"""Online estimators against NumPy, brute force and AR(1) chains, whose answer is known.

Shapes: M chains, Q quantities, n rows.
"""

import tracemalloc

import numpy as np
import pytest
from scipy.signal import lfilter

from bayesian_lora.errors import InputError
from bayesian_lora.monitoring.online import OnlineBatchMeans

AR1_RATIO = (1 - 0.9) / (1 + 0.9)  # ESS/n of φ = .9: .0526


def ar1(rows: int, shape: tuple[int, int], phi: float = 0.9, seed: int = 0) -> np.ndarray:
    """Stationary (n, M, Q) of variance 1."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((rows, *shape)) * np.sqrt(1 - phi**2)
    noise[0] /= np.sqrt(1 - phi**2)
    return np.asarray(lfilter([1.0], [1.0, -phi], noise, axis=0))


def fed(x: np.ndarray, max_batches: int = 512) -> OnlineBatchMeans:
    online = OnlineBatchMeans((x.shape[1], x.shape[2]), max_batches)
    for row in x:
        online.update(row)
    return online


def test_figures_are_overlapping_batch_means_by_brute_force():
    n, b = 400, 20
    x = np.random.default_rng(3).standard_normal((n, 2, 3))
    windows = np.stack([x[i : i + b].mean(0) for i in range(n - b + 1)])
    sigma = n * b / ((n - b) * (n - b + 1)) * ((windows - x.mean(0)) ** 2).sum(0)
    got = fed(x).per_chain()
    assert got.mcse == pytest.approx(np.sqrt(sigma / n), rel=1e-9)
    assert got.ess == pytest.approx(n * x.var(0, ddof=1) / sigma, rel=1e-9)
    assert all(r is None for r in [*got.reason.flat, *got.note.flat])


def test_sub_batches_double_and_cover_all_rows():
    x = np.random.default_rng(4).standard_normal((1000, 1, 2))
    online = fed(x, max_batches=64)
    assert (online.size, online.filled, online.rows) == (16, 62, 8)
    whole = x[: 16 * 62].reshape(62, 16, 1, 2).mean(1)
    assert online.batches[:62] == pytest.approx(whole, abs=1e-12)
    assert online.mean == pytest.approx(x.mean(0), abs=1e-12)
    assert online.variance == pytest.approx(x.var(0, ddof=1), rel=1e-10)


def test_ess_of_ar1_chains_is_known():
    x = ar1(50_000, (8, 2))
    online = fed(x)
    pooled = online.pooled()
    assert pooled.ess / (8 * 50_000) == pytest.approx(np.full(2, AR1_RATIO), rel=0.1)
    assert pooled.mcse == pytest.approx(np.full(2, 1 / np.sqrt(AR1_RATIO * 400_000)), rel=0.1)
    assert online.ess(pooled=True).tolist() == pooled.ess.tolist()
    assert online.ess() / 50_000 == pytest.approx(np.full((8, 2), AR1_RATIO), rel=0.35)
    assert online.mcse().shape == (8, 2)


@pytest.mark.parametrize("phi", [0.0, -0.5])
def test_ess_of_independent_and_antithetic_chains(phi: float):
    got = fed(ar1(4000, (4, 3), phi)).pooled().ess / 16_000
    assert got == pytest.approx(np.full(3, (1 - phi) / (1 + phi)), rel=0.25)


def test_an_ess_beyond_belief_is_capped():
    alternating = np.resize([1.0, -1.0], 1000)[:, None, None]
    assert fed(alternating).ess()[0, 0] == pytest.approx(3000)  # n log₁₀ n


def test_windows_widen_for_slow_chains():
    """φ = .98 has an autocorrelation time of 99 rows, as wide as a window of √10,000."""
    x = ar1(10_000, (16, 1), 0.98)
    got = fed(x).pooled()
    assert got.note[0] is None
    assert got.ess[0] / 160_000 == pytest.approx(0.02 / 1.98, rel=0.25)


def test_mcse_is_the_spread_of_chains_means():
    x = ar1(2000, (400, 1))
    online = fed(x)
    assert np.sqrt(np.mean(online.mcse() ** 2)) == pytest.approx(x.mean(0).std(), rel=0.15)


def test_chains_in_separate_modes_count_as_one_draw_each():
    x = ar1(2000, (4, 2))
    x[:, :, 1] += 50.0 * np.arange(4)
    got = fed(x).pooled()
    assert got.note[0] is None
    assert "separate modes" in str(got.note[1])
    assert got.ess[1] == pytest.approx(4, rel=0.01)
    assert got.mcse[1] == pytest.approx(x[:, :, 1].mean(0).std(ddof=1) / 2)
    assert got.ess[0] > 200


def test_chains_that_agree_are_rarely_said_to_differ():
    got = fed(ar1(3000, (4, 300))).pooled()
    assert sum(note is not None for note in got.note) <= 3
    assert np.median(got.ess) / 12_000 == pytest.approx(AR1_RATIO, rel=0.1)


def test_a_chain_slower_than_the_run_is_said_to_be():
    walk = np.random.default_rng(5).standard_normal((2000, 1, 1)).cumsum(0)
    got = fed(walk).per_chain()
    assert "too few to show how slow" in str(got.note[0, 0])
    assert got.ess[0, 0] < 20


def noted(x: np.ndarray, phi: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether the rows are said to be too few, and ess/truth, of every quantity, all chains."""
    got = fed(x).pooled()
    truth = x.shape[0] * x.shape[1] * (1 - phi) / (1 + phi)
    return np.array(["too few" in str(note) for note in got.note]), got.ess / truth


@pytest.mark.parametrize(("phi", "rows"), [(0.95, 1000), (0.98, 5000), (0.99, 5000)])
def test_no_luck_spares_a_slow_chain_its_note(phi: float, rows: int):
    """26, 51 and 25 effective draws a chain: windows that seem wide enough are so by luck."""
    slow, ratio = noted(ar1(rows, (4, 200), phi), phi)
    assert np.median(ratio) > 1.1
    assert slow.mean() > 0.95


def test_what_has_no_note_is_about_right():
    slow, ratio = noted(ar1(20_000, (4, 50)), 0.9)
    assert not slow.any()
    assert np.median(ratio) == pytest.approx(1.05, abs=0.1)


def test_too_few_rows_have_a_reason():
    online = OnlineBatchMeans((2, 1))
    for got in (online.per_chain(), online.pooled()):
        assert np.isnan(got.ess).all()
        assert np.isnan(got.mcse).all()
        assert "0 rows: at least 25" in str(got.reason.flat[0])
    assert np.isnan(online.mean).all()
    x = ar1(25, (2, 1))
    for row in x[:24]:
        online.update(row)
    assert "24 rows" in str(online.pooled().reason[0])
    online.update(x[24])
    assert online.pooled().reason[0] is None
    assert online.pooled().ess[0] > 0


def test_what_cannot_be_computed_has_a_reason_and_spoils_nothing_else():
    x = ar1(100, (3, 4))
    x[:, 1, 1] = 0.1 + 0.2
    x[7, 2, 2] = np.nan
    x[[3, 9], 0, 3] = np.inf
    online = fed(x)
    alone = online.per_chain()
    assert alone.reason[1, 1] == "it is constant"
    assert alone.reason[2, 2] == "1 of 100 values are not finite"
    assert alone.reason[0, 3] == "2 of 100 values are not finite"
    assert (np.isnan(alone.ess) == [[r is not None for r in row] for row in alone.reason]).all()
    assert np.isnan(online.mean[2, 2])
    assert np.isnan(online.variance[0, 3])
    pooled = online.pooled()
    assert pooled.reason.tolist() == [
        None,
        "chain 1: it is constant",
        "chain 2: 1 of 100 values are not finite",
        "chain 0: 2 of 100 values are not finite",
    ]
    assert np.isnan(pooled.ess).tolist() == [False, True, True, True]
    clean = fed(ar1(100, (3, 4))).pooled()
    assert pooled.ess[0] == clean.ess[0]


def test_chains_that_all_stand_still_or_overflow_have_a_reason():
    still = np.tile(np.array([[1.0], [2.0]]), (30, 1, 1))
    assert fed(still).pooled().reason[0] == "chain 0: it is constant"
    huge = 1e200 * ar1(200, (2, 2))
    huge[..., 1] *= 1e-200
    got = fed(huge, 64)
    assert got.pooled().reason.tolist() == ["chain 0: its variance overflows", None]
    assert got.per_chain().reason[1, 0] == "its variance overflows"
    assert np.isnan(got.ess()[:, 0]).all()


def test_a_run_goes_on_from_its_state_bit_by_bit():
    x = ar1(1000, (2, 3))
    whole = fed(x, 64)
    half = fed(x[:777], 64)
    state = half.state_dict()
    half.update(np.full((2, 3), np.nan))  # the state is a copy
    again = OnlineBatchMeans((2, 3), 64)
    again.load_state_dict(state)
    for row in x[777:]:
        again.update(row)
    one, other = whole.pooled(), again.pooled()
    assert (one.ess == other.ess).all()
    assert (one.mcse == other.mcse).all()
    assert (whole.variance == again.variance).all()
    assert (again.bad == 0).all()


def test_dropped_chains_leave_the_others_as_they_were():
    x = ar1(500, (4, 2))
    online = fed(x[:300], 64)
    online.keep([0, 3])
    for row in x[300:, [0, 3]]:
        online.update(row)
    expected = fed(x[:, [0, 3]], 64)
    assert (online.pooled().ess == expected.pooled().ess).all()
    assert (online.mcse() == expected.mcse()).all()


def peak_growth(rows: int) -> int:
    """Bytes by which the peak of `rows` updates is above that of the 2,000 before them."""
    block = ar1(1000, (2, 4))
    tracemalloc.start()
    try:
        online = OnlineBatchMeans((2, 4), 64)
        for i in range(2000):
            online.update(block[i % 1000])
        before = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        for i in range(rows):
            online.update(block[i % 1000])
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow():
    assert peak_growth(50_000) < 2000


@pytest.mark.slow
def test_memory_does_not_grow_in_a_million_rows():
    assert peak_growth(1_000_000) < 2000


@pytest.mark.slow
def test_ess_of_a_million_rows():
    """One window is then a sub-batch of 2,048 rows."""
    x = ar1(1_000_000, (4, 1))
    online = fed(x)
    assert (online.size, online.count) == (2048, 1_000_000)
    ratio = online.pooled().ess[0] / 4_000_000
    assert ratio == pytest.approx(AR1_RATIO, rel=0.1)


def test_bad_input_is_one_clear_line():
    with pytest.raises(InputError, match=r"shape \(2, 2\) does not fit the \(2, 1\)"):
        OnlineBatchMeans((2, 1)).update(np.zeros((2, 2)))
    for shape, batches in (((2,), 64), ((2, 1), 32), ((2, 1), 65)):
        with pytest.raises(InputError, match="an even number of batches, 64 or more"):
            OnlineBatchMeans(shape, batches)  # type: ignore[arg-type]
    many = fed(ar1(100, (2, 1)), 128).state_dict()
    with pytest.raises(InputError, match="a state of 100 sub-batches does not fit 64"):
        OnlineBatchMeans((2, 1), 64).load_state_dict(many)
    with pytest.raises(InputError, match="does not fit"):
        OnlineBatchMeans((3, 1), 128).load_state_dict(many)
