"""Whether adapters can share one base model: base, tokenizer, layers, widths, heads, precision.

Shapes: D widths, C classes.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bayesian_lora.composition.sources import Source
from bayesian_lora.composition.state_dicts import head_outputs
from bayesian_lora.errors import InputError
from bayesian_lora.models.sources import MINILM_HUB_ID, load_pretrained, resolve_model

_OWNERS = ("google-bert/", "FacebookAI/", "distilbert/")
"""Under which the hub lists models that are better known without."""
_PROBE = "Naïve TEXT, with  numbers 1234 and a hyphen-ated word."


def check_sources(sources: Sequence[Source]) -> None:
    """Raises InputError for adapters that no stack can hold together, naming them."""
    if len(sources) < 2:
        raise InputError(
            f"{len(sources)} adapter given: a stack joins at least two; name another one"
        )
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two adapters are called {twice[0]!r}; name them, as in a=PATH b=PATH")
    for source in sources:
        _check_alone(source)
    for a, b in itertools.combinations(sources, 2):
        _check_base(a, b)
        _check_layers(a, b)
        _check_heads(a, b)
        _check_precision(a, b)
    _check_tokenizers(sources)


def _check_alone(source: Source) -> None:
    where = f"{source.name!r} ({source.path})"
    if source.spec is None:
        raise InputError(
            f"{where}: without its adapter_config.json neither alpha nor base model are known; "
            "put that file beside the weights"
        )
    if not source.head or head_outputs(source.members[0]) is None:
        raise InputError(
            f"{where}: has no head, so a stack could not answer its task; save the adapter with "
            "its classifier (modules_to_save), or leave it out"
        )
    if likelihood_of(source) != "categorical":
        raise InputError(f"{where}: a regression, whose noise a stack does not hold; leave it out")
    if base_of(source) is None:
        raise InputError(
            f"{where}: names no base model; write it as base_model_name_or_path into its "
            "adapter_config.json"
        )


def likelihood_of(source: Source) -> str:
    """As its task says, else by the outputs of its head: one alone is a regression."""
    if source.task is not None:
        return source.task["likelihood"]
    return "gaussian" if head_outputs(source.members[0]) == 1 else "categorical"


def base_of(source: Source) -> str | None:
    """The public id of its base model; None if nothing tells."""
    given = (source.model or {}).get("base") or (source.model or {}).get("name")
    return given or (source.spec.base if source.spec is not None else None) or None


def name_of(source: Source) -> str:
    """What `resolve_model` finds its base model by."""
    if source.model is not None and source.model.get("name"):
        return source.model["name"]
    base = base_of(source)
    assert base is not None, "checked by check_sources"
    if base == MINILM_HUB_ID:
        try:
            resolve_model("minilm")
        except InputError:
            return base
        return "minilm"
    return base


def fingerprint_of(source: Source) -> str | None:
    """Of its base model's weights, where its maker noted it."""
    return (source.model or {}).get("fingerprint")


def dtype_of(source: Source) -> torch.dtype:
    """Of its tensors, which have all the same: float32 or float64."""
    return next(iter(source.members[0].values())).dtype


def _canonical(base: str) -> str:
    if Path(base).is_dir():
        return str(Path(base).resolve())
    for owner in _OWNERS:
        base = base.removeprefix(owner)
    return MINILM_HUB_ID if base == "minilm" else base


def same_base(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Whether two `model` facts may be of one base: by fingerprint, or else by name.

    Fingerprints decide where both have one. Where nothing is known of one, nothing speaks against.
    """
    facts = [model or {} for model in (first, second)]
    prints = [model.get("fingerprint") for model in facts]
    if None not in prints:
        return prints[0] == prints[1]
    names = [model.get("base") or model.get("name") for model in facts]
    return not all(names) or _canonical(str(names[0])) == _canonical(str(names[1]))


def known_model(source: Source) -> dict[str, Any]:
    """What is known of a source's base, also where its `adapter_config.json` alone names it."""
    return {**(source.model or {}), "base": base_of(source)}


def _check_base(a: Source, b: Source) -> None:
    ids = [base_of(source) or "" for source in (a, b)]
    prints = [fingerprint_of(source) for source in (a, b)]
    if same_base(known_model(a), known_model(b)):
        return
    if prints[0] is not None and prints[1] is not None:
        raise InputError(
            f"{a.name!r} was made on {ids[0]} (fingerprint {prints[0][:12]}…), {b.name!r} on "
            f"{ids[1]} ({prints[1][:12]}…): adapters of different base models cannot be "
            "stacked; leave one out"
        )
    raise InputError(
        f"{a.name!r} was made on {ids[0]}, {b.name!r} on {ids[1]}: adapters of different base "
        "models cannot be stacked; leave one out, or, if they are the same model, name it "
        "alike in base_model_name_or_path"
    )


def _check_layers(a: Source, b: Source) -> None:
    ours, theirs = a.widths, b.widths
    for module in sorted(ours.keys() & theirs.keys()):
        if ours[module] != theirs[module]:
            raise InputError(
                f"{module}: {a.name!r} takes {ours[module][0]} numbers and gives {ours[module][1]},"
                f" {b.name!r} {theirs[module][0]} and {theirs[module][1]}: adapters of other "
                "widths cannot be stacked; leave one out"
            )
    families = [{module.partition(".")[0] for module in widths} for widths in (ours, theirs)]
    if not families[0] & families[1]:
        raise InputError(
            f"{a.name!r} adapts {min(ours)}, {b.name!r} {min(theirs)}: these are layers of "
            "different architectures; leave one out"
        )


def _check_heads(a: Source, b: Source) -> None:
    if a.head != b.head:
        odd = sorted({*a.head} ^ {*b.head})
        owner = a if odd[0] in a.head else b
        raise InputError(
            f"the heads of {a.name!r} and {b.name!r} differ in their layers ({odd[0]} is in "
            f"{owner.name!r} alone); adapters in a stack need heads of one kind, leave one out"
        )


def _check_precision(a: Source, b: Source) -> None:
    if dtype_of(a) != dtype_of(b):
        kinds = [str(dtype_of(source)).removeprefix("torch.") for source in (a, b)]
        raise InputError(
            f"{a.name!r} is {kinds[0]}, {b.name!r} {kinds[1]}; convert one, for both need the "
            "same precision"
        )


def _check_tokenizers(sources: Sequence[Source]) -> None:
    """The same weights may lie in two folders, each with a tokenizer of its own."""
    names = dict.fromkeys(name_of(source) for source in sources)
    if len(names) < 2:
        return
    owners = {name_of(source): source.name for source in reversed(sources)}
    known = {name: found for name in names if (found := _tokenisation(name)) is not None}
    for (one, first), (two, second) in itertools.combinations(known.items(), 2):
        if first != second:
            raise InputError(
                f"{owners[one]!r} and {owners[two]!r} were made with different tokenizers "
                f"({one} and {two}); leave one out"
            )


def _tokenisation(name: str) -> Any:
    """What tells tokenizers apart: vocabulary, special tokens and the ids of a text.

    None if the model is not to be had here.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = load_pretrained(AutoTokenizer, resolve_model(name))
    except InputError:
        return None
    return tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer(_PROBE)["input_ids"]
