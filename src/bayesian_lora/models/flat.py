"""The tokens of a batch on one flat axis, without padding: where each token lies and belongs.

Shapes: M chains, B examples of a chain, S = M·B sequences in the order of (chain, example), T
tokens of all sequences, L tokens of a sequence, H heads, D widths.

Everything but attention treats tokens alone, so it runs on (1, T, D). Attention puts sequences of
like length together, from all chains, since it has no weights of its own; padding counts only
there, where the work is small.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Work of a group's attention in units of one padded token: starting it, and L²/32 a sequence.
# Measured on a CPU with AVX-512; a GPU starts kernels while it computes, and wants fewer.
GROUP_COST = {"cpu": 100.0}
GROUP_COST_ELSEWHERE = 2_000.0
SQUARE_COST = 1 / 32

CURRENT: ContextVar["Flat | None"] = ContextVar("flat batch of the forward pass", default=None)
"""What the layers of the running forward pass are given, None for a padded batch."""


@dataclass(frozen=True)
class Group:
    """Sequences whose attention is computed together, each padded to `length`."""

    sequences: np.ndarray
    length: int


@dataclass(frozen=True)
class Grid:
    """Where the heads' rows of the flat axis lie in the groups' blocks (n, H, L, …), and back.

    rows (P,): for each row of the blocks, one behind the other, its row (token·H + head) of the
    flat axis; places: its inverse, for each flat row its place in the blocks.
    """

    rows: Tensor
    places: Tensor


@dataclass
class Flat:
    """One batch without padding.

    Args:
        lengths: tokens of each sequence, (M, B), at least 1.
        device: of the model.
    """

    lengths: np.ndarray
    device: torch.device
    kept: dict[str, Tensor] = field(default_factory=dict)
    """What the last layer puts by for its attention."""
    lowered: tuple[Tensor, Tensor] | None = None
    """The input that was last put into another precision, before and after."""
    _grids: dict[tuple[str, int], Grid] = field(default_factory=dict)

    @property
    def chains(self) -> int:
        return self.lengths.shape[0]

    @property
    def sequences(self) -> int:
        return self.lengths.size

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def per_chain(self) -> list[int]:
        """Tokens of each chain: its part of the flat axis."""
        return self.lengths.sum(1).tolist()

    @cached_property
    def starts(self) -> np.ndarray:
        """The flat position of each sequence's first token, (S,)."""
        return np.cumsum(self.lengths.ravel()) - self.lengths.ravel()

    @cached_property
    def first(self) -> Tensor:
        return torch.from_numpy(self.starts).to(self.device)

    @cached_property
    def groups(self) -> list[Group]:
        cost = GROUP_COST.get(self.device.type, GROUP_COST_ELSEWHERE)
        return length_groups(self.lengths.ravel(), cost)

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """For each group 0 where a key is a token and −∞ where it is none, (n, 1, 1, L)."""
        found: list[Tensor | None] = []
        for group in self.groups:
            own = self.lengths.ravel()[group.sequences]
            if (own == group.length).all():
                found.append(None)
                continue
            absent = np.arange(group.length) >= own[:, None]
            mask = np.where(absent, -np.inf, 0.0).astype(np.float32)[:, None, None]
            found.append(torch.from_numpy(mask).to(self.device))
        return found

    def unpad(self, padded: Tensor) -> Tensor:
        """(M, B, L) or (M·B, L) → the tokens alone, (1, T), on the model's device."""
        mask = np.arange(padded.shape[-1]) < self.lengths.reshape(-1, 1)
        index = torch.from_numpy(np.flatnonzero(mask)).to(padded.device)
        return padded.reshape(-1)[index][None].to(self.device)

    def rows_per_chain(self, rows: int) -> list[int]:
        """How many of a layer's input rows belong to each chain."""
        if rows == self.tokens:
            return self.per_chain
        return [rows // self.chains] * self.chains

    def grid(self, heads: int) -> Grid:
        """Of all tokens."""
        return self._grid("tokens", heads)

    def first_grid(self, heads: int) -> Grid:
        """Of the sequences' first tokens, given alone: rows sequence·H + head."""
        return self._grid("first", heads)

    def _grid(self, kind: str, heads: int) -> Grid:
        if (kind, heads) not in self._grids:
            self._grids[kind, heads] = self._make_grid(kind == "first", heads)
        return self._grids[kind, heads]

    def _make_grid(self, first_only: bool, heads: int) -> Grid:
        lengths = np.ones_like(self.starts) if first_only else self.lengths.ravel()
        starts = np.arange(len(lengths)) if first_only else self.starts
        places = np.empty(int(lengths.sum()), dtype=np.int64)
        strides = np.empty_like(places)
        blocks: list[Tensor] = []
        begin = 0
        for group in self.groups:
            own, width = lengths[group.sequences], 1 if first_only else group.length
            column = np.arange(width)
            # A padded place repeats the sequence's own last token, never another chain's: what is
            # not finite there would reach this chain through 0·∞.
            token = starts[group.sequences][:, None] + np.minimum(column, own[:, None] - 1)
            blocks.append(torch.from_numpy(token))
            n, real = len(own), column < own[:, None]
            where = begin + np.arange(n)[:, None] * heads * width + column
            places[token[real]], strides[token[real]] = where[real], width
            begin += n * heads * width
        head = torch.arange(heads, device=self.device)
        rows = [(t.to(self.device)[:, None] * heads + head[:, None]).flatten() for t in blocks]
        back = torch.from_numpy(places).to(self.device)[:, None]
        back = back + torch.from_numpy(strides).to(self.device)[:, None] * head
        return Grid(torch.cat(rows), back.flatten())


def in_precision(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another precision; query, key and value share one copy of their common input."""
    flat = CURRENT.get()
    if x.dtype == dtype or flat is None:
        return x.to(dtype)
    if flat.lowered is None or flat.lowered[0] is not x:
        flat.lowered = (x, x.to(dtype))
    return flat.lowered[1]


def flat_of(attention_mask: Tensor, device: torch.device) -> Flat | None:
    """The flat batch of a mask (M, B, L), or None where it is not padded on the right only."""
    mask = attention_mask.cpu().numpy() != 0
    lengths = mask.sum(-1)
    prefix = np.arange(mask.shape[-1]) < lengths[..., None]
    if lengths.size == 0 or lengths.min() < 1 or not np.array_equal(mask, prefix):
        return None
    return Flat(lengths, device)


def length_groups(lengths: np.ndarray, group_cost: float) -> list[Group]:
    """Sequences (S,) in groups of like length, at the least work by `GROUP_COST`'s measure.

    Sorted by length, groups are neighbours; the best cuts of the first j lengths follow from
    those of fewer.
    """
    order = np.argsort(lengths, kind="stable")
    width, counts = np.unique(lengths, return_counts=True)
    ends = np.cumsum(counts)
    begins = np.concatenate([[0], ends])
    best = np.zeros(len(width) + 1)
    cut = np.zeros(len(width) + 1, dtype=np.int64)
    for j, (end, length) in enumerate(zip(ends, width, strict=True), start=1):
        each = length + SQUARE_COST * length**2
        total = best[:j] + (end - begins[:j]) * each
        cut[j] = int(total.argmin())
        best[j] = total[cut[j]] + group_cost
    groups: list[Group] = []
    j = len(width)
    while j > 0:
        i = int(cut[j])
        groups.append(Group(order[begins[i] : begins[j]], int(width[j - 1])))
        j = i
    return groups[::-1]


class _ToBlocks(torch.autograd.Function):
    """x[rows], whose backward pass is again a selection: padded places carry no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return x.index_select(0, grid.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.grid.places), None


class _FromBlocks(torch.autograd.Function):
    """x[places]; padded places get the gradient 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return x.index_select(0, grid.places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grid: Grid = ctx.grid
        if len(grid.rows) == len(grid.places):
            return grads[0].index_select(0, grid.rows), None
        out = grads[0].new_zeros(len(grid.rows), grads[0].shape[1])
        return out.index_copy_(0, grid.places, grads[0]), None


def to_blocks(x: Tensor, grid: Grid) -> Tensor:
    """Flat rows (T·H, d) → rows of the groups' blocks (P, d).

    The gradient at padded places must be 0, as it is for keys and values that a mask hides and
    for queries whose result `from_blocks` leaves out.
    """
    return _ToBlocks.apply(x, grid)  # type: ignore[no-any-return]


def from_blocks(x: Tensor, grid: Grid) -> Tensor:
    """Undo `to_blocks`: (P, d) → (T·H, d)."""
    return _FromBlocks.apply(x, grid)  # type: ignore[no-any-return]
