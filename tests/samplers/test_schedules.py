"""Burn-in, thinning and learning-rate schedules, by hand."""

import pytest

from bayesian_lora.samplers.schedules import BurnIn, Thinning, warmup_linear_decay


def test_burn_in_is_geometric():
    burn_in = BurnIn(steps=5, start=0.16, end=0.01)
    sizes = [burn_in.step_size(step) for step in range(5)]
    assert sizes == pytest.approx([0.16, 0.08, 0.04, 0.02, 0.01])


@pytest.mark.parametrize(("steps", "start"), [(4, 0.01), (1, 0.5)])
def test_burn_in_is_constant_where_nothing_changes(steps: int, start: float):
    assert [BurnIn(steps, start, 0.01).step_size(i) for i in range(steps)] == [0.01] * steps


def test_thinning_keeps_the_last_of_every_thin_steps():
    thinning = Thinning(thin=3, draws=4)
    assert thinning.steps == 12
    kept = {step: thinning.draw_after(step) for step in range(13)}
    assert {s: d for s, d in kept.items() if d is not None} == {3: 0, 6: 1, 9: 2, 12: 3}


def test_thinning_by_one_keeps_every_step():
    assert [Thinning(1, 3).draw_after(step) for step in range(4)] == [None, 0, 1, 2]


def test_warmup_then_linear_decay():
    factors = [warmup_linear_decay(step, warmup=3, total=9) for step in range(10)]
    rising = [1 / 4, 2 / 4, 3 / 4]
    falling = [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert factors == pytest.approx(rising + falling)


def test_no_step_of_a_run_is_lost():
    for warmup, total in ((0, 1), (1, 1), (0, 5), (5, 5)):
        steps = range(total)
        assert all(warmup_linear_decay(s, warmup=warmup, total=total) > 0 for s in steps)
