"""Adaptive prediction: what it leaves out, what it promises, what it gives back.

Shapes: M chains, K members, N examples, C classes.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from transformers import AutoTokenizer

from bayesian_lora.adaptive import (
    FEWEST,
    adaptive_logits,
    check_tolerance,
    estimate,
    expected_error,
    fewest,
    member_order,
)
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.synthetic import generate
from bayesian_lora.errors import InputError
from bayesian_lora.metrics import ensemble_probs
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model
from bayesian_lora.predict import predict_logits

MEMBERS, EXAMPLES = 20, 60
EQUAL, CHAINS = np.full(MEMBERS, 1 / MEMBERS), np.arange(MEMBERS) % 4


@pytest.fixture
def data(tiny_models: dict[str, Path]) -> TokenisedSet:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["bert"])
    return TokenisedSet(generate("train", size=EXAMPLES), tokenizer, 64)


def build(folder: Path) -> HuggingFaceLora:
    """Members around one classifier, so that some inputs are settled and some are not."""
    model = build_huggingface_lora_model(str(folder), 2, rank=2, chains=MEMBERS)
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
    whole = predict_logits(model, data)
    logits, used = adaptive_logits(model, data, EQUAL, CHAINS, 0.01)
    assert logits.shape == whole.shape
    assert logits.dtype == whole.dtype
    assert used.min() >= FEWEST
    assert used.mean() < 0.8 * MEMBERS
    assert len(set(used.tolist())) > 2
    order = member_order(CHAINS)
    for i, k in enumerate(used):
        seen = order[:k]
        np.testing.assert_allclose(logits[seen, i], whole[seen, i], rtol=0, atol=1e-5)
        mean = estimate(probabilities(whole[seen, i])[:, None], EQUAL, CHAINS[order])[0]
        np.testing.assert_allclose(ensemble_probs(logits, EQUAL)[i], mean, rtol=0, atol=1e-5)
    error = np.abs(ensemble_probs(logits, EQUAL) - ensemble_probs(whole, EQUAL)).max(1)
    assert (error <= 0.01).mean() >= 0.95


def test_a_small_tolerance_uses_every_member(
    tiny_models: dict[str, Path], data: TokenisedSet
) -> None:
    model = build(tiny_models["bert"])
    logits, used = adaptive_logits(model, data, EQUAL, CHAINS, 1e-9)
    assert (used == MEMBERS).all()
    np.testing.assert_allclose(logits, predict_logits(model, data), rtol=0, atol=1e-5)


def test_members_of_no_weight_are_never_asked(
    tiny_models: dict[str, Path], data: TokenisedSet
) -> None:
    model = build(tiny_models["bert"])
    weights = np.where(np.arange(MEMBERS) < 8, 1 / 8, 0.0)
    logits, used = adaptive_logits(model, data, weights, CHAINS, 1e-9)
    assert (used == 8).all()
    whole = predict_logits(model, data)
    np.testing.assert_allclose(logits[:8], whole[:8], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        ensemble_probs(logits, weights), ensemble_probs(whole, weights), rtol=0, atol=1e-5
    )


def test_members_of_no_weight_hide_no_chain(
    tiny_models: dict[str, Path], data: TokenisedSet
) -> None:
    """A chain whose members are mostly without weight is still seen before an input may stop."""
    model = build(tiny_models["bert"])
    dropped = np.isin(np.arange(MEMBERS), member_order(CHAINS)[[3, 7, 11, 15]])
    weights = np.where(dropped, 0.0, 1.0) / (~dropped).sum()
    assert (CHAINS[dropped] == 3).all(), "all of one chain but its last"
    logits, used = adaptive_logits(model, data, weights, CHAINS, 0.3)
    assert used.min() == fewest(CHAINS)
    order = np.flatnonzero(~dropped)[member_order(CHAINS[~dropped])]
    assert set(CHAINS[order[: used.min()]]) == {0, 1, 2, 3}
    assert np.isfinite(logits).all()
    whole = ensemble_probs(predict_logits(model, data), weights)
    assert np.abs(ensemble_probs(logits, weights) - whole).max() < 0.3


@pytest.mark.parametrize("counts", [(5, 5, 5, 5), (20,), (3, 3, 2, 2), (7, 2), (2, 2, 2, 2, 2, 2)])
def test_every_beginning_of_the_order_is_spread_over_chains_and_time(
    counts: tuple[int, ...],
) -> None:
    draws = [(t, chain) for chain, n in enumerate(counts) for t in range(n)]
    chains = np.array([chain for _, chain in sorted(draws)])
    order = member_order(chains)
    assert sorted(order.tolist()) == list(range(len(chains)))
    for k in range(1, len(chains) + 1):
        seen = np.bincount(chains[order[:k]], minlength=len(counts))
        assert (seen >= np.minimum(counts, seen.max() - 1)).all()
    for chain, n in enumerate(counts):
        times = [
            int((chains[:member] == chain).sum()) for member in order if chains[member] == chain
        ]
        assert sorted(times) == list(range(n))
        if n >= 5:
            assert min(abs(a - b) for a, b in pairwise(times[:-1])) >= 2


def settle(probs: np.ndarray, chains: np.ndarray) -> tuple[float, float]:
    """Share of inputs (K, N, 1) whose estimate, at the first k where they settle, is off; K/k."""
    order, members = member_order(chains), len(probs)
    seen, weights, c = probs[order], np.full(members, 1 / members), chains[order]
    used, found = np.full(probs.shape[1], members), probs.mean(0)[:, 0]
    for k in range(fewest(chains), members):
        still = np.flatnonzero(used == members)
        error = expected_error(seen[:k, still], weights, c)[:, 0]
        rows = still[error <= 0.01]
        used[rows], found[rows] = k, estimate(seen[:k, rows], weights, c)[:, 0]
    off = np.abs(found - probs.mean(0)[:, 0]) > 0.01
    return float(off.mean()), members / float(used.mean())


@pytest.mark.parametrize("spread", [0.003, 0.01, 0.02, 0.03, 0.1])
@pytest.mark.parametrize("m", [1, 4, 10])
def test_looking_at_every_k_breaks_the_promise_for_few(spread: float, m: int) -> None:
    rng = np.random.default_rng(0)
    off, _ = settle(0.5 + spread * rng.standard_normal((MEMBERS, 4_000, 1)), np.arange(MEMBERS) % m)
    assert off <= 0.03


def test_chains_in_modes_of_their_own_cost_nothing() -> None:
    """Far apart, and one of them far from all others, on every input another one."""
    rng, m = np.random.default_rng(0), 4
    chains = np.arange(MEMBERS) % m
    within = 0.006 * rng.standard_normal((MEMBERS, 2_000, 1))
    modes = 0.1 * rng.standard_normal((m, 2_000, 1))
    lone = np.zeros((m, 2_000, 1))
    lone[rng.integers(m, size=2_000), np.arange(2_000)] = 0.3
    for centre in (modes, lone):
        off, saved = settle(0.5 + centre[chains] + within, chains)
        assert off <= 0.02
        assert saved > 2


def test_draws_like_their_neighbours_do_not_pass_for_settled() -> None:
    """One chain that drifts: neighbours agree, and their mean is not that of all."""
    rng = np.random.default_rng(0)
    drift = np.linspace(-0.05, 0.05, MEMBERS)[:, None, None]
    probs = 0.5 + drift + 0.002 * rng.standard_normal((MEMBERS, 2_000, 1))
    chains, weights = np.zeros(MEMBERS, dtype=int), EQUAL
    assert settle(probs, chains)[0] <= 0.01
    as_they_come = expected_error(probs[:4], weights, chains)[:, 0]
    assert (np.abs(probs[:4].mean(0) - probs.mean(0))[:, 0] > as_they_come).all()


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("k", [5, 8])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_expected_error_covers_the_real_one(k: int, skewed: bool, alike: bool) -> None:
    """Of members drawn independently around chains' own means: the 99 % it says.

    Also where inputs differ in their spread, which is then as uncertain as its prior says.
    """
    rng, n = np.random.default_rng(0), 20_000
    weights = np.linspace(1, 3, MEMBERS) if skewed else np.ones(MEMBERS)
    weights /= weights.sum()
    spread = 0.02 if alike else 0.02 / np.sqrt(rng.chisquare(6, (n, 1)) / 6)
    modes = 0.05 * rng.standard_normal((4, n, 1))
    probs = 0.5 + modes[CHAINS] + spread * rng.standard_normal((MEMBERS, n, 1))
    distance = np.abs(estimate(probs[:k], weights, CHAINS) - np.tensordot(weights, probs, 1))
    covered = (distance <= expected_error(probs[:k], weights, CHAINS)).mean()
    assert covered == pytest.approx(0.99, abs=0.006)


def test_its_formula_for_one_input() -> None:
    """No other input to learn from: Student's t alone."""
    probs = np.array([0.2, 0.4, 0.3, 0.5])[:, None, None]
    weights, one = np.full(10, 0.1), np.zeros(10, dtype=int)
    expected = 5.8409 * probs.std(ddof=1) * np.sqrt(1 / 4 - 1 / 10)  # t at 99 %, three degrees
    assert expected_error(probs, weights, one)[0, 0] == pytest.approx(expected, rel=1e-4)
    two = np.arange(10) % 2  # 0.2, 0.3 and 0.4, 0.5: each of variance 0.005, two degrees
    expected = 9.9248 * np.sqrt(0.005) * np.sqrt((1 / 2 - 1 / 5) / 2)
    assert expected_error(probs, weights, two)[0, 0] == pytest.approx(expected, rel=1e-4)
    uneven = np.array([0, 0, 0, 1, *[0] * 4, 1, 1])  # weights .7 and .3, 3 of 7 and 1 of 3 seen
    own = 0.49 * (1 / 3 - 1 / 7) + 0.09 * (1 - 1 / 3)
    variance = probs[:3].var(ddof=1)
    expected = 9.9248 * np.sqrt(variance * own)
    assert expected_error(probs, weights, uneven)[0, 0] == pytest.approx(expected, rel=1e-4)
    assert estimate(probs, weights, uneven)[0, 0] == pytest.approx(0.7 * 0.3 + 0.3 * 0.5)


def test_an_inputs_spread_is_drawn_to_that_of_the_others() -> None:
    """Equal spreads are taken for one; where they differ without bound, each stays its own."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((5, 2_000, 1))
    chains, weights = np.arange(MEMBERS) % 4, EQUAL
    alike = expected_error(0.5 + 0.01 * noise, weights, chains)
    assert alike.max() / alike.min() < 1.7
    known = 2.576 * 0.01 * np.sqrt((3 * (1 - 1 / 5) + (1 / 2 - 1 / 5)) / 16)
    assert np.median(alike) == pytest.approx(known, rel=0.1)
    wild = np.exp(6 * rng.standard_normal((2_000, 1))) * 1e-6
    own = expected_error(0.5 + wild * noise, weights, chains)
    assert np.corrcoef(np.log(own[:, 0]), np.log(wild[:, 0]))[0, 1] > 0.9


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 1.0, float("nan"), float("inf")])
def test_a_tolerance_is_a_distance_of_probabilities(tolerance: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        check_tolerance(tolerance, CHAINS)


@pytest.mark.parametrize(("members", "m", "first"), [(1, 1, 4), (4, 2, 4), (8, 8, 9)])
def test_too_few_members_to_leave_any_out(members: int, m: int, first: int) -> None:
    with pytest.raises(InputError, match=f"with {members} members .* at least {first} "):
        check_tolerance(0.01, np.arange(members) % m)
    check_tolerance(0.01, np.arange(first + 1) % m)
