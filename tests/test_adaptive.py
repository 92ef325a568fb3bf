"""Adaptive prediction: what it leaves out, what it promises, what it gives back.

Shapes: K members, N examples, C classes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from transformers import AutoTokenizer

from bayesian_lora.adaptive import FEWEST, adaptive_logits, expected_error
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.synthetic import generate
from bayesian_lora.errors import InputError
from bayesian_lora.metrics import ensemble_probs
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model
from bayesian_lora.predict import predict_logits

MEMBERS, EXAMPLES = 20, 60


@pytest.fixture
def data(tiny_models: dict[str, Path]) -> TokenisedSet:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["bert"])
    return TokenisedSet(generate("train", size=EXAMPLES), tokenizer, 64)


def build(folder: Path, labels: int = 2) -> HuggingFaceLora:
    """Members around one classifier, so that some inputs are settled and some are not."""
    model = build_huggingface_lora_model(str(folder), labels, rank=2, chains=MEMBERS)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.chain_parameters().values():
            centre = torch.empty(p.shape[1:]).normal_(0, 0.8, generator=rng)
            p.copy_(centre + torch.empty_like(p).normal_(0, 0.005, generator=rng))
    return model


def probabilities(logits: np.ndarray) -> np.ndarray:
    return softmax(logits.astype(np.float64), axis=-1)


def test_settled_inputs_get_fewer_members_and_their_mean(
    tiny_models: dict[str, Path], data: TokenisedSet
) -> None:
    model = build(tiny_models["bert"])
    weights = np.full(MEMBERS, 1 / MEMBERS)
    whole = predict_logits(model, data)
    logits, used = adaptive_logits(model, data, weights, 0.01)
    assert logits.shape == whole.shape
    assert used.min() >= FEWEST
    assert used.mean() < 0.8 * MEMBERS
    assert len(set(used.tolist())) > 2
    for i, k in enumerate(used):
        np.testing.assert_allclose(logits[:k, i], whole[:k, i], rtol=0, atol=1e-5)
        mean = probabilities(whole[:k, i]).mean(0)
        np.testing.assert_allclose(ensemble_probs(logits, weights)[i], mean, rtol=0, atol=1e-5)
    error = np.abs(ensemble_probs(logits, weights) - ensemble_probs(whole, weights)).max(1)
    assert (error <= 0.01).mean() >= 0.95


def test_a_small_tolerance_uses_every_member(
    tiny_models: dict[str, Path], data: TokenisedSet
) -> None:
    model = build(tiny_models["bert"])
    weights = np.full(MEMBERS, 1 / MEMBERS)
    logits, used = adaptive_logits(model, data, weights, 1e-9)
    assert (used == MEMBERS).all()
    np.testing.assert_allclose(logits, predict_logits(model, data), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_expected_error_covers_the_real_one(k: int, skewed: bool) -> None:
    """Of members drawn independently: the 95 % it says, within the test's own error."""
    rng = np.random.default_rng(0)
    weights = np.linspace(1, 3, MEMBERS) if skewed else np.ones(MEMBERS)
    weights /= weights.sum()
    probs = 0.5 + 0.05 * rng.standard_normal((MEMBERS, 20_000, 1))
    seen = np.tensordot(weights[:k] / weights[:k].sum(), probs[:k], 1)
    distance = np.abs(seen - np.tensordot(weights, probs, 1))
    covered = (distance <= expected_error(probs[:k], weights)).mean()
    assert covered == pytest.approx(0.95, abs=0.008)


def test_its_formula_for_equal_weights() -> None:
    probs = np.array([0.2, 0.4, 0.3, 0.5])[:, None, None]
    weights = np.full(10, 0.1)
    expected = 3.1824 * probs.std(ddof=1) * np.sqrt(1 / 4 - 1 / 10)  # t at 95 %, three degrees
    assert expected_error(probs, weights)[0, 0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tolerance", [0.0, -0.1, 1.0, float("nan")])
def test_a_tolerance_is_a_distance_of_probabilities(
    tiny_models: dict[str, Path], data: TokenisedSet, tolerance: float
) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        adaptive_logits(build(tiny_models["bert"]), data, np.full(MEMBERS, 0.05), tolerance)


def test_regression_has_none(tiny_models: dict[str, Path], data: TokenisedSet) -> None:
    with pytest.raises(InputError, match="regression has no probabilities"):
        adaptive_logits(build(tiny_models["bert"], 1), data, np.full(MEMBERS, 0.05), 0.01)
