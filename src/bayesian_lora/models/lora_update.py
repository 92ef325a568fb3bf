"""The low-rank update of every chain, added to what the frozen layer gives.

Shapes: M chains, n rows of all chains, R rank, D widths.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.models.first_order import refuse_second_derivatives


class _LoraUpdate(torch.autograd.Function):
    """out += s·x Aᵀ Bᵀ in place, each chain on its own rows.

    Autograd would keep the update (n, D_out) of its own and add it in another pass; here the
    products write into `out`, and only x Aᵀ (n, R) is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, rows: Sequence[int]
    ) -> Tensor:
        a_own, b_own = a.to(x.dtype), b.to(x.dtype)
        low = x.new_empty(x.shape[0], a.shape[1])
        for m, part in enumerate(_parts(rows)):
            torch.mm(x[part], a_own[m].mT, out=low[part])
            out[part].addmm_(low[part], b_own[m].mT, alpha=scaling)
        ctx.save_for_backward(x, low, a_own, b_own)
        ctx.precision = a.dtype
        ctx.scaling, ctx.rows = scaling, rows
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives("the low-rank update")
        x, low, a_own, b_own = ctx.saved_tensors
        grad = grads[0]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        grad_a, grad_b = (torch.empty_like(t, dtype=ctx.precision) for t in (a_own, b_own))
        for m, part in enumerate(_parts(ctx.rows)):
            inner = torch.mm(grad[part], b_own[m]).mul_(ctx.scaling)
            grad_a[m] = torch.mm(inner.mT, x[part])
            grad_b[m] = torch.mm(grad[part].mT, low[part]).mul_(ctx.scaling)
            if grad_x is not None:
                torch.mm(inner, a_own[m], out=grad_x[part])
        return grad, grad_x, grad_a, grad_b, None, None


def _parts(rows: Sequence[int]) -> list[slice]:
    """Each chain's rows, one chain behind the other."""
    parts: list[slice] = []
    begin = 0
    for count in rows:
        parts.append(slice(begin, begin + count))
        begin += count
    return parts


def add_lora(
    out: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, rows: Sequence[int]
) -> Tensor:
    """out + s·x A_mᵀ B_mᵀ for the rows of chain m, in place.

    out (n, D_out) and x (n, D_in) hold `rows[m]` rows of each chain m, chain after chain;
    a is (M, R, D_in), b (M, D_out, R), in their own precision.
    """
    assert sum(rows) == x.shape[0]
    return _LoraUpdate.apply(out, x, a, b, scaling, rows)  # type: ignore[no-any-return]
