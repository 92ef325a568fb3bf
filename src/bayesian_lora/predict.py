"""A model with members in its chain dimension + texts → logits of every member.

Shapes: K members, N examples, C classes, L tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.errors import InputError
from bayesian_lora.metrics import ensemble_probs, uncertainty_per_example
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.scores.regression_scores import mixture_quantiles

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

    @property
    def predicted(self) -> np.ndarray:
        """(N,) numbers of the most probable classes; of a regression the members' mean."""
        if self.noise_std is not None or self.logits.shape[2] == 1:
            return self.weights @ self.logits[..., 0].astype(np.float64)
        return self.probs.argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """(N,) the probability of the most probable class.

        Raises:
            InputError: of a regression, which has no classes.
        """
        self._need_classes("confidence")
        return self.probs.max(axis=1)

    @property
    def uncertainty(self) -> dict[str, np.ndarray]:
        """predictive_entropy, expected_entropy and mutual_information, each (N,), in nats.

        See `metrics.uncertainty_per_example`. The last two need every member on every input: with
        members left out (`members_used`) they are off.

        Raises:
            InputError: of a regression, which has no classes.
        """
        self._need_classes("uncertainty")
        return uncertainty_per_example(self.logits, self.weights)

    @property
    def members_sd(self) -> np.ndarray:
        """(N,) of a regression: the deviation of the members' means from `predicted`."""
        means = self.logits[..., 0].astype(np.float64)
        return np.sqrt(self.weights @ np.square(means - self.predicted))

    @property
    def sd(self) -> np.ndarray | None:
        """(N,) of a regression's mixture: √(Σ_k w_k s_k² + members_sd²), in the label's unit.

        None of members that carry no noise_std.
        """
        if self.noise_std is None:
            return None
        return np.sqrt(self.weights @ np.square(self.noise_std) + np.square(self.members_sd))

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray] | None:
        """(lower, upper), each (N,): the quantiles (1 ∓ level)/2 of a regression's mixture.

        In the label's unit. None of members that
        carry no noise_std.
        """
        if self.noise_std is None:
            return None
        shares = ((1 - level) / 2, (1 + level) / 2)
        low, high = mixture_quantiles(self.logits[..., 0], self.noise_std, self.weights, shares)
        return low, high

    def _need_classes(self, what: str) -> None:
        if self.noise_std is not None or self.logits.shape[2] == 1:
            raise InputError(f"{what}: a regression has no classes; use predicted, sd or interval")


def predict_logits(
    model: ChainModel,
    data: TokenisedSet,
    *,
    on_done: Callable[[int], None] = lambda _: None,
    tokens_per_pass: int | None = None,
) -> np.ndarray:
    """Logits (K, N, C) of all members on all examples, float64 if the model is, else float32.

    Batches go by length, longest first. Members go one by one, each merged into the weights, or
    all in one pass, whichever is cheaper. `on_done` is told how many of the K·N logits came.
    """
    if merging_pays(model, data):
        with model.turn:
            members = range(model.num_chains)
            found = [member_logits(model, data, k, None, on_done, tokens_per_pass) for k in members]
        return np.stack(found)
    with torch.inference_mode(), model.turn:
        budget = max(1, (tokens_per_pass or model.tokens_per_pass) // model.num_chains)
        return _in_order(model, data, budget, None, on_done)


def member_logits(
    model: ChainModel,
    data: TokenisedSet,
    k: int,
    rows: np.ndarray | None = None,
    on_done: Callable[[int], None] = lambda _: None,
    tokens_per_pass: int | None = None,
) -> np.ndarray:
    """Logits (n, C) of member k, merged into the weights, on all examples or some rows (n,).

    They come in the order of the set.
    """
    with torch.inference_mode(), model.member(k):
        return _in_order(model, data, tokens_per_pass or model.tokens_per_pass, rows, on_done)[0]


def merging_pays(model: ChainModel, data: TokenisedSet) -> bool:
    """Whether a member alone, its update merged into the weights, costs less than beside others."""
    enough = MERGE_FROM.get(model.device.type, MERGE_FROM_ELSEWHERE)
    return not model.dropping and int(data.lengths.sum()) >= enough


def _in_order(
    model: ChainModel,
    data: TokenisedSet,
    budget: int,
    rows: np.ndarray | None,
    on_done: Callable[[int], None],
) -> np.ndarray:
    """(K, n, C) in the order of the set, from batches of at most `budget` padded tokens."""
    parts: list[np.ndarray] = []
    done: list[np.ndarray] = []
    for index in data.by_length(budget, rows):
        parts.append(model(**data.batch(index).inputs).cpu().numpy())
        done.append(index)
        on_done(len(index) * model.num_chains)
    return np.concatenate(parts, axis=1)[:, np.argsort(np.concatenate(done), kind="stable")]
