"""Energies that leave the range of burn-in are reported, once a chain; steady ones never are.

Shapes: M chains.
"""

import pytest
import torch

from bayesian_lora.energy_range import FAR, LEAST, MEMORY, EnergyRange

BURN_IN = 100


def watched(
    path: torch.Tensor, burn_in: int = BURN_IN, prior: torch.Tensor | None = None
) -> EnergyRange:
    """After the batch losses (steps, M)."""
    energies = EnergyRange(path.shape[1], burn_in)
    for step, loss in enumerate(path):
        energies.record(loss, torch.zeros(path.shape[1]) if prior is None else prior[step], step)
    return energies


def noise(steps: int, chains: int = 3, seed: int = 0) -> torch.Tensor:
    return 1.0 + 0.1 * torch.randn(steps, chains, generator=torch.Generator().manual_seed(seed))


def test_mean_and_sd_are_those_of_burn_ins_second_half() -> None:
    path = noise(BURN_IN)
    energies = watched(path)
    half = path[BURN_IN // 2 :].double()
    torch.testing.assert_close(energies.mean, half.mean(0))
    torch.testing.assert_close(energies.sd, half.std(0))


def test_steady_chains_are_never_reported() -> None:
    """100 chains over 2,000 steps: the average of 20 batches is 6·√39 of its own sds away."""
    assert watched(noise(2000, chains=100)).take() == []


@pytest.mark.parametrize("through", ["loss", "prior"])
def test_a_climbing_chain_is_reported_once(through: str) -> None:
    """Also where only the prior's share climbs: parameters that the data leave free run away."""
    steps = 400
    climb = torch.zeros(steps, 3)
    climb[200:, 1] = 0.02 * torch.arange(steps - 200)
    path = noise(steps)
    energies = watched(path + climb) if through == "loss" else watched(path, prior=climb)
    (found,) = energies.take()
    assert found.chain == 1
    # The climb passes 6 · .1 after 30 steps; the moving average lags by its memory.
    assert 200 + 30 <= found.step <= 200 + 30 + 2 * MEMORY
    assert found.energy - found.mean > FAR * found.sd
    assert energies.take() == []
    line = found.told(7)
    assert line.startswith("chain 7: energy per example ")
    assert f"at step {found.step}" in line


def test_falling_energies_are_no_divergence() -> None:
    path = noise(300)
    path[BURN_IN:] -= 50.0
    assert watched(path).take() == []


def test_a_short_burn_in_has_no_range() -> None:
    path = noise(200)
    path[100:] += 1000.0
    short = watched(path, burn_in=2 * LEAST - 2)
    assert not short.known
    assert short.take() == []
    assert watched(path, burn_in=2 * LEAST).known


def test_it_is_saved_restored_and_cut() -> None:
    path = noise(300)
    path[200:, 2] += 5.0
    whole, again = watched(path), EnergyRange(3, BURN_IN)
    again.load_state_dict(watched(path[:150]).state_dict())
    for step in range(150, 300):
        again.record(path[step], torch.zeros(3), step)
    assert again.take() == whole.take()
    torch.testing.assert_close(again.now, whole.now, rtol=0, atol=0)
    cut = EnergyRange(3, BURN_IN)
    cut.load_state_dict(watched(path[:150]).state_dict())
    cut.keep([0, 2])
    for step in range(150, 300):
        cut.record(path[step, [0, 2]], torch.zeros(2), step)
    assert [found.chain for found in cut.take()] == [1]
    torch.testing.assert_close(cut.now, whole.now[[0, 2]], rtol=0, atol=0)
