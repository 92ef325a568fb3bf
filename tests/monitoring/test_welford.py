"""One-pass mean and variance against NumPy."""

import numpy as np
import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.monitoring.online import Welford


def test_welford_is_mean_and_variance():
    x = 1e6 + np.random.default_rng(0).standard_normal((200, 3, 2))
    running = Welford((3, 2))
    assert np.isnan(running.variance).all()
    for row in x:
        running.update(row)
    assert running.count == 200
    assert running.mean == pytest.approx(x.mean(0), rel=1e-14)
    assert running.variance == pytest.approx(x.var(0, ddof=1), rel=1e-8)


@pytest.mark.parametrize("cut", [0, 1, 60, 100])
def test_welford_merges(cut: int):
    x = np.random.default_rng(1).standard_normal((100, 4))
    first, second = Welford((4,)), Welford((4,))
    for i, row in enumerate(x):
        (first if i < cut else second).update(row)
    first.merge(second)
    assert first.count == 100
    assert first.mean == pytest.approx(x.mean(0), abs=1e-14)
    assert first.variance == pytest.approx(x.var(0, ddof=1), rel=1e-12)


def test_welford_goes_on_from_its_state():
    x = np.random.default_rng(2).standard_normal((50, 4))
    whole, half = Welford((4,)), Welford((4,))
    for i, row in enumerate(x):
        whole.update(row)
        if i < 20:
            half.update(row)
    state = half.state_dict()
    half.update(np.full(4, 9.0))  # the state is a copy
    again = Welford((4,))
    again.load_state_dict(state)
    for row in x[20:]:
        again.update(row)
    assert (again.mean == whole.mean).all()
    assert (again.squares == whole.squares).all()


def test_another_shape_is_refused():
    with pytest.raises(InputError, match=r"shape \(2,\) does not fit the \(3,\)"):
        Welford((3,)).update(np.zeros(2))
    with pytest.raises(InputError, match="does not fit"):
        Welford((3,)).merge(Welford((2,)))
