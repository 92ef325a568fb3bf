"""Gated stacks written out: dense updates in a plain HuggingFace model, one text at a time.

Shapes: E experts, L tokens, C classes, D widths.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bayesian_lora.composition.stack import Stack


class DenseMixture(nn.Module):
    """W x + b + Σ_i w_i(x) ΔW_i x with every matrix formed; keeps the weights it gave."""

    def __init__(self, base: nn.Linear, updates: list[Tensor], scores: Any, gate: Any) -> None:
        super().__init__()
        self.base, self.updates, self.scores, self.gate = base, updates, scores, gate
        self.weights = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x).expand(*x.shape[:-1], len(self.updates))
        self.weights = torch.exp(scores / self.gate.temperature)
        self.weights = self.weights / self.weights.sum(-1, keepdim=True)
        own = self.weights
        if self.gate.top_k < len(self.updates):
            least = own.sort(-1, descending=True).values[..., self.gate.top_k - 1, None]
            own = torch.where(own >= least, own, 0.0)
            own = own / own.sum(-1, keepdim=True)
        out = self.base(x)
        for i, update in enumerate(self.updates):
            out = out + own[..., i, None] * (x @ update.T)
        return out


@torch.no_grad()
def written_out(
    stack: Stack, base: Path, gate: Any, k: int, ids: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Member k on one text's ids (1, L): {task: log p(task, y | x) (C,)} and the weights (E,)."""
    logits: dict[str, Tensor] = {}
    weights = torch.empty(0)
    for task, own in stack.tasks.items():
        network = plain(base, own.num_labels)
        for name, tensor in stack.heads[task].items():
            network.get_parameter(name).copy_(tensor[k])
        modules = replaced(stack, network, gate, k, pooled_state(network, ids))
        logits[task] = network(ids, attention_mask=torch.ones_like(ids)).logits[0]
        weights = torch.stack([mean_weights(stack, n, m) for n, m in modules.items()]).mean(0)
    found = {}
    for task, own in logits.items():
        share = sum(weights[i] for i, part in enumerate(stack.parts) if part.task == task)
        found[task] = torch.log(share * own.softmax(-1))
    return found, weights


def plain(base: Path, classes: int) -> Any:
    return copy.deepcopy(_loaded(base, classes))


@cache
def _loaded(base: Path, classes: int) -> Any:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=classes
    )
    transformers.logging.set_verbosity(verbosity)
    return network.double().eval()


def pooled_state(network: Any, ids: Tensor) -> Tensor:
    """The means over the tokens of what every layer is given, each normalised."""
    encoder = getattr(network, network.base_model_prefix)
    out = encoder(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    means = [state[0].mean(0) for state in out.hidden_states[:-1]]
    normal = [(m - m.mean()) / (m.var(unbiased=False) + 1e-5).sqrt() for m in means]
    return torch.cat(normal) / len(normal) ** 0.5


def replaced(
    stack: Stack, network: Any, gate: Any, k: int, pooled: Tensor
) -> dict[str, DenseMixture]:
    """Put the dense mixtures into the network, by the layers' names."""
    found = {}
    names = [n.removesuffix(".lora_A") for n in stack.factors if n.endswith(".lora_A")]
    for number, name in enumerate(names):
        a, b = (stack.factors[f"{name}.lora_{x}"][k].double() for x in "AB")
        updates = [
            stack.spec.scaling * b[:, slice(*p.columns)] @ a[slice(*p.columns)] for p in stack.parts
        ]
        scores = scores_of(gate, number, k, pooled, updates)
        found[name] = DenseMixture(network.get_submodule(name), updates, scores, gate)
        network.set_submodule(name, found[name])
    return found


def scores_of(gate: Any, number: int, k: int, pooled: Tensor, updates: list[Tensor]) -> Any:
    if gate.kind == "arrow":
        vectors = torch.stack([torch.linalg.svd(update).Vh[0] for update in updates])
        return lambda x: (x @ vectors.T).abs()
    weights = [w[k].double() for w in gate.weight]
    biases = [b[k].double() for b in gate.bias]
    if gate.kind == "token":
        return lambda x: x @ weights[number].T + biases[number]
    if gate.kind == "sequence":
        return lambda x: weights[0] @ pooled + biases[0]
    return lambda x: weights[0] if gate.kind == "adapter" else weights[0][number]


def mean_weights(stack: Stack, name: str, module: DenseMixture) -> Tensor:
    """Over the tokens; in the last layer's query only the first one's matter to the prediction."""
    last = max(int(n.split(".layer.")[1].split(".")[0]) for n in stack.factors)
    asks = name.endswith((".query", ".q_lin")) and f".layer.{last}." in name
    return module.weights[0, 0] if asks else module.weights[0].mean(0)
