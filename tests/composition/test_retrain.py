"""A stack trained further: each variant moves what it says, and is measured against its promise."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bayesian_lora.composition.fit import Recipe
from bayesian_lora.composition.retrain import (
    Variant,
    overlap,
    part_states,
    retrain,
    teacher_log_probs,
)
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_model import build_stack_model, stack_state, task_predictions
from bayesian_lora.data.joined import JoinedSet
from bayesian_lora.errors import InputError
from bayesian_lora.metrics import ensemble_log_probs
from bayesian_lora.progress import Progress
from tests.composition.stacks import make_data, make_sets, make_stack

RECIPE = Recipe(epochs=4, batch_size=16, lr=1e-2, steps_per_epoch=6, patience=None)
BOTH = ("long", "third")


def run(stack: Stack, base: Path, *variants: Variant, recipe: Recipe = RECIPE) -> dict[str, Stack]:
    found = retrain(stack, make_data(base), variants, recipe, seed=0, progress=Progress(quiet=True))
    return {name: one.stack for name, one in found.items()}


def nll(stack: Stack, base: Path, task: str) -> float:
    data = make_sets(base)[task]
    p = task_predictions(build_stack_model(stack), stack, task, data)
    log_probs = ensemble_log_probs(p.logits, p.weights)
    return float(-log_probs[np.arange(len(p)), p.labels].mean())


def test_variants_move_what_they_say_and_learn_their_tasks(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack = make_stack(base, members=2)
    found = run(
        stack,
        base,
        Variant("first", ("long",)),
        Variant("columns", ("third",), part="third"),
        Variant("both", BOTH),
    )
    assert [len(s) for s in found.values()] == [2, 2, 2]
    for task, name in (
        ("long", "first"),
        ("third", "columns"),
        ("long", "both"),
        ("third", "both"),
    ):
        assert nll(found[name], base, task) < nll(stack, base, task) - 0.02, (task, name)
    for name, tensor in stack.factors.items():
        after = found["columns"].factors[name]
        kept = after[:, :1] if name.endswith("lora_A") else after[..., :1]
        torch.testing.assert_close(
            kept, tensor[:, :1] if name.endswith("lora_A") else tensor[..., :1], rtol=0, atol=0
        )
    for name, tensor in stack.heads["third"].items():
        assert torch.equal(found["first"].heads["third"][name], tensor)
    facts = found["columns"].facts["retrained"]
    assert facts["variant"]["part"] == "third"
    assert facts["steps"] == 24


def test_orthogonality_lowers_the_overlap(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack = make_stack(base)
    found = run(
        stack, base, Variant("plain", BOTH), Variant("orthogonal", BOTH, orthogonality=20.0)
    )
    values = {n: float(overlap(build_stack_model(s), s.parts).detach()) for n, s in found.items()}
    assert values["orthogonal"] < 0.5 * values["plain"]


def test_overlap_is_the_squared_cosine_of_rank_one_directions(
    tiny_models: dict[str, Path],
) -> None:
    stack = make_stack(tiny_models["bert"], members=2)
    model = build_stack_model(stack)
    found = overlap(model, stack.parts)
    wanted = []
    for name, tensor in stack.factors.items():
        rows = tensor if name.endswith("lora_A") else tensor.mT
        wanted.append(torch.cosine_similarity(rows[:, 0], rows[:, 1], dim=-1).square())
    torch.testing.assert_close(found.detach(), torch.stack(wanted).mean(0))
    for layer in model.lora_layers().values():  # a part that is zero has no direction
        layer.lora_B.data[..., 0] = 0
    found = overlap(model, stack.parts)
    found.sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in grads)
    torch.testing.assert_close(found.detach(), torch.stack(wanted[::2]).sum(0) / len(wanted))


def test_distillation_keeps_what_the_other_task_s_adapter_said(
    tiny_models: dict[str, Path],
) -> None:
    """Trained on one task alone; the distance is to the single adapters' own predictions."""
    base = tiny_models["bert"]
    stack = make_stack(base)
    found = run(
        stack, base, Variant("plain", ("long",)), Variant("kept", ("long",), distillation=5.0)
    )
    model = build_stack_model(stack)
    data = make_sets(base)["third"]
    teacher = teacher_log_probs(model, stack, JoinedSet({"third": data}, model.slices))[:, 2:]
    far = {}
    for name, one in found.items():
        p = task_predictions(build_stack_model(one), one, "third", data)
        q = torch.from_numpy(p.logits[0]).double().log_softmax(-1).numpy()
        far[name] = float((np.exp(teacher) * (teacher - q)).sum(-1).mean())
    assert far["kept"] < 0.5 * far["plain"]


def test_the_teacher_is_the_single_adapter_with_its_head(tiny_models: dict[str, Path]) -> None:
    """Undoing the weight its part has in the stack."""
    base = tiny_models["bert"]
    stack = make_stack(base, members=2)
    first = stack.parts[0]
    halved = {
        n: t * torch.tensor([0.5, 1.0]) if n.endswith("lora_B") else t
        for n, t in stack.factors.items()
    }
    weighted = stack.changed(
        factors=halved, parts=(first.__class__(**{**vars(first), "weight": 0.5}), stack.parts[1])
    )
    model = build_stack_model(weighted)
    sets = make_sets(base)
    found = teacher_log_probs(model, weighted, JoinedSet(sets, model.slices))[:48, :2]
    alone = {
        n: t * torch.tensor([1.0, 0.0]) if n.endswith("lora_B") else t
        for n, t in stack.factors.items()
    }
    single = stack.changed(factors=alone)
    p = task_predictions(build_stack_model(single), single, "long", sets["long"])
    np.testing.assert_allclose(found, ensemble_log_probs(p.logits, p.weights), atol=1e-5)
    assert set(part_states(stack)) == set(BOTH)
    assert part_states(stack)["long"].keys() == stack_state(stack).keys()


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ((), "at least one"),
        ((Variant("a", ("long",)), Variant("a", ("third",))), "a name of its own"),
        ((Variant("a", ("other",)),), "^no task 'other': the stack carries long, third, choose"),
        ((Variant("a", ()),), "^no task to train on: the stack carries long, third, name one"),
        ((Variant("a", ("long", "long")),), "^task 'long' is named twice; name it once"),
        ((Variant("a", ("long",)), Variant("b", ("x",))), "^variant 'b': no task 'x'"),
        ((Variant("a", ("long",), part="other"),), "no part 'other'"),
        ((Variant("a", ("long",), mixing="x"),), "^mixing='x': choose alternate or sum"),  # type: ignore[arg-type]
        ((Variant("a", ("long",), distillation=-1.0),), "^distillation=-1.0: .* number from 0"),
    ],
)
def test_variants_that_cannot_be(
    tiny_models: dict[str, Path], variants: tuple[Variant, ...], words: str
) -> None:
    base = tiny_models["bert"]
    with pytest.raises(InputError, match=words):
        run(make_stack(base), base, *variants)


def test_a_compressed_stack_has_no_columns_of_parts(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack = make_stack(base)
    parts = tuple(p.__class__(**{**vars(p), "columns": (0, 0)}) for p in stack.parts)
    with pytest.raises(InputError, match="compressed"):
        run(stack.changed(parts=parts), base, Variant("a", ("long",), part="long"))
