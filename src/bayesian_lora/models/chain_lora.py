"""Linear maps with a leading chain dimension over one frozen base.

Shapes: M chains, B examples of each chain, L tokens, R rank, D widths, n rows of all chains.
Activations are (M·B, …, D) with the chain index slowest, so that a HuggingFace forward runs
unchanged between these modules; in a flat batch (`models.flat`) they are (1, n, D), the tokens of
one chain behind those of another.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesian_lora.models.chain_dropout import ChainDropout
from bayesian_lora.models.flat import CURRENT, flat_of, in_precision
from bayesian_lora.models.flat_attention import family_of, flat_forward, prefix_of, prepare
from bayesian_lora.models.frozen_linear import frozen_linear
from bayesian_lora.models.lora_update import add_lora
from bayesian_lora.models.turn import Turn
from bayesian_lora.utils.lora_params import num_chains

# Tokens of a forward pass, over all its chains: large enough for the matrix products, small enough
# that activations stay within some hundred MiB.
TOKENS_PER_PASS = 16_384
# On CPUs within what the caches and the allocator keep at hand: tokens times the bytes of a number.
BYTES_PER_PASS_ON_CPU = 8_192


class ChainLora(nn.Module):
    """y = W x + b + s·B_m A_m x for chain m, W and b frozen and shared (Hu et al. 2021).

    ``lora_A`` is (M, R, D_in), ``lora_B`` (M, D_out, R); s = α/R, or α/√R for rank-stabilised
    LoRA (Kalajdzievski 2023). A ~ U(−1/√D_in, 1/√D_in) and B = 0 at the start, as in PEFT.
    """

    def __init__(
        self, base: nn.Linear, chains: int, rank: int, scaling: float, dropout: float
    ) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.dropout = ChainDropout(dropout)
        like = base.weight
        a = torch.zeros(chains, rank, base.in_features, device=like.device, dtype=like.dtype)
        b = torch.zeros(chains, base.out_features, rank, device=like.device, dtype=like.dtype)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.mix: Callable[..., Tensor] | None = None
        """Adds the update in another way (`models.mixing`)."""
        self.merged: Tensor | None = None
        """W + s·B_k A_k while one member alone is on (`ChainModel.member`)."""

    @torch.no_grad()
    def merge(self, k: int) -> None:
        """Make the frozen weight and member k's update one matrix, in the weight's precision."""
        weight = self.base.weight
        update = torch.addmm(
            weight.to(self.lora_B.dtype), self.lora_B[k], self.lora_A[k], alpha=self.scaling
        )
        self.merged = update.to(weight.dtype)

    @torch.no_grad()
    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        bound = 1.0 / math.sqrt(self.base.in_features)
        for a, generator in zip(self.lora_A, generators, strict=True):
            a.uniform_(-bound, bound, generator=generator)
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (M·B, L, D_in), (M·B, D_in) or flat (1, n, D_in) → the same with D_out."""
        x = in_precision(x, self.base.weight.dtype)
        if self.merged is not None:
            return frozen_linear(x, self.merged, self.base.bias)
        inputs = x.reshape(-1, x.shape[-1])
        rows = self._rows_per_chain(inputs.shape[0])
        out = self.base(inputs)
        low = self.dropout(inputs.to(out.dtype), rows)  # autocast may have lowered the precision
        if self.mix is not None:
            return self.mix(out, inputs, low, rows).reshape(*x.shape[:-1], -1)
        out = add_lora(out, low, self.lora_A, self.lora_B, self.scaling, rows)
        return out.reshape(*x.shape[:-1], -1)

    def _rows_per_chain(self, rows: int) -> list[int]:
        flat, chains = CURRENT.get(), self.lora_A.shape[0]
        return [rows // chains] * chains if flat is None else flat.rows_per_chain(rows)


class ChainLinear(nn.Module):
    """y = W_m x + b_m for chain m: a trainable layer of the head, weight (M, D_out, D_in)."""

    def __init__(self, base: nn.Linear, chains: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().expand(chains, -1, -1).clone())
        bias = base.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().expand(chains, -1).clone())
        self.only: int | None = None
        """The member that is on alone (`ChainModel.member`)."""

    @torch.no_grad()
    def initialise(self, generators: Sequence[torch.Generator], std: float) -> None:
        """W ~ N(0, std²) from each chain's generator, b = 0, as HuggingFace does."""
        for weight, generator in zip(self.weight, generators, strict=True):
            weight.normal_(0.0, std, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (M·B, …, D_in) → the same with D_out."""
        x = x.to(self.weight.dtype)
        if self.only is not None:
            bias = None if self.bias is None else self.bias[self.only]
            return F.linear(x, self.weight[self.only], bias)
        chains, width_out, width_in = self.weight.shape
        rows = x.reshape(chains, -1, width_in)
        out = torch.bmm(rows, self.weight.mT)
        if self.bias is not None:
            out = out + self.bias[:, None]
        return out.reshape(*x.shape[:-1], width_out)


class ChainModel(nn.Module):
    """A HuggingFace classifier whose adapters and head carry M chains; the base is shared.

    `model(input_ids=…)` takes one batch per chain (M, B, L) or one for all (B, L) and gives the
    logits (M, B, C). The base stays in eval mode: only `lora_dropout` switches dropout on.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.autocast: torch.dtype | None = None  # of padded passes
        self._takes_types = "token_type_ids" in inspect.signature(base.forward).parameters
        self.family = family_of(base)
        self.flat = self.family is not None  # batches run without padding
        if self.family is not None:
            prepare(base, self.family)
        self.prefix = prefix_of(base, self.family, ChainLora)
        """Of the frozen layers below the first adapter, if there are any."""
        self._alone = False
        self.turn = Turn()
        """Held by a thread while it runs the model or has one member on alone."""
        base.eval()

    def train(self, mode: bool = True) -> "ChainModel":
        """The base's own dropout never acts: everything stays in eval mode."""
        return super().train(False)

    @property
    def num_chains(self) -> int:
        """M (or K, after `load_chains`; 1 within `member`)."""
        if self._alone:
            return 1
        return next(iter(self.chain_parameters().values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.chain_parameters().values())).device

    # The modules are what they were when the model was made; walking through them all takes longer
    # than a small model's forward pass.
    @cached_property
    def _found(self) -> dict[str, dict[str, Any]]:
        modules = dict(self.base.named_modules())
        return {
            "parameters": {n: p for n, p in self.base.named_parameters() if p.requires_grad},
            "lora": {n: m for n, m in modules.items() if isinstance(m, ChainLora)},
            "head": {n: m for n, m in modules.items() if isinstance(m, ChainLinear)},
        }

    def chain_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable tensors (M, …) by name relative to the HuggingFace model."""
        return dict(self._found["parameters"])

    def lora_layers(self) -> dict[str, ChainLora]:
        return dict(self._found["lora"])

    def head_layers(self) -> dict[str, ChainLinear]:
        return dict(self._found["head"])

    def lora_dropout(self, generators: Sequence[torch.Generator] | None) -> None:
        """Switch LoRA dropout on, each chain drawing from its own generator, or off with None."""
        for layer in self.lora_layers().values():
            layer.dropout.generators = generators

    @contextmanager
    def member(self, k: int) -> Iterator[None]:
        """Member k alone, its updates merged into the frozen weights: for inference."""
        with self._one_chain(k):
            for layer in self.lora_layers().values():
                layer.merge(k)
            yield

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The frozen weights alone, as one chain, under member 0's head: for inference."""
        with self._one_chain(0):
            for layer in self.lora_layers().values():
                layer.merged = layer.base.weight.detach()
            yield

    @contextmanager
    def _one_chain(self, k: int) -> Iterator[None]:
        with self.turn:
            try:
                self._alone = True
                for linear in self.head_layers().values():
                    linear.only = k
                yield
            finally:
                self._alone = False
                for layer in self.lora_layers().values():
                    layer.merged = None
                for linear in self.head_layers().values():
                    linear.only = None

    @torch.no_grad()
    def load_chains(self, state: dict[str, Tensor]) -> None:
        """Put tensors (K, …) into the chain dimension; K may differ from the present M.

        Raises:
            ValueError: missing or unknown names, shapes that do not fit, different K; the model
                is as before.
        """
        own = self.chain_parameters()
        if state.keys() != own.keys():
            odd = sorted(state.keys() ^ own.keys())
            raise ValueError(f"tensors missing or not part of the model: {odd[:4]}")
        num_chains(state)
        for name, parameter in own.items():
            if state[name].shape[1:] != parameter.shape[1:]:
                raise ValueError(
                    f"{name}: shape {tuple(state[name].shape[1:])}, "
                    f"the model has {tuple(parameter.shape[1:])}"
                )
        for name, parameter in own.items():
            parameter.data = state[name].to(parameter.device, parameter.dtype, copy=True)
            parameter.grad = None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(M, B, L) or (B, L) token ids, mask and types → logits (M, B, C), at least float32."""
        with self.turn:
            return self._forward(input_ids, attention_mask, token_type_ids)

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        chains = self.num_chains
        if input_ids.ndim == 2:
            shape = (chains, *input_ids.shape)
            input_ids, attention_mask = input_ids.expand(shape), attention_mask.expand(shape)
            if token_type_ids is not None:
                token_type_ids = token_type_ids.expand(shape)
        inputs = {"input_ids": input_ids.flatten(0, 1)}
        if token_type_ids is not None and self._takes_types:
            inputs["token_type_ids"] = token_type_ids.flatten(0, 1)
        flat = flat_of(attention_mask, self.device) if self.flat else None
        if flat is None:
            logits = self._padded_forward(inputs, attention_mask)
        else:
            # A caller's autocast would undo the precisions chosen here, as in padded passes.
            with torch.autocast(self.device.type, enabled=False):
                logits = flat_forward(self.base, inputs, flat, self.prefix)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return logits.unflatten(0, (chains, -1))

    def _padded_forward(self, inputs: dict[str, Tensor], attention_mask: Tensor) -> Tensor:
        """Padded inputs (M·B, L), mask (M, B, L) → logits (M·B, C)."""
        present = attention_mask.cpu().numpy() != 0 if self.dropping else None
        for layer in self.lora_layers().values():
            layer.dropout.present = present
        inputs = inputs | {"attention_mask": attention_mask.flatten(0, 1)}
        inputs = {name: x.to(self.device) for name, x in inputs.items()}
        kind = self.device.type
        with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            logits = self.base(**inputs).logits
        for layer in self.lora_layers().values():
            layer.dropout.present = None  # a flat pass has no padding
        return logits

    @property
    def tokens_per_pass(self) -> int:
        """Tokens of all chains in a forward pass that runs fastest, or, elsewhere, fits."""
        if not self.flat or self.device.type != "cpu":
            return TOKENS_PER_PASS
        some = next(iter(self._found["lora"].values()))
        return BYTES_PER_PASS_ON_CPU // some.base.weight.element_size()

    @property
    def dropping(self) -> bool:
        """Whether LoRA dropout acts."""
        return any(layer.dropout.generators is not None for layer in self.lora_layers().values())
