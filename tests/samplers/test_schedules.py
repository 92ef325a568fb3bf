"""Burn-in, thinning, cycles and learning-rate schedules, by hand."""

import math
from itertools import pairwise

import pytest

from bayesian_lora.samplers.schedules import (
    BurnIn,
    Cycle,
    CycleThinning,
    Thinning,
    warmup_linear_decay,
)


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


def test_a_cosine_cycle():
    cycle = Cycle(steps=4, explore_fraction=0.5)
    quarter = (2 + math.sqrt(2)) / 4
    assert [cycle.factor(t) for t in range(8)] == pytest.approx([1, quarter, 0.5, 1 - quarter] * 2)
    assert [cycle.sampling(t) for t in range(8)] == [False, False, True, True] * 2
    assert (cycle.explore_steps, cycle.sampling_steps) == (2, 2)


@pytest.mark.parametrize(
    ("steps", "share", "explore"),
    [(5, 0.5, 3), (10, 0.0, 0), (10, 0.3, 3), (7, 0.99, 7), (100, 0.55, 55)],
)
def test_exploration_is_rounded_up(steps: int, share: float, explore: int):
    cycle = Cycle(steps, share)
    assert cycle.explore_steps == explore
    assert sum(cycle.sampling(t) for t in range(steps)) == cycle.sampling_steps == steps - explore


def test_every_draw_of_a_cycle_is_from_its_sampling_share():
    """C = 10, half of it exploration, thin = 2: steps 7 and 9 of 1 … 10 no, 8 and 10 yes."""
    plan = CycleThinning(Cycle(10, 0.5), thin=2, draws=5)
    assert (plan.per_cycle, plan.steps) == (2, 28)
    kept = {step: plan.draw_after(step) for step in range(plan.steps + 1)}
    assert {s: d for s, d in kept.items() if d is not None} == {8: 0, 10: 1, 18: 2, 20: 3, 28: 4}


@pytest.mark.parametrize("thin", [1, 2, 3, 5])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("draws", [1, 4, 9])
def test_a_cyclic_plan_makes_its_draws(thin: int, share: float, draws: int):
    """Each once, in order, after steps with noise, spaced by `thin` within a cycle, to its end."""
    cycle = Cycle(10, share)
    plan = CycleThinning(cycle, thin, draws)
    kept = [(step, plan.draw_after(step)) for step in range(plan.steps + 1)]
    kept = [(step, draw) for step, draw in kept if draw is not None]
    assert [draw for _, draw in kept] == list(range(draws))
    assert all(cycle.sampling(step - 1) for step, _ in kept)
    for (a, _), (b, _) in pairwise(kept):
        assert b - a == thin or (a % 10 == 0 and (b - 1) // 10 == a // 10)
    assert kept[-1][0] == plan.steps, "it ends at the last draw"


def test_a_cycle_must_hold_a_draw():
    with pytest.raises(ValueError, match="thin=6 exceeds 5 sampling steps"):
        CycleThinning(Cycle(10, 0.5), thin=6, draws=1)
