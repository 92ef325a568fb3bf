"""Tensors of chains as members with their records.

Shapes: M chains.
"""

import torch

from bayesian_lora.experiment.starts import as_members


def test_members_have_their_chains_numbers_steps_and_noise() -> None:
    """Chain 1 was dropped: the second of two is number 2."""
    tensors = {"a": torch.arange(6.0).view(2, 3)}
    noise = torch.tensor([0.5, 0.25], dtype=torch.float64)
    found = as_members(tensors, noise, [0, 2], draw=3, steps=[10, 20])
    assert [(r.chain, r.draw, r.step, r.noise_std) for _, r in found] == [
        (0, 3, 10, 0.5),
        (2, 3, 20, 0.25),
    ]
    assert [member["a"].tolist() for member, _ in found] == [[0, 1, 2], [3, 4, 5]]
    tensors["a"].zero_()
    assert found[1][0]["a"].tolist() == [3, 4, 5], "a copy"


def test_one_fit_for_all_chains_is_the_first_ones() -> None:
    ((_, record),) = as_members({"a": torch.ones(1, 2)}, None, [0, 1, 2], 0, [7])
    assert (record.chain, record.step, record.noise_std) == (0, 7, None)
