"""`benchmarks/online_memory.py`: its toy has the law it is held against; what it prints."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bayesian_lora.errors import InputError

STEPS, SETTLED, CHAINS = 12_000, 2_000, 4


@pytest.fixture(scope="module")
def script(load: Callable[[str], Any]) -> Any:
    return load("online_memory")


@pytest.fixture(scope="module")
def found(script: Any) -> Any:
    return script.run(STEPS, CHAINS, SETTLED)


def test_the_toys_gradient_is_that_of_its_loss(script: Any) -> None:
    theta = torch.randn(2, script.QUANTITIES, dtype=torch.float64, requires_grad=True)
    loss = script.quadratic(theta, torch.from_numpy(script.curvatures()))()
    by_hand = theta.grad
    assert by_hand is not None
    own = (0.5 * torch.from_numpy(script.curvatures()) * theta.square()).sum(1)
    (derived,) = torch.autograd.grad(own.sum(), theta)
    assert torch.allclose(loss, own)
    assert torch.allclose(by_hand, derived)


def test_the_derived_share_is_that_of_a_simulated_process(script: Any) -> None:
    """n·Var(mean)/Var(x) of many short AR(1) chains begun in their law."""
    k = script.curvatures()[-1]
    phi, n = 1.0 - script.H * k, 400
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20_000)
    total = np.zeros_like(x)
    for _ in range(n):
        x = phi * x + np.sqrt(1 - phi**2) * rng.standard_normal(len(x))
        total += x
    share = 1.0 / (n * (total / n).var())
    assert script.derived_ess_share()[-1] == pytest.approx(share, rel=0.05)


def test_what_is_measured_is_near_the_truth(script: Any, found: Any) -> None:
    """48,000 chain-steps are 480 independent ones of the slowest coordinate: 4 errors are .26."""
    ratio = found.variance / found.derived_variance
    independent = STEPS * CHAINS * script.derived_ess_share()
    assert (np.abs(ratio - 1) < 4 * np.sqrt(2 / independent)).all()
    last = found.milestones[-1]
    assert (last["step"], last["rows"]) == (STEPS, STEPS)
    least = script.derived_ess_share().min()
    assert last["ess_per_step"] == pytest.approx(least, rel=0.5)


def test_the_state_is_a_small_part_of_the_traces_it_stands_for(found: Any) -> None:
    early, late = found.readings
    assert (early.step, late.step) == (SETTLED, STEPS)
    came_in = (STEPS - SETTLED) * CHAINS * 8 * 8
    assert abs(found.state_growth) < 0.04 * came_in, "a buffer that is full, half full before"
    assert late.state_bytes < 0.06 * came_in


def test_growth_is_told_and_ends_in_an_exit_status(
    script: Any, found: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = dataclasses.replace(found.readings[1], resident_mb=found.readings[0].resident_mb + 50)
    grown = dataclasses.replace(found, readings=[found.readings[0], late])
    monkeypatch.setattr(script, "run", lambda *_: grown)
    assert script.main([]) == 1
    assert "GROWTH: +50.00 MB" in capsys.readouterr().out
    steady = dataclasses.replace(late, resident_mb=found.readings[0].resident_mb)
    calm = dataclasses.replace(found, readings=[found.readings[0], steady])
    monkeypatch.setattr(script, "run", lambda *_: calm)
    assert script.main([]) == 0
    assert "no growth: +0.00 MB" in capsys.readouterr().out


@pytest.mark.parametrize("given", [(10_000, 4), (20_000, 0)])
def test_too_little_to_compare_is_refused(
    script: Any, given: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="give more than 10,000 steps"):
        script.run(*given)
    assert script.main(["--steps", str(given[0]), "--chains", str(given[1])]) == 1
    assert capsys.readouterr().err.startswith("Error: --steps")
