"""Weights of a stack's adapters: an exact gradient, a planted optimum, the stack brought to them.

Shapes: K members, P parts, N examples, C classes.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from transformers import AutoTokenizer

from bayesian_lora.composition.fitting import WeightLoss, fit_weights, reweighted
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_model import build_stack_model, stack_state, task_predictions
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.synthetic import generate
from bayesian_lora.errors import InputError
from bayesian_lora.metrics import ensemble_log_probs
from tests.composition.stacks import make_sets, make_stack


def exact(stack: Stack) -> Stack:
    """Computed in float64."""
    return stack.changed(model={**stack.model, "dtype": "float64"})


def uneven(stack: Stack) -> Stack:
    """Members that do not count alike, parts that do not stand at 1."""
    weights = np.arange(1.0, len(stack) + 1)
    return reweighted(stack.changed(weights=weights / weights.sum()), [0.7, -1.3])


def nll(stack: Stack, sets: Mapping[str, TokenisedSet]) -> dict[str, float]:
    """Each task's mean NLL as prediction has it."""
    model = build_stack_model(stack)
    found = {}
    for task, data in sets.items():
        p = task_predictions(model, stack, task, data)
        log_probs = ensemble_log_probs(p.logits, p.weights)
        found[task] = float(-log_probs[np.arange(len(p)), p.labels].mean())
    return found


def planted(stack: Stack, base: Path, copies: int = 20) -> dict[str, TokenisedSet]:
    """Sentences repeated under all labels, as often as this stack's probabilities say."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), build_stack_model(stack)
    sentences = generate("train", size=8).texts[0]
    found = {}
    for task in stack.tasks:
        plain = Examples((sentences,), np.zeros(8, dtype=np.int64), np.arange(8))
        law = task_predictions(model, stack, task, TokenisedSet(plain, tokenizer, 32)).probs
        counts = np.rint(law * copies).astype(int)
        texts = [
            text for text, row in zip(sentences, counts, strict=True) for _ in range(row.sum())
        ]
        labels = np.concatenate([np.repeat(np.arange(len(row)), row) for row in counts])
        examples = Examples((texts,), labels, np.arange(len(texts)))
        found[task] = TokenisedSet(examples, tokenizer, 32)
    return found


@pytest.mark.parametrize("members", [1, 3])
def test_the_gradient_is_that_of_finite_differences(
    tiny_models: dict[str, Path], members: int
) -> None:
    base = tiny_models["bert"]
    ranks = {"long": 1, "third": 2}
    stack = exact(uneven(make_stack(base, ranks, members)))
    loss = WeightLoss(stack, make_sets(base, size=12), build_stack_model(stack))
    at = np.array([0.4, 1.1])
    _, gradient = loss(at)
    numeric = np.asarray(approx_fprime(at, lambda w: loss(w)[0].mean(), 1e-6))
    assert np.abs(gradient).min() > 1e-3
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_nll_of_the_stack_at_these_weights(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack, sets = exact(uneven(make_stack(base, members=2))), make_sets(base, size=12)
    loss = WeightLoss(stack, sets, build_stack_model(stack))
    for weights in ([0.7, -1.3], [1.4, 0.2]):
        expected = nll(reweighted(stack, weights), sets)
        np.testing.assert_allclose(loss(np.array(weights))[0], list(expected.values()), rtol=1e-6)


def test_passes_of_any_size_give_the_same_loss_and_gradient(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_models["bert"]
    stack, sets = exact(make_stack(base, members=2)), make_sets(base, size=12)
    loss, at = WeightLoss(stack, sets, build_stack_model(stack)), np.array([0.4, 1.1])
    whole = loss(at)
    monkeypatch.setattr(WeightLoss, "_budget", 40)
    for part, all_at_once in zip(loss(at), whole, strict=True):
        np.testing.assert_allclose(part, all_at_once, rtol=1e-9)


def test_a_planted_optimum_is_found(tiny_models: dict[str, Path]) -> None:
    """Cross-entropy against a stack's own probabilities is least at its own weights."""
    base = tiny_models["bert"]
    stack, truth = exact(make_stack(base)), [1.4, 0.5]
    sets = planted(reweighted(stack, truth), base)
    found = fit_weights(stack, sets, prior_std=float("inf"))
    assert found.converged
    np.testing.assert_allclose(found.weights, truth, atol=0.15)  # counts are rounded laws
    after = nll(reweighted(stack, found.weights), sets)
    at_truth = nll(reweighted(stack, truth), sets)
    assert np.mean(list(after.values())) <= np.mean(list(at_truth.values())) + 1e-9
    assert found.loss_after < found.loss_before - 0.01
    np.testing.assert_allclose(list(found.nll_after.values()), list(after.values()), rtol=1e-5)
    np.testing.assert_allclose(list(found.nll_before.values()), list(nll(stack, sets).values()))


def test_the_weights_balance_the_data_and_the_prior(tiny_models: dict[str, Path]) -> None:
    """∂NLL/∂w + (w − start)/(σ²N) = 0; a narrow prior holds the weights at the start."""
    base, begin = tiny_models["bert"], np.array([0.8, 1.2])
    stack, sets = exact(uneven(make_stack(base, members=2))), make_sets(base, size=12)
    loss, distance = WeightLoss(stack, sets, build_stack_model(stack)), {}
    for std in (1e-2, 1.0):
        found = fit_weights(stack, sets, start=begin.tolist(), prior_std=std)
        pull = (found.weights - begin) / (std**2 * 24)
        np.testing.assert_allclose(loss(found.weights)[1], -pull, atol=1e-5)
        assert np.abs(pull).max() > 1e-3
        distance[std] = np.abs(found.weights - begin).max()
        assert found.start.tolist() == begin.tolist()
    assert distance[1e-2] < 1e-2 < 0.1 < distance[1.0]


def test_a_models_tensors_are_the_stacks_again_after(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack = make_stack(base)
    model = build_stack_model(stack)
    fit_weights(stack, make_sets(base, size=8), max_steps=2, model=model)
    own = {name: p.detach() for name, p in model.chain_parameters().items()}
    assert all(torch.equal(own[name], tensor) for name, tensor in stack_state(stack).items())


def test_a_reweighted_stack_has_weighted_updates(tiny_models: dict[str, Path]) -> None:
    stack = make_stack(tiny_models["bert"], {"long": 1, "third": 2}, members=2)
    twice = reweighted(reweighted(stack, [0.5, 3.0]), [-0.25, 1.5], {"fit": {"converged": True}})
    assert [part.weight for part in twice.parts] == [-0.25, 1.5]
    assert twice.facts["kind"] == "fitted"
    assert twice.facts["fit"] == {"converged": True}
    for name, b in stack.factors.items():
        if name.endswith(".lora_B"):
            a = stack.factors[f"{name[:-1]}A"]
            expected = -0.25 * b[..., :1] @ a[:, :1] + 1.5 * b[..., 1:] @ a[:, 1:]
            after = twice.factors[name] @ twice.factors[f"{name[:-1]}A"]
            torch.testing.assert_close(after, expected)
        else:
            assert torch.equal(twice.factors[name], b)


def test_facts_are_json(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack = make_stack(base)
    sets = {"third": make_sets(base, size=8)["third"]}
    found = fit_weights(stack, sets, prior_std=float("inf"), max_steps=1)
    after = reweighted(stack, found.weights, found.facts())
    facts = json.loads(json.dumps(dict(after.facts), allow_nan=False))
    assert facts["kind"] == "fitted"
    assert facts["examples"] == {"third": 8}
    assert facts["weights"] == found.weights.tolist()
    assert facts["prior_std"] is None


def without_columns(stack: Stack) -> Stack:
    parts = [type(part)(part.name, part.source, (0, 0)) for part in stack.parts]
    return stack.changed(parts=tuple(parts))


def test_mistakes_are_answered_before_any_work(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack, sets = make_stack(base), make_sets(base, size=4)
    off = reweighted(stack, [1.0, 0.0])
    third = dataclasses.replace(stack.tasks["third"], likelihood="gaussian")
    regression = stack.changed(tasks={**stack.tasks, "third": third})
    for wrong, words in (
        (lambda: fit_weights(stack, {}), "no examples"),
        (lambda: fit_weights(stack, {"cola": sets["long"]}), "'cola' is none of the stack's"),
        (lambda: fit_weights(regression, {"third": sets["third"]}), "is a regression"),
        (lambda: fit_weights(stack, {"long": sets["long"]}, start=[1.0]), "2 parts need one"),
        (lambda: fit_weights(stack, {"long": sets["long"]}, prior_std=0.0), "prior_std=0"),
        (lambda: fit_weights(stack, {"long": sets["long"]}, max_steps=0), "max_steps=0"),
        (lambda: fit_weights(without_columns(stack), sets), "no columns of its own"),
        (lambda: fit_weights(off, sets), "has weight 0"),
        (lambda: reweighted(stack, [1.0, 2.0, 3.0]), "need one finite number each"),
        (lambda: reweighted(stack, [1.0, float("nan")]), "need one finite number each"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()
