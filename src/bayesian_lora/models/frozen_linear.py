"""y = W x + b with W and b frozen: no gradient but the input's, by the CPU's faster library.

Shapes: D widths.

PyTorch's own float32 products go through MKL, which on processors that are not Intel's leaves
AVX-512 aside: half the rate of oneDNN there. `torch.compile` calls oneDNN by the operator used
here; where it is missing, and for every other precision and device, it is `F.linear`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesian_lora.models.first_order import refuse_second_derivatives
from bayesian_lora.models.flat import in_precision


class FrozenLinear(nn.Linear):
    """A frozen layer: inputs of any precision, products and outputs in the weight's."""

    def forward(self, input: Tensor) -> Tensor:
        """x (…, D_in) → (…, D_out)."""
        return frozen_linear(in_precision(input, self.weight.dtype), self.weight, self.bias)


def freeze(linear: nn.Linear) -> None:
    """Make a plain layer a `FrozenLinear` in place: whoever holds it, and its hooks, stay."""
    if type(linear) is nn.Linear:
        linear.__class__ = FrozenLinear


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, D_in), weight (D_out, D_in), bias (D_out) → (…, D_out)."""
    if _onednn_serves(x, weight, bias):
        return _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


def _onednn_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        refuse_second_derivatives("a frozen layer")
        (weight,) = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        return _product(grads[0], weight.t(), None) if needed else None, None, None
