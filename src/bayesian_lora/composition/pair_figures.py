"""The figures of pairs of adapters, by module, by layer, by kind of module, and of the whole.

Shapes: K members, R rank, r its numerical value, D widths. The mathematics is in `subspaces`; here
modules are matched, random LoRAs drawn, and figures put together.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bayesian_lora.composition.compatibility import same_base
from bayesian_lora.composition.subspaces import (
    SIDES,
    Pair,
    Update,
    compare_updates,
    decompose,
    factor_cosine,
    figures,
    mean_grid,
    random_phi,
    random_update,
    spread,
)
from bayesian_lora.errors import InputError
from bayesian_lora.utils.rng import chain_generators

Figures = dict[str, Any]


@dataclass(frozen=True)
class Adapter:
    """One side of a comparison: members map modules to factors A (R, D_in), B (D_out, R).

    weights (K,) summing to 1; scale: s in ΔW = s·BA, None where no file says it: norms are then
    unknown, while cosine and subspaces do not depend on a positive scale that all modules share.
    """

    name: str
    members: tuple[Mapping[str, tuple[Tensor, Tensor]], ...]
    weights: np.ndarray
    scale: float | None
    model: Mapping[str, Any] | None = None

    @property
    def modules(self) -> list[str]:
        """Its modules, layer by layer."""
        return sorted(self.members[0], key=_natural)

    def widths(self, module: str) -> tuple[int, int]:
        """D_out, D_in."""
        a, b = self.members[0][module]
        return b.shape[0], a.shape[1]


@dataclass(frozen=True)
class Plan:
    """Two adapters, the members (k, l) of them that are compared, the first one in full, and
    whether ‖ΔW_2 − ΔW_1‖ is asked for.

    given: the pairs' weights; None where members are drawn independently, so that theirs multiply.
    """

    first: Adapter
    second: Adapter
    members: Sequence[tuple[int, int]]
    difference: bool = False
    given: np.ndarray | None = None

    @property
    def shared(self) -> list[str]:
        """The modules both have."""
        return [name for name in self.first.modules if name in self.second.members[0]]

    @property
    def weights(self) -> np.ndarray:
        """One per pair of members, summing to 1."""
        if self.given is not None:
            return self.given / self.given.sum()
        weights = [self.first.weights[k] * self.second.weights[m] for k, m in self.members]
        return np.array(weights) / sum(weights)


@dataclass(frozen=True)
class _Row:
    """One module of a plan: a pair per member pair, one per random LoRA, the factors' cosines."""

    name: str
    pairs: list[Pair]
    controls: list[Pair]
    factors: dict[str, float | None]


class _Module:
    """What several plans need at one module, made once: singular vectors and random LoRAs."""

    def __init__(self, name: str, seed: int, repeats: int) -> None:
        self.name, self.seed, self.repeats = name, seed, repeats
        self._updates: dict[tuple[int, int], Update] = {}
        self._random: dict[tuple[int, int, int], list[Update]] = {}

    def update(self, adapter: Adapter, k: int) -> Update:
        key = (id(adapter), k)
        if key not in self._updates:
            a, b = adapter.members[k][self.name]
            scale = 1.0 if adapter.scale is None else adapter.scale
            self._updates[key] = decompose(a, b, scale)
        return self._updates[key]

    def controls(self, plan: Plan) -> list[Update]:
        """Random LoRAs in place of the second adapter; itself where it is zero."""
        second = self.update(plan.second, plan.members[0][1])
        if second.rank == 0:
            return [second] * self.repeats
        key = (*plan.second.widths(self.name), second.rank)
        if key not in self._random:
            purpose = f"random LoRA at {self.name}"
            generators = chain_generators(self.seed, range(self.repeats), purpose)
            self._random[key] = [random_update(*key, generator) for generator in generators]
        return [update.scaled(second.norm) for update in self._random[key]]

    def row(self, plan: Plan) -> _Row:
        def compared(first: Update, second: Update) -> Pair:
            return compare_updates(first, second, difference=plan.difference)

        k, m = plan.members[0]
        first = self.update(plan.first, k)
        (a1, b1), (a2, b2) = plan.first.members[k][self.name], plan.second.members[m][self.name]
        return _Row(
            self.name,
            [compared(self.update(plan.first, i), self.update(plan.second, j))
             for i, j in plan.members],
            [compared(first, random) for random in self.controls(plan)],
            {"A": factor_cosine(a1, a2), "B": factor_cosine(b1, b2)},
        )  # fmt: skip


def check_plan(plan: Plan) -> None:
    """Whether the two can be compared at all.

    Raises:
        InputError: of different bases, no common module, or other widths at one.
    """
    first, second = plan.first, plan.second
    if not same_base(first.model, second.model):
        facts = [adapter.model or {} for adapter in (first, second)]
        what = [
            f"{model.get('base') or model.get('name')}, fingerprint "
            f"{str(model.get('fingerprint') or 'unknown')[:12]}"
            for model in facts
        ]
        raise InputError(
            f"{first.name} and {second.name} belong to different base models ({what[0]}; "
            f"{what[1]}); compare adapters of one base"
        )
    if not plan.shared:
        raise InputError(
            f"{first.name} and {second.name} have no module in common ({first.modules[0]}, … and "
            f"{second.modules[0]}, …); compare adapters of the same layers"
        )
    for module in plan.shared:
        if (size := first.widths(module)) != (found := second.widths(module)):
            raise InputError(
                f"{module} is {size[0]} x {size[1]} in {first.name}, {found[0]} x {found[1]} in "
                f"{second.name}; compare adapters of one base model"
            )


def compare_pairs(
    plans: Sequence[Plan], *, seed: int, repeats: int, ranks: int | None
) -> list[Figures]:
    """The figures of each plan, in order; see `similarity.compare`.

    Module by module, so that singular vectors of one module alone are held at a time.

    Raises:
        InputError: as `check_plan`.
    """
    for plan in plans:
        check_plan(plan)
    rows: list[list[_Row]] = [[] for _ in plans]
    for module in sorted({name for plan in plans for name in plan.shared}, key=_natural):
        at = _Module(module, seed, repeats)
        for plan, found in zip(plans, rows, strict=True):
            if module in plan.second.members[0] and module in plan.first.members[0]:
                found.append(at.row(plan))
    return [_result(plan, found, ranks) for plan, found in zip(plans, rows, strict=True)]


def _result(plan: Plan, rows: list[_Row], ranks: int | None) -> Figures:
    layers: dict[int | None, list[_Row]] = {}
    kinds: dict[str, list[_Row]] = {}
    for row in rows:
        layer, kind = layer_and_kind(row.name)
        layers.setdefault(layer, []).append(row)
        kinds.setdefault(kind, []).append(row)
    shared = set(plan.shared)
    return {
        "first": plan.first.name,
        "second": plan.second.name,
        "left_out": {
            "first": [name for name in plan.first.modules if name not in shared],
            "second": [name for name in plan.second.modules if name not in shared],
        },
        "whole": _group(plan, rows) | _grids(rows, ranks, control=True),
        "layers": [{"layer": layer} | _group(plan, own) for layer, own in layers.items()],
        "kinds": [{"kind": kind} | _group(plan, own) for kind, own in kinds.items()],
        "modules": [_module(plan, row) | _grids([row], ranks, control=False) for row in rows],
    }


def _group(plan: Plan, rows: Sequence[_Row]) -> Figures:
    """One module's figures or several modules' together, with baseline and control."""
    pairs = [row.pairs[0] for row in rows]
    found: Figures = {"modules": len(rows), **figures(pairs)}
    missing = [row.name for row in rows if not row.pairs[0].defined]
    if missing:
        zero = " and ".join(
            adapter.name
            for k, adapter in enumerate((plan.first, plan.second))
            if any(pair.ranks[k] == 0 for pair in pairs)
        )
        found["reason"] = f"ΔW of {zero} is zero at {len(missing)} of {len(rows)} modules"
    defined = [pair for pair in pairs if pair.defined]
    for s, side in enumerate(SIDES):
        shares = [max(pair.ranks) / pair.widths[s] for pair in defined]
        found[f"baseline_{side}"] = sum(shares) / len(shares) if shares else None
    repeats = range(len(rows[0].controls))
    found["control"] = spread([figures([row.controls[r] for row in rows]) for r in repeats])
    if len(plan.members) > 1:
        chosen = range(len(plan.members))
        each = [figures([row.pairs[m] for row in rows]) for m in chosen]
        found["members"] = spread(each, plan.weights)
    return found


def _grids(rows: Sequence[_Row], ranks: int | None, *, control: bool) -> Figures:
    """φ(i, j) per side, mean over the modules, and of several modules with what chance gives."""

    def mean(pairs: Sequence[Pair], s: int) -> np.ndarray:
        return mean_grid([pair.phi[s][:ranks, :ranks] for pair in pairs if pair.defined])

    pairs = [row.pairs[0] for row in rows]
    grids: Figures = {}
    for s, side in enumerate(SIDES):
        found = {"phi": mean(pairs, s)}
        if control:
            chance = [random_phi(*pair.ranks, pair.widths[s]) for pair in pairs if pair.defined]
            found["baseline"] = mean_grid([grid[:ranks, :ranks] for grid in chance])
            draws = range(len(rows[0].controls))
            repeated = np.stack([mean([row.controls[r] for row in rows], s) for r in draws])
            found["control_mean"] = repeated.mean(0)
            found["control_sd"] = repeated.std(0, ddof=1)
        grids[f"grids_{side}"] = {name: _listed(grid) for name, grid in found.items()}
    return grids


def _listed(grid: np.ndarray) -> list[list[float | None]]:
    """Rows of a grid for JSON, rounded to six digits after the point."""
    return [[None if np.isnan(x) else round(float(x), 6) for x in row] for row in grid]


def _module(plan: Plan, row: _Row) -> Figures:
    layer, kind = layer_and_kind(row.name)
    pair = row.pairs[0]
    found: Figures = {"name": row.name, "layer": layer, "kind": kind}
    found |= {"widths": list(pair.widths), "ranks": list(pair.ranks)}
    known = [adapter.scale is not None for adapter in (plan.first, plan.second)]
    found["norms"] = [norm if k else None for norm, k in zip(pair.norms, known, strict=True)]
    found |= _group(plan, [row])
    for s, side in enumerate(SIDES):
        found[f"angles_{side}"] = pair.angles[s].tolist()
    found["factor_cosines"] = row.factors
    return found


def layer_and_kind(module: str) -> tuple[int | None, str]:
    """The first number in a module's name, and the name with * in its place."""
    numbered = re.search(r"(?<=\.)\d+(?=\.)", module)
    if numbered is None:
        return None, module
    return int(numbered[0]), f"{module[: numbered.start()]}*{module[numbered.end() :]}"


def _natural(module: str) -> list[str | int]:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", module)]
