"""Chains fitted to several tasks at once do what their plans say, and nothing else."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesian_lora.composition.fit import ChainPlan, FitReport, Recipe, fit
from bayesian_lora.composition.stack_model import build_stack_model, stack_state
from bayesian_lora.composition.stack_objective import StackObjective
from bayesian_lora.data.joined import JoinedSet
from bayesian_lora.errors import InputError
from bayesian_lora.models.task_heads import TaskModel
from bayesian_lora.progress import Progress
from tests.composition.stacks import make_data, make_sets, make_stack

RECIPE = Recipe(epochs=2, batch_size=16, lr=5e-3, steps_per_epoch=3)
PLANS = [
    ChainPlan(("long",)),
    ChainPlan(("long", "third"), columns=(1, 2)),
    ChainPlan(("long", "third"), columns=(0, 0), mixing="sum"),
    ChainPlan(("third",), mixing="sum"),
]


def fitted(
    base: Path, plans: list[ChainPlan], recipe: Recipe = RECIPE
) -> tuple[TaskModel, dict[str, Tensor], FitReport]:
    """The model, what it began with, and the report."""
    model = build_stack_model(make_stack(base))
    for tensor in model.chain_parameters().values():  # every chain from the same start
        tensor.data = tensor.data.repeat(len(plans), *[1] * (tensor.ndim - 1))
    before = {n: p.detach().clone() for n, p in model.chain_parameters().items()}
    report = fit(model, make_data(base), plans, recipe, seed=0, progress=Progress(quiet=True))
    return model, before, report


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_a_plan_keeps_stays_to_the_last_bit(tiny_models: dict[str, Path], family: str) -> None:
    model, before, _ = fitted(tiny_models[family], PLANS)
    for name, after in model.chain_parameters().items():
        moved = after.detach() != before[name]
        if name.endswith(".lora_A"):
            assert moved[0].any(1).all()
            assert not moved[1, 0].any()
            assert moved[1, 1].any()
            assert not moved[2].any()
        elif name.endswith(".lora_B"):
            assert moved[0].any(0).all()
            assert not moved[1, :, 0].any()
            assert moved[1, :, 1].any()
            assert not moved[2].any()
        else:
            trains = [".long." in name, True, True, ".third." in name]
            assert [bool(m.any()) for m in moved] == trains, name


def test_a_chain_among_others_is_the_chain_alone(tiny_models: dict[str, Path]) -> None:
    """Chain 0, whose generator it is either way; another task beside it changes no bit of note."""
    both, _, _ = fitted(tiny_models["bert"], PLANS)
    alone, _, _ = fitted(tiny_models["bert"], PLANS[:1])
    for name, tensor in alone.chain_parameters().items():
        torch.testing.assert_close(both.chain_parameters()[name][:1], tensor, atol=2e-4, rtol=1e-3)


def test_fitting_lowers_the_held_out_loss_and_keeps_the_best_epoch(
    tiny_models: dict[str, Path],
) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=6, lr=1e-2, patience=None)
    model, _, report = fitted(tiny_models["bert"], PLANS, recipe)
    assert report.steps == 18
    by_chain = [[r for r in report.history if r["chain"] == m] for m in range(4)]
    for m, rows in enumerate(by_chain):
        losses = [row["val/loss"] for row in rows]
        if m != 2:  # whose factors are all kept
            assert min(losses) < losses[0]
        assert report.best_epoch[m] == int(np.argmin(losses))
        assert report.validation_loss[m] == pytest.approx(min(losses))
        assert [row["trainer/global_step"] for row in rows] == [3, 6, 9, 12, 15, 18]
    sets = make_sets(tiny_models["bert"])
    goal = StackObjective(model, JoinedSet(sets, model.slices), PLANS)
    now, accuracy = goal.score(JoinedSet(sets, model.slices))
    np.testing.assert_allclose(now.numpy(), report.validation_loss, rtol=1e-5)
    best = [rows[epoch]["val/acc"] for rows, epoch in zip(by_chain, report.best_epoch, strict=True)]
    np.testing.assert_allclose(accuracy.numpy(), best)


def test_an_example_is_scored_by_its_own_task_alone(tiny_models: dict[str, Path]) -> None:
    """Against softmax over the slices, by hand; the score weighs tasks alike."""
    model = build_stack_model(make_stack(tiny_models["bert"]))
    sets = make_sets(tiny_models["bert"], size=24)
    joined = JoinedSet(sets, model.slices)
    goal = StackObjective(model, joined, [ChainPlan(("long", "third"))])
    rows = np.array([[0, 1, 30, 31]])
    loss = goal.closure(rows)()
    batch = joined.batch(rows)
    logits = model(**batch.inputs)[0]
    wanted = [
        -logits[i, part].log_softmax(-1)[sets[task].labels[row]]
        for i, (task, row) in enumerate([("long", 0), ("long", 1), ("third", 6), ("third", 7)])
        for part in [model.slices[task]]
    ]
    torch.testing.assert_close(loss, torch.stack(wanted).mean()[None].detach(), atol=1e-5, rtol=0)
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


def test_distillation_adds_the_divergence_from_the_teacher(tiny_models: dict[str, Path]) -> None:
    model = build_stack_model(make_stack(tiny_models["bert"]))
    joined = JoinedSet(make_sets(tiny_models["bert"], size=24), model.slices)
    rows = np.array([[0, 1, 30, 31]])
    logits = model(**joined.batch(rows).inputs).detach()[0].double()
    same = torch.zeros(len(joined), 5, dtype=torch.float64)
    other = torch.zeros_like(same)
    kl = torch.zeros(4, dtype=torch.float64)
    for part in model.slices.values():
        q = logits[:, part].log_softmax(-1)
        same[rows[0], part] = q
        p = torch.full_like(q, 1 / q.shape[1]).log()
        other[:, part] = p[0]
        kl += (p.exp() * (p - q)).sum(-1)
    plan = [ChainPlan(("long", "third"), distillation=0.7)]
    plain, at_teacher, away = (
        float(StackObjective(model, joined, plan, t).closure(rows)()) for t in (None, same, other)
    )
    assert at_teacher == pytest.approx(plain, abs=1e-5)
    assert away == pytest.approx(plain + 0.7 * float(kl.mean()), rel=1e-4)


def test_the_prior_counts_a_chain_s_own_examples(tiny_models: dict[str, Path]) -> None:
    """θ/(Nσ²) with N of the chain's tasks: the step hook sees it before Adam does."""
    base = tiny_models["bert"]
    model = build_stack_model(make_stack(base, members=2))
    seen: dict[str, Tensor] = {}

    def penalty() -> Tensor:
        for name, p in model.chain_parameters().items():
            assert p.grad is not None
            seen.setdefault(name, p.grad.clone())
        return torch.zeros(2, requires_grad=True)

    class Flat(StackObjective):
        """No likelihood: what is left of the gradient is the prior's."""

        def losses(self, outputs: Tensor, batch: object) -> Tensor:
            return 0 * outputs.sum(-1)

    plans = [ChainPlan(("long",)), ChainPlan(("long", "third"), mixing="sum")]
    before = stack_state(make_stack(base, members=2))
    recipe = dataclasses.replace(RECIPE, prior_std=0.5, epochs=1, steps_per_epoch=1)
    data = make_data(base)
    fit(
        model,
        data,
        plans,
        recipe,
        seed=0,
        progress=Progress(quiet=True),
        objective=Flat,
        penalty=penalty,
    )
    name = next(n for n in seen if n.endswith("lora_A"))
    for m, count in enumerate((48, 96)):
        torch.testing.assert_close(seen[name][m], before[name][m] / (count * 0.25))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (ChainPlan(()), "fitted to no task"),
        (ChainPlan(("other",)), "task 'other': not carried; there are long, third"),
    ],
)
def test_plans_that_cannot_be(tiny_models: dict[str, Path], plan: ChainPlan, words: str) -> None:
    with pytest.raises(InputError, match=words):
        fitted(tiny_models["bert"], [plan])


@pytest.mark.parametrize(
    ("mixing", "recipe", "words"),
    [
        ("sum", {"batch_size": 1}, "batch_size=1: .* raise it to at least 2"),
        ("alternate", {"steps_per_epoch": 1}, "steps_per_epoch=1: 2 tasks .* at least 2"),
    ],
)
def test_no_task_is_left_out_silently(
    tiny_models: dict[str, Path], mixing: Any, recipe: dict[str, int], words: str
) -> None:
    plan = ChainPlan(("long", "third"), mixing=mixing)
    with pytest.raises(InputError, match=words):
        fitted(tiny_models["bert"], [plan], dataclasses.replace(RECIPE, **recipe))


def test_few_examples_still_give_every_task_a_step(tiny_models: dict[str, Path]) -> None:
    """96 examples would fill one batch of 128."""
    recipe = Recipe(epochs=1, batch_size=128, lr=5e-3)
    model, before, report = fitted(tiny_models["bert"], [ChainPlan(("long", "third"))], recipe)
    assert report.steps == 2
    for name, tensor in model.chain_parameters().items():
        if ".tasks." in name:
            assert (tensor.detach() != before[name]).any(), name


def test_a_fit_that_diverges_names_the_learning_rate(tiny_models: dict[str, Path]) -> None:
    recipe = dataclasses.replace(RECIPE, lr=1e37)
    with pytest.raises(InputError, match=r"^lr=1e\+37: chain.* lower it, such as to 2\.5e\+36$"):
        fitted(tiny_models["bert"], [ChainPlan(("long",))], recipe)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": 2.5},
        {"batch_size": True},
        {"patience": 0},
        {"steps_per_epoch": 0},
        {"schedule": "cosine"},
        {"lr": -1.0},
        {"prior_std": float("nan")},
    ],
)
def test_recipes_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Recipe(**wrong)  # type: ignore[arg-type]
