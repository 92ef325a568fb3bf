"""The low-rank update and its gradients against the formula.

Shapes: M chains, n rows of all chains, R rank.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bayesian_lora.models.lora_update import add_lora


def filled(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def plain(out: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float, rows: list[int]) -> Tensor:
    """The slow obvious twin."""
    parts = [z @ (b[m] @ a[m]).mT for m, z in enumerate(x.split(rows))]
    return out + s * torch.cat(parts)


@pytest.mark.parametrize("rows", [[7], [3, 3, 3], [5, 1, 9]])
def test_value_and_gradients_are_the_formula_s(rows: list[int]) -> None:
    n, m = sum(rows), len(rows)
    base, x, a, b = filled((n, 4), 0), filled((n, 6), 1), filled((m, 2, 6), 2), filled((m, 4, 2), 3)
    found = add_lora(base * 1.0, x, a, b, 1.7, rows)
    expected = plain(base, x, a, b, 1.7, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = filled((n, 4), 4).detach()
    gradients = torch.autograd.grad((found * weights).sum(), (base, x, a, b))
    reference = torch.autograd.grad((expected * weights).sum(), (base, x, a, b))
    for ours, theirs in zip(gradients, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_factors_have_gradients_where_the_inputs_need_none() -> None:
    a, b = filled((1, 2, 6), 2), filled((1, 4, 2), 3)
    out = add_lora(torch.zeros(5, 4).double(), filled((5, 6), 1).detach(), a, b, 1.0, [5])
    out.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.any()
    assert b.grad.any()


def test_a_chain_that_is_not_finite_leaves_the_others_alone() -> None:
    x, a, b = filled((6, 6), 1), filled((2, 2, 6), 2), filled((2, 4, 2), 3)
    with torch.no_grad():
        a[0] = float("nan")
        b[0] = float("inf")
    out = add_lora(torch.zeros(6, 4).double(), x, a, b, 1.0, [2, 4])
    out[2:].sum().backward()
    assert out[2:].isfinite().all()
    assert x.grad is not None
    assert a.grad is not None
    assert x.grad[2:].isfinite().all()
    assert a.grad[1].isfinite().all()


def test_rows_that_do_not_add_up_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        add_lora(
            filled((3, 4), 0),
            filled((3, 6), 1),
            filled((2, 2, 6), 2),
            filled((2, 4, 2), 3),
            1,
            [1, 1],
        )


def test_low_precision_inputs_keep_the_factors_gradients_precise() -> None:
    a, b = filled((1, 2, 6), 2), filled((1, 4, 2), 3)
    small = [t.detach().float().requires_grad_() for t in (a, b)]
    x = filled((5, 6), 1).detach().bfloat16()
    out = add_lora(torch.zeros(5, 4, dtype=torch.bfloat16), x, small[0], small[1], 2.0, [5])
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    plain(torch.zeros(5, 4).double(), x.double(), a, b, 2.0, [5]).sum().backward()
    for own, exact in zip(small, (a, b), strict=True):
        assert own.grad is not None
        assert exact.grad is not None
        assert own.grad.dtype == torch.float32
        error = (own.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 0.02
