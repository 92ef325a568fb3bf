"""Products with frozen weights: the same values and gradients by either library.

Shapes: D widths.
"""

import pytest
import torch
import torch.nn.functional as F

from bayesian_lora.models import frozen_linear as room
from bayesian_lora.models.frozen_linear import FrozenLinear, freeze, frozen_linear

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available(),
    reason="this PyTorch has no oneDNN",
)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((3, 17, 40), (24, 40), (24,)))
    return x.to(dtype), w.to(dtype), b.to(dtype)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_values_and_gradient_are_those_of_linear(with_bias: bool, transposed: bool) -> None:
    x, w, b = tensors()
    if transposed:
        x = x.transpose(0, 1)  # rows that do not lie one behind the other
    bias = b if with_bias else None
    ours, plain = (x.detach().requires_grad_() for _ in range(2))
    out, expected = frozen_linear(ours, w, bias), F.linear(plain, w, bias)
    assert type(out.grad_fn).__name__ == "_OneDnnLinearBackward"
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_linear_itself(dtype: torch.dtype) -> None:
    x, w, b = tensors(dtype)
    assert torch.equal(frozen_linear(x, w, b), F.linear(x, w, b))


def test_what_is_trained_gets_its_gradient() -> None:
    """The fast product has none for weight and bias, so these go the plain way."""
    for trained in (0, 1):
        parts = [t.requires_grad_(i == trained) for i, t in enumerate(tensors()[1:])]
        frozen_linear(tensors()[0], *parts).sum().backward()
        assert parts[trained].grad is not None


def test_without_the_operator_it_is_linear_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = tensors()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert torch.equal(frozen_linear(x, w, b), F.linear(x, w, b))


def test_no_rows_are_no_rows() -> None:
    _, w, b = tensors()
    assert frozen_linear(torch.empty(0, 40), w, b).shape == (0, 24)


def test_autocast_decides_on_its_own_precision() -> None:
    x, w, b = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_linear(x, w, b).dtype == torch.bfloat16


def test_a_layer_is_frozen_in_place_and_only_a_plain_one() -> None:
    class Special(torch.nn.Linear):
        """What a layer of another kind does is its own."""

    plain, special = torch.nn.Linear(40, 24).requires_grad_(False), Special(40, 24)
    seen: list[int] = []
    plain.register_forward_hook(lambda *_: seen.append(1))
    freeze(plain)
    freeze(special)
    assert type(plain) is FrozenLinear
    assert type(special) is Special
    plain.bfloat16()
    assert plain(tensors()[0]).dtype == torch.bfloat16
    assert seen == [1]


def test_without_a_gradient_to_give_the_weight_is_not_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, b = tensors()
    calls: list[int] = []
    product = room._product
    monkeypatch.setattr(room, "_product", lambda *a: (calls.append(1), product(*a))[1])
    frozen_linear(x.requires_grad_(), w, b).sum().backward()
    assert len(calls) == 2, "once forward, once backward"
    frozen_linear(x.detach(), w, b)
    assert len(calls) == 3
