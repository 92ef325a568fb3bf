"""Linear maps with a leading chain dimension over one frozen base.

Shapes: M chains, B examples of each chain, L tokens, R rank, D widths. Activations are (M·B, …, D)
with the chain index slowest, so that a HuggingFace forward runs unchanged between these modules.
"""

import inspect
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora.utils.lora_params import num_chains


class ChainDropout(nn.Module):
    """Dropout whose mask for chain m comes from chain m's generator alone.

    It acts only while `generators` are set. A chain's mask covers its own longest sequence, so
    that what other chains padded the batch to does not change what this chain draws.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generators: Sequence[torch.Generator] | None = None
        self.lengths: list[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (M, B, L, D) → the same shape."""
        if self.generators is None or self.p == 0:
            return x
        chains, batch, length, width = x.shape
        assert len(self.generators) == chains
        keep = 1.0 - self.p
        mask = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        for m, generator in enumerate(self.generators):
            own = min(length, self.lengths[m]) if self.lengths is not None else length
            drawn = torch.empty(batch, own, width, dtype=x.dtype, device=x.device)
            mask[m, :, :own] = drawn.bernoulli_(keep, generator=generator)
        return x * mask.mul_(1.0 / keep)


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

    @torch.no_grad()
    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        bound = 1.0 / math.sqrt(self.base.in_features)
        for a, generator in zip(self.lora_A, generators, strict=True):
            a.uniform_(-bound, bound, generator=generator)
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (M·B, L, D_in) or (M·B, D_in) → the same with D_out."""
        chains = self.lora_A.shape[0]
        rows = x.reshape(chains, x.shape[0] // chains, -1, x.shape[-1])
        rows = self.dropout(rows).flatten(1, 2)
        update = torch.bmm(torch.bmm(rows, self.lora_A.mT), self.lora_B.mT)
        out = self.base(x)
        return torch.add(out, update.reshape(out.shape), alpha=self.scaling)


class ChainLinear(nn.Module):
    """y = W_m x + b_m for chain m: a trainable layer of the head, weight (M, D_out, D_in)."""

    def __init__(self, base: nn.Linear, chains: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().expand(chains, -1, -1).clone())
        bias = base.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().expand(chains, -1).clone())

    @torch.no_grad()
    def initialise(self, generators: Sequence[torch.Generator], std: float) -> None:
        """W ~ N(0, std²) from each chain's generator, b = 0, as HuggingFace does."""
        for weight, generator in zip(self.weight, generators, strict=True):
            weight.normal_(0.0, std, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (M·B, …, D_in) → the same with D_out."""
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

    def __init__(self, base: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.base = base
        self.autocast = autocast
        self._takes_types = "token_type_ids" in inspect.signature(base.forward).parameters
        base.eval()

    def train(self, mode: bool = True) -> "ChainModel":
        """The base's own dropout never acts: everything stays in eval mode."""
        return super().train(False)

    @property
    def num_chains(self) -> int:
        """M (or K, after `load_chains`)."""
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
        chains = self.num_chains
        if input_ids.ndim == 2:
            shape = (chains, *input_ids.shape)
            input_ids, attention_mask = input_ids.expand(shape), attention_mask.expand(shape)
            if token_type_ids is not None:
                token_type_ids = token_type_ids.expand(shape)
        if self._dropping():
            lengths = attention_mask.sum(-1).amax(1).tolist()
            for layer in self.lora_layers().values():
                layer.dropout.lengths = lengths
        inputs = {"input_ids": input_ids.flatten(0, 1)}
        inputs["attention_mask"] = attention_mask.flatten(0, 1)
        if token_type_ids is not None and self._takes_types:
            inputs["token_type_ids"] = token_type_ids.flatten(0, 1)
        with torch.autocast(
            input_ids.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            logits = self.base(**inputs).logits
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return logits.unflatten(0, (chains, -1))

    def _dropping(self) -> bool:
        return any(layer.dropout.generators is not None for layer in self.lora_layers().values())
