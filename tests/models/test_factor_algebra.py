"""What the factors B, A mean: W + s·BA per chain, whatever their gauge (BG, G⁻¹A); in float64.

Shapes: M chains, B examples of each chain, L tokens, R rank, D widths.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bayesian_lora.models.chain_lora import ChainLinear, ChainLora
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.traces import PROJECTIONS, Traces, delta_w_norm
from bayesian_lora.utils.lora_params import chain_norm

UNHURRIED = settings(deadline=None)


@dataclass
class Case:
    """A layer with factors of any size, and an input (M·B, …, D_in)."""

    layer: ChainLora
    x: Tensor
    seed: int

    @property
    def chains(self) -> int:
        return self.layer.lora_A.shape[0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chains, rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    width_in, width_out = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    shape = [chains * draw(st.integers(1, 3)), *draw(st.sampled_from([[], [1], [3]])), width_in]
    scaling = draw(st.floats(1e-3, 1e3))
    size_a, size_b = (draw(st.sampled_from([0.0, 1e-3, 1.0, 1e3])) for _ in range(2))
    seed = draw(st.integers(0, 2**32))
    rng = torch.Generator().manual_seed(seed)
    base = nn.Linear(width_in, width_out, bias=draw(st.booleans()), dtype=torch.float64)
    layer = ChainLora(base, chains, rank, scaling, 0.0).requires_grad_(False)
    for p in base.parameters():
        p.normal_(generator=rng)
    layer.lora_A.normal_(generator=rng).mul_(size_a)
    layer.lora_B.normal_(generator=rng).mul_(size_b)
    return Case(layer, torch.randn(shape, generator=rng, dtype=torch.float64), seed)


def dense(layer: ChainLora) -> Tensor:
    """ΔW of every chain (M, D_out, D_in), entry by entry."""
    return layer.scaling * torch.einsum("mor,mri->moi", layer.lora_B, layer.lora_A)


def apart(x: Tensor, chains: int) -> list[Tensor]:
    """(M·B, …) → each chain's (B, …)."""
    return list(x.unflatten(0, (chains, -1)))


def size_of(layer: ChainLora) -> float:
    """What rounding in products of the factors is relative to."""
    return float(layer.scaling * layer.lora_A.norm() * layer.lora_B.norm())


def assert_close(found: Tensor, expected: Tensor, size: float) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * (1 + size))


@given(cases())
@UNHURRIED
def test_a_chain_s_layer_is_the_dense_matrix(case: Case) -> None:
    layer, update = case.layer, dense(case.layer)
    size = size_of(layer) * float(case.x.norm())
    for m, (x, y) in enumerate(
        zip(apart(case.x, case.chains), apart(layer(case.x), case.chains), strict=True)
    ):
        expected = nn.functional.linear(x, layer.base.weight + update[m], layer.base.bias)
        assert_close(y, expected, size + float(case.x.norm() * layer.base.weight.norm()))


@given(cases())
@UNHURRIED
def test_a_chain_s_output_is_its_own(case: Case) -> None:
    """Chain m among others gives what it gives alone."""
    together = apart(case.layer(case.x), case.chains)
    for m, x in enumerate(apart(case.x, case.chains)):
        alone = ChainLora(case.layer.base, 1, case.layer.lora_A.shape[1], case.layer.scaling, 0.0)
        with torch.no_grad():
            alone.lora_A.copy_(case.layer.lora_A[m : m + 1])
            alone.lora_B.copy_(case.layer.lora_B[m : m + 1])
            assert_close(together[m], alone(x), size_of(case.layer) * float(x.norm()))


@given(cases())
@UNHURRIED
def test_a_head_s_chains_are_linear_maps_of_their_own(case: Case) -> None:
    head = ChainLinear(case.layer.base, case.chains).requires_grad_(False)
    head.weight.add_(dense(case.layer))
    size = float(head.weight.norm() * case.x.norm())
    for m, (x, y) in enumerate(
        zip(apart(case.x, case.chains), apart(head(case.x), case.chains), strict=True)
    ):
        bias = None if head.bias is None else head.bias[m]
        assert_close(y, nn.functional.linear(x, head.weight[m], bias), size)


@given(cases())
@UNHURRIED
def test_delta_w_norm_is_that_of_the_dense_product(case: Case) -> None:
    """To half the digits where the product cancels, as a difference of squares does."""
    expected = dense(case.layer).flatten(1).norm(dim=1)
    each = case.layer.scaling * case.layer.lora_A.flatten(1).norm(dim=1)
    bound = 1e-7 * each * case.layer.lora_B.flatten(1).norm(dim=1)
    found = delta_w_norm(case.layer)
    assert found.shape == (case.chains,)
    assert bool(((found - expected).abs() <= bound).all())
    clear = expected > 1e-3 * bound / 1e-7
    torch.testing.assert_close(found[clear], expected[clear], rtol=1e-9, atol=1e-10)


def test_factors_whose_product_vanishes_have_norm_zero() -> None:
    """B and A are not zero, BA is: no NaN of a square that rounds below zero."""
    layer = ChainLora(nn.Linear(5, 4, dtype=torch.float64), 3, 2, 7.0, 0.0).requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, n, generator=rng, dtype=torch.float64) for n in (5, 4))
    layer.lora_A.copy_(torch.stack([a, a], dim=1))
    layer.lora_B.copy_(torch.stack([b, -b], dim=2))
    assert delta_w_norm(layer).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


def projections(layer: ChainLora) -> Tensor:
    """uᵀ ΔW v as `Traces` records them, (M, PROJECTIONS)."""
    rng = torch.Generator().manual_seed(1)
    width_out, width_in = layer.base.weight.shape
    pair = tuple(torch.randn(PROJECTIONS, width, generator=rng) for width in (width_out, width_in))
    traces: Any = SimpleNamespace(directions={"layer": pair})
    return Traces._project(traces, "layer", layer)


@given(cases())
@UNHURRIED
def test_projections_are_those_of_the_dense_product(case: Case) -> None:
    rng = torch.Generator().manual_seed(1)
    left, right = (
        torch.randn(PROJECTIONS, width, generator=rng).double()
        for width in case.layer.base.weight.shape
    )
    expected = torch.einsum("jo,moi,ji->mj", left, dense(case.layer), right)
    assert_close(projections(case.layer), expected, 100 * size_of(case.layer))


def gauge(case: Case) -> tuple[Tensor, float]:
    """G (M, R, R) of condition up to 55, and its condition."""
    rank = case.layer.lora_A.shape[1]
    rng = torch.Generator().manual_seed(case.seed + 1)
    square = torch.randn(case.chains, rank, rank, generator=rng, dtype=torch.float64)
    turned = torch.linalg.qr(square)[0]
    stretch = (4 * torch.rand(case.chains, 1, rank, generator=rng, dtype=torch.float64) - 2).exp()
    return turned * stretch, float(stretch.max() / stretch.min())


@given(cases())
@settings(max_examples=200, deadline=None)
def test_what_is_recorded_does_not_depend_on_the_gauge(case: Case) -> None:
    """(BG, G⁻¹A) is the same model: outputs, ‖ΔW‖ and projections agree."""
    layer = case.layer
    before = layer(case.x), delta_w_norm(layer), projections(layer)
    g, condition = gauge(case)
    layer.lora_B.copy_(layer.lora_B @ g)
    layer.lora_A.copy_(torch.linalg.solve(g, layer.lora_A))
    size = 1e3 * condition * size_of(layer) * (1 + float(case.x.norm()))
    assert_close(layer(case.x), before[0], size)
    assert_close(projections(layer), before[2], size)
    torch.testing.assert_close(
        delta_w_norm(layer), before[1], rtol=1e-8, atol=1e-6 * condition * size_of(layer)
    )


def test_the_factors_norm_does_depend_on_the_gauge() -> None:
    """So the test above can fail: a quantity of the factors is none of the model."""
    layer = ChainLora(nn.Linear(3, 3), 2, 2, 1.0, 0.0).requires_grad_(False)
    layer.lora_A.fill_(1.0)
    layer.lora_B.fill_(1.0)
    before = chain_norm({"a": layer.lora_A, "b": layer.lora_B}), delta_w_norm(layer)
    layer.lora_B.mul_(3.0)
    layer.lora_A.div_(3.0)
    after = chain_norm({"a": layer.lora_A, "b": layer.lora_B}), delta_w_norm(layer)
    torch.testing.assert_close(after[1], before[1])
    assert bool(((after[0] - before[0]).abs() > 1).all())


@given(st.integers(1, 64), st.floats(1e-3, 1e3), st.booleans())
@UNHURRIED
def test_scaling_is_alpha_over_the_rank_or_its_root(rank: int, alpha: float, rslora: bool) -> None:
    spec = LoraSpec(rank, alpha, 0.0, ("query",), rslora, (), "base")
    assert spec.scaling * (math.sqrt(rank) if rslora else rank) == pytest.approx(alpha, rel=1e-12)
