"""Prediction that stops adding members to inputs whose probabilities have settled.

An input stops at the first k at which a 95 % bound on the distance of its mean from that of the
whole ensemble (`expected_error`) lies within the tolerance. What that promises: the bound holds for
95 % of inputs at one k. Because it is asked again at every k, and inputs stop where it happens to
be small, more can end outside: simulated with members of normal spread, 20 of them, none at spreads
far from the tolerance and 7 % at the worst. Of SST-2's and MRPC's validation sets, whose spreads
are mixed, 0 to 1 % ended outside 0.01.

No rule foresees what no member seen has shown: with a share r of the weight left a probability may
be off by up to r, and where one draw of 20 alone differed by 0.6, four inputs in five ended outside
(by 0.03). So every chain is seen at least once, which keeps chains in separate modes within the
promise, and draws far apart in time come first: taken as they come, draws that resemble their
neighbours let up to a third of inputs end outside.

Shapes: M chains, K members, N examples, C classes.
"""

import numpy as np

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.errors import InputError
from bayesian_lora.metrics import softmax
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.predict import member_logits

FEWEST = 4
"""Members every input is given before it may stop: fewer say too little of their spread."""
CONFIDENCE = 0.95
GOLDEN = (5**0.5 - 1) / 2


def check_tolerance(tolerance: float, chains: np.ndarray) -> None:
    """Whether adaptive prediction can be had of members of these chains, (K,).

    Raises:
        InputError: a tolerance outside (0, 1), or so few members that none can be left out.
    """
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance={tolerance}: a distance of probabilities, between 0 and 1")
    if len(chains) <= (first := fewest(chains)):
        raise InputError(
            f"tolerance={tolerance}: with {len(chains)} members none can be left out, because an "
            f"input is given at least {first} (every chain's first, and {FEWEST}); leave it out"
        )


def fewest(chains: np.ndarray) -> int:
    """Members an input is given at least: `FEWEST`, and one of every chain."""
    return max(FEWEST, len(np.unique(chains)))


def member_order(chains: np.ndarray) -> np.ndarray:
    """An order of the members (K,) of which every beginning is spread over chains and over time.

    Chains take turns. A chain's draws follow the golden ratio, each far in time from those before
    it, and every chain begins at another time.
    """
    turns: list[np.ndarray] = []
    for i, chain in enumerate(np.unique(chains)):
        own = np.flatnonzero(chains == chain)
        far = np.argsort(np.argsort(np.arange(len(own)) * GOLDEN % 1))
        turns.append(np.roll(own[far], -i))
    rounds = range(max(map(len, turns)))
    return np.array([turn[r] for r in rounds for turn in turns if r < len(turn)])


def adaptive_logits(
    model: ChainModel,
    data: TokenisedSet,
    weights: np.ndarray,
    chains: np.ndarray,
    tolerance: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (K, N, C), and how many members each input was given, (N,).

    In the place of the members left out stand the logarithms of the mean of those used, so that
    the ensemble's probabilities are that mean. Members of weight 0 are never used.

    Args:
        weights: of the members, (K,), summing to 1.
        chains: of the members, (K,); those of one chain in the order of its draws.
        tolerance: on each class's probability, in (0, 1).

    Raises:
        InputError: as `check_tolerance`.
    """
    check_tolerance(tolerance, chains)
    order = member_order(chains)
    order = order[weights[order] > 0]
    w, c = weights[order], chains[order]
    open_rows, used = np.arange(len(data)), np.full(len(data), len(order))
    first = member_logits(model, data, order[0], open_rows)
    logits = np.empty((len(weights), *first.shape), dtype=first.dtype)
    probs = np.empty((len(order), *first.shape))
    for k, member in enumerate(order):
        found = member_logits(model, data, member, open_rows) if k else first
        logits[member, open_rows], probs[k, open_rows] = found, softmax(found)
        if fewest(chains) <= k + 1 < len(order):
            error = expected_error(probs[: k + 1, open_rows], w, c)
            settled = (error <= tolerance).all(1)
            used[open_rows[settled]] = k + 1
            open_rows = open_rows[~settled]
        if not len(open_rows):
            break
    for k in np.unique(used):
        rows = np.flatnonzero(used == k)
        mean = np.tensordot(w[:k] / w[:k].sum(), probs[:k, rows], 1)
        out = np.setdiff1d(np.arange(len(weights)), order[:k])
        logits[np.ix_(out, rows)] = np.log(np.maximum(mean, np.finfo(np.float32).tiny))
    return logits, used


def expected_error(probs: np.ndarray, weights: np.ndarray, chains: np.ndarray) -> np.ndarray:
    """How far the mean of the first k of K members may be from that of all, (N, C).

    probs (k, N, C), weights (K,), chains (K,). With r the weight of the members left and n
    effective numbers of members, the two means differ by r times the difference of two independent
    means: t·sd·r·√(1/n_seen + 1/n_left); for equal weights t·sd·√(1/k − 1/K), as of a sample
    without replacement (Cochran, Sampling Techniques, 1977, eq. 2.9).

    Where every chain has been seen in proportion to its weight, and together more often than once
    each, the chains' means cancel: sd is then that around each chain's own mean (stratified
    sampling with one pooled variance, eq. 5.6 there), with k − M degrees of freedom, else that
    around the common mean with k − 1. Chains that sit in separate modes so cost nothing.
    """
    # SciPy is of use here alone, and importing it is felt.
    from scipy.special import stdtrit

    k = len(probs)
    seen, left = weights[:k], weights[k:]
    _, number = np.unique(chains, return_inverse=True)
    share, whole = seen / seen.sum(), np.bincount(number, weights)
    so_far = np.bincount(number[:k], share, len(whole))
    balanced = k > len(whole) and np.allclose(so_far, whole / weights.sum())
    groups = number[:k] if balanced else np.zeros(k, dtype=int)
    freedom = k - len(np.unique(groups))
    spread = np.zeros(probs.shape[1:])
    for group in np.unique(groups):
        own = share[groups == group]
        mean = np.tensordot(own / own.sum(), probs[groups == group], 1)
        spread += np.tensordot(own, (probs[groups == group] - mean) ** 2, 1) * k / freedom
    numbers = [part.sum() ** 2 / np.square(part).sum() for part in (seen, left)]
    factor = left.sum() * np.sqrt(1 / numbers[0] + 1 / numbers[1])
    return stdtrit(freedom, (1 + CONFIDENCE) / 2) * factor * np.sqrt(spread)
