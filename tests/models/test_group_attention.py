"""Attention by groups against plain attention of every sequence alone.

Shapes: S sequences, L tokens, T tokens of all, H heads, d width of a head.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bayesian_lora.models import group_attention as room
from bayesian_lora.models.flat import Flat
from bayesian_lora.models.group_attention import Call, group_attention

HEADS, WIDTH = 3, 4
Rows = tuple[Tensor, Tensor, Tensor]
LENGTHS = {"ragged": [[2, 7, 7], [40, 1, 3]], "equal": [[5, 5]], "one token": [[1], [1]]}


def made(lengths: list[list[int]], first_only: bool) -> tuple[Flat, Call, Rows]:
    flat = Flat(np.array(lengths), torch.device("cpu"))
    tokens = flat.grid(HEADS)
    queries = flat.first_grid(HEADS) if first_only else tokens
    generator = torch.Generator().manual_seed(0)
    asking = flat.sequences if first_only else flat.tokens

    def drawn(count: int) -> Tensor:
        shape = (count * HEADS, WIDTH)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows = (drawn(asking), drawn(flat.tokens), drawn(flat.tokens))
    return flat, Call(flat, queries, tokens, HEADS, 0.7), rows


def alone(flat: Flat, call: Call, rows: Rows) -> Tensor:
    """Sequence by sequence, without padding."""
    first_only = call.queries is not call.tokens
    parts: list[Tensor] = []
    ends = np.cumsum(flat.lengths)
    for s, (start, end) in enumerate(zip(flat.starts, ends, strict=True)):
        own = slice(s, s + 1) if first_only else slice(start, end)
        q, k, v = (
            x.view(-1, HEADS, WIDTH)[part].transpose(0, 1)
            for x, part in zip(rows, (own, slice(start, end), slice(start, end)), strict=True)
        )
        parts.append(F.scaled_dot_product_attention(q, k, v, scale=call.scale).transpose(0, 1))
    return torch.cat(parts).reshape(-1, WIDTH)


@pytest.mark.parametrize("kind", ["cpu", "fused"])
@pytest.mark.parametrize("first_only", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_values_and_gradients(lengths: list[list[int]], first_only: bool, kind: str) -> None:
    flat, call, rows = made(lengths, first_only)
    out = group_attention(*rows, call) if kind == "cpu" else room._fused(*rows, call)
    expected = alone(flat, call, rows)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    towards = torch.randn_like(expected)
    ours = torch.autograd.grad(out, rows, towards)
    plain = torch.autograd.grad(expected, rows, towards)
    for own, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_that_nobody_asked_for_are_left_out(wanted: int) -> None:
    _, call, rows = made(LENGTHS["ragged"], first_only=False)
    whole = torch.autograd.grad(group_attention(*rows, call).square().sum(), rows)
    some = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(rows)]
    group_attention(some[0], some[1], some[2], call).square().sum().backward()
    assert [x.grad is None for x in some] == [i != wanted for i in range(3)]
    assert torch.equal(whole[wanted], some[wanted].grad)  # type: ignore[arg-type]


def test_half_precision_counts_in_single() -> None:
    """Scores and weights in float32: the error is that of the rounded inputs and result."""
    _, call, rows = made(LENGTHS["ragged"], first_only=False)
    q, k, v = (x.detach().bfloat16() for x in rows)
    exact = group_attention(q.double(), k.double(), v.double(), call)
    out = group_attention(q, k, v, call)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())
