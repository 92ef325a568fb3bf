"""Prediction that stops adding members to inputs whose probabilities have settled.

Members go chain by chain in turn, and an input's estimate is the mean over chains of what each has
given so far: chains that sit in separate modes cancel, and only the spread within chains is left to
settle (a stratified sample without replacement: Cochran, Sampling Techniques, 1977, section 5.6).
That spread is seen in few members, so it is steadied by that of the other inputs (`_moderated`).

An input stops at the first k at which a 99 % bound on the distance of its estimate from the whole
ensemble's mean (`expected_error`) lies within the tolerance. The bound holds at one k; because it
is asked again at every k, more than 1 % may end outside (of 16 stored ensembles of 20 members, on
SST-2, MRPC and the embedded task, on which 99 % was chosen, 0 to 1.2 % did at 0.01).
No rule foresees what no member seen has shown: where one draw of 20 alone differs, most inputs end
outside. Draws far apart in time come first: taken as they come, draws like their neighbours pass
for settled.

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
CONFIDENCE = 0.99
ENOUGH_INPUTS = 20
"""From which the spread of the others says something of an input's own."""
LEAST_SCALE = 1e-4
"""Of p(1 − p), by which spreads are compared over inputs."""
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
            f"input is given at least {first} (one of every chain and one more, and {FEWEST}): "
            "leave the tolerance out"
        )


def fewest(chains: np.ndarray) -> int:
    """Members an input is given at least: `FEWEST`, and one more than there are chains."""
    return max(FEWEST, len(np.unique(chains)) + 1)


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

    In the place of a member left out stand the logarithms of its chain's mean so far, so that the
    ensemble's probabilities are the estimate. Members of weight 0 are never used.

    Args:
        weights: of the members, (K,), summing to 1.
        chains: of the members, (K,); those of one chain in the order of its draws.
        tolerance: on each class's probability, in (0, 1).

    Raises:
        InputError: as `check_tolerance`.
    """
    check_tolerance(tolerance, chains)
    asked = np.flatnonzero(weights > 0)
    order = asked[member_order(chains[asked])]
    w, c = weights[order], chains[order]
    open_rows, used = np.arange(len(data)), np.full(len(data), len(order))
    first = member_logits(model, data, order[0], open_rows)
    logits = np.zeros((len(weights), *first.shape), dtype=first.dtype)
    probs = np.empty((len(order), *first.shape))
    for k, member in enumerate(order):
        found = member_logits(model, data, member, open_rows) if k else first
        logits[member, open_rows], probs[k, open_rows] = found, softmax(found)
        if fewest(c) <= k + 1 < len(order):
            error = expected_error(probs[: k + 1, open_rows], w, c)
            settled = (error <= tolerance).all(1)
            used[open_rows[settled]] = k + 1
            open_rows = open_rows[~settled]
        if not len(open_rows):
            break
    for k in np.unique(used[used < len(order)]):
        rows = np.flatnonzero(used == k)
        means = chain_means(probs[:k, rows], w, c)
        for member, chain in zip(order[k:], c[k:], strict=True):
            logits[member, rows] = np.log(np.maximum(means[chain], np.finfo(np.float32).tiny))
    return logits, used


def chain_means(
    probs: np.ndarray, weights: np.ndarray, chains: np.ndarray
) -> dict[int, np.ndarray]:
    """By chain the weighted mean (N, C) of its members among the first k, (k, N, C)."""
    seen, w = chains[: len(probs)], weights[: len(probs)]
    own = {int(chain): np.flatnonzero(seen == chain) for chain in np.unique(seen)}
    return {m: np.tensordot(w[i] / w[i].sum(), probs[i], 1) for m, i in own.items()}


def estimate(probs: np.ndarray, weights: np.ndarray, chains: np.ndarray) -> np.ndarray:
    """The ensemble's mean (N, C) from its first k members (k, N, C), every chain among them."""
    return _summed_up(chain_means(probs, weights, chains), weights, chains)


def _summed_up(means: dict[int, np.ndarray], weights: np.ndarray, chains: np.ndarray) -> np.ndarray:
    """The chains' means (N, C) by the chains' whole weights."""
    total = sum(weights[chains == m].sum() * mean for m, mean in means.items())
    return np.asarray(total / weights.sum())


def expected_error(probs: np.ndarray, weights: np.ndarray, chains: np.ndarray) -> np.ndarray:
    """How far `estimate` may be from the mean of all K members, (N, C), at 99 %.

    probs (k, N, C), weights (K,), chains (K,), in the order in which members are asked. With v the
    variance within chains, pooled over them, each chain adds
    v·(Σ_seen w²(1/S − 1/W)² + Σ_left (w/W)²)·W² to the error's variance, S and W its weight seen
    and in all; for equal weights and chains v·(1/n − 1/N)/M². Student's t of k − M degrees of
    freedom, and of those that v gains by `_moderated`.
    """
    # SciPy is of use here alone, and importing it is felt.
    from scipy.special import stdtrit

    k, means = len(probs), chain_means(probs, weights, chains)
    freedom = k - len(means)
    centre = np.stack([means[int(m)] for m in chains[:k]])
    spread = np.square(probs - centre).sum(0) / freedom
    factor = 0.0
    for m in means:
        own, seen = weights[chains == m], weights[:k][chains[:k] == m]
        left = np.square(own).sum() - np.square(seen).sum()
        factor += np.square(seen).sum() * (own.sum() / seen.sum() - 1) ** 2 + left
    mean = _summed_up(means, weights, chains)
    scale = np.square(np.maximum(mean * (1 - mean), LEAST_SCALE))
    steady, freedom = _moderated(spread / scale, freedom)
    quantile = stdtrit(freedom, (1 + CONFIDENCE) / 2)
    return quantile * np.sqrt(steady * scale * factor) / weights.sum()


def _moderated(variances: np.ndarray, freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample variances (N, C) drawn to what is usual of their class, and degrees of freedom (C,).

    Variances that scatter no more than χ² would are taken for one variance, others as they are;
    between, d₀ degrees of freedom are added at the usual variance s₀² (Smyth 2004, Linear models
    and empirical Bayes methods, section 6.2).
    """
    from scipy.special import digamma, polygamma

    classes = variances.shape[1]
    if len(variances) < ENOUGH_INPUTS:
        return variances, np.full(classes, float(freedom))
    floor = np.maximum(np.median(variances, 0) * 1e-5, np.finfo(float).tiny)
    half = freedom / 2
    log = np.log(np.maximum(variances, floor)) - digamma(half) + np.log(half)
    excess = np.maximum(log.var(0, ddof=1) - polygamma(1, half), 1e-6)
    halves = _inverse_trigamma(excess)
    usual = np.exp(log.mean(0) + digamma(halves) - np.log(halves))
    added = 2 * halves
    return (added * usual + freedom * variances) / (added + freedom), added + freedom


def _inverse_trigamma(values: np.ndarray) -> np.ndarray:
    """Newton's method from below, where it rises without overshooting (Smyth 2004, appendix)."""
    from scipy.special import polygamma

    x = 0.5 + 1 / values
    for _ in range(20):
        trigamma = polygamma(1, x)
        x = x + trigamma * (1 - trigamma / values) / polygamma(2, x)
    return x
