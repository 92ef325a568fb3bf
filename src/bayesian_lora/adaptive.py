"""Prediction that stops adding members to inputs whose probabilities have settled.

Shapes: K members, N examples, C classes.
"""

import numpy as np
import torch
from scipy.special import softmax
from scipy.stats import t as student_t

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.errors import InputError
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.predict import default_budget

FEWEST = 4
"""Members every input is given before it may stop: fewer say too little of their spread."""
CONFIDENCE = 0.95


def adaptive_logits(
    model: ChainModel, data: TokenisedSet, weights: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (K, N, C), and how many members each input was given, (N,).

    An input stops once, at 95 % confidence by Student's t of the members seen so far, no
    probability of the whole ensemble is farther than `tolerance` from the mean of those. In the
    place of the members left out stand the logarithms of that mean, so that the ensemble's
    probabilities are the mean's.

    Args:
        weights: of the members, (K,), summing to 1; members go in the ensemble's order.
        tolerance: on each class's probability, in (0, 1).

    Raises:
        InputError: a tolerance outside (0, 1), an ensemble of one output (regression).
    """
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance={tolerance}: a distance of probabilities, between 0 and 1")
    members = model.num_chains
    open_rows, used = np.arange(len(data)), np.full(len(data), members)
    logits: np.ndarray | None = None
    probs: np.ndarray | None = None
    for k in range(members):
        found = _one_member(model, data, k, open_rows)
        if logits is None or probs is None:
            if found.shape[-1] < 2:
                raise InputError("tolerance: a regression has no probabilities; leave it out")
            logits = np.empty((members, *found.shape), dtype=found.dtype)
            probs = np.empty(logits.shape)
        logits[k, open_rows] = found
        probs[k, open_rows] = softmax(found.astype(np.float64), axis=-1)
        if k + 1 < FEWEST or k + 1 == members:
            continue
        error = expected_error(probs[: k + 1, open_rows], weights)
        settled = open_rows[(error <= tolerance).all(1)]
        mean = np.tensordot(weights[: k + 1] / weights[: k + 1].sum(), probs[: k + 1, settled], 1)
        logits[k + 1 :, settled] = np.log(np.maximum(mean, np.finfo(np.float32).tiny))
        used[settled] = k + 1
        open_rows = np.setdiff1d(open_rows, settled)
        if not len(open_rows):
            break
    assert logits is not None
    return logits, used


def expected_error(probs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How far the mean of the first k of K members may be from that of all, (N, C).

    probs (k, N, C), weights (K,). With r the weight of the members left and n effective numbers
    of members, the two means differ by r times the difference of two independent means:
    t·sd·r·√(1/n_seen + 1/n_left); for equal weights t·sd·√(1/k − 1/K).
    """
    k = len(probs)
    seen, left = weights[:k], weights[k:]
    mean = np.tensordot(seen / seen.sum(), probs, 1)
    spread = np.tensordot(seen / seen.sum(), (probs - mean) ** 2, 1) * k / (k - 1)
    numbers = [part.sum() ** 2 / np.square(part).sum() for part in (seen, left)]
    factor = left.sum() * np.sqrt(1 / numbers[0] + 1 / numbers[1])
    return student_t.ppf((1 + CONFIDENCE) / 2, k - 1) * factor * np.sqrt(spread)


def _one_member(model: ChainModel, data: TokenisedSet, k: int, rows: np.ndarray) -> np.ndarray:
    """Logits (n, C) of one member on some rows (n,), which are in rising order."""
    parts: list[np.ndarray] = []
    done: list[np.ndarray] = []
    with torch.inference_mode(), model.member(k):
        for index in data.by_length(default_budget(model), rows):
            parts.append(model(**data.batch(index).inputs)[0].cpu().numpy())
            done.append(index)
    return np.concatenate(parts)[np.argsort(np.concatenate(done), kind="stable")]
