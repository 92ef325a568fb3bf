"""Streams of randomness: one per (seed, chain, purpose), saved and restored."""

from itertools import product

import pytest
import torch

from bayesian_lora.utils.rng import chain_generators, derive_seed, restore_states, save_states

PURPOSES = ("init", "order", "dropout", "noise", "heat", "jitter", "")


def test_every_seed_chain_and_purpose_has_its_own_seed() -> None:
    seeds = [*range(20), 2**31, 2**32, 2**40]
    grid = list(product(seeds, range(20), PURPOSES))
    derived = [derive_seed(*arguments) for arguments in grid]
    assert len(set(derived)) == len(grid)
    assert all(0 <= seed < 2**63 for seed in derived)


def test_derived_seeds_use_all_their_bits() -> None:
    derived = [derive_seed(seed, chain, "noise") for seed in range(50) for chain in range(8)]
    for bit in range(63):
        share = sum(seed >> bit & 1 for seed in derived) / len(derived)
        assert 0.35 < share < 0.65, f"bit {bit} is set in {share:.0%}"  # six standard errors


def test_seeds_are_the_same_in_every_process_and_version() -> None:
    """A stored run is resumed and reproduced by them, so they must never change."""
    assert derive_seed(0, 0, "init") == 3626620442099128023
    assert derive_seed(17, 3, "noise") == 4319651610132449249


def test_streams_are_unrelated() -> None:
    generators = [
        *chain_generators(0, range(4), "noise"),
        *chain_generators(0, range(4), "order"),
        *chain_generators(1, range(4), "noise"),
    ]
    draws = torch.stack([torch.randn(4000, generator=g) for g in generators])
    correlation = torch.corrcoef(draws) - torch.eye(len(generators))
    assert correlation.abs().max() < 0.08  # five standard errors


def test_a_chain_s_stream_depends_on_its_global_number_only() -> None:
    many = chain_generators(3, range(8), "noise")
    alone = chain_generators(3, [5], "noise")
    assert torch.equal(torch.randn(9, generator=many[5]), torch.randn(9, generator=alone[0]))


def test_restored_streams_go_on_where_they_were_saved() -> None:
    generators = chain_generators(0, range(3), "noise")
    for generator in generators:
        torch.randn(7, generator=generator)
    states = save_states(generators)
    expected = [torch.randn(100, generator=g) for g in generators]

    others = chain_generators(99, range(3), "noise")
    restore_states(others, states)
    for generator, draws in zip(others, expected, strict=True):
        assert torch.equal(torch.randn(100, generator=generator), draws)
    restore_states(others, states)  # the saved states are not the generators' own
    assert torch.equal(torch.randn(100, generator=others[2]), expected[2])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_states_of_another_number_of_chains_are_refused(count: int) -> None:
    states = save_states(chain_generators(0, range(2), "noise"))
    with pytest.raises(ValueError, match=f"2 generator states for {count} generators"):
        restore_states(chain_generators(0, range(count), "noise"), states)
