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

NOT_SAMPLED: dict[str, Any] = {
    "temperature": 0.0,
    "tempering": "none",
    "starts": "independent",
    "exactness": "not sampled, as far as is known",
}
"""Of an adapter without a posterior that is known of: what a fit's manifest has, too."""


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
    the stack was made, for `stack.json`: of stacked sources also ``samplers`` {name: `Provenance`'s
    or None} and ``places``, each member's chain and draw.
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

    @property
    def layers(self) -> list[str]:
        """The names of the layers that have factors, sorted."""
        return sorted(n.removesuffix(".lora_A") for n in self.factors if n.endswith(".lora_A"))

    def changed(self, **fields: Any) -> "Stack":
        """Another stack with these fields in place of its own."""
        return dataclasses.replace(self, **fields)

    def ensemble(self, task: str) -> Ensemble:
        """The stack as one task's ensemble: the shared factors and that task's head."""
        own = self.tasks[task]
        state = {**self.factors, **self.heads[task]}
        places = self.fact("places") or []
        if len(places) != len(self):
            places = [(k, 0) for k in range(len(self))]
        records = [
            MemberRecord("", chain=chain, draw=draw, step=0, weight=float(w))
            for (chain, draw), w in zip(places, self.weights, strict=True)
        ]
        return Ensemble(self._provenance(own), records, split(state))

    def fact(self, name: str) -> Any:
        """One of `facts`, or of those of the stack that this one was made of; None without it."""
        facts: Any = self.facts
        while isinstance(facts, Mapping):
            if name in facts:
                return facts[name]
            facts = facts.get("of")
        return None

    def _provenance(self, task: StackTask) -> Provenance:
        model = {**self.model, "num_labels": task.num_labels, "max_length": task.max_length}
        facts = {
            "name": task.data,
            "label_names": list(task.label_names),
            "likelihood": task.likelihood,
        }
        lora = dataclasses.asdict(self.spec)
        return Provenance(model=model, task=facts, lora=lora, sampler=self._sampler())

    def _sampler(self) -> dict[str, Any]:
        """How the members came about: as all parts' did, or mixed, part by part."""
        given = self.fact("samplers") or {part.name: None for part in self.parts}
        parts = {n: _stated(own) for n, own in given.items()}
        temperatures = {name: own["temperature"] for name, own in parts.items()}
        tempered = parts
        if len({*temperatures.values()}) > 1:
            tempered = {n: {"tempering": f"{own['tempering']} (T = {own['temperature']:g})"}
                        for n, own in parts.items()}  # fmt: skip
        what = f"a stack of {len(self.parts)} adapters, no posterior of its own"
        if self.fact("retrained") is not None:
            what += ", trained further since"
        return {
            "name": "stack",
            "temperature": min(temperatures.values()),
            "tempering": _common(tempered, "tempering"),
            "starts": _common(parts, "starts"),
            "exactness": f"{what}; its parts: {_common(parts, 'exactness')}",
        }


def _stated(sampler: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a stack says of a part's sampler."""
    if sampler is None:
        return NOT_SAMPLED
    exactness = sampler.get("exactness") or f"{sampler['name']}, of unknown exactness"
    return {**NOT_SAMPLED, **sampler, "exactness": exactness}


def _common(parts: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """What all parts have under a name, or each one's."""
    values = {part: str(own[name]) for part, own in parts.items()}
    if len({*values.values()}) == 1:
        return next(iter(values.values()))
    return "mixed: " + ", ".join(f"{part} {value}" for part, value in values.items())
