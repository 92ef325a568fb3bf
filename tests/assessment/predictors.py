"""Predictions made of random numbers, of classes and of scores.

Shapes: K members, N examples, C classes.
"""

from typing import Any

import numpy as np

from bayesian_lora.predict import Predictions

CLASSES = ("accuracy", "nll", "ece", "brier", "adaptive_ece", "classwise_ece", "aurc")
PARTS = ("brier_reliability", "brier_resolution", "brier_uncertainty", "brier_within_bin")
SCORES = ("nll", "rmse", "crps", "coverage_0.5", "coverage_0.9", "coverage_0.95")


def classifiers(
    k: int = 4, n: int = 200, classes: int = 2, seed: int = 0, scale: float = 1.0
) -> Predictions:
    """Members that share most of what they say; the labels of an n depend on nothing else."""
    labels = np.random.default_rng(n).integers(classes, size=n)
    rng = np.random.default_rng(1000 + seed)
    shared = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    logits = scale * (shared + 0.5 * rng.normal(size=(k, n, classes)))
    return Predictions(logits, labels, np.full(k, 1 / k), np.arange(n))


def gaussians(k: int = 4, n: int = 200, seed: int = 0) -> Predictions:
    """Means of scores from 0 to 5, each member with its own noise."""
    labels = np.random.default_rng(n).uniform(0, 5, n).astype(np.float32)
    rng = np.random.default_rng(1000 + seed)
    logits = labels[None, :, None] + rng.normal(size=(k, n, 1))
    return Predictions(logits, labels, np.full(k, 1 / k), np.arange(n), np.linspace(0.5, 2.0, k))


def first(p: Predictions, k: int) -> Predictions:
    """The first k members, their weights scaled to sum to 1."""
    noise = None if p.noise_std is None else p.noise_std[:k]
    weights = p.weights[:k] / p.weights[:k].sum()
    return Predictions(p.logits[:k], p.labels, weights, p.example_id, noise)


def nulls_without_reason(value: Any, where: str = "") -> list[str]:
    """Places of a null that has neither a reason of its own nor of all around it."""
    if not isinstance(value, dict):
        return []
    bare = [
        f"{where}.{key}"
        for key, v in value.items()
        if v is None and not value.get("reason") and not value.get(f"{key}_reason")
    ]
    return bare + [x for k, v in value.items() for x in nulls_without_reason(v, f"{where}.{k}")]
