"""Stacking: ΔW = Σ w_i ΔW_i by laying factors side by side, each task's head beside them.

Shapes: K members, R rank, D widths, C classes.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.composition.compatibility import check_sources, dtype_of
from bayesian_lora.composition.joint_facts import joint_model, joint_spec, task_of
from bayesian_lora.composition.sources import Source
from bayesian_lora.composition.stack import Part, Stack
from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import LoraSpec

Scaling = Literal["exact", "original"]
Members = Literal["paired", "crossed"]

CROSSED_LIMIT = 1_000


def stack_sources(
    sources: Sequence[Source],
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    scaling: Scaling = "exact",
    members: Members = "paired",
    over_width: bool = False,
) -> Stack:
    """Adapters side by side in one set of factors, with each one's head as a task of its own.

    Exact: A = rows(A_i), B = columns(w_i s_i B_i) at scale s = 1, so that ΔW = Σ w_i ΔW_i to
    rounding, for any ranks, alphas and rank-stabilised scaling; in a module that an adapter does
    not adapt its columns are zero. Original: A_i and B_i as they are at the first adapter's α over
    the whole rank R = Σ r_i, which multiplies adapter i by r_i/R.

    Args:
        sources: at least two adapters or ensembles of one base model.
        weights: w_i, one per source; 1 each by default.
        scaling: ``exact``, or ``original`` for the stacking of the LoRA-Ensembling experiments.
        members: of ensembles, ``paired`` (k-th with k-th; a single adapter goes with all) or
            ``crossed`` (every combination). Members' weights multiply.
        over_width: allow a rank over the narrowest layer's width; for what is cut afterwards.

    Raises:
        InputError: adapters that do not go together (`check_sources`), weights that do not fit,
            ensembles that cannot be paired or crossed, a rank over the narrowest layer's width,
            alphas that ``original`` cannot join.
    """
    check_sources(sources)
    specs = [source.spec for source in sources if source.spec is not None]
    own = _checked_weights(sources, weights)
    order = _combinations([len(source) for source in sources], sources, members)
    rank = sum(spec.rank for spec in specs)
    if not over_width:
        _check_rank(sources, rank)
    if scaling not in get_args(Scaling):
        raise InputError(f"scaling={scaling!r}: choose one of {', '.join(get_args(Scaling))}")
    exact = scaling == "exact"
    if not exact:
        _check_original(sources, specs, weights)
    scales = [w * spec.scaling if exact else 1.0 for w, spec in zip(own, specs, strict=True)]
    shares = own if exact else [spec.rank / rank for spec in specs]
    spec = joint_spec(sources, specs, rank, float(rank) if exact else specs[0].alpha)
    return Stack(
        model=joint_model(sources),
        spec=spec,
        tasks={source.name: task_of(source) for source in sources},
        parts=_parts(sources, specs, shares),
        factors=_factors(sources, order, scales),
        heads={
            source.name: _states(source, source.head, rows)
            for source, rows in zip(sources, order.T, strict=True)
        },
        weights=_member_weights(sources, order),
        facts={
            **_facts(scaling, members, specs, shares, spec),
            "samplers": {source.name: source.sampler for source in sources},
            "places": _places(sources, order),
        },
    )


def _facts(
    scaling: str, members: str, specs: Sequence[LoraSpec], shares: Sequence[float], spec: LoraSpec
) -> dict[str, Any]:
    return {
        "kind": scaling,
        "members": members,
        "ranks": [spec.rank for spec in specs],
        "scales": [spec.scaling for spec in specs],
        "weights": [float(share) for share in shares],
        "scale": spec.scaling,
    }


def _checked_weights(
    sources: Sequence[Source], weights: Sequence[float] | np.ndarray | None
) -> list[float]:
    own = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
    if len(own) != len(sources):
        raise InputError(
            f"{len(own)} weights for {len(sources)} adapters: give one each, in their order"
        )
    if wrong := [weight for weight in own if not math.isfinite(weight)]:
        raise InputError(f"weight {wrong[0]}: a weight is a finite number; give another")
    return own


def _check_rank(sources: Sequence[Source], rank: int) -> None:
    width, module = min(
        (min(pair), module) for source in sources for module, pair in source.widths.items()
    )
    if rank > width:
        raise InputError(
            f"rank {rank}: the adapters' ranks add up to more than the width of {module}, which "
            f"is {width}; stack fewer, or cut or merge them to a rank (--rank)"
        )


def _check_original(sources: Sequence[Source], specs: Sequence[LoraSpec], weights: Any) -> None:
    remedy = "choose scaling=exact"
    if weights is not None:
        raise InputError(f"scaling=original: adapters have no weights there; {remedy}")
    for source, spec in zip(sources, specs, strict=True):
        if spec.rslora:
            raise InputError(
                f"scaling=original: {source.name!r} is rank-stabilised, which that stacking did "
                f"not have; {remedy}"
            )
        if spec.alpha != specs[0].alpha:
            raise InputError(
                f"scaling=original: {sources[0].name!r} has alpha {specs[0].alpha:g}, "
                f"{source.name!r} {spec.alpha:g}, and that stacking has one; {remedy}"
            )


def _combinations(counts: Sequence[int], sources: Sequence[Source], members: str) -> np.ndarray:
    """(K, sources): which member of each source makes up each member of the stack."""
    if members not in get_args(Members):
        raise InputError(f"members={members!r}: choose one of {', '.join(get_args(Members))}")
    if members == "crossed":
        total = math.prod(counts)
        if total > CROSSED_LIMIT:
            product = " × ".join(map(str, counts))
            raise InputError(
                f"members=crossed: {product} = {total:,} members; at most {CROSSED_LIMIT:,} are "
                "stacked, take fewer of each (Ensemble.subset) or members=paired"
            )
        return np.indices(counts).reshape(len(counts), -1).T
    largest = max(counts)
    for source, count in zip(sources, counts, strict=True):
        if count not in (1, largest):
            other = sources[counts.index(largest)]
            raise InputError(
                f"members=paired: {source.name!r} has {count} members, {other.name!r} {largest}; "
                "pairing needs as many of each (or one), choose members=crossed or subsets"
            )
    each = [np.arange(largest) if count > 1 else np.zeros(largest, dtype=int) for count in counts]
    return np.stack(each, axis=1)


def _member_weights(sources: Sequence[Source], order: np.ndarray) -> np.ndarray:
    """(K,): draws of different adapters are independent, so their weights multiply."""
    columns = [s.weights[rows] for s, rows in zip(sources, order.T, strict=True)]
    product = np.prod(columns, axis=0)
    if not product.sum() > 0:
        raise InputError(
            "members=paired: every pair has a member of weight 0; choose members=crossed"
        )
    return product / product.sum()


def _places(sources: Sequence[Source], order: np.ndarray) -> list[list[int]]:
    """Chain and draw of each member: as the ensembles had them where these go together.

    Members that share a chain of any ensemble are not independent, so they are of one chain here.
    """
    several = [i for i, source in enumerate(sources) if len(source) > 1]
    if not several:
        return [[0, 0]] * len(order)
    known = [sources[i].places or tuple((k, 0) for k in range(len(sources[i]))) for i in several]
    own = np.array([[p[row[i]] for p, i in zip(known, several, strict=True)] for row in order])
    chains, before = own[:, 0, 0].copy(), None
    while before is None or (chains != before).any():
        before = chains.copy()
        for column in own[:, :, 0].T:
            for chain in np.unique(column):
                chains[column == chain] = chains[column == chain].min()
    draws = own[:, 0, 1]
    if len({*zip(chains.tolist(), draws.tolist(), strict=True)}) < len(order):
        draws = np.array([(chains[:k] == chain).sum() for k, chain in enumerate(chains)])
    return np.stack([chains, draws], axis=1).tolist()


def _states(source: Source, names: Sequence[str], rows: np.ndarray) -> dict[str, Tensor]:
    """Name → (K, …), the source's members in this order."""
    return {name: torch.stack([source.members[k][name] for k in rows]) for name in names}


def _factors(
    sources: Sequence[Source], order: np.ndarray, scales: Sequence[float]
) -> dict[str, Tensor]:
    """A (K, R, D_in) and B (K, D_out, R) of every module that a source adapts."""
    widths = {module: pair for source in sources for module, pair in source.widths.items()}
    factors: dict[str, Tensor] = {}
    for module in sorted(widths):
        d_in, d_out = widths[module]
        names = [f"{module}.lora_A", f"{module}.lora_B"]
        rows_a, columns_b = [], []
        for source, rows, scale in zip(sources, order.T, scales, strict=True):
            if module in source.widths:
                a, b = _states(source, names, rows).values()
            else:
                assert source.spec is not None
                like = torch.zeros((), dtype=dtype_of(source))
                a = like.new_zeros(len(order), source.spec.rank, d_in)
                b = like.new_zeros(len(order), d_out, source.spec.rank)
            rows_a.append(a)
            columns_b.append(b * scale)
        factors[names[0]], factors[names[1]] = torch.cat(rows_a, 1), torch.cat(columns_b, 2)
    return factors


def _parts(
    sources: Sequence[Source], specs: Sequence[LoraSpec], shares: Sequence[float]
) -> tuple[Part, ...]:
    stops = np.cumsum([spec.rank for spec in specs]).tolist()
    starts = [0, *stops[:-1]]
    rows = zip(sources, starts, stops, shares, strict=True)
    return tuple(Part(s.name, s.path, (a, b), float(w), s.name) for s, a, b, w in rows)
