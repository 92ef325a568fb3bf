"""Stacks of a lower rank: SVD compression, and TIES and DARE merging of adapters.

After either, a column of the factors mixes all adapters and belongs to none of them: every part's
`columns` are then (0, 0), its name, source, weight and task stay as a record.

Shapes: K members, R rank, D widths.
"""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesian_lora.composition.sources import Source
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stacking import Members, stack_sources
from bayesian_lora.composition.subspaces import decompose
from bayesian_lora.errors import InputError
from bayesian_lora.member_files import check_finite
from bayesian_lora.progress import Progress
from bayesian_lora.utils.rng import chain_generators

RANDOM = ("dare_linear", "dare_ties")
METHODS = ("ties", *RANDOM)
MIXED = (0, 0)
"""`Part.columns` where no column is one part's alone."""


def compress(stack: Stack, rank: int) -> Stack:
    """The stack whose every ΔW is the nearest one of this rank (Eckart & Young 1936).

    ΔW' is the truncated SVD of ΔW = s·BA, which comes from the factors alone (`decompose`). The
    new factors are balanced, B' = U√S and A' = √S Vᵀ, at scale 1; in a layer narrower than the
    rank the rest is zeros.

    `facts["error"]` has ‖ΔW − ΔW'‖_F/‖ΔW‖_F: ``overall`` (all layers and members), ``members``
    (K,) and ``layers`` {name: (K,)}; 0 where ΔW is 0. Weights can no longer be fitted to the
    parts of such a stack: fit them before.

    Raises:
        InputError: a rank below 1, above the stack's or above every layer's width, or a factor
            that is not finite.
    """
    if rank > stack.spec.rank:
        raise InputError(
            f"rank={rank}: the stack has rank {stack.spec.rank}; choose 1 to {stack.spec.rank}"
        )
    _check_rank(stack, rank)
    check_finite(stack.factors, "stack")
    factors: dict[str, Tensor] = {}
    error = _Error()
    for layer in stack.layers:
        a, b = stack.factors[f"{layer}.lora_A"], stack.factors[f"{layer}.lora_B"]
        updates = [decompose(*pair, stack.spec.scaling) for pair in zip(a, b, strict=True)]
        low = [balanced(u.left, u.values, u.right.T, rank, a.dtype) for u in updates]
        factors |= _named(layer, low)
        error.add(layer, [u.values for u in updates], rank)
    facts = {"kind": "svd", "rank": rank, "error": error.facts(), "of": dict(stack.facts)}
    return _of_rank(stack, rank, factors, facts, [part.weight for part in stack.parts])


def merge(
    sources: Sequence[Source],
    method: str = "ties",
    density: float = 0.5,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    *,
    rank: int | None = None,
    members: Members = "paired",
    progress: Progress | None = None,
) -> Stack:
    """TIES (Yadav et al. 2023) or DARE (Yu et al. 2024) on the adapters' ΔW, each head kept.

    PEFT's functions act on the whole ΔW_i of one layer at a time, so the result depends on no
    factor's gauge, and ranks, alphas and rank-stabilised scaling may differ; the merged ΔW, which
    has full rank, is then cut to `rank` by SVD. PEFT's own `add_weighted_adapter` refuses adapters
    with heads, gives wrong scales for rsLoRA, and merges A and B apart unless told ``…_svd``.

    Args:
        sources: at least two adapters or ensembles.
        method: ``ties`` (trim the smallest, elect signs, mean of those that agree),
            ``dare_linear`` (drop at random, rescale, weighted sum) or ``dare_ties`` (drop at
            random, rescale, then as TIES).
        density: the share of a ΔW's numbers that is kept, in (0, 1].
        weights: one per source, 1 each by default. TIES's mean divides by the number of adapters
            that agree, not by their weights.
        seed: of DARE's dropping; member k draws from (seed, k), whatever torch's own state.
        rank: Σ r_i by default, or the widest layer's width where that is less.
        members: as in `stack_sources`.

    Returns:
        A stack at scale 1 whose `facts["error"]` is the SVD's, as in `compress`.

    Raises:
        InputError: unknown method, density outside (0, 1] or too small for a layer, weights that
            do not fit, a rank out of range, or as `stack_sources`.
    """
    _check_method(method, density)
    own = [1.0] * len(sources) if weights is None else [float(w) for w in weights]
    if len(own) != len(sources) or not all(map(math.isfinite, own)):
        raise InputError(
            f"weights {own}: {len(sources)} adapters need one finite number each; mend the list"
        )
    stack = stack_sources(sources, members=members, over_width=True)
    rank = min(stack.spec.rank, _width(stack)) if rank is None else rank
    _check_rank(stack, rank)
    check_finite(stack.factors, "stack")
    if method == "ties":
        _check_trimming(stack, density)
    recipe = {"method": method, "density": density, "weights": own}
    return _merged(stack, recipe, seed, rank, progress or Progress(quiet=True))


def balanced(
    u: Tensor, s: Tensor, vh: Tensor, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A' = √S Vᵀ (rank, D_in) and B' = U√S (D_out, rank) of the first `rank` directions.

    The two share the norm of ΔW evenly; where there are fewer directions the rest is zeros.
    """
    root = s[:rank].sqrt()
    missing = rank - len(root)
    a = F.pad(root[:, None] * vh[:rank], (0, 0, 0, missing))
    b = F.pad(u[:, :rank] * root, (0, missing))
    return a.to(dtype), b.to(dtype)


def merged_update(
    updates: Sequence[Tensor],
    method: str,
    density: float,
    weights: Sequence[float],
    generator: torch.Generator,
) -> Tensor:
    """One layer's ΔW_i (D_out, D_in) merged by PEFT's function of this name.

    PEFT drops by torch's global generator, which belongs to the user: `generator`'s state is put
    in its place for the call and what was there is put back.
    """
    from peft.utils.merge_utils import dare_linear, dare_ties, ties

    function = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties}[method]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        if density == 1:  # nothing is to be dropped, and PEFT warns that nothing is
            warnings.filterwarnings("ignore", message="The density", category=UserWarning)
        torch.set_rng_state(generator.get_state())
        found = function(list(updates), torch.tensor(weights, dtype=updates[0].dtype), density)
        generator.set_state(torch.get_rng_state())
    return found


def _merged(
    stack: Stack, recipe: dict[str, Any], seed: int, rank: int, progress: Progress
) -> Stack:
    """The parts of a stack merged; `recipe`: method, density and weights."""
    import peft

    streams = chain_generators(seed, range(len(stack)), "dare")
    names = stack.layers
    factors: dict[str, Tensor] = {}
    error = _Error()
    progress.start("Merging", len(names))
    for done, layer in enumerate(names, start=1):
        low, values = [], []
        for k, generator in enumerate(streams):
            parts = _dense_parts(stack, layer, k)
            merged = merged_update(parts, **recipe, generator=generator)
            u, s, vh = torch.linalg.svd(merged, full_matrices=False)
            low.append(balanced(u, s, vh, rank, stack.factors[f"{layer}.lora_A"].dtype))
            values.append(s.double())
        factors |= _named(layer, low)
        error.add(layer, values, rank)
        progress.update(done, lambda layer=layer: layer)
    progress.end()
    facts = {
        "kind": recipe["method"],
        "through": f"peft {peft.__version__}, on each layer's ΔW",
        "density": recipe["density"],
        "weights": recipe["weights"],
        "rank": rank,
        "error": error.facts(),
    }
    if recipe["method"] in RANDOM:
        facts["seed"] = seed
    return _of_rank(stack, rank, factors, facts, recipe["weights"])


def _dense_parts(stack: Stack, layer: str, k: int) -> list[Tensor]:
    """ΔW_i (D_out, D_in) of member k, one of each part, as it counts in the stack."""
    a, b = stack.factors[f"{layer}.lora_A"][k], stack.factors[f"{layer}.lora_B"][k]
    exact = torch.promote_types(a.dtype, torch.float32)  # halves have no SVD
    a, b, spans = a.to(exact), b.to(exact), [slice(*part.columns) for part in stack.parts]
    return [stack.spec.scaling * (b[:, span] @ a[span]) for span in spans]


def _named(layer: str, low: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Members' (A', B') → a layer's factors (K, …)."""
    a, b = (torch.stack(rows) for rows in zip(*low, strict=True))
    return {f"{layer}.lora_A": a, f"{layer}.lora_B": b}


def _of_rank(
    stack: Stack,
    rank: int,
    factors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    weights: Sequence[float],
) -> Stack:
    """The stack with these factors at scale 1, its parts' columns mixed."""
    parts = tuple(
        dataclasses.replace(part, columns=MIXED, weight=weight)
        for part, weight in zip(stack.parts, weights, strict=True)
    )
    spec = dataclasses.replace(stack.spec, rank=rank, alpha=float(rank), rslora=False)
    return stack.changed(spec=spec, parts=parts, factors=dict(factors), facts=dict(facts))


class _Error:
    """Relative Frobenius errors of truncation, from all singular values of every ΔW."""

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}

    def add(self, layer: str, values: Sequence[Tensor], rank: int) -> None:
        """values: of each member, float64, in falling order."""
        pairs = [torch.stack([s[rank:].square().sum(), s.square().sum()]) for s in values]
        self._squares[layer] = torch.stack(pairs)

    def facts(self) -> dict[str, Any]:
        whole = torch.stack(list(self._squares.values()))  # (layers, K, 2)
        return {
            "overall": _relative(whole.sum((0, 1))),
            "members": [_relative(pair) for pair in whole.sum(0)],
            "layers": {n: [_relative(pair) for pair in x] for n, x in self._squares.items()},
        }


def _relative(pair: Tensor) -> float:
    """√(lost/whole), 0 where there is nothing to lose."""
    lost, whole = pair.tolist()
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def _width(stack: Stack) -> int:
    """The most directions that a layer's ΔW can have, min(D_in, D_out) of the widest layer."""
    a, b = ([stack.factors[f"{n}.lora_{f}"] for n in stack.layers] for f in "AB")
    return max(min(x.shape[2], y.shape[1]) for x, y in zip(a, b, strict=True))


def _check_rank(stack: Stack, rank: int) -> None:
    width = _width(stack)
    if not 1 <= rank <= width:
        raise InputError(
            f"rank={rank}: the widest layer takes 1 to {width}; choose a rank within that"
        )


def _check_method(method: str, density: float) -> None:
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"method {method!r} is unknown: {hint}known are {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise InputError(
            f"density={density:g}: the share that is kept must be above 0 and at most 1; try 0.5"
        )


def _check_trimming(stack: Stack, density: float) -> None:
    """TIES keeps ⌊density·n⌋ of a layer's n numbers, none of which would leave no adapter."""
    for layer in stack.layers:
        a, b = stack.factors[f"{layer}.lora_A"], stack.factors[f"{layer}.lora_B"]
        numbers = a.shape[2] * b.shape[1]
        if int(density * numbers) < 1:
            raise InputError(
                f"density={density:g}: keeps none of the {numbers} numbers of {layer}; choose at "
                f"least {1 / numbers:.2g}"
            )
