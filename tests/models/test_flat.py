"""Flat batches: where tokens lie, and groups of like length at the least cost.

Shapes: M chains, B examples, S sequences, T tokens, H heads.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesian_lora.models.flat import (
    CURRENT,
    SQUARE_COST,
    Flat,
    flat_of,
    from_blocks,
    in_precision,
    length_groups,
    to_blocks,
)

CPU = torch.device("cpu")
LENGTHS = np.array([[3, 1, 7, 2], [7, 2, 2, 6]])


def cost(groups: list[tuple[int, int]], each: float) -> float:
    """Of groups given as (sequences, longest)."""
    return sum(n * (length + SQUARE_COST * length**2) + each for n, length in groups)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.sampled_from([1.0, 30.0, 500.0]))
def test_groups_are_the_cheapest_of_all_partitions(lengths: list[int], each: float) -> None:
    groups = length_groups(np.array(lengths), each)
    seen = np.concatenate([g.sequences for g in groups])
    assert sorted(seen.tolist()) == list(range(len(lengths)))
    for group in groups:
        assert max(lengths[i] for i in group.sequences) == group.length
    ordered = sorted(lengths)
    cuts = itertools.product([False, True], repeat=len(lengths) - 1)
    best = np.inf
    for cut in cuts:
        edges = [0, *(i + 1 for i, c in enumerate(cut) if c), len(lengths)]
        parts = [(e - b, ordered[e - 1]) for b, e in itertools.pairwise(edges)]
        best = min(best, cost(parts, each))
    assert cost([(len(g.sequences), g.length) for g in groups], each) == pytest.approx(best)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("lengths", [LENGTHS, np.full((2, 3), 4), np.array([[2]])])
def test_blocks_hold_each_sequence_s_rows_head_by_head(lengths: np.ndarray, heads: int) -> None:
    flat = Flat(lengths, CPU)
    grid = flat.grid(heads)
    x = torch.arange(flat.tokens * heads).double()[:, None]
    blocks, at = to_blocks(x, grid), 0
    for group in flat.groups:
        n = len(group.sequences)
        size = n * heads * group.length
        block = blocks[at : at + size].view(n, heads, group.length)
        at += size
        for sequence, rows in zip(group.sequences, block, strict=True):
            own, start = int(lengths.ravel()[sequence]), int(flat.starts[sequence])
            expected = x.view(-1, heads)[start : start + own].T
            assert torch.equal(rows[:, :own], expected)
            assert (rows[:, own:] == expected[:, -1:]).all(), "padding is the sequence's own"
    assert at == len(blocks)
    assert torch.equal(from_blocks(blocks, grid), x)


def test_gradients_go_back_to_their_rows_and_padding_has_none() -> None:
    flat = Flat(LENGTHS, CPU)
    flat.groups = length_groups(LENGTHS.ravel(), 1e6)  # one group, so that there is padding
    grid = flat.grid(2)
    assert len(grid.rows) > len(grid.places)
    x = torch.randn(flat.tokens * 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(grid.places), 3, dtype=torch.float64)
    (from_blocks(to_blocks(x, grid), grid) * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)
    block = torch.randn(len(grid.rows), 3, dtype=torch.float64, requires_grad=True)
    (from_blocks(block, grid) * weights).sum().backward()
    assert block.grad is not None
    assert torch.equal(block.grad[grid.places], weights)
    assert block.grad.abs().sum() == pytest.approx(weights.abs().sum())


def test_rows_of_the_first_tokens_alone() -> None:
    flat = Flat(LENGTHS, CPU)
    grid = flat.first_grid(2)
    x = torch.arange(flat.sequences * 2)[:, None]
    order = np.concatenate([g.sequences for g in flat.groups])
    assert to_blocks(x, grid).view(-1, 2).tolist() == [[2 * s, 2 * s + 1] for s in order]
    assert torch.equal(from_blocks(to_blocks(x, grid), grid), x)


def test_unpad_keeps_the_order_of_chains_and_examples() -> None:
    flat = Flat(LENGTHS, CPU)
    padded = torch.arange(2 * 4 * 9).view(2, 4, 9)
    expected = [padded[m, b, : LENGTHS[m, b]] for m in range(2) for b in range(4)]
    assert torch.equal(flat.unpad(padded)[0], torch.cat(expected))
    assert torch.equal(flat.unpad(padded.flatten(0, 1))[0], torch.cat(expected))
    assert flat.per_chain == [13, 17]
    assert flat.first.tolist() == [0, 3, 4, 11, 13, 20, 22, 24]
    assert flat.rows_per_chain(30) == [13, 17]
    assert flat.rows_per_chain(8) == [4, 4]


def test_only_masks_padded_on_the_right_are_flat() -> None:
    mask = torch.tensor([[[1, 1, 0], [1, 1, 1]]])
    flat = flat_of(mask, CPU)
    assert flat is not None
    assert flat.lengths.tolist() == [[2, 3]]
    for odd in ([[[0, 1, 1]]], [[[1, 0, 1]]], [[[0, 0, 0]]]):
        assert flat_of(torch.tensor(odd), CPU) is None


def test_a_common_input_is_lowered_once_within_a_batch() -> None:
    x, flat = torch.ones(3), Flat(np.array([[3]]), torch.device("cpu"))
    assert in_precision(x, torch.float32) is x
    assert in_precision(x, torch.bfloat16) is not in_precision(x, torch.bfloat16)
    token = CURRENT.set(flat)
    try:
        assert in_precision(x, torch.bfloat16) is in_precision(x, torch.bfloat16)
        assert in_precision(x + 1, torch.bfloat16).tolist() == [2, 2, 2]
    finally:
        CURRENT.reset(token)
