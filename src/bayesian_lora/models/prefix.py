"""Frozen layers below the first adapter, computed once for each text and kept.

Where LoRA is in the upper layers alone, what enters the first adapted layer depends on the tokens,
not on chains, members or steps. It is kept by the tokens themselves, so that training, traces and
prediction share it. Each text is computed alone: its numbers do not depend on which texts came
with it, so a run that goes on finds the same ones to the last bit.

Shapes: S sequences, T tokens of all sequences, L tokens of one, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BYTES = 2**30
"""Kept at most; a text beyond that is computed whenever it comes."""


class Prefix:
    """The frozen layers before the first adapted one, and what they gave for the texts so far.

    Args:
        encoder: the network without its classifier.
        parent, name: where the encoder has its list of layers.
        layers: how many of them come before the first adapter, at least 1.
        limit: bytes kept.
    """

    def __init__(
        self, encoder: Any, parent: nn.Module, name: str, layers: int, limit: int = BYTES
    ) -> None:
        self.encoder, self.parent, self.name = encoder, parent, name
        whole = list(getattr(parent, name))
        self.below, self.above = nn.ModuleList(whole[:layers]), nn.ModuleList(whole[layers:])
        self.limit, self.bytes = limit, 0
        self.kept: dict[bytes, Tensor] = {}

    def hidden(
        self, keys: list[bytes], tokens: list[dict[str, Tensor]], alone: Callable[[int], Any]
    ) -> Tensor:
        """What enters the first adapted layer, (1, T, D).

        Args:
            keys: of each sequence what tells it from all others.
            tokens: of each sequence the encoder's inputs, each (1, L).
            alone: a context in which one sequence of so many tokens runs.
        """
        each = zip(keys, tokens, strict=True)
        return torch.cat([self._of(key, one, alone) for key, one in each])[None]

    def _of(self, key: bytes, tokens: dict[str, Tensor], alone: Callable[[int], Any]) -> Tensor:
        if (found := self.kept.get(key)) is not None:
            return found
        length = next(iter(tokens.values())).shape[1]
        # A tensor made in inference mode could never take part in a gradient.
        with torch.inference_mode(False), torch.no_grad(), alone(length), self._with(self.below):
            found = self.encoder(**tokens).last_hidden_state[0]
        if self.bytes + found.nbytes <= self.limit:
            self.kept[key] = found
            self.bytes += found.nbytes
        return found

    @contextmanager
    def skipped(self, hidden: Tensor) -> Iterator[None]:
        """The network begins with `hidden` (1, T, D), at the first adapted layer."""
        embeddings = self.encoder.embeddings
        embeddings.forward = lambda *_args, **_options: hidden
        try:
            with self._with(self.above):
                yield
        finally:
            del embeddings.forward

    @contextmanager
    def _with(self, layers: nn.ModuleList) -> Iterator[None]:
        whole = getattr(self.parent, self.name)
        setattr(self.parent, self.name, layers)
        try:
            yield
        finally:
            setattr(self.parent, self.name, whole)
