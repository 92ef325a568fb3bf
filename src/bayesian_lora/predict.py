"""A model with members in its chain dimension + texts → logits of every member.

Shapes: K members, N examples, C classes, L tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.metrics import ensemble_probs
from bayesian_lora.models.chain_lora import ChainModel

# Padded tokens of a forward pass, over all members: large enough for the matrix products,
# small enough that activations stay within some hundred MiB.
TOKENS_PER_PASS = 16_384


@dataclass(frozen=True)
class Predictions:
    """What every metric reads.

    logits (K, N, C) (for regression the means, C = 1), labels (N,), weights (K,) summing to 1,
    example_id (N,), noise_std (K,) for regression, true_probs (N, C) where the law is known.
    """

    logits: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    example_id: np.ndarray
    noise_std: np.ndarray | None = None
    true_probs: np.ndarray | None = None

    def __len__(self) -> int:
        return self.logits.shape[1]

    @property
    def num_members(self) -> int:
        """K."""
        return self.logits.shape[0]

    @property
    def probs(self) -> np.ndarray:
        """Class probabilities (N, C): the weighted mean of the members' probabilities."""
        return ensemble_probs(self.logits, self.weights)


def predict_logits(
    model: ChainModel,
    data: TokenisedSet,
    *,
    on_batch: Callable[[int], None] = lambda _: None,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> np.ndarray:
    """Logits (K, N, C) of all members on all examples, float64 if the model is, else float32.

    Batches go by length, longest first; `on_batch` is told the number of examples done.
    """
    budget = max(1, tokens_per_pass // model.num_chains)
    parts: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    with torch.inference_mode():
        for index in data.by_length(budget):
            batch = data.batch(index, model.device)
            parts.append(model(**batch.inputs).cpu().numpy())
            rows.append(index)
            on_batch(len(index))
    order = np.argsort(np.concatenate(rows), kind="stable")
    return np.concatenate(parts, axis=1)[:, order]
