"""A stack: the adapters of several tasks in one set of factors, with each task's head.

Shapes: K members, R rank, D widths.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bayesian_lora.ensemble import Ensemble
from bayesian_lora.manifest import Provenance
from bayesian_lora.member_files import MemberRecord
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.utils.lora_params import split


@dataclass(frozen=True)
class Part:
    """One adapter in a stack: columns [start, stop) of the factors came from it.

    `weight` is w in ΔW_stack = Σ w ΔW; `task` the stack's task it was trained on, if any.
    """

    name: str
    source: str
    columns: tuple[int, int]
    weight: float = 1.0
    task: str | None = None


@dataclass(frozen=True)
class StackTask:
    """A task whose head a stack carries.

    `name` is its name within the stack, `data` what `get_task` or the maker's config calls it.
    """

    name: str
    data: str
    label_names: tuple[str, ...]
    likelihood: str
    max_length: int

    @property
    def num_labels(self) -> int:
        """C, 1 for regression."""
        return len(self.label_names) or 1


@dataclass(frozen=True)
class Stack:
    """Shared factors and a head per task; K members, of which an ordinary stack has one.

    model: ``name`` (what `resolve_model` takes), ``base`` (its public id), ``fingerprint`` of the
    frozen weights (None where no part knew it), ``dtype``; spec: of the factors, its scale s is
    that of every task's PEFT folder; factors: ``….lora_A`` (K, R, D_in), ``….lora_B``
    (K, D_out, R); heads: task → the head's tensors (K, …); weights (K,) summing to 1; facts: how
    the stack was made, for `stack.json`.
    """

    model: dict[str, Any]
    spec: LoraSpec
    tasks: Mapping[str, StackTask]
    parts: tuple[Part, ...]
    factors: Mapping[str, Tensor]
    heads: Mapping[str, Mapping[str, Tensor]]
    weights: np.ndarray
    facts: Mapping[str, Any]

    def __len__(self) -> int:
        """K."""
        return len(self.weights)

    def changed(self, **fields: Any) -> "Stack":
        """Another stack with these fields in place of its own."""
        return dataclasses.replace(self, **fields)

    def ensemble(self, task: str) -> Ensemble:
        """The stack as one task's ensemble: the shared factors and that task's head."""
        own = self.tasks[task]
        state = {**self.factors, **self.heads[task]}
        records = [
            MemberRecord("", chain=k, draw=0, step=0, weight=float(w))
            for k, w in enumerate(self.weights)
        ]
        return Ensemble(self._provenance(own), records, split(state))

    def _provenance(self, task: StackTask) -> Provenance:
        model = {**self.model, "num_labels": task.num_labels, "max_length": task.max_length}
        facts = {
            "name": task.data,
            "label_names": list(task.label_names),
            "likelihood": task.likelihood,
        }
        lora = dataclasses.asdict(self.spec)
        sampler = {
            "name": "stack",
            "temperature": 1.0,
            "tempering": "posterior",
            "starts": "independent",
            "exactness": f"a stack of {len(self.parts)} adapters, no posterior of its own",
        }
        return Provenance(model=model, task=facts, lora=lora, sampler=sampler)
