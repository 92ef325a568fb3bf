"""Gates learn which task a text belongs to, from the mixture alone; and their posterior draws.

Shapes: K members, M = K chains, B examples, E experts.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bayesian_lora.composition.fit import Recipe
from bayesian_lora.composition.gated_model import gated_model
from bayesian_lora.composition.gates import (
    Gated,
    GateObjective,
    GateOptions,
    load_imbalance,
    train_gate,
)
from bayesian_lora.composition.stack import Part, Stack
from bayesian_lora.composition.stack_model import stack_state
from bayesian_lora.composition.task_data import TaskData
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.glue_datasets import get_task
from bayesian_lora.data.joined import JoinedSet
from bayesian_lora.data.synthetic import generate
from bayesian_lora.errors import InputError
from bayesian_lora.models.mixing import GateKind
from bayesian_lora.models.task_heads import TaskModel
from bayesian_lora.progress import Progress
from tests.composition.stacks import LABELS, make_data, make_stack

QUIET = Progress(quiet=True)
RECIPE = Recipe(epochs=4, batch_size=16, lr=3e-2, prior_std=10.0)


def told_apart(base: Path, size: int = 64) -> dict[str, TaskData]:
    """Two tasks whose texts differ at a glance: sentences in words, and spelt letter by letter."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    spec, found = get_task("synthetic"), {}
    sentences = generate("train", size=2 * size).texts[0]
    for i, (task, classes) in enumerate(LABELS.items()):
        own = sentences[i * size : (i + 1) * size]
        texts = [" ".join(text[:20].replace(" ", "")) for text in own] if i else own
        labels = np.array([len(text.split()) % classes for text in own], dtype=np.int64)
        data = TokenisedSet(Examples((texts,), labels, np.arange(size)), tokenizer, 48)
        found[task] = TaskData(spec, data, data, {"validation": data})
    return found


def trained(
    stack: Stack, data: Any, seed: int = 0, recipe: Recipe = RECIPE, **options: Any
) -> Gated:
    return train_gate(stack, data, GateOptions(**options), recipe, seed=seed, progress=QUIET)


def task_accuracy(gated: Gated, data: dict[str, TaskData]) -> float:
    model = gated.model()
    right = [
        np.exp(model.outputs(own.train).joint[..., model.slices[task]]).sum(-1) > 0.5
        for task, own in data.items()
    ]
    return float(np.mean(right))


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_a_gate_tells_tasks_apart_without_being_told(
    tiny_models: dict[str, Path], kind: GateKind
) -> None:
    base = tiny_models["bert"]
    stack, data = make_stack(base, members=2), told_apart(base)
    gated = trained(stack, data, kind=kind)
    assert task_accuracy(gated, data) > 0.9
    losses = [row["val/loss"] for row in gated.report["history"] if row["chain"] == 1]
    assert min(losses[1:]) < losses[0] - 0.01
    assert gated.report["validation_loss"][1] == pytest.approx(min(losses))
    assert gated.stack is stack, "frozen experts are the stack's own"
    assert gated.report["trained"]


@pytest.mark.parametrize("kind", ["adapter", "layer"])
def test_constant_gates_cannot_tell_tasks_apart(
    tiny_models: dict[str, Path], kind: GateKind
) -> None:
    base = tiny_models["distilbert"]
    data = told_apart(base, 32)
    model = trained(make_stack(base), data, kind=kind, balance=0.1).model()
    shares = np.concatenate([model.outputs(own.train).full[0] for own in data.values()])
    np.testing.assert_allclose(shares, shares[:1].repeat(len(shares), 0), atol=1e-6)
    assert abs(shares[0, 0] - 0.5) > 1e-3, "it learnt something"


def test_frozen_experts_stay_and_others_move_with_their_heads(
    tiny_models: dict[str, Path],
) -> None:
    base = tiny_models["bert"]
    stack, data = make_stack(base, members=2), told_apart(base, 32)
    short = Recipe(epochs=1, batch_size=16, lr=1e-2)
    frozen = trained(stack, data, kind="sequence", recipe=short)
    moved = trained(stack, data, kind="sequence", recipe=short, frozen=False)
    before, kept, after = (stack_state(s) for s in (stack, frozen.stack, moved.stack))
    for name, tensor in before.items():
        assert torch.equal(kept[name], tensor)
        assert not torch.equal(after[name], tensor), name
    assert all(name.startswith("gate.") for name in moved.state)
    loss = [min(g.report["validation_loss"]) for g in (frozen, moved)]
    assert loss[1] < loss[0]


def test_members_are_trained_as_if_alone(tiny_models: dict[str, Path]) -> None:
    """Draws, batches and noise of a member do not depend on how many there are."""
    base = tiny_models["bert"]
    data, short = told_apart(base, 32), Recipe(epochs=1, batch_size=16, lr=1e-2)
    both = make_stack(base, members=2)
    first = both.changed(
        factors={n: t[:1] for n, t in both.factors.items()},
        heads={t: {n: x[:1] for n, x in head.items()} for t, head in both.heads.items()},
        weights=np.ones(1),
    )
    options = {"kind": "layer", "posterior_steps": 3, "step_size": 1e-2}
    two, one = (trained(s, data, recipe=short, **options) for s in (both, first))
    for name, tensor in one.state.items():
        torch.testing.assert_close(two.state[name][:1], tensor, rtol=0, atol=1e-5)
        assert (two.state[name][1] - tensor[0]).abs().max() > 1e-3


def test_the_posterior_step_moves_the_gate_alone(tiny_models: dict[str, Path]) -> None:
    """By the noise √(2h/N) a step, where the data hardly speak."""
    base = tiny_models["bert"]
    stack, data = make_stack(base, members=3), told_apart(base, 32)
    short = Recipe(epochs=1, batch_size=32, lr=1e-2)
    fitted = trained(stack, data, kind="token", recipe=short)
    steps, h = 8, 1e-3
    drawn = trained(stack, data, kind="token", recipe=short, posterior_steps=steps, step_size=h)
    moved = torch.cat([(drawn.state[n] - fitted.state[n]).flatten() for n in fitted.state])
    expected = math.sqrt(steps * 2 * h / 64)
    assert 0.9 < float(moved.std()) / expected < 1.3
    posterior = drawn.report["posterior"]
    assert (posterior["num_examples"], posterior["steps"]) == (64, steps)
    assert "one draw a member" in posterior["exactness"]
    for name, tensor in stack_state(stack).items():
        assert torch.equal(stack_state(drawn.stack)[name], tensor)


def test_seeds_decide(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack, data = make_stack(base), told_apart(base, 32)
    short = Recipe(epochs=1, batch_size=16, lr=1e-2)
    same, again, other = (
        trained(stack, data, seed=s, kind="sequence", recipe=short).state for s in (1, 1, 2)
    )
    for name in same:
        assert torch.equal(same[name], again[name])
        assert not torch.equal(same[name], other[name])


def test_load_balance_is_least_for_equal_loads() -> None:
    equal = torch.full((1, 5, 4), 0.25)
    assert load_imbalance(equal).item() == pytest.approx(4 * math.log(4))
    one_hot = torch.eye(4)[None, [0, 1, 2, 3, 0, 1, 2, 3]]
    assert load_imbalance(one_hot).item() == pytest.approx(4 * math.log(4)), "of means, not texts"
    idle = torch.tensor([[[0.7, 0.29, 0.01]]])
    assert load_imbalance(idle).item() == pytest.approx(-math.log(0.7 * 0.29 * 0.01))


def test_the_balance_term_draws_loads_together(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack = make_stack(base, {"long": 1, "third": 3})
    parts = (
        *stack.parts[:1],
        Part("a", "", (1, 2), task="third"),
        Part("b", "", (2, 4), task="third"),
    )
    stack, data = stack.changed(parts=parts), told_apart(base, 32)
    shares = []
    for balance in (0.0, 5.0):
        model = trained(stack, data, kind="adapter", balance=balance).model()
        shares.append(model.outputs(data["long"].train).full[0, 0])
    free, balanced = (np.abs(share - 1 / 3).max() for share in shares)
    assert balanced < 0.5 * free


def test_the_objective_is_the_joint_likelihood_and_the_term(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    model = gated_model(make_stack(base, members=2), "token")
    data = {task: own.train for task, own in make_data(base, size=8).items()}
    joined = JoinedSet(data, model.slices)
    rows = np.array([[0, 9, 3], [12, 1, 2]])

    class Plan:
        tasks = tuple(LABELS)
        distillation = 0.0

    objective = GateObjective(model, joined, [Plan(), Plan()])
    batch = joined.batch(rows)
    joint = model(**batch.inputs)
    nll = objective.losses(joint, batch)
    for m, i in np.ndindex(2, 3):
        assert nll[m, i].item() == pytest.approx(
            -joint[m, i, joined.labels[rows[m, i]]].item(), rel=1e-5
        )
    objective.balance = 0.3
    joint = model(**batch.inputs)
    weights = model.weights
    assert weights is not None
    more = objective.losses(joint, batch) - nll
    wanted = -0.3 * weights.mean(1).log().sum(-1)
    torch.testing.assert_close(more, wanted[:, None].expand(2, 3), rtol=0, atol=1e-5)


def test_arrow_needs_no_training(tiny_models: dict[str, Path]) -> None:
    stack = make_stack(tiny_models["roberta"], members=2)
    gated = trained(stack, make_data(tiny_models["roberta"]), kind="arrow", top_k=1)
    assert gated.state == {}
    assert not gated.report["trained"]
    assert gated.model().gate.kind == "arrow"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "expert"}, "kind='expert': choose one of adapter"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"balance": -1.0}, "balance=-1.0"),
        ({"posterior_steps": -1}, "posterior_steps=-1"),
        ({"step_size": math.inf}, "step_size=inf"),
        ({"kind": "arrow", "frozen": False}, "has no parameters"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        GateOptions(**options)


def test_mistakes_are_told_before_the_model_is_built(tiny_models: dict[str, Path]) -> None:
    stack = make_stack(tiny_models["bert"])
    nowhere = stack.changed(model={**stack.model, "name": "/no/such/model"})
    data = make_data(tiny_models["bert"], size=8)
    with pytest.raises(InputError, match=r"'third'.* give its data"):
        trained(nowhere, {"long": data["long"]})
    with pytest.raises(InputError, match="top_k=5"):
        trained(nowhere, data, top_k=5)
    with pytest.raises(InputError, match="lower its step size"):
        trained(
            stack,
            data,
            kind="adapter",
            recipe=Recipe(1, 8, 1e-2),
            posterior_steps=9,
            step_size=1e38,
        )


@pytest.mark.parametrize("small", [False, True])
def test_balance_does_not_depend_on_how_a_batch_is_cut(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """One member alone, or beside three others, whose tokens fill the passes sooner."""
    base = tiny_models["bert"]
    data, short = told_apart(base, 32), Recipe(epochs=1, batch_size=16, lr=3e-2)
    four = make_stack(base, members=4)
    one = four.changed(
        factors={n: t[:1] for n, t in four.factors.items()},
        heads={t: {n: x[:1] for n, x in head.items()} for t, head in four.heads.items()},
        weights=np.ones(1),
    )
    whole, alone = (trained(s, data, recipe=short, kind="token", balance=2.0) for s in (four, one))
    if small:
        monkeypatch.setattr(TaskModel, "tokens_per_pass", 64)
        whole = trained(four, data, recipe=short, kind="token", balance=2.0)
    for name, tensor in alone.state.items():
        torch.testing.assert_close(whole.state[name][:1], tensor, rtol=0, atol=2e-5)


def test_the_posterior_says_how_hot_it_is(tiny_models: dict[str, Path]) -> None:
    """T_eff = 1 + hNv/2: more for longer steps; watching changes no draw."""
    base = tiny_models["bert"]
    stack, data = make_stack(base, members=2), told_apart(base, 32)
    short = Recipe(epochs=1, batch_size=8, lr=1e-2)
    heat = []
    for h in (1e-4, 1e-2):
        found = trained(
            stack, data, kind="layer", recipe=short, posterior_steps=6, step_size=h
        ).report["posterior"]
        assert len(found["t_eff"]) == 2
        assert min(found["t_eff"]) > 1
        assert "no uncertainty" not in found["exactness"]
        heat.append(np.mean(found["t_eff"]) - 1)
    assert heat[1] > 20 * heat[0]
    single = make_stack(base)
    posterior = trained(single, data, kind="layer", recipe=short, posterior_steps=1).report
    assert "a single draw, of which no uncertainty comes" in posterior["posterior"]["exactness"]
    assert posterior["posterior"]["t_eff"] is None


def test_a_fit_that_diverges_names_the_learning_rate_not_the_step_size(
    tiny_models: dict[str, Path],
) -> None:
    stack, data = make_stack(tiny_models["bert"]), make_data(tiny_models["bert"], size=16)
    with pytest.raises(InputError, match=r"^lr=1e\+30: ") as caught:
        trained(stack, data, kind="token", recipe=Recipe(1, 8, 1e30), posterior_steps=2)
    assert "step_size" not in str(caught.value)


def test_tasks_of_one_data_set_are_said_to_be_alike(tiny_models: dict[str, Path]) -> None:
    stack, data = make_stack(tiny_models["bert"]), make_data(tiny_models["bert"], size=16)
    tasks = {n: dataclasses.replace(t, data="same") for n, t in stack.tasks.items()}
    report = trained(stack.changed(tasks=tasks), data, kind="arrow").report
    assert report["same_data"] == [["long", "third"]]
    assert "same_data" not in trained(stack, data, kind="arrow").report
