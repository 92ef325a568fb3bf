"""Tokenised examples, and batches for M chains with little padding.

Shapes: M chains, B examples of a chain's batch, L tokens, N examples.

A chain's batch of B is cut into micro-batches in the order of its lengths; the gradients of the
micro-batches add up to that of the batch. So short sentences are not padded to the longest one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.data.examples import Examples
from bayesian_lora.data.token_cache import COLUMNS, cache_key, read_tokens, write_tokens
from bayesian_lora.errors import InputError


@dataclass(frozen=True)
class Batch:
    """One micro-batch: token ids, mask and types (M, b, L), labels (M, b), rows of the set (M, b).

    The inputs are on the CPU: the model takes to its device what it needs of them.
    `share` is b/B, the part of the whole batch that this one is.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    rows: Tensor
    share: float


class TokenisedSet:
    """One split as token ids: ragged rows in one flat array, and the labels.

    Args:
        examples: at least one; texts of one or two columns (pairs go through the pair encoding).
        tokenizer: a HuggingFace tokenizer; its outputs say whether token types are needed.
        max_length: tokens after which the longest text of a pair is cut.
        cache: folder of token ids of earlier runs (`token_cache`); None tokenises anew.
    """

    def __init__(
        self, examples: Examples, tokenizer: Any, max_length: int, cache: Path | None = None
    ) -> None:
        columns = _cached(examples.texts, tokenizer, max_length, cache)
        self.lengths = columns.pop("lengths")
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._columns = columns
        self._pad = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": 0}
        self.examples = examples
        self.labels = torch.from_numpy(np.ascontiguousarray(examples.labels))

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(
        self, rows: np.ndarray, device: torch.device | str = "cpu", share: float = 1.0
    ) -> Batch:
        """Rows (…, b) → inputs (…, b, L), padded on the right; the labels are put on `device`."""
        lengths = self.lengths[rows]
        columns = np.arange(lengths.max())
        mask = columns < lengths[..., None]
        index = np.where(mask, self._starts[rows][..., None] + columns, 0)
        inputs = {
            name: torch.from_numpy(np.where(mask, flat[index], self._pad[name])).long()
            for name, flat in self._columns.items()
        }
        inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        index_tensor = torch.from_numpy(rows)
        return Batch(inputs, self.labels[index_tensor].to(device), index_tensor, share)

    def micro_batches(
        self, rows: np.ndarray, size: int | None, device: torch.device | str = "cpu"
    ) -> Iterator[Batch]:
        """Rows (M, B) → micro-batches of at most `size` examples a chain, each chain by length."""
        total = rows.shape[1]
        order = np.argsort(self.lengths[rows], axis=1, kind="stable")
        ordered = np.take_along_axis(rows, order, axis=1)
        step = size or total
        for start in range(0, total, step):
            part = ordered[:, start : start + step]
            yield self.batch(part, device, part.shape[1] / total)

    def by_length(self, max_tokens: int, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """All rows, or those given, once as (b,): longest first, at most `max_tokens` padded."""
        rows = np.arange(len(self)) if rows is None else rows
        order = rows[np.argsort(-self.lengths[rows], kind="stable")]
        start = 0
        while start < len(order):
            size = max(1, max_tokens // int(self.lengths[order[start]]))
            yield order[start : start + size]
            start += size


def _cached(
    texts: Sequence[list[str]], tokenizer: Any, max_length: int, cache: Path | None
) -> dict[str, np.ndarray]:
    """Lengths (N,) and the rows of each column one behind the other, int32."""
    key = None if cache is None else cache_key(texts, tokenizer, max_length)
    if cache is not None and key is not None:
        found = read_tokens(cache, key, len(texts[0]))
        if found is not None:
            return found
    encoded = encode(texts, tokenizer, max_length)
    lengths = np.array([len(row) for row in encoded["input_ids"]], dtype=np.int64)
    columns = {
        name: np.concatenate([np.asarray(row, dtype=np.int32) for row in encoded[name]])
        for name in COLUMNS
        if name in encoded
    }
    found = {"lengths": lengths, **columns}
    if cache is not None and key is not None:
        write_tokens(cache, key, found)
    return found


def encode(texts: Sequence[list[str]], tokenizer: Any, max_length: int) -> dict[str, Any]:
    """Token ids of one or two text columns, cut to `max_length`, not padded.

    Raises:
        InputError: a text that is no Unicode (JSON can hold lone surrogates).
    """
    try:
        return tokenizer(
            *texts, truncation=True, max_length=max_length, return_attention_mask=False
        )
    except TypeError as error:  # of the tokeniser's Rust side
        raise InputError(
            "a text has lone surrogates, which are no Unicode characters: "
            "mend the file, or read it with its right encoding"
        ) from error


class BatchOrder:
    """Which rows each chain sees: epochs without replacement, or i.i.d. batches.

    Every chain draws from its own generator (on the CPU), so that its batches do not depend on
    how many chains run beside it.
    """

    def __init__(
        self, num_examples: int, batch_size: int, generators: Sequence[torch.Generator]
    ) -> None:
        self.num_examples = num_examples
        self.batch_size = min(batch_size, num_examples)
        self.generators = list(generators)

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these chains alone."""
        self.generators = [self.generators[m] for m in kept]

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def epoch(self) -> np.ndarray:
        """A fresh permutation of all rows for each chain, (M, N)."""
        rows = [torch.randperm(self.num_examples, generator=g) for g in self.generators]
        return torch.stack(rows).numpy()

    def epoch_batch(self, epoch: np.ndarray, number: int) -> np.ndarray:
        """Batch `number` of an epoch, (M, B); the last one may be smaller."""
        return epoch[:, number * self.batch_size : (number + 1) * self.batch_size]

    def iid(self) -> np.ndarray:
        """One batch per chain, uniform with replacement, (M, B)."""
        shape = (self.batch_size,)
        rows = [torch.randint(self.num_examples, shape, generator=g) for g in self.generators]
        return torch.stack(rows).numpy()
