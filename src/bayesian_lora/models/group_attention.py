"""Attention over a flat batch, group by group.

Shapes: T tokens, S sequences, H heads, d width of a head; a group has n sequences padded to L.
Rows are (token·H + head, d).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesian_lora.models.first_order import refuse_second_derivatives
from bayesian_lora.models.flat import Flat, Grid, from_blocks, to_blocks

Part = tuple[Tensor | None, list[Tensor]]
"""A group's mask (n, 1, 1, L), and its part (n·H, L, d) of each tensor asked for."""


@dataclass(frozen=True)
class Call:
    """One layer's attention: which rows ask, which answer, and the scores' scale."""

    flat: Flat
    queries: Grid
    tokens: Grid
    heads: int
    scale: float

    def groups(self, asking: Sequence[Tensor], answering: Sequence[Tensor]) -> Iterator[Part]:
        """The groups' parts of blocks of the queries' rows and of all tokens' rows."""
        only_first = self.queries is not self.tokens
        sequences = [len(group.sequences) * self.heads for group in self.flat.groups]
        rows = [n * group.length for n, group in zip(sequences, self.flat.groups, strict=True)]
        rows_q = sequences if only_first else rows
        split_q = zip(*(x.split(rows_q) for x in asking), strict=True)
        split = zip(*(x.split(rows) for x in answering), strict=True)
        for n, mask, own_q, own in zip(sequences, self.flat.masks, split_q, split, strict=True):
            yield mask, [x.view(n, -1, x.shape[-1]) for x in (*own_q, *own)]


def group_attention(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """softmax(scale · q kᵀ) v within each sequence, rows like the query's.

    On GPUs by the fused kernel; on CPUs, where its backward pass is slow on short sequences (in
    bfloat16 tenfold), by plain products in at least float32, as fast as bfloat16 there.
    """
    if query.device.type == "cpu":
        return _CpuAttention.apply(query, key, value, call)  # type: ignore[no-any-return]
    return _fused(query, key, value, call)


def _fused(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    q = to_blocks(query, call.queries)
    k, v = (to_blocks(x, call.tokens) for x in (key, value))
    parts: list[Tensor] = []
    for mask, own in call.groups([q], [k, v]):
        by_head = [x.unflatten(0, (-1, call.heads)) for x in own]
        bias = None if mask is None else mask.to(q.dtype)
        out = F.scaled_dot_product_attention(*by_head, attn_mask=bias, scale=call.scale)
        parts.append(out.flatten(0, 2))
    return from_blocks(torch.cat(parts), call.queries)


class _CpuAttention(torch.autograd.Function):
    """One node for all groups: what autograd would do, without a node for every small step."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        precision = torch.promote_types(query.dtype, torch.float32)
        q = query.index_select(0, call.queries.rows).to(precision).mul_(call.scale)
        k, v = (x.index_select(0, call.tokens.rows).to(precision) for x in (key, value))
        out = torch.empty_like(q)
        weights: list[Tensor] = []
        for mask, (q_g, out_g, k_g, v_g) in call.groups([q, out], [k, v]):
            scores = torch.bmm(q_g, k_g.mT)
            if mask is not None:
                scores.unflatten(0, (-1, call.heads)).add_(mask)
            weights.append(scores.softmax(-1))
            torch.bmm(weights[-1], v_g, out=out_g)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.call, ctx.dtype = call, query.dtype
        return out.index_select(0, call.queries.places).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("attention")
        q, k, v, *weights = ctx.saved_tensors
        call: Call = ctx.call
        wants_q, wants_k, wants_v = ctx.needs_input_grad[:3]
        # Padded places gave nothing, so they get the gradient 0.
        padded = len(call.queries.rows) > len(call.queries.places)
        grad = torch.zeros_like(q) if padded else torch.empty_like(q)
        grad.index_copy_(0, call.queries.places, grads[0].to(q.dtype))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        groups = call.groups([q, grad, dq], [k, v, dk, dv])
        for p, (_, (q_g, grad_g, dq_g, k_g, v_g, dk_g, dv_g)) in zip(weights, groups, strict=True):
            if wants_v:
                torch.bmm(p.mT, grad_g, out=dv_g)
            if not (wants_q or wants_k):
                continue
            scores = torch.ops.aten._softmax_backward_data(
                torch.bmm(grad_g, v_g.mT), p, -1, p.dtype
            )
            if wants_q:
                torch.bmm(scores, k_g, out=dq_g)
            if wants_k:
                torch.bmm(scores.mT, q_g, out=dk_g)
        places_q, places = call.queries.places, call.tokens.places
        return (
            dq.index_select(0, places_q).mul_(call.scale).to(ctx.dtype) if wants_q else None,
            dk.index_select(0, places).to(ctx.dtype) if wants_k else None,
            dv.index_select(0, places).to(ctx.dtype) if wants_v else None,
            None,
        )
