"""What a stack takes over from its sources: the adapter's shape, the base model, the tasks.

Shapes: R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bayesian_lora.composition.compatibility import base_of, dtype_of, fingerprint_of, name_of
from bayesian_lora.composition.sources import Source
from bayesian_lora.composition.stack import StackTask
from bayesian_lora.composition.state_dicts import head_outputs, matches
from bayesian_lora.data.preparation import length_limit
from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.models.sources import load_pretrained, resolve_model

DEFAULT_LENGTH = 128
"""Tokens of a text where nothing tells what an adapter was trained with (or fewer, if its base
reads fewer)."""


def joint_spec(
    sources: Sequence[Source], specs: Sequence[LoraSpec], rank: int, alpha: float
) -> LoraSpec:
    """The shape of adapters side by side, R = `rank`: of all layers that any of them adapts."""
    head = sources[0].head
    roots = {root for spec in specs for root in spec.head_modules}
    return LoraSpec(
        rank=rank,
        alpha=alpha,
        dropout=max(spec.dropout for spec in specs),
        target_modules=_targets(sources, specs),
        rslora=False,
        # PEFT lists some that the model may not have, such as score.
        head_modules=tuple(sorted(r for r in roots if any(f".{r}." in f".{n}" for n in head))),
        base=str(base_of(_best_known(sources))),
    )


def _targets(sources: Sequence[Source], specs: Sequence[LoraSpec]) -> tuple[str, ...]:
    """The endings of all sources where they mean what is stacked, and full names elsewhere.

    An ending means every layer that has it. A source without some of these (a part of the layers,
    say) would give PEFT a layer for which the stack has no factors.
    """
    stacked = {module for source in sources for module in source.widths}
    whole = all(
        {m for m in stacked if any(matches(m, t) for t in spec.target_modules)}
        == source.widths.keys()
        for source, spec in zip(sources, specs, strict=True)
    )
    if not whole or not _layers_are_whole(stacked):
        return tuple(sorted(stacked))
    endings = {target for spec in specs for target in spec.target_modules}
    # PEFT's all-linear lists layers of the head too, which it then leaves to modules_to_save.
    return tuple(sorted(t for t in endings if any(matches(module, t) for module in stacked)))


def _layers_are_whole(modules: set[str]) -> bool:
    """Whether each kind of module is there for layers 0 to n − 1, with one n for all."""
    numbers: dict[str, set[int]] = {}
    for module in modules:
        parts = module.split(".")
        if place := [i for i, part in enumerate(parts) if part.isdigit()][:1]:
            kind = ".".join(["*" if i == place[0] else part for i, part in enumerate(parts)])
            numbers.setdefault(kind, set()).add(int(parts[place[0]]))
    wanted = set(range(1 + max((max(found) for found in numbers.values()), default=0)))
    return all(found == wanted for found in numbers.values())


def _best_known(sources: Sequence[Source]) -> Source:
    """The first of which most is known: its base's weights, its base's name, nothing."""
    return max(sources, key=lambda s: (fingerprint_of(s) is not None, s.model is not None))


def joint_model(sources: Sequence[Source]) -> dict[str, Any]:
    """`Stack.model` as the best-known source has it, in the most precise of their precisions."""
    best = _best_known(sources)
    given = [source.model["dtype"] if source.model else "float32" for source in sources]
    wide = dtype_of(sources[0]) == torch.float64
    dtype = "float64" if wide else "bfloat16" if {*given} == {"bfloat16"} else "float32"
    return {
        "name": name_of(best),
        "base": base_of(best),
        "fingerprint": fingerprint_of(best),
        "dtype": dtype,
    }


def task_of(source: Source) -> StackTask:
    """The task of a source's head; without facts its labels are numbers."""
    facts: Mapping[str, Any] = source.task or {}
    outputs = head_outputs(source.members[0])
    assert outputs is not None, "checked by check_sources"
    length = (source.model or {}).get("max_length") or _length(name_of(source))
    return StackTask(
        name=source.name,
        data=facts.get("name", source.name),
        label_names=tuple(facts.get("label_names", map(str, range(outputs)))),
        likelihood="categorical",
        max_length=length,
    )


def _length(model: str) -> int:
    """`DEFAULT_LENGTH`, or what the model reads where that is less and it is to be had."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        base = resolve_model(model)
        limit = length_limit(
            load_pretrained(AutoTokenizer, base), load_pretrained(AutoConfig, base)
        )
    except InputError:
        return DEFAULT_LENGTH
    return min(DEFAULT_LENGTH, limit)
