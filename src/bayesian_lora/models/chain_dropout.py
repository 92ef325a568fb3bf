"""Dropout whose draws belong to chains.

Shapes: M chains, B examples of a chain, L tokens, n rows of all chains, D width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class ChainDropout(nn.Module):
    """Dropout whose mask for chain m comes from chain m's generator alone.

    It acts only while `generators` are set. A chain draws for its own tokens, in their order, so
    what other chains have beside it does not change what this chain draws.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generators: Sequence[torch.Generator] | None = None
        self.present: np.ndarray | None = None
        """(M, B, L) where a padded batch has tokens; padding is not drawn for."""

    def forward(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """x (n, D), `rows[m]` rows of each chain m, chain after chain → the same shape."""
        if self.generators is None or self.p == 0:
            return x
        assert len(self.generators) == len(rows)
        keep = 1.0 - self.p
        drawn = torch.empty_like(x)
        present = self._present(rows)
        begin = 0
        for m, (generator, count) in enumerate(zip(self.generators, rows, strict=True)):
            own = drawn[begin : begin + count]
            if present is None:
                own.bernoulli_(keep, generator=generator)
            else:
                index = torch.from_numpy(np.flatnonzero(present[m])).to(x.device)
                values = x.new_empty(len(index), x.shape[1])
                own.zero_().index_copy_(0, index, values.bernoulli_(keep, generator=generator))
            begin += count
        return x * drawn.mul_(1.0 / keep)

    def _present(self, rows: Sequence[int]) -> np.ndarray | None:
        """Which rows (M, B·L) are tokens; None if every row is (also of a layer without L)."""
        if self.present is None or rows[0] == self.present.shape[1]:
            return None
        return self.present.reshape(len(rows), -1)
