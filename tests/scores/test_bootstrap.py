"""Bootstrap errors against closed forms, fresh sets and the plain loop.

Shapes: N examples, R replicates.
"""

import numpy as np
import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.scores.bootstrap import (
    Replicates,
    replicate,
    resample_counts,
    standard_errors,
)
from tests.scores.plain_bootstrap import plain_errors


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def hits(n: int, share: float = 0.8) -> np.ndarray:
    return (np.arange(n) < share * n).astype(float)


def mean_of(values: np.ndarray):
    return lambda counts: {"mean": values @ counts / counts.sum(0)}


def test_error_of_accuracy_is_that_of_a_binomial_share():
    expected = np.sqrt(0.8 * 0.2 / 400)
    right = hits(400)
    got = replicate({"map": mean_of(right)}, 400, rng(), 4000).se("map")
    assert got["mean"] == pytest.approx(expected, rel=0.05)
    plain = plain_errors(lambda i: {"accuracy": float(right[i].mean())}, 400, rng(), 4000)
    assert plain == {"accuracy": pytest.approx(expected, rel=0.05)}


def test_every_example_is_drawn_as_often_as_it_should_be():
    counts = np.concatenate(list(resample_counts(20, rng(), 5000)), axis=1)
    assert counts.shape == (20, 5000)
    assert (counts.sum(0) == 20).all()
    assert counts.mean(1) == pytest.approx(np.ones(20), abs=5 / np.sqrt(5000))
    assert counts.var() == pytest.approx(1 - 1 / 20, rel=0.03)  # of Binomial(20, 1/20)


def test_blocks_do_not_change_the_draws():
    whole = np.concatenate(list(resample_counts(7, rng(), 30)), axis=1)
    parts = list(resample_counts(7, rng(), 30, size=4))
    assert [p.shape[1] for p in parts] == [4] * 7 + [2]
    assert (np.concatenate(parts, axis=1) == whole).all()


def test_large_sets_come_in_blocks(monkeypatch):
    monkeypatch.setattr("bayesian_lora.scores.bootstrap.BLOCK", 1000)
    sizes = [c.shape for c in resample_counts(300, rng(), 7)]
    assert sizes == [(300, 3), (300, 3), (300, 1)]
    assert [c.shape for c in resample_counts(5000, rng(), 2)] == [(5000, 1), (5000, 1)]


def test_differences_are_paired():
    right = hits(500, 0.7)
    better = right.copy()
    better[-10:] = 1.0  # ten more are right, all others alike
    found = replicate({"map": mean_of(right), "ensemble": mean_of(better)}, 500, rng(), 3000)
    got = found.difference_se("ensemble", "map")
    assert got["mean"] == pytest.approx(np.sqrt(0.02 * 0.98 / 500), rel=0.08)
    assert float(found.se("map")["mean"] or 0) > 3 * float(got["mean"] or 0)


def test_error_of_a_mean_over_rows_is_of_the_rows_together():
    one, other = hits(300), hits(300)[::-1]
    found = replicate({"a": mean_of(one), "b": mean_of(other)}, 300, rng(), 3000)
    both = (one + other) / 2
    got = standard_errors(found.mean(["a", "b"]), 300)
    assert got["mean"] == pytest.approx(both.std() / np.sqrt(300), rel=0.06)


def test_rows_share_only_the_figures_that_both_have():
    values = {"a": {"x": np.arange(4.0), "y": np.arange(4.0)}, "b": {"x": np.zeros(4)}}
    found = Replicates(10, values)
    assert list(found.difference_se("a", "b")) == ["x"]
    assert found.mean(["a", "b"]).keys() == {"x"}
    assert found.mean(["a", "b"])["x"].tolist() == [0.0, 0.5, 1.0, 1.5]


def test_undefined_replicates_are_left_out_and_said():
    x = np.array([1.0, np.nan, 3.0, 2.0])
    assert standard_errors({"f1": x}, 10) == {"f1": 1.0, "f1_left_out": 1}
    got = standard_errors({"f1": np.array([1.0, np.nan, np.nan, 2.0, np.nan])}, 10)
    assert got == {"f1": None, "f1_reason": "undefined in 3 of 5 resamples"}
    assert standard_errors({"f1": np.full(4, np.nan)}, 10)["f1"] is None


def test_one_example_has_no_error():
    got = replicate({"a": mean_of(np.ones(1))}, 1, rng()).se("a")
    assert got["mean"] is None
    assert "one example" in str(got["mean_reason"])


def test_what_never_varies_claims_no_error_of_0():
    got = replicate({"a": mean_of(np.ones(5))}, 5, rng()).se("a")
    assert got["mean"] is None
    assert "same in every resample" in str(got["mean_reason"])
    third = replicate({"a": mean_of(np.full(50, 1 / 3))}, 50, rng()).se("a")
    assert third["mean"] is None  # rounding is no variation


def test_impossible_numbers_are_refused():
    with pytest.raises(InputError, match="no examples to resample"):
        replicate({"a": mean_of(np.ones(1))}, 0, rng())
    with pytest.raises(InputError, match="1 replicates have no spread"):
        replicate({"a": mean_of(np.ones(3))}, 3, rng(), 1)
