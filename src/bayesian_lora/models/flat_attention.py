"""Forward passes over flat batches through a HuggingFace encoder that knows nothing of them.

Shapes: T tokens, S sequences, H heads, D widths, d = D/H.

Position ids are given, attention is registered under a name with transformers, and hooks on the
last layer let only the rows of the sequences' first tokens through: the classifier reads no other.
Its keys and values still come from all tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesian_lora.models.flat import CURRENT, Flat
from bayesian_lora.models.frozen_linear import FrozenLinear, freeze
from bayesian_lora.models.group_attention import Call, group_attention
from bayesian_lora.models.prefix import Prefix

NAME = "bayesian_lora_flat"


@dataclass(frozen=True)
class Family:
    """Where an encoder has its layers, and a layer its projections."""

    layers: str
    query: str
    key: str
    value: str


_BERT = Family(
    "encoder.layer", "attention.self.query", "attention.self.key", "attention.self.value"
)
FAMILIES = {
    "BertForSequenceClassification": _BERT,
    "RobertaForSequenceClassification": _BERT,
    "DistilBertForSequenceClassification": Family(
        "transformer.layer", "attention.q_lin", "attention.k_lin", "attention.v_lin"
    ),
}
"""By class; every other model runs on padded batches."""


def family_of(network: nn.Module) -> Family | None:
    """The family of a classifier whose forward pass can be flat, else None."""
    config: Any = getattr(network, "config", None)
    plain = (
        not getattr(config, "is_decoder", False)
        and not getattr(config, "chunk_size_feed_forward", 0)
        and getattr(config, "position_embedding_type", "absolute") in ("absolute", None)
    )
    return FAMILIES.get(type(network).__name__) if plain else None


def encoder_layers(network: nn.Module, family: Family) -> list[nn.Module]:
    prefix: Any = network.base_model_prefix
    return list(network.get_submodule(f"{prefix}.{family.layers}").children())


def store_half(network: nn.Module, family: Family) -> None:
    """The encoder layers' linear maps in bfloat16; the rest, adapters too, stays as it is.

    Sums with the residual stream are float32 by type promotion, and so are layer norms.
    """
    for layer in encoder_layers(network, family):
        for module in layer.modules():
            if isinstance(module, FrozenLinear):
                module.bfloat16()


def prepare(network: nn.Module, family: Family) -> None:
    """Register attention and the last layer's hooks, which act in `flat_forward` only.

    The layers' linear maps become `FrozenLinear`.
    """
    if getattr(network, "flat_hooks", False):  # hooks twice would select rows twice
        return
    network.flat_hooks = True  # type: ignore[assignment]
    layers = encoder_layers(network, family)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                freeze(module)
    last = layers[-1]
    last.register_forward_pre_hook(_keep_all_rows_aside)
    last.register_forward_hook(_as_sequences)
    for name in (family.key, family.value):
        projection = last.get_submodule(name)
        projection.register_forward_pre_hook(_take_all_rows)
    last.get_submodule(family.key).register_forward_hook(_put_key_by)
    last.get_submodule(family.value).register_forward_hook(_put_value_by)


def flat_forward(
    network: nn.Module, inputs: dict[str, Tensor], flat: Flat, prefix: Prefix | None = None
) -> Tensor:
    """Padded inputs (S, L) → logits (S, C); `prefix`: of the layers below the first adapter."""
    tokens = {name: flat.unpad(x) for name, x in inputs.items() if name != "attention_mask"}
    tokens["position_ids"] = _positions(network, inputs, flat)
    with _attention(network):
        if prefix is None:
            with _batch(flat):
                return network(**tokens).logits
        lengths = flat.lengths.ravel().tolist()
        given = [x.cpu().numpy() for x in inputs.values()]  # once: a GPU waits for each copy
        keys = [b"".join(x[s, :n].tobytes() for x in given) for s, n in enumerate(lengths)]
        split = {name: x.split(lengths, dim=1) for name, x in tokens.items()}
        each = [{name: x[s] for name, x in split.items()} for s in range(len(lengths))]
        hidden = prefix.hidden(keys, each, lambda length: _batch(_one(length, flat.device)))
        with _batch(flat), prefix.skipped(hidden):
            return network(**tokens).logits


def _one(length: int, device: torch.device) -> Flat:
    return Flat(np.array([[length]]), device)


def prefix_of(network: Any, family: Family | None, adapter: type[nn.Module]) -> Prefix | None:
    """The layers below the first that has an adapter; None if that is the first of all."""
    if family is None:
        return None
    has = [
        any(isinstance(m, adapter) for m in x.modules()) for x in encoder_layers(network, family)
    ]
    below = has.index(True) if any(has) else 0
    if below == 0:
        return None
    encoder = network.get_submodule(network.base_model_prefix)
    parent, _, name = family.layers.rpartition(".")
    return Prefix(encoder, encoder.get_submodule(parent), name, below)


def _positions(network: Any, inputs: dict[str, Tensor], flat: Flat) -> Tensor:
    """Positions (1, T) as the model itself counts them: RoBERTa from its padding id + 1."""
    ids = inputs["input_ids"]
    embeddings = network.get_submodule(network.base_model_prefix).embeddings
    count = getattr(embeddings, "create_position_ids_from_input_ids", None)
    if count is None:
        return flat.unpad(torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape))
    return flat.unpad(count(ids, embeddings.padding_idx, 0))


@cache
def _register() -> None:
    """In every process that runs a model: it may have been unpickled there, not built."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, flat_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def _attention(network: Any) -> Iterator[None]:
    _register()
    before = network.config._attn_implementation
    network.config._attn_implementation = NAME
    try:
        yield
    finally:
        network.config._attn_implementation = before


@contextmanager
def _batch(flat: Flat) -> Iterator[None]:
    token = CURRENT.set(flat)
    try:
        yield
    finally:
        flat.kept.clear()
        flat.lowered = None
        CURRENT.reset(token)


def _no_mask(*_args: Any, **_options: Any) -> None:
    return None


def _current() -> Flat:
    flat = CURRENT.get()
    assert flat is not None, "the flat attention is for flat_forward alone"
    return flat


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence: query, key, value (1, H, T, d) → (1, T, H, d).

    In the last layer the query has the S first tokens only; key and value stand by in `kept`.
    """
    flat = _current()
    _, heads, rows, size = query.shape
    if "key" in flat.kept:
        # The names' order is that of the flat axis: (1, rows, H, d).
        key, value = (flat.kept.pop(name).view(-1, size) for name in ("key", "value"))
        queries = flat.first_grid(heads)
    else:
        key, value = (x.transpose(1, 2).reshape(-1, size) for x in (key, value))
        queries = flat.grid(heads)
    scale = size**-0.5 if scaling is None else scaling
    call = Call(flat, queries, flat.grid(heads), heads, scale)
    out = group_attention(query.transpose(1, 2).reshape(-1, size), key, value, call)
    return out.view(1, rows, heads, size), None


def _keep_all_rows_aside(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    flat = CURRENT.get()
    if flat is None:
        return None
    hidden: Tensor = args[0]
    flat.kept["hidden"] = hidden
    return (hidden.index_select(1, flat.first), *args[1:])


def _take_all_rows(_projection: nn.Module, _args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    flat = CURRENT.get()
    return None if flat is None else (flat.kept["hidden"],)


def _put_key_by(_projection: nn.Module, _args: Any, out: Tensor) -> Tensor | None:
    return _put_by("key", out)


def _put_value_by(_projection: nn.Module, _args: Any, out: Tensor) -> Tensor | None:
    return _put_by("value", out)


def _put_by(name: str, out: Tensor) -> Tensor | None:
    """Keep a projection of all tokens; the layer goes on with as many rows as its query has."""
    flat = CURRENT.get()
    if flat is None:
        return None
    flat.kept[name] = out
    return out[:, : flat.sequences]


def _as_sequences(_layer: nn.Module, _args: Any, out: Tensor) -> Tensor | None:
    """(1, S, D) → (S, 1, D): the model takes each sequence's row 0."""
    return None if CURRENT.get() is None else out.transpose(0, 1)
