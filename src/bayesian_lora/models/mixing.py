"""Mixtures of LoRA experts: a gate's weights on the parts of each layer's update.

    h = W₀x + Σ_i w_i(x) ΔW_i x,    Σ_i w_i = 1

The experts i are the parts of a stack, each with its own columns of the factors: x Aᵀ (n, R) is
multiplied column by column before B. Kinds of gates, by what w depends on:

    adapter   nothing: w = softmax(θ/τ), one θ for the model
    layer     the layer: a θ for each (as MoLE's, Wu et al. 2024, of one block)
    sequence  the text: a linear map of what the adapted layers see of it in a pass without adapters
              (X-LoRA, Buehler & Buehler 2024, has such a pass too; its map gives every layer and
              token weights of their own, here all share the text's)
    token     the layer's own input: a linear router in each (as mixture-of-experts layers have)
    arrow     the same without parameters: |v_iᵀx|, v_i the first right singular vector of ΔW_i
              (Ostapenko et al. 2024)

Shapes: M chains, E experts, B examples, S = M·B sequences, L tokens, n rows of all chains, R rank,
D widths.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesian_lora.models.chain_lora import ChainLora
from bayesian_lora.models.flat import CURRENT

GateKind = Literal["adapter", "layer", "sequence", "token", "arrow"]
START_STD = 0.02
"""Of a gate's weights at the start, as of BERT's linear layers: nearly equal shares."""


@dataclass
class Run:
    """What one forward pass gives the gate and gets back.

    mask (S, L): where the batch has tokens; scores (S, E): of the sequences, of that kind alone.
    full, used: of every layer the mean over each sequence's tokens (S, E) of the softmax, and of
    what is left of it by top-k. entropies: where it is a list, of every layer the mean over the
    same tokens (S, 1) of the softmax's entropy, nats.
    """

    mask: Tensor
    scores: Tensor | None
    full: list[Tensor] = field(default_factory=list)
    used: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] | None = None
    _places: dict[tuple[int, bool, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )

    def places(
        self, rows: int, first_only: bool, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Of each of a layer's n input rows its sequence (n,) and its share of it (n, 1)."""
        key = rows, first_only, dtype
        if key not in self._places:
            self._places[key] = self._find(rows, first_only, dtype)
        return self._places[key]

    def _find(self, rows: int, first_only: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mask = self.mask
        sequences, length = mask.shape
        index = torch.arange(sequences, device=mask.device)
        if rows == sequences:
            return index, mask.new_ones(rows, 1, dtype=dtype)
        if CURRENT.get() is not None:
            counts = mask.sum(1)
            share = (1 / counts.to(dtype)).repeat_interleave(counts)
            return index.repeat_interleave(counts), share[:, None]
        counted = mask.to(dtype)
        if first_only:
            counted[:, 0], counted[:, 1:] = 1.0, 0.0
        share = counted / counted.sum(1, keepdim=True)
        return index.repeat_interleave(length), share.reshape(-1, 1)


class Gate(nn.Module):
    """The weights of E experts in every LoRA layer, with parameters (M, …) of each chain's own.

    Args:
        kind: see the module.
        chains: M.
        columns: of each of the factors' R columns its expert.
        widths: D_in of each layer.
        hidden: D of the pooled state of `sequence`, else 0.
        temperature: τ > 0 the scores are divided by.
        top_k: how many experts of largest weight act, their weights made to sum to 1; None: all.
    """

    columns: Tensor

    def __init__(
        self,
        kind: GateKind,
        chains: int,
        columns: Sequence[int],
        widths: Sequence[int],
        hidden: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        self.kind: GateKind = kind
        self.experts, self.temperature = max(columns) + 1, temperature
        self.top_k = self.experts if top_k is None else top_k
        self.register_buffer("columns", torch.tensor(list(columns)), persistent=False)
        shapes: dict[str, list[tuple[int, ...]]] = {
            "adapter": [(chains, self.experts)],
            "layer": [(chains, len(widths), self.experts)],
            "sequence": [(chains, self.experts, hidden)],
            "token": [(chains, self.experts, width) for width in widths],
            "arrow": [],
        }
        self.weight = nn.ParameterList([nn.Parameter(torch.zeros(s)) for s in shapes[kind]])
        biases = {"sequence": 1, "token": len(widths)}
        self.bias = nn.ParameterList(
            [nn.Parameter(torch.zeros(chains, self.experts)) for _ in range(biases.get(kind, 0))]
        )
        self.prototypes: list[Tensor] = []
        """(M, E, D_in) of each layer: the unit vectors v_i, of `arrow` alone."""
        self.run: Run | None = None
        self.forced: int | None = None
        """The expert that acts alone, whatever the gate says."""

    @torch.no_grad()
    def initialise(self, generators: Sequence[torch.Generator]) -> None:
        for weight in self.weight:
            for own, generator in zip(weight, generators, strict=True):
                own.normal_(0.0, START_STD, generator=generator)

    @torch.no_grad()
    def take_directions(self, layers: Mapping[str, ChainLora]) -> None:
        """The experts' first right singular vectors, for `arrow`, from the present factors."""
        if self.kind == "arrow":
            self.prototypes = [
                _directions(lora.lora_A, lora.lora_B, self.columns) for lora in layers.values()
            ]

    def sequence_scores(self, pooled: Tensor) -> Tensor:
        """Pooled hidden states (M, B, D), or (1, B, D) for all chains → scores (M·B, E)."""
        weight, bias = self.weight[0], self.bias[0]
        return (pooled.to(weight.dtype) @ weight.mT + bias[:, None]).flatten(0, 1)

    @contextmanager
    def running(self, run: Run) -> Iterator[Run]:
        """Within a forward pass, whose layers read and record here."""
        self.run = run
        try:
            yield run
        finally:
            self.run = None

    def mix(self, number: int, x: Tensor, rows: Sequence[int], first_only: bool) -> Tensor:
        """The weights (n, E) of layer `number` on its input rows x (n, D_in)."""
        run = self.run
        assert run is not None, "a gated model is run as a whole"
        scores, by_row = self._scores(number, x, rows, run)
        full = (scores / self.temperature).softmax(-1)
        index, share = run.places(x.shape[0], first_only, full.dtype)
        if self.forced is not None:
            full = torch.zeros_like(full)
            full[:, self.forced] = 1.0
        used = self._largest(full)
        recorded = [(run.full, full), (run.used, used)]
        if run.entropies is not None:
            recorded.append((run.entropies, torch.special.entr(full).sum(-1, keepdim=True)))
        if not by_row:
            for kept, values in recorded:
                kept.append(values)
            return used.index_select(0, index)
        for kept, values in recorded:
            mean = values.new_zeros(len(run.mask), values.shape[1])
            kept.append(mean.index_add(0, index, values * share))
        return used

    def _scores(self, number: int, x: Tensor, rows: Sequence[int], run: Run) -> tuple[Tensor, bool]:
        """Scores (n, E) of rows and True, or (S, E) of sequences and False."""
        if self.kind == "token":
            return _by_chain(x, self.weight[number], self.bias[number], rows), True
        if self.kind == "arrow":
            return _by_chain(x, self.prototypes[number], None, rows).abs(), True
        if self.kind == "sequence":
            assert run.scores is not None
            return run.scores, False
        weight = self.weight[0] if self.kind == "adapter" else self.weight[0][:, number]
        return weight.repeat_interleave(len(run.mask) // len(weight), 0), False

    def _largest(self, weights: Tensor) -> Tensor:
        if self.top_k >= self.experts:
            return weights
        places = weights.topk(self.top_k, -1).indices
        kept = torch.zeros_like(weights).scatter(-1, places, 1.0) * weights
        return kept / kept.sum(-1, keepdim=True)


class LayerMix:
    """A LoRA layer's mixture: what `ChainLora.mix` calls.

    Args:
        gate: of all layers.
        layer: whose update it is.
        number: of the layer among the LoRA layers.
        first_only: whether only the rows of the sequences' first tokens reach the logits.
    """

    def __init__(self, gate: Gate, layer: ChainLora, number: int, first_only: bool) -> None:
        self.gate, self.layer, self.number, self.first_only = gate, layer, number, first_only

    def __call__(self, out: Tensor, x: Tensor, dropped: Tensor, rows: Sequence[int]) -> Tensor:
        """out (n, D_out) + s·Σ_i w_i(x) B_i A_i x, each chain on its own rows."""
        weights = self.gate.mix(self.number, x, rows, self.first_only)
        by_column = weights.index_select(1, self.gate.columns).to(dropped.dtype)
        a, b = (t.to(dropped.dtype) for t in (self.layer.lora_A, self.layer.lora_B))
        count = list(rows)
        updates = [
            ((own @ a_m.mT) * w) @ b_m.mT
            for own, w, a_m, b_m in zip(
                dropped.split(count), by_column.split(count), a, b, strict=True
            )
        ]
        return out + self.layer.scaling * torch.cat(updates)


def _by_chain(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Sequence[int]) -> Tensor:
    """x (n, D) under weight (M, E, D) and bias (M, E), each chain on its own rows → (n, E)."""
    parts = x.to(weight.dtype).split(list(rows))
    biases = [None] * len(parts) if bias is None else bias
    return torch.cat([F.linear(own, w, b) for own, w, b in zip(parts, weight, biases, strict=True)])


def _directions(a: Tensor, b: Tensor, columns: Tensor) -> Tensor:
    """(M, E, D_in): the first right singular vectors of the experts' B_i A_i; 0 where that is 0.

    With Aᵀ = QR, ΔW = (B Rᵀ) Qᵀ, and Q turns the right singular vectors of the narrow B Rᵀ.
    """
    found = []
    wide_a, wide_b, columns = a.cpu().double(), b.cpu().double(), columns.cpu()  # MPS has no such
    for expert in range(int(columns.max()) + 1):
        own = columns == expert
        q, r = torch.linalg.qr(wide_a[:, own].mT)
        _, s, vh = torch.linalg.svd(wide_b[:, :, own] @ r.mT, full_matrices=False)
        first = (q @ vh[:, :1].mT).squeeze(-1)
        found.append(torch.where(s[:, :1] > 0, first, 0.0))
    return torch.stack(found, dim=1).to(a)
