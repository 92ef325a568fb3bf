"""The matrix products that a step of ours needs, and the rate of the machine at the same shapes.

Useful ones alone: of tokens, not padding, nothing of the last layer that no classifier reads, and
in the backward pass no gradient that nothing trainable asks for.

Shapes: M chains, B examples of a chain's batch, S = M·B sequences, T tokens of all, D widths.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ours import wait
from torch import Tensor, nn

from bayesian_lora.models.chain_lora import ChainLinear, ChainLora, ChainModel
from bayesian_lora.models.flat_attention import Family, encoder_layers
from bayesian_lora.models.frozen_linear import frozen_linear

REPEATS = 5


@dataclass(frozen=True)
class Product:
    """(rows, inner) · (inner, outer); `frozen`: by a weight of the base, or its transpose."""

    rows: int
    inner: int
    outer: int
    frozen: bool = False

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inner * self.outer


@dataclass
class _Walk:
    """One passage through the layers; `grad`: whether the present input has a gradient."""

    products: list[Product]
    grad: bool = False

    def linear(self, module: nn.Module, rows: int) -> bool:
        """A linear map and its gradients; whether its output has a gradient."""
        d_out, d_in = _widths(module)
        trained = isinstance(module, ChainLinear)
        self.products.append(Product(rows, d_in, d_out, not trained))
        if self.grad:
            self.products.append(Product(rows, d_out, d_in, not trained))
        if trained:
            self.products.append(Product(d_out, rows, d_in))
        if isinstance(module, ChainLora):
            rank = module.lora_A.shape[1]
            pairs = [(d_in, rank), (rank, d_out)]  # forward
            pairs += [(d_out, rank)] + [(rank, d_in)] * self.grad  # to x Aᵀ, and to x
            self.products += [Product(rows, a, b) for a, b in pairs]
            self.products += [Product(rank, rows, d_in), Product(d_out, rows, rank)]
        return self.grad or trained or isinstance(module, ChainLora)

    def attention(self, lengths: np.ndarray, width: int, last: bool, wanted: list[bool]) -> None:
        """Scores and their use, and their gradients; `wanted`: by query, key, value."""
        query, key, value = wanted
        # Forward two, backward one for each of query, key, value, and one to the scores.
        times = 2 + query + key + value + (query or key)
        for length in lengths.ravel().tolist():
            queries = 1 if last else length
            self.products += [Product(queries, width, length)] * times


def useful_products(model: ChainModel, lengths: np.ndarray) -> list[Product]:
    """Of one forward and backward pass; lengths (M, B) are the tokens of each sequence."""
    assert model.family is not None, "only the families whose batches run flat are known"
    walk, sequences = _Walk([]), lengths.size
    layers = encoder_layers(model.base, model.family)
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        _layer(walk, layer, model.family, lengths, last)
    inside = {id(m) for layer in layers for m in layer.modules()}
    for module in model.base.modules():  # pooler and head, in the order they act
        if isinstance(module, nn.Linear | ChainLinear) and id(module) not in inside:
            # Chains have their own weights, and a gradient each.
            rows = sequences // model.num_chains if isinstance(module, ChainLinear) else sequences
            times = sequences // rows
            before = len(walk.products)
            grad = walk.linear(module, rows)
            walk.products += walk.products[before:] * (times - 1)
            walk.grad = grad
    return walk.products


def _layer(walk: _Walk, layer: nn.Module, family: Family, lengths: np.ndarray, last: bool) -> None:
    tokens, sequences = int(lengths.sum()), lengths.size
    projections = [layer.get_submodule(n) for n in (family.query, family.key, family.value)]
    rows = [sequences if last else tokens, tokens, tokens]
    wanted = [walk.linear(m, n) for m, n in zip(projections, rows, strict=True)]
    walk.attention(lengths, _widths(projections[0])[0], last, wanted)
    walk.grad = any(wanted)
    for module in _linear(layer):
        if module not in projections:
            walk.grad = walk.linear(module, sequences if last else tokens)


def _widths(module: nn.Module) -> tuple[int, int]:
    """D_out and D_in."""
    weight: Any = module.base.weight if isinstance(module, ChainLora) else module.weight
    return weight.shape[-2], weight.shape[-1]


def _linear(layer: nn.Module) -> Iterator[nn.Module]:
    """Its linear maps in the order they act; a map with LoRA is one."""
    inner = {id(m.base) for m in layer.modules() if isinstance(m, ChainLora)}
    for module in layer.modules():
        if isinstance(module, nn.Linear | ChainLora) and id(module) not in inner:
            yield module


def operations(model: ChainModel, lengths: np.ndarray) -> int:
    """Floating-point operations of the useful products."""
    return sum(product.operations for product in useful_products(model, lengths))


def plain_shapes(model: ChainModel, lengths: np.ndarray) -> Counter[Product]:
    """How often each product of all tokens by a frozen weight occurs, forward and backward."""
    tokens = int(lengths.sum())
    found = useful_products(model, lengths)
    return Counter(p for p in found if p.frozen and p.rows == tokens)


class Peak:
    """The machine's rate at the shapes given, weighted by their numbers; operations a second.

    Each is timed alone, at the best of some repeats: `plain` by F.linear, `fastest` by whichever
    is faster of F.linear and the product that ours uses, both of the last call, which gives the
    plain one.
    """

    def __init__(
        self, shapes: Counter[Product], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.shapes, self.device = shapes, torch.device(device)
        self.inputs = {
            p: (
                torch.randn(p.rows, p.inner, device=device).to(dtype),
                torch.randn(p.outer, p.inner, device=device).to(dtype),
            )
            for p in shapes
        }
        self.plain = self.fastest = 0.0

    def __call__(self) -> float:
        plain, fastest = 0.0, 0.0
        for product, count in self.shapes.items():
            slow = self._best(F.linear, product)
            fast = self._best(lambda x, weight: frozen_linear(x, weight, None), product)
            plain += slow * count
            fastest += min(slow, fast) * count
        done = sum(p.operations * count for p, count in self.shapes.items())
        self.plain, self.fastest = done / plain, done / fastest
        return self.plain

    def _best(self, kernel: Callable[[Tensor, Tensor], Tensor], product: Product) -> float:
        """Seconds."""
        times: list[float] = []
        for _ in range(REPEATS):
            wait(self.device)
            began = time.perf_counter()
            kernel(*self.inputs[product])
            wait(self.device)
            times.append(time.perf_counter() - began)
        return min(times)
