"""A stack's figures: those of each task's own ensemble, honest where something is unknown.

Shapes: K members, N examples, C classes.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bayesian_lora.assessment import evaluation
from bayesian_lora.composition.stack import Stack, StackTask
from bayesian_lora.composition.stack_evaluation import (
    NO_NOISE,
    TaskFigures,
    evaluate_stack,
    table,
    task_figures,
)
from bayesian_lora.composition.stack_model import build_stack_model
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.glue_datasets import get_task
from bayesian_lora.data.synthetic import generate
from bayesian_lora.ensemble import load_model
from bayesian_lora.errors import InputError
from bayesian_lora.predict import Predictions
from tests.composition.stacks import make_stack

TASKS = {"first": ("synthetic", 2), "grammar": ("cola", 2), "pairs": ("mnli", 3)}


def of_registry(base: Path, members: int = 1) -> Stack:
    """Tasks of the registry under names of their own."""
    stack = make_stack(base, members=members, labels={name: c for name, (_, c) in TASKS.items()})
    tasks = {
        name: dataclasses.replace(task, data=TASKS[name][0]) for name, task in stack.tasks.items()
    }
    weights = np.arange(1.0, members + 1)
    return stack.changed(tasks=tasks, weights=weights / weights.sum())


def regression_stack(base: Path, members: int) -> Stack:
    """STS-B beside another task."""
    stack = make_stack(base, members=members, labels={"first": 2, "scores": 1})
    scores = StackTask("scores", "stsb", (), "gaussian", 32)
    first = dataclasses.replace(stack.tasks["first"], data="synthetic")
    return stack.changed(tasks={"first": first, "scores": scores})


def a_set(base: Path, classes: int, size: int = 30, split: str = "validation") -> TokenisedSet:
    """Synthetic sentences under random labels; scores where there are no classes."""
    draw, texts = np.random.default_rng(classes), generate(split, size=size).texts[0]
    labels = (
        draw.integers(0, classes, size)
        if classes > 1
        else draw.uniform(0, 5, size).astype(np.float32)
    )
    examples = Examples((texts,), labels, np.arange(size))
    return TokenisedSet(examples, AutoTokenizer.from_pretrained(base), 32)


def sets_of(base: Path) -> dict[str, dict[str, TokenisedSet]]:
    return {
        "first": {"validation": a_set(base, 2), "shifted": a_set(base, 2, 20, "shifted")},
        "grammar": {"validation": a_set(base, 2, 25)},
        "pairs": {"matched": a_set(base, 3)},
    }


@pytest.mark.parametrize("members", [1, 3])
def test_figures_are_those_of_the_tasks_own_ensemble(
    tiny_models: dict[str, Path], members: int
) -> None:
    """The other heads and the joint model change nothing."""
    base = tiny_models["bert"]
    stack, sets = of_registry(base, members), sets_of(base)
    figures = evaluate_stack(stack, sets)
    assert {task: list(splits) for task, splits in figures.items()} == {
        task: list(splits) for task, splits in sets.items()
    }
    for task, splits in sets.items():
        alone = stack.ensemble(task)
        model, spec = load_model(alone.provenance), get_task(stack.tasks[task].data)
        for split, data in splits.items():
            p, own = alone.predict_set(model, data), figures[task][split]
            expected = evaluation.evaluate(spec.metrics, False, p)
            for name, value in expected.items():
                assert own[name] == pytest.approx(value, abs=1e-5), (task, split, name)
            assert (own["n"], own["k"]) == (len(data), members)
            assert ("single" in own, "uncertainty" in own) == (members > 1, members > 1)
            if members > 1:
                single = evaluation.single_members(spec.metrics, False, p)
                mean = single["nll"]["mean"]
                assert own["single"]["nll"]["mean"] == pytest.approx(mean, abs=1e-5)
    assert "mcc" in figures["grammar"]["validation"]
    assert "mcc" not in figures["first"]["validation"]
    json.dumps(figures, allow_nan=False)


def test_predictions_are_given_to_be_stored(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack, sets, kept = of_registry(base, 2), sets_of(base), {}
    figures = evaluate_stack(
        stack, sets, on_predictions=lambda task, split, p: kept.update({(task, split): p})
    )
    assert sorted(kept) == sorted((t, s) for t, splits in sets.items() for s in splits)
    assert kept["pairs", "matched"].logits.shape == (2, 30, 3)
    for (task, split), p in kept.items():
        spec = get_task(stack.tasks[task].data)
        assert task_figures(spec, p) == figures[task][split]


def test_a_model_at_hand_is_given_the_stacks_members(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack, sets = of_registry(base), {"pairs": {"matched": a_set(base, 3)}}
    model = build_stack_model(of_registry(base, members=3))
    with torch.no_grad():
        for p in model.chain_parameters().values():
            p.zero_()
    assert evaluate_stack(stack, sets, model=model) == evaluate_stack(stack, sets)


@pytest.mark.parametrize("members", [1, 2])
def test_a_regression_without_its_noise_has_no_nll_and_says_why(
    tiny_models: dict[str, Path], members: int
) -> None:
    base = tiny_models["bert"]
    stack, data = regression_stack(base, members), a_set(base, 1)
    figures = evaluate_stack(stack, {"scores": {"validation": data}})["scores"]["validation"]
    assert figures["nll"] is None
    assert figures["nll_reason"] == NO_NOISE
    alone = stack.ensemble("scores")
    means = alone.predict_set(load_model(alone.provenance), data).logits[..., 0]
    rmse = np.sqrt(np.mean((stack.weights @ means - data.examples.labels) ** 2))
    assert figures["rmse"] == pytest.approx(rmse, rel=1e-5)
    assert -1 <= figures["pearson"] <= 1
    if members > 1:
        assert figures["single"]["nll"]["mean"] is None
        assert figures["single"]["rmse"]["mean"] > figures["rmse"]
    json.dumps(figures, allow_nan=False)


def test_a_known_noise_gives_the_nll() -> None:
    draw = np.random.default_rng(0)
    logits, noise = draw.normal(size=(2, 9, 1)), np.array([0.5, 2.0])
    p = Predictions(logits, draw.normal(size=9), np.full(2, 0.5), np.arange(9), noise)
    figures = task_figures(get_task("stsb"), p)
    densities = np.exp(-0.5 * ((p.labels - logits[..., 0]) / noise[:, None]) ** 2)
    densities /= noise[:, None] * np.sqrt(2 * np.pi)
    assert figures["nll"] == pytest.approx(-np.log(densities.mean(0)).mean())
    assert "nll_reason" not in figures


def test_where_the_law_is_known_figures_say_how_far_it_is(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    data = TokenisedSet(generate("validation", size=40), AutoTokenizer.from_pretrained(base), 32)
    figures = evaluate_stack(of_registry(base), {"first": {"validation": data}})
    truth = figures["first"]["validation"]["truth"]
    assert truth["excess"] > 0
    assert truth["bayes_nll"] < figures["first"]["validation"]["nll"]


def test_the_tables_columns_are_aligned_and_its_gaps_named() -> None:
    figures: TaskFigures = {
        "sst2": {"validation": {"n": 872, "k": 1, "accuracy": 0.84628, "nll": 0.33}},
        "cola": {
            "validation": {
                "n": 1043,
                "k": 1,
                "accuracy": 0.81,
                "mcc": None,
                "mcc_reason": "one class alone is predicted",
                "nll": 0.4171,
            }
        },
        "mnli": {"mismatched": {"n": 9832, "k": 1, "accuracy": 0.7571, "mcc": 0.5, "nll": 10.5}},
    }
    lines = table(figures)
    assert lines[0].split() == ["task", "split", "n", "accuracy", "mcc", "nll"]
    assert lines[1].split() == ["sst2", "validation", "872", "0.8463", "-", "0.3300"]
    assert lines[2].split() == ["cola", "validation", "1043", "0.8100", "n/a", "0.4171"]
    assert lines[3].split() == ["mnli", "mismatched", "9832", "0.7571", "0.5000", "10.5000"]
    assert {len(line) for line in lines[:4]} == {len(lines[0])}
    for name in ("n", "accuracy", "mcc", "nll"):
        stop = lines[0].index(f" {name}") + len(name) + 1
        assert all(line[stop : stop + 1] in ("", " ") for line in lines[:4])
    assert lines[4:] == ["cola validation: no mcc: one class alone is predicted"]


def test_mistakes_are_named(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack, data = of_registry(base), a_set(base, 2)
    outside = make_stack(base)  # its tasks are none of the registry's
    for wrong, words in (
        (lambda: evaluate_stack(stack, {}), "no sets to evaluate on"),
        (lambda: evaluate_stack(stack, {"first": {}}), "no sets to evaluate on"),
        (lambda: evaluate_stack(stack, {"sst2": {"validation": data}}), "none of the stack's"),
        (lambda: evaluate_stack(outside, {"long": {"validation": data}}), "'long' is unknown"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()
