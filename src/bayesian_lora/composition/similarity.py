"""Adapters compared pair by pair, and a trained stack with what it was stacked from.

Shapes: K members, R rank, D widths. A *comparison* is a JSON-able dictionary; every figure stands
beside that of the random-subspace baseline and of a random LoRA of equal rank and norm, and one
that cannot be computed is None with a reason. The mathematics is in `subspaces`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from bayesian_lora.composition.compatibility import known_model
from bayesian_lora.composition.pair_figures import Adapter, Figures, Plan, compare_pairs
from bayesian_lora.composition.sources import Source
from bayesian_lora.composition.stack import Part, Stack
from bayesian_lora.composition.subspaces import RANK_TOLERANCE
from bayesian_lora.errors import InputError

Members = Literal["first", "all"]

LABELS = {
    "cosine": "of ΔW = s·BA, all modules as one vector; cosine_mean: mean over the modules",
    "phi": "φ(i, j) = ‖U1(i)ᵀ U2(j)‖²_F / min(i, j) of the left (output) and right (input) "
    "singular vectors of ΔW; phi_left, phi_right: with all directions of both",
    "angle": "mean principal angle, radians",
    "geodesic": "√(Σ θ²), radians; projection: √(Σ sin²θ); over the smaller rank's angles",
    "baseline": "max(i, j)/n, the mean of φ(i, j) for independent uniform subspaces",
    "control": "random LoRA of the second adapter's rank and norm in its place, module by module",
    "factor_cosines": "depends on the gauge and on a shared initialisation",
}
LARGEST = 1e60
"""An entry of a factor beyond this is damage, and squares of products would overflow."""


def adapter_of(source: Source) -> Adapter:
    """A source as one side of a comparison.

    Raises:
        InputError: no LoRA factors, a factor without its other half, or NaN in one.
    """
    members = tuple(_modules(member, source.name) for member in source.members)
    scale = source.spec.scaling if source.spec is not None else None
    return Adapter(source.name, members, source.weights, scale, known_model(source))


def adapter_of_stack(name: str, stack: Stack, part: Part | None = None) -> Adapter:
    """A stack, or one part's adapter in it, without the weight it was stacked with.

    Raises:
        InputError: NaN in a factor.
    """
    start, stop = part.columns if part is not None else (0, stack.spec.rank)
    weight = part.weight if part is not None and part.weight != 0 else 1.0
    states = [{key: x[k] for key, x in stack.factors.items()} for k in range(len(stack))]
    members = tuple(
        {key: (a[start:stop], b[:, start:stop]) for key, (a, b) in _modules(state, name).items()}
        for state in states
    )
    return Adapter(name, members, stack.weights, stack.spec.scaling / weight, stack.model)


def _modules(member: Mapping[str, Tensor], name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → (A, B), checked."""
    ends = (".lora_A", ".lora_B")
    found = {key.rpartition(".")[0] for key in member if key.endswith(ends)}
    if not found:
        raise InputError(
            f"{name}: has no LoRA factors (tensors ….lora_A and ….lora_B); give a LoRA adapter"
        )
    pairs = {}
    for module in found:
        if odd := [module + end for end in ends if module + end not in member]:
            raise InputError(f"{name}: {odd[0]} is missing beside its other factor; restore it")
        a, b = (member[module + end] for end in ends)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise InputError(
                f"{name}: {module} has factors A {tuple(a.shape)} and B {tuple(b.shape)}; a LoRA "
                "has A (R, D_in) and B (D_out, R); restore the file"
            )
        for end, factor in zip(ends, (a, b), strict=True):
            # NaN is not below anything either.
            if factor.numel() and not float(factor.abs().max()) < LARGEST:
                what = "NaN" if torch.isnan(factor).any() else f"an entry beyond {LARGEST:g}"
                raise InputError(f"{name}: {module}{end} has {what}; restore the adapter")
        pairs[module] = (a, b)
    return pairs


def compare(
    adapters: Sequence[Adapter],
    *,
    seed: int = 0,
    repeats: int = 10,
    ranks: int | None = None,
    members: Members = "first",
) -> Figures:
    """Every pair of adapters: cosine of ΔW, φ grids, principal angles, Grassmann distances.

    Args:
        adapters: of `adapter_of` or `adapter_of_stack`.
        seed: of the random LoRAs; repeats: how many (their mean and deviation are given).
        ranks: the largest i and j whose φ(i, j) is kept; all without it.
        members: of ensembles the first alone, or also the mean and deviation of every figure over
            all K1 × K2 pairs, weighted as the members are.

    Returns:
        ``adapters``, ``settings``, ``labels`` (what each figure is) and ``pairs``, each with
        ``whole``, ``layers``, ``kinds``, ``modules`` (figures as `subspaces.figures` names them,
        with ``baseline_*``, ``control`` and ``members``) and ``left_out``: modules only one has.

    Raises:
        InputError: fewer than two adapters, of different bases or widths, no common module, or a
            number of ranks or repeats that is too small.
    """
    if len(adapters) < 2:
        raise InputError(f"{len(adapters)} adapter given; a comparison needs at least two")
    plans = []
    for first, second in itertools.combinations(adapters, 2):
        sizes = (len(first.members), len(second.members)) if members == "all" else (1, 1)
        chosen = list(itertools.product(range(sizes[0]), range(sizes[1])))
        plans.append(Plan(first, second, chosen))
    settings = _settings(seed, repeats, ranks, members)
    facts = [_facts(adapter) for adapter in adapters]
    pairs = compare_pairs(plans, seed=seed, repeats=repeats, ranks=ranks)
    return {"adapters": facts, "settings": settings, "labels": LABELS, "pairs": pairs}


def _settings(seed: int, repeats: int, ranks: int | None, members: str) -> Figures:
    if repeats < 2:
        raise InputError(f"{repeats} random LoRA; their deviation needs at least 2")
    if ranks is not None and ranks < 1:
        raise InputError(f"ranks up to {ranks}; φ(i, j) begins at 1")
    settings = {"seed": seed, "repeats": repeats, "ranks": ranks, "members": members}
    return settings | {"rank_tolerance": RANK_TOLERANCE}


def _facts(adapter: Adapter) -> Figures:
    """Its name, members, modules and ‖ΔW‖ of the first member."""
    facts: Figures = {"name": adapter.name, "members": len(adapter.members)}
    facts |= {"modules": len(adapter.members[0]), "scale": adapter.scale}
    facts["rank"] = max(a.shape[0] for a, _ in adapter.members[0].values())
    facts["base"] = (adapter.model or {}).get("base") or (adapter.model or {}).get("name")
    if adapter.scale is None:
        facts["norm"] = None
        facts["reason"] = "no adapter_config.json says its scale α/r, so its norms are not known"
    else:
        norms = [_norm(a, b) for a, b in adapter.members[0].values()]
        facts["norm"] = abs(adapter.scale) * math.hypot(*norms)
    return facts


def _norm(a: Tensor, b: Tensor) -> float:
    """‖BA‖_F."""
    (_, a), (_, b) = torch.linalg.qr(a.double().T), torch.linalg.qr(b.double())
    return float((b @ a.T).norm())


def drift(
    before: Stack, after: Stack, *, seed: int = 0, repeats: int = 10, ranks: int | None = None
) -> Figures:
    """How far a stack moved when it was trained: whole, part by part, and from each adapter.

    Returns:
        ``whole`` and ``parts`` (each part's columns), before against after: as a pair of
        `compare`, with ``relative_change`` = ‖ΔW_after − ΔW_before‖/‖ΔW_before‖; ``against``: per
        part ``before`` and ``after``, the adapter it was stacked from (without its weight) against
        the whole stack. Of K members the first is given in full, with mean and deviation over
        member k before and k after.

    Raises:
        InputError: stacks of other parts, columns or numbers of members, or as `compare`.
    """
    _check_same_stack(before, after)
    settings = _settings(seed, repeats, ranks, "paired")
    paired = [(k, k) for k in range(len(before))]
    old = adapter_of_stack("stack before", before)
    new = adapter_of_stack("stack after", after)
    # Member k after is member k before: one draw, which has its weight once.
    plans = [Plan(old, new, paired, True, before.weights)]
    for part in before.parts:
        came = adapter_of_stack(part.name, before, part)
        became = adapter_of_stack(f"{part.name} after", after, part)
        plans += [Plan(came, to, paired, True, before.weights) for to in (became, old, new)]
    found = compare_pairs(plans, seed=seed, repeats=repeats, ranks=ranks)
    result: Figures = {"settings": settings, "labels": LABELS, "whole": found[0]}
    result |= {"parts": {}, "against": {}}
    for i, part in enumerate(before.parts):
        own, *stacks = found[1 + 3 * i : 4 + 3 * i]
        result["parts"][part.name] = own
        result["against"][part.name] = dict(zip(("before", "after"), stacks, strict=True))
    return result


def _check_same_stack(before: Stack, after: Stack) -> None:
    shapes = [[(part.name, part.columns) for part in stack.parts] for stack in (before, after)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"the stacks differ in their parts or columns ({shapes[0]} and {shapes[1]}); drift is "
            "measured between a stack and what training made of it"
        )
    if len(before) != len(after):
        raise InputError(
            f"the stack has {len(before)} members before and {len(after)} after; drift is measured "
            "member by member"
        )
