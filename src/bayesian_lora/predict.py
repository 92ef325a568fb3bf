"""A model with members in its chain dimension + texts → logits of every member.

Shapes: K members, N examples, C classes, L tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bayesian_lora.data.batching import Batch, TokenisedSet
from bayesian_lora.metrics import ensemble_probs
from bayesian_lora.models.chain_lora import ChainModel

# Padded tokens of a forward pass, over all its members: large enough for the matrix products,
# small enough that activations stay within some hundred MiB, on CPUs within what is kept at hand.
TOKENS_PER_PASS = 16_384
TOKENS_PER_PASS_ON_CPU = 4_096
# Tokens of a member from which its own merged weights cost less than its updates beside others':
# merging reads and writes the target layers once, and a GPU must be filled by one member alone.
MERGE_FROM = {"cpu": 512}
MERGE_FROM_ELSEWHERE = 8_192


@dataclass(frozen=True)
class Predictions:
    """What every metric reads.

    logits (K, N, C) (for regression the means, C = 1), labels (N,), weights (K,) summing to 1,
    example_id (N,), noise_std (K,) for regression, true_probs (N, C) where the law is known.
    members_used (N,): of adaptive prediction, whose logits repeat the mean of the members used in
    the place of those left out (so measures of their disagreement are too small), else None.
    """

    logits: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    example_id: np.ndarray
    noise_std: np.ndarray | None = None
    true_probs: np.ndarray | None = None
    members_used: np.ndarray | None = None

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
    tokens_per_pass: int | None = None,
) -> np.ndarray:
    """Logits (K, N, C) of all members on all examples, float64 if the model is, else float32.

    Batches go by length, longest first; `on_batch` is told the number of examples done. Members
    go one by one, each merged into the weights, or all in one pass, whichever is cheaper.
    """
    budget = tokens_per_pass or default_budget(model)
    one_by_one = merging_pays(model, data)
    parts: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    with torch.inference_mode(), model.turn:
        budget = budget if one_by_one else max(1, budget // model.num_chains)
        for index in data.by_length(budget):
            batch = data.batch(index)
            parts.append(_each_member(model, batch) if one_by_one else _logits(model, batch))
            rows.append(index)
            on_batch(len(index))
    order = np.argsort(np.concatenate(rows), kind="stable")
    return np.concatenate(parts, axis=1)[:, order]


def default_budget(model: ChainModel) -> int:
    """Padded tokens of a forward pass."""
    on_cpu = model.device.type == "cpu" and model.flat
    return TOKENS_PER_PASS_ON_CPU if on_cpu else TOKENS_PER_PASS


def merging_pays(model: ChainModel, data: TokenisedSet) -> bool:
    """Whether a member alone, its update merged into the weights, costs less than beside others."""
    enough = MERGE_FROM.get(model.device.type, MERGE_FROM_ELSEWHERE)
    return not model.dropping and int(data.lengths.sum()) >= enough


def _each_member(model: ChainModel, batch: Batch) -> np.ndarray:
    """(K, b, C), member after member."""
    found: list[np.ndarray] = []
    for k in range(model.num_chains):
        with model.member(k):
            found.append(_logits(model, batch))
    return np.concatenate(found)


def _logits(model: ChainModel, batch: Batch) -> np.ndarray:
    return model(**batch.inputs).cpu().numpy()
