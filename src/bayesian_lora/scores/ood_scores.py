"""How well uncertainty scores tell a set from the one a model is meant for, with standard errors.

Shape letters: K members, N examples inside, M outside, C classes, R replicates, E models of a kind
(warm starts; 1 for an ensemble).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayesian_lora import metrics
from bayesian_lora.errors import InputError
from bayesian_lora.scores.array_checks import Array
from bayesian_lora.scores.bootstrap import BLOCK, REPLICATES, Replicates, resample_counts
from bayesian_lora.scores.detection import Pooled

Figures = dict[str, Any]
Scores = dict[str, Array]
Models = Sequence[tuple[Scores, Scores]]
"""Of one kind, each with its scores inside {name: (N,)} and outside {name: (M,)}."""
Pools = dict[str, dict[str, Pooled]]
"""Row (a model) → score → both sets in the order of that score."""

SCORES = ("predictive_entropy", "expected_entropy", "mutual_information", "max_probability")
"""High where a model is unsure; the last is 1 − max_c p_c (Hendrycks & Gimpel 2017)."""
MEASURES = ("auroc", "aupr")
ONE_MEMBER = "one member alone cannot disagree with itself: use two or more"


def scores_of(logits: ArrayLike, weights: ArrayLike) -> Scores:
    """Each of `SCORES` (N,) of logits (K, N, C) under weights (K,), nats or probability.

    A single member has no mutual information: it is left out. Raises InputError on a logit that is
    not finite.
    """
    scores = metrics.uncertainty_per_example(logits, weights)
    scores["max_probability"] = 1.0 - metrics.ensemble_probs(logits, weights).max(axis=1)
    if np.count_nonzero(np.asarray(weights)) == 1:
        del scores["mutual_information"]
    return scores


def ood_figures(
    models: Mapping[str, Models], rng: np.random.Generator, replicates: int = REPLICATES
) -> Figures:
    """AUROC and AUPR of every score of every kind of model, and differences from the first kind.

    Args:
        models: kind → its models; the first kind is compared with each of the others.
        rng: of the resamples of both sets, each at its own size; all kinds see the same ones, so
            that differences are paired.
        replicates: R, two or more.

    Returns:
        ``inside_n``, ``outside_n``, ``base_rate`` M/(N + M) (the AUPR of a score that tells
        nothing; the AUROC is then .5), ``replicates``, ``models`` {kind: {score: {"auroc",
        "auroc_se", "aupr", "aupr_se"}}} (of several models the means, and "auroc_sd", "aupr_sd"
        over them), ``differences`` {"first-other": the same}. The errors are the bootstrap's over
        examples (`bootstrap`); null with a reason where undefined.

    Raises:
        InputError: scores that are not finite, or an empty set.
    """
    first, *others = models
    n, m = (len(next(iter(scores.values()))) for scores in models[first][0])
    if min(n, m) == 0:
        raise InputError(
            f"{n} examples inside and {m} outside: one class only has no ranking, so no AUROC; "
            "give sets that have some"
        )
    rows = {f"{kind} {e}": pair for kind, given in models.items() for e, pair in enumerate(given)}
    pools = {row: _pooled(*pair) for row, pair in rows.items()}
    ones = np.ones((n, 1)), np.ones((m, 1))
    points = {row: _areas(scores, *ones) for row, scores in pools.items()}
    resampled = _resampled(pools, n, m, rng, replicates)
    of_kind = {kind: [f"{kind} {e}" for e in range(len(given))] for kind, given in models.items()}
    means = {kind: resampled.mean(names) for kind, names in of_kind.items()}
    errors = Replicates(resampled.n, means)
    values = {
        kind: {key: np.concatenate([points[row][key] for row in names]) for key in means[kind]}
        for kind, names in of_kind.items()
    }
    return {
        "inside_n": n,
        "outside_n": m,
        "base_rate": m / (n + m),
        "replicates": replicates,
        "models": {kind: _table(values[kind], errors.se(kind)) for kind in models},
        "differences": {
            f"{first}-{other}": _table(
                _differences(values[first], values[other]), errors.difference_se(first, other)
            )
            for other in others
        },
    }


def _pooled(inside: Scores, outside: Scores) -> dict[str, Pooled]:
    return {score: Pooled(inside[score], outside[score]) for score in inside}


def _areas(pools: Mapping[str, Pooled], inside: Array, outside: Array) -> dict[str, Array]:
    """{"score measure": (B,)} of counts (N, B) and (M, B)."""
    return {
        f"{score} {measure}": values
        for score, pool in pools.items()
        for measure, values in pool.areas(inside, outside).items()
    }


def _resampled(
    pools: Pools, n: int, m: int, rng: np.random.Generator, replicates: int
) -> Replicates:
    found: dict[str, dict[str, list[Array]]] = {row: {} for row in pools}
    # A generator for each set, and blocks of one size, so that the blocks go in step.
    size = max(1, BLOCK // (n + m))
    blocks = [resample_counts(z, rng.spawn(1)[0], replicates, size) for z in (n, m)]
    for inside, outside in zip(*blocks, strict=True):
        for row, scores in pools.items():
            for key, values in _areas(scores, inside, outside).items():
                found[row].setdefault(key, []).append(values)
    return Replicates(
        min(n, m), {row: {k: np.concatenate(v) for k, v in x.items()} for row, x in found.items()}
    )


def _differences(first: dict[str, Array], other: dict[str, Array]) -> dict[str, Array]:
    """Of the means over models, (1,) each, for the scores that both kinds have."""
    return {
        key: first[key].mean(keepdims=True) - other[key].mean(keepdims=True)
        for key in first
        if key in other
    }


def _table(values: Mapping[str, Array], errors: Figures) -> dict[str, Figures]:
    """{score: {measure: …}} from {"score measure": (E,)} and the standard errors of the means."""
    table: dict[str, Figures] = {}
    for score in SCORES:
        row: Figures = {}
        for measure in MEASURES:
            key = f"{score} {measure}"
            if key not in values:
                row |= {measure: None, f"{measure}_se": None, f"{measure}_reason": ONE_MEMBER}
                continue
            row[measure] = float(values[key].mean())
            row |= {
                name.replace(key, f"{measure}_se", 1): value
                for name, value in errors.items()
                if name.startswith(key)
            }
            if len(values[key]) > 1:
                row[f"{measure}_sd"] = float(values[key].std(ddof=1))
        table[score] = row
    return table
