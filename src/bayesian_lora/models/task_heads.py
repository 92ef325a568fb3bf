"""Heads of several tasks on one encoder: one forward pass gives the logits of all of them.

Shapes: M chains, B examples, C_t classes of task t, D widths.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from bayesian_lora.models.chain_lora import ChainLinear
from bayesian_lora.models.hf_lora import HuggingFaceLora


class TaskHeads(nn.Module):
    """A head's linear layer, once for each task; outputs lie side by side.

    The head's first layer gives every task the same input; a later one, of a head of several
    layers, finds the tasks' own inputs side by side, for what stands between acts on each number
    alone (tanh, ReLU).
    """

    def __init__(self, layers: Mapping[str, ChainLinear]) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (M·B, …, D_in), or (M·B, …, T·D_in) for T tasks → (M·B, …, Σ D_out)."""
        layers = list(self.tasks.values())
        width = cast(ChainLinear, layers[0]).weight.shape[-1]
        own = [x] * len(layers) if x.shape[-1] == width else x.split(width, dim=-1)
        return torch.cat([layer(part) for layer, part in zip(layers, own, strict=True)], dim=-1)


def is_reserved(name: str) -> bool:
    """Whether torch keeps a task's name for itself where a model holds its tasks' heads."""
    return hasattr(nn.ModuleDict(), name)


class TaskModel(HuggingFaceLora):
    """A classifier with a head per task: logits (M, B, Σ C_t), `slices` says whose are which."""

    slices: dict[str, slice]


def with_tasks(model: HuggingFaceLora, labels: Mapping[str, int]) -> TaskModel:
    """Put a head for every task {name: C_t} in the place of the model's head.

    The new heads are zero; the given model must not be used any more.

    Raises:
        ValueError: a task's name with a dot, which parameter names cannot hold.
    """
    if wrong := [name for name in labels if "." in name]:
        raise ValueError(f"task {wrong[0]!r}: a name within a stack has no dot")
    network = model.base
    chains, last = model.num_chains, list(model.head_layers())[-1]
    for name, layer in model.head_layers().items():
        heads = {}
        for task, classes in labels.items():
            width_out = classes if name == last else layer.weight.shape[1]
            like = nn.Linear(layer.weight.shape[2], width_out, bias=layer.bias is not None)
            with torch.no_grad():
                for parameter in like.parameters():
                    parameter.zero_()
            heads[task] = ChainLinear(like.to(layer.weight.device, layer.weight.dtype), chains)
        network.set_submodule(name, TaskHeads(heads))
    found = TaskModel(network, model.info)
    found._fingerprint = model._fingerprint
    found.autocast = model.autocast
    stops = [0]
    for classes in labels.values():
        stops.append(stops[-1] + classes)
    found.slices = {t: slice(a, b) for t, a, b in zip(labels, stops[:-1], stops[1:], strict=True)}
    return found
