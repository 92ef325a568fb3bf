"""A model of several tasks that says itself which task a text belongs to.

Shapes: M chains, K members, B examples, E experts, T tasks, C_t classes of task t, D widths.

gate(task | x) is the mean over the LoRA layers, and over the text's tokens where tokens have
weights of their own, of the gate's softmax, summed over the task's experts; of top-k it is the
softmax before the others are left out, for no task is impossible. In the last encoder layer only
the first token's rows count, except of keys and values: no other row reaches the logits. With it

    log p(task, y | x) = log gate(task | x) + log p(y | x, task)

over all tasks' classes, right only if both factors are, is an ordinary categorical law: members'
probabilities average, and every metric applies.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bayesian_lora.composition.experts import experts_of
from bayesian_lora.composition.stack import Part, Stack
from bayesian_lora.composition.stack_model import build_stack_model
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.errors import InputError
from bayesian_lora.models.chain_lora import ChainLora
from bayesian_lora.models.flat_attention import encoder_layers
from bayesian_lora.models.mixing import Gate, GateKind, LayerMix, Run
from bayesian_lora.models.sources import ModelSource
from bayesian_lora.models.task_heads import TaskModel
from bayesian_lora.predict import predict_logits
from bayesian_lora.utils.rng import chain_generators

LEAST = 1e-30
"""Below any probability a softmax gives in float32 unless it underflows; its logarithm is −69."""


@dataclass(frozen=True)
class GatedOutputs:
    """A gated model on a set: joint (K, N, ΣC) log p(task, y | x), mean weights (K, N, E).

    full: the gate's softmax, used: what acts of it, which differ under top-k. entropy (K, N): of
    the softmax itself, mean over layers and tokens, nats; at most that of the mean `full`.
    """

    joint: np.ndarray
    full: np.ndarray
    used: np.ndarray
    entropy: np.ndarray


class GatedModel(TaskModel):
    """A `TaskModel` whose experts a gate mixes; made by `with_gate`. Logits are joint.

    Its parameters are those of the stack and the gate's, `gate.…`; `member` restricts it to one
    member without merging, which there is no way to do with weights that depend on the input.
    """

    parts: tuple[Part, ...]
    membership: Tensor
    """(E, T), 1 where an expert is of a task."""
    read_layers: list[ChainLora]
    """Whose inputs `pooled` reads: those that all tokens reach, if there are any."""
    first_rows_alone = False
    """Whether there are none."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.weights: Tensor | None = None
        """(M, B, E) of the last pass that autograd recorded, until `take_weights`."""
        self._beside = False

    @property
    def gate(self) -> Gate:
        return self.base.gate  # type: ignore[return-value]

    def take_weights(self) -> Tensor:
        """The gate's weights (M, B, E) in the last recorded pass, given once."""
        weights, self.weights = self.weights, None
        assert weights is not None, "no pass was recorded since the weights were taken"
        return weights

    def load_chains(self, state: dict[str, Tensor]) -> None:
        super().load_chains(state)
        self.gate.take_directions(self.lora_layers())

    @contextmanager
    def member(self, k: int) -> Iterator[None]:
        """Member k alone, its update not merged: for inference."""
        own = self.chain_parameters()
        with self.turn:
            directions = self.gate.prototypes  # within the turn, or another member's may be taken
            whole = {name: parameter.data for name, parameter in own.items()}
            try:
                for name, parameter in own.items():
                    parameter.data = whole[name][k : k + 1]
                self.gate.prototypes = [v[k : k + 1] for v in directions]
                yield
            finally:
                for name, parameter in own.items():
                    parameter.data = whole[name]
                self.gate.prototypes = directions

    @contextmanager
    def expert(self, number: int) -> Iterator[None]:
        """One expert acting alone on every input."""
        with self.turn:
            self.gate.forced = number
            try:
                yield
            finally:
                self.gate.forced = None

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        chains, scores = self.num_chains, None
        if self.gate.kind == "sequence":
            pooled = self.pooled(input_ids, attention_mask, token_type_ids)
            scores = self.gate.sequence_scores(pooled.expand(chains, -1, -1))
        mask = attention_mask.expand(chains, *attention_mask.shape[-2:]).flatten(0, 1)
        run = Run(mask.to(self.device) != 0, scores, entropies=[] if self._beside else None)
        with self.gate.running(run):
            logits = super()._forward(input_ids, attention_mask, token_type_ids)
        full, used = (
            torch.stack(w).mean(0).unflatten(0, (chains, -1)) for w in (run.full, run.used)
        )
        joint = self._joint(logits, full)
        if torch.is_grad_enabled():
            self.weights = full
        if run.entropies is None:
            return joint
        doubt = torch.stack(run.entropies).mean(0).unflatten(0, (chains, -1))
        return torch.cat([joint, full.to(joint), used.to(joint), doubt.to(joint)], -1)

    def _joint(self, logits: Tensor, weights: Tensor) -> Tensor:
        """Task logits (M, B, ΣC) and weights (M, B, E) → log p(task, y | x)."""
        by_task = weights @ self.membership.to(weights)
        log_gate = by_task.clamp_min(LEAST).log()
        own = [
            logits[..., part].log_softmax(-1) + log_gate[..., t : t + 1]
            for t, part in enumerate(self.slices.values())
        ]
        return torch.cat(own, -1)

    @torch.no_grad()
    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """What the adapted layers see of the base without adapters, (M or 1, B, D).

        Of each input that adapted layers share (query, key and value do) the mean over the text's
        tokens, normalised to mean 0 and variance 1; all side by side, over the square root of their
        number. Inputs (M, B, L), or (B, L) for all chains, which are then run once.
        """
        chains = input_ids.shape[0] if input_ids.ndim == 3 else 1
        given = (input_ids, attention_mask, token_type_ids)
        one = [None if x is None else x.reshape(-1, x.shape[-1]) for x in given]
        run = Run(attention_mask.reshape(-1, attention_mask.shape[-1]).to(self.device) != 0, None)
        seen: list[Tensor] = []
        means: list[Tensor] = []

        def take(_layer: Any, args: tuple[Tensor, ...]) -> None:
            if any(args[0] is known for known in seen):
                return
            seen.append(args[0])
            x = args[0].reshape(-1, args[0].shape[-1])
            index, share = run.places(x.shape[0], self.first_rows_alone)
            mean = x.new_zeros(len(run.mask), x.shape[-1])
            mean.index_add_(0, index, x * share.to(x.dtype))
            means.append(F.layer_norm(mean, mean.shape[-1:]))

        hooks = [lora.register_forward_pre_hook(take) for lora in self.read_layers]
        try:
            with self.without_adapters():
                super()._forward(*one)  # type: ignore[arg-type]
        finally:
            for hook in hooks:
                hook.remove()
        state = torch.cat(means, -1) / math.sqrt(len(means))
        return state.unflatten(0, (chains, -1))

    def outputs(self, data: TokenisedSet) -> GatedOutputs:
        """Joint log-probabilities and weights on a set, in its order."""
        with self.turn:
            self._beside = True
            try:
                found = predict_logits(self, data)
            finally:
                self._beside = False
        classes = max(part.stop for part in self.slices.values())
        ends = [classes, classes + self.gate.experts, classes + 2 * self.gate.experts]
        joint, full, used, doubt = np.split(found, ends, axis=-1)
        return GatedOutputs(joint, full, used, doubt[..., 0])


def gated_model(
    stack: Stack,
    kind: GateKind,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    state: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    source: ModelSource | None = None,
) -> GatedModel:
    """The stack's model with a gate, drawn from (`seed`, chain) or with the tensors given.

    Args:
        state: the gate's tensors ``gate.…`` (K, …).
        source: of the base model, in the place of what the stack names.

    Raises:
        InputError: as `experts_of`, `build_stack_model`, or a gate that does not fit the stack.
    """
    experts_of(stack, top_k)
    model = build_stack_model(stack, device=device, source=source)
    generators = chain_generators(seed, range(len(stack)), "gate", device)
    gated = with_gate(model, stack, kind, generators, temperature=temperature, top_k=top_k)
    if state is None:
        return gated
    own = {n: p.detach() for n, p in gated.chain_parameters().items() if not n.startswith("gate.")}
    try:
        gated.load_chains({**own, **state})
    except ValueError as error:
        raise InputError(
            f"the gate does not fit its stack of {len(stack.parts)} parts and {len(stack)} members "
            f"({error}); restore the folder as it was written"
        ) from error
    return gated


def with_gate(
    model: TaskModel,
    stack: Stack,
    kind: GateKind,
    generators: Sequence[torch.Generator],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> GatedModel:
    """Put a gate between the model's adapters; the given model must not be used any more.

    Raises:
        InputError: as `experts_of`.
    """
    columns = experts_of(stack, top_k)
    layers = model.lora_layers()
    widths = [lora.base.in_features for lora in layers.values()]
    late, width = _first_rows_only(model), 0
    if kind == "sequence":
        ids = torch.zeros(1, 2, dtype=torch.long)
        width = _bare(model, late).pooled(ids, torch.ones_like(ids)).shape[-1]
    gate = Gate(
        kind, model.num_chains, columns, widths, width, temperature=temperature, top_k=top_k
    )
    like = next(iter(model.chain_parameters().values()))
    gate.to(like.device, like.dtype).initialise(generators)
    gate.take_directions(layers)
    for number, (name, lora) in enumerate(layers.items()):
        lora.mix = LayerMix(gate, lora, number, name in late)
    model.base.add_module("gate", gate)
    found = _bare(model, late)
    found.slices, found.parts = model.slices, stack.parts
    found.membership = torch.tensor(
        [[float(part.task == task) for task in model.slices] for part in stack.parts],
        device=like.device,
    )
    return found


def _bare(model: TaskModel, late: set[str]) -> GatedModel:
    """A `GatedModel` on the given model's network, that knows which inputs to read."""
    found = GatedModel(model.base, model.info)
    found._fingerprint, found.autocast, found.flat = model._fingerprint, model.autocast, model.flat
    layers = model.lora_layers()
    wide = [lora for name, lora in layers.items() if name not in late]
    found.read_layers, found.first_rows_alone = wide or list(layers.values()), not wide
    return found


def _first_rows_only(model: TaskModel) -> set[str]:
    """LoRA layers of the last encoder layer after its keys and values, where it is known."""
    family = model.family
    if family is None:
        return set()
    last = len(encoder_layers(model.base, family)) - 1
    prefix = f"{model.base.base_model_prefix}.{family.layers}.{last}."
    wide = {prefix + family.key, prefix + family.value}
    return {name for name in model.lora_layers() if name.startswith(prefix) and name not in wide}
