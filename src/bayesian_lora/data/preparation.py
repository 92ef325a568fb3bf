"""From a task's name to tokenised splits: subset, held-out share, tokens.

Shapes: N examples in a set.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples, split_off, stratified_subset
from bayesian_lora.data.glue_datasets import load_split
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.errors import InputError

DATA_VARIABLE = "BAYESIAN_LORA_DATA"
PROBE_SIZE = 8
SUBSET_SIZE = 32


@dataclass(frozen=True)
class RawData:
    """The examples of a run: what is trained on, held out of it, and evaluated."""

    task: TaskSpec
    train: Examples
    validation: Examples | None
    evaluation: Examples

    def fingerprint(self) -> dict[str, str]:
        """sha256 of every part."""
        parts = {"train": self.train, "validation": self.validation, "evaluation": self.evaluation}
        return {name: part.fingerprint() for name, part in parts.items() if part is not None}


def data_folder(given: str | None) -> Path | None:
    """The folder of local data: as given, or of BAYESIAN_LORA_DATA; None is the hub.

    Raises:
        InputError: it is not a folder.
    """
    name = given or os.environ.get(DATA_VARIABLE)
    if not name:
        return None
    if not Path(name).is_dir():
        origin = "data.dir" if given else DATA_VARIABLE
        raise InputError(f"{origin}={name!r} is not a folder; name a folder of data or unset it")
    return Path(name)


def load_train(
    task: TaskSpec,
    *,
    data_dir: Path | None,
    train_examples: int | None,
    validation_share: float,
    seed: int,
    notify: Callable[[str], None] = lambda _: None,
) -> tuple[Examples, Examples | None]:
    """The training split, subset, and the share held out of it; both label-stratified by `seed`.

    Raises:
        InputError: whatever is wrong with the data or the numbers asked of it.
    """
    train = load_split(task, "train", data_dir=data_dir, notify=notify)
    if train_examples is not None:
        try:
            train = stratified_subset(train, train_examples, seed)
        except InputError as error:
            raise InputError(f"data.train_examples={train_examples}: {error}") from error
    return split_off(train, validation_share, seed) if validation_share > 0 else (train, None)


def length_limit(tokenizer: Any, config: Any) -> int:
    """The most tokens a model reads; RoBERTa's positions begin after its padding id."""
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert"}:
        positions -= int(config.pad_token_id or 0) + 1
    return int(min(tokenizer.model_max_length, positions))


def check_max_length(max_length: int, limit: int, model: str) -> None:
    """Raises InputError if texts may become longer than the model reads."""
    if max_length > limit:
        raise InputError(
            f"data.max_length={max_length}: {model} reads at most {limit} tokens; "
            f"set data.max_length={limit} or less"
        )


def fixed_part(data: Examples, size: int, seed: int) -> Examples:
    """At most `size` examples, the same for every run with this seed."""
    if len(data) <= size:
        return data
    index = np.random.default_rng(seed).permutation(len(data))[:size]
    return data.take(np.sort(index))


def probe_and_subset(
    raw: RawData, tokenizer: Any, max_length: int, seed: int
) -> tuple[TokenisedSet, TokenisedSet]:
    """The fixed sets of the traces: probe inputs (held out if there are any), part of train."""
    held_out = raw.validation if raw.validation is not None else raw.train
    probe = fixed_part(held_out, PROBE_SIZE, seed)
    subset = fixed_part(raw.train, SUBSET_SIZE, seed + 1)
    return TokenisedSet(probe, tokenizer, max_length), TokenisedSet(subset, tokenizer, max_length)
