"""Stacking is exact: ΔW is the sum, PEFT computes the stack's logits, the order does not matter.

Shapes: K members, B examples, R rank, D widths, C classes.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bayesian_lora.composition.sources import read_sources
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_files import read_stack, write_stack
from bayesian_lora.composition.stack_model import build_stack_model
from bayesian_lora.composition.stacking import CROSSED_LIMIT, stack_sources
from bayesian_lora.models.hf_lora import LoraSpec
from tests.composition.adapters import (
    lora_model,
    stacked_update,
    toy_source,
    update_of,
    write_peft,
    write_run,
)

MODULES = {
    f"net.layer.{i}.{name}": pair
    for i in range(2)
    for name, pair in {"query": (9, 9), "up": (9, 14), "down": (14, 9)}.items()
}
TEXTS = [
    "The breakfast was perhaps very good.",
    "Dreadful, although the rooms at the hotel were not remotely unpleasant.",
    "The plot seemed decent.",
]
HEADED_TARGETS = {
    "bert": (["query", "value"], ["key", "output.dense"], ["attention.output.dense"]),
    "roberta": (["query", "value"], ["dense"], ["attention.output.dense", "key"]),
    "distilbert": (["q_lin", "v_lin"], ["k_lin"], ["ffn.lin1", "q_lin"]),
}


@st.composite
def adapters(draw: st.DrawFn) -> list[Any]:
    """Two to four adapters of any rank, alpha, scaling and modules."""
    found = []
    for i in range(draw(st.integers(2, 4))):
        kinds = draw(st.sets(st.sampled_from(["query", "up", "down"]), min_size=1))
        found.append(
            toy_source(
                f"a{i}",
                {m: w for m, w in MODULES.items() if m.rpartition(".")[2] in kinds},
                rank=draw(st.integers(1, 2)),
                alpha=draw(st.floats(0.1, 40.0)),
                rslora=draw(st.booleans()),
                seed=draw(st.integers(0, 2**31)),
            )
        )
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sources=adapters(), data=st.data())
def test_the_update_is_the_weighted_sum_of_the_parts(sources: Any, data: st.DataObject) -> None:
    number = st.floats(-3.0, 3.0)
    weights = data.draw(st.lists(number, min_size=len(sources), max_size=len(sources)))
    found = stack_sources(sources, weights=weights)
    assert found.spec.scaling == 1.0
    assert found.spec.rank == sum(source.spec.rank for source in sources)
    assert {n.rpartition(".")[0] for n in found.factors} == {m for s in sources for m in s.widths}
    for module, (d_in, d_out) in MODULES.items():
        terms = [
            w * update_of(s, module)
            for w, s in zip(weights, sources, strict=True)
            if module in s.widths
        ]
        if terms:
            assert found.factors[f"{module}.lora_A"].shape == (1, found.spec.rank, d_in)
            wanted = torch.stack(terms).sum(0)
            assert wanted.shape == (d_out, d_in)
            scale = max(1.0, *(float(term.abs().max()) for term in terms))
            error = (stacked_update(found, module) - wanted).abs().max()
            assert error <= 1e-12 * scale


@settings(max_examples=20, deadline=None)
@given(sources=adapters(), data=st.data())
def test_the_order_of_stacking_does_not_matter(sources: Any, data: st.DataObject) -> None:
    other = data.draw(st.permutations(sources))
    one, two = stack_sources(sources), stack_sources(other)
    assert one.spec == two.spec
    assert one.tasks == two.tasks
    for module in {name.rpartition(".")[0] for name in one.factors}:
        torch.testing.assert_close(
            stacked_update(one, module), stacked_update(two, module), atol=1e-11, rtol=1e-12
        )


def test_a_part_says_which_columns_are_whose() -> None:
    sources = [
        toy_source("sst2", MODULES, rank=2, alpha=5.0, seed=1),
        toy_source("cola", MODULES, rank=3, alpha=2.0, seed=2),
    ]
    found = stack_sources(sources, weights=[0.25, -2.0])
    assert [(p.name, p.columns, p.weight, p.task) for p in found.parts] == [
        ("sst2", (0, 2), 0.25, "sst2"),
        ("cola", (2, 5), -2.0, "cola"),
    ]
    for part, source in zip(found.parts, sources, strict=True):
        own = slice(*part.columns)
        for module in MODULES:
            a, b = (found.factors[f"{module}.lora_{side}"][0] for side in "AB")
            torch.testing.assert_close(
                b[:, own] @ a[own], part.weight * update_of(source, module), atol=1e-12, rtol=1e-12
            )
    for source in sources:
        head = found.heads[source.name]["classifier.weight"]
        assert torch.equal(head[0], source.members[0]["classifier.weight"])
    assert found.facts["kind"] == "exact"
    assert found.spec.head_modules == ("classifier",), "without what PEFT lists in vain"


def test_the_original_scaling_shrinks_each_adapter_by_its_share_of_the_rank() -> None:
    sources = [
        toy_source("a", MODULES, rank=1, alpha=4.0, seed=1),
        toy_source("b", MODULES, rank=3, alpha=4.0, seed=2),
    ]
    found = stack_sources(sources, scaling="original")
    assert (found.spec.rank, found.spec.alpha) == (4, 4.0)
    assert [part.weight for part in found.parts] == [0.25, 0.75]
    assert found.facts["kind"] == "original"
    for module in MODULES:
        a = found.factors[f"{module}.lora_A"][0]
        assert torch.equal(a[:1], sources[0].members[0][f"{module}.lora_A"]), "as they were"
        wanted = 0.25 * update_of(sources[0], module) + 0.75 * update_of(sources[1], module)
        torch.testing.assert_close(stacked_update(found, module), wanted, atol=1e-12, rtol=1e-12)


def test_paired_members_are_stacked_one_by_one_and_one_adapter_goes_with_all() -> None:
    sources = [
        toy_source("a", MODULES, members=3, weights=[1.0, 2.0, 1.0], seed=1),
        toy_source("b", MODULES, seed=2),
        toy_source("c", MODULES, members=3, weights=[3.0, 1.0, 0.0], seed=3),
    ]
    found = stack_sources(sources)
    assert len(found) == 3
    np.testing.assert_allclose(found.weights, np.array([3.0, 2.0, 0.0]) / 5.0, atol=1e-15)
    for k, module in itertools.product(range(3), MODULES):
        wanted = sum(update_of(s, module, k if len(s) > 1 else 0) for s in sources)
        assert isinstance(wanted, Tensor)
        torch.testing.assert_close(stacked_update(found, module, k), wanted, atol=1e-12, rtol=0)
    single = found.heads["b"]["classifier.weight"]
    assert single.shape == (3, 2, 8)
    assert torch.equal(single[0], single[2])


def test_crossed_members_are_all_combinations_and_their_weights_multiply() -> None:
    sources = [
        toy_source("a", MODULES, members=2, weights=[1.0, 3.0], seed=1),
        toy_source("b", MODULES, members=3, weights=[1.0, 1.0, 2.0], seed=2),
    ]
    found = stack_sources(sources, members="crossed")
    wanted = np.outer([0.25, 0.75], [0.25, 0.25, 0.5]).ravel()
    np.testing.assert_allclose(found.weights, wanted, atol=1e-15)
    module = next(iter(MODULES))
    for k, (i, j) in enumerate(itertools.product(range(2), range(3))):
        update = update_of(sources[0], module, i) + update_of(sources[1], module, j)
        torch.testing.assert_close(stacked_update(found, module, k), update, atol=1e-12, rtol=0)
        head = found.heads["b"]["classifier.weight"][k]
        assert torch.equal(head, sources[1].members[j]["classifier.weight"])


def test_crossing_stops_at_the_limit() -> None:
    one = {"net.layer.0.query": (9, 9)}
    side = int(CROSSED_LIMIT**0.5) + 1
    sources = [toy_source(name, one, members=side, seed=1) for name in "ab"]
    with pytest.raises(ValueError, match=rf"{side} × {side} = .* at most 1,000"):
        stack_sources(sources, members="crossed")


def test_a_layer_that_an_ending_would_add_is_not_adapted() -> None:
    """One adapter has layer 1 alone, so the ending ``query`` would mean more than is there."""
    first = toy_source("a", {"net.layer.1.query": (9, 9)}, targets=["query"])
    second = toy_source("b", {"net.layer.1.up": (9, 14)}, targets=["up"])
    found = stack_sources([first, second])
    assert found.spec.target_modules == ("net.layer.1.query", "net.layer.1.up")
    whole = stack_sources([toy_source("a", MODULES), toy_source("b", MODULES)])
    assert whole.spec.target_modules == ("down", "query", "up")


def logits_of(stack: Stack, path: Path) -> dict[str, Tensor]:
    """Task → (K, B, C) of the stack as one model."""
    model = build_stack_model(stack)
    inputs = dict(AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt"))
    with torch.no_grad():
        out = model(**inputs)
    return {task: out[..., columns] for task, columns in model.slices.items()}


def peft_logits(folder: Path, path: Path, family: str, classes: int) -> Tensor:
    """(B, C) of the task's folder, as PEFT loads it."""
    inputs = dict(AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt"))
    if family != "bert":
        inputs.pop("token_type_ids", None)
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder).eval()(**inputs).logits


def peft_trained(folder: Path, path: Path, family: str, seed: int, **options: Any) -> Path:
    """An adapter that PEFT itself made and saved, with a random B."""
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    head = {"modules_to_save": ["pre_classifier", "classifier"]} if family == "distilbert" else {}
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **head, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("family", HEADED_TARGETS)
def test_an_adapter_of_pefts_own_predicts_in_a_stack_as_it_did(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """The other has weight 0; one is on every linear layer, one on a single one of one layer."""
    path = tiny_models[family]
    single = {"distilbert": "transformer.layer.1.ffn.lin1"}.get(
        family, f"{family}.encoder.layer.1.attention.self.key"
    )
    wide = {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"}
    one = peft_trained(tmp_path / "sst2", path, family, 1, **wide)
    two = peft_trained(tmp_path / "cola", path, family, 2, r=1, target_modules=[single])
    sources = read_sources([str(one), str(two)])
    for task, folder, weights in (("sst2", one, [1.0, 0.0]), ("cola", two, [0.0, 1.0])):
        found = stack_sources(sources, weights=weights)
        alone = peft_logits(folder, path, family, 2)
        torch.testing.assert_close(logits_of(found, path)[task][0], alone, atol=1e-5, rtol=1e-5)
        write_stack(tmp_path / "stacks" / task, found)
        again = peft_logits(tmp_path / "stacks" / task / "tasks" / task, path, family, 2)
        torch.testing.assert_close(again, alone, atol=1e-5, rtol=1e-5)
        other = "cola" if task == "sst2" else "sst2"
        assert (logits_of(found, path)[other][0] - alone).abs().max() > 0.05


@pytest.mark.parametrize("family", HEADED_TARGETS)
def test_adapters_of_single_layers_are_stacked_on_these_alone(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    path = tiny_models[family]
    layer = f"{family}.{'transformer' if family == 'distilbert' else 'encoder'}.layer"
    place = "attention.q_lin" if family == "distilbert" else "attention.self.query"
    kinds = [f"{layer}.1.{place}", place.rpartition(".")[2]]
    folders = [
        write_peft(tmp_path / name, path, name, seed, target_modules=[kind])
        for seed, (name, kind) in enumerate(zip(("sst2", "cola"), kinds, strict=True))
    ]
    found = stack_sources(read_sources([str(folder) for folder in folders]))
    write_stack(tmp_path / "stack", found)
    for task, logits in logits_of(found, path).items():
        theirs = peft_logits(tmp_path / "stack" / "tasks" / task, path, family, 2)
        torch.testing.assert_close(logits[0], theirs, atol=1e-5, rtol=1e-5)
    assert not found.factors[f"{layer}.0.{place}.lora_A"][0, :2].any()
    assert found.factors[f"{layer}.1.{place}.lora_A"][0, :2].all()


def merged_layers(folder: Path, path: Path, classes: int) -> dict[str, Tensor]:
    """Layer → the weight after PEFT has added its ΔW."""
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes)
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    return {
        n: p.detach() for n, p in merged.named_parameters() if n.startswith(base.base_model_prefix)
    }


@pytest.mark.parametrize("family", HEADED_TARGETS)
def test_peft_gives_the_stacks_logits_for_every_task(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """Two runs and a folder nobody knows; other ranks, alphas, scaling, targets, heads."""
    path = tiny_models[family]
    first, second, third = HEADED_TARGETS[family]
    write_run(tmp_path / "one", path, "sst2", 1, rank=1, target_modules=first)
    write_run(tmp_path / "two", path, "mnli", 2, rank=3, rslora=True, target_modules=second)
    write_peft(tmp_path / "cola", path, "cola", 3, alpha=7.0, target_modules=third)
    folders = [str(tmp_path / name) for name in ("one", "two", "cola")]
    sources = read_sources(folders)
    found = stack_sources(sources, weights=[1.0, 0.5, -1.5])
    assert list(found.tasks) == ["sst2", "mnli", "cola"]
    assert set(found.spec.target_modules) == {*first, *second, *third}
    logits = logits_of(found, path)
    write_stack(tmp_path / "stack", found)
    for task, described in found.tasks.items():
        classes = described.num_labels
        theirs = peft_logits(tmp_path / "stack" / "tasks" / task, path, family, classes)
        torch.testing.assert_close(logits[task][0], theirs, atol=1e-5, rtol=1e-5)
    swapped = stack_sources([sources[i] for i in (2, 0, 1)], weights=[-1.5, 1.0, 0.5])
    for task, other in logits_of(swapped, path).items():
        torch.testing.assert_close(other, logits[task], atol=1e-5, rtol=1e-5)
    plain = stack_sources(sources, weights=[0.0, 0.0, 0.0])
    assert (logits_of(plain, path)["sst2"] - logits["sst2"]).abs().max() > 0.05


def test_peft_adds_the_sum_of_the_adapters_updates(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    path = tiny_models["bert"]
    a = write_peft(tmp_path / "sst2", path, "sst2", 1, target_modules=["query", "value"])
    b = write_peft(tmp_path / "cola", path, "cola", 2, rank=4, target_modules=["dense", "query"])
    write_stack(tmp_path / "stack", stack_sources(read_sources([str(a), str(b)])))
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    plain = dict(base.named_parameters())
    one, two, both = (merged_layers(f, path, 2) for f in (a, b, tmp_path / "stack/tasks/sst2"))
    for name, weight in both.items():
        before = plain[name].detach()
        wanted = before + (one[name] - before) + (two[name] - before)
        torch.testing.assert_close(weight, wanted, atol=2e-6, rtol=1e-5)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert (both[query] - one[query]).abs().max() > 0.1


def test_a_stack_of_runs_knows_its_base_and_its_tasks(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    path = tiny_models["bert"]
    for number, task in enumerate(("sst2", "sst2", "mnli")):
        write_run(tmp_path / str(number), path, task, number)
    sources = read_sources([str(tmp_path / str(number)) for number in range(3)])
    found = stack_sources(sources)
    assert list(found.tasks) == ["sst2", "sst2-2", "mnli"]
    assert found.tasks["sst2-2"].data == "sst2"
    assert found.tasks["mnli"].label_names == ("entailment", "neutral", "contradiction")
    assert {task.max_length for task in found.tasks.values()} == {32}
    expected = lora_model(path, "sst2", 0).fingerprint()
    assert found.model == {
        "name": str(path),
        "base": str(path),
        "fingerprint": expected,
        "dtype": "float32",
    }


def test_an_unknown_adapters_texts_are_as_long_as_its_base_reads(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folders = [
        str(write_peft(tmp_path / name, tiny_models["bert"], "sst2", seed))
        for seed, name in enumerate(("sst2", "mine"))
    ]
    found = stack_sources(read_sources(folders))
    assert found.model["fingerprint"] is None
    assert found.tasks["sst2"].label_names == ("negative", "positive")
    assert found.tasks["mine"].label_names == ("0", "1")
    assert found.tasks["mine"].max_length == 64


def test_double_precision_stays(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_models["bert"]
    for task in ("sst2", "cola"):
        write_run(tmp_path / task, path, task, 1, dtype="float64")
    found = stack_sources(read_sources([str(tmp_path / task) for task in ("sst2", "cola")]))
    assert found.model["dtype"] == "float64"
    write_stack(tmp_path / "stack", found)
    again = read_stack(tmp_path / "stack")
    assert {tensor.dtype for tensor in again.factors.values()} == {torch.float64}
    for task, logits in logits_of(again, path).items():
        assert torch.equal(logits, logits_of(found, path)[task])


def test_spec_of_a_stack_is_that_of_its_peft_folders() -> None:
    found = stack_sources([toy_source("a", MODULES, rank=1), toy_source("b", MODULES, rank=2)])
    assert found.spec == LoraSpec(
        rank=3,
        alpha=3.0,
        dropout=0.0,
        target_modules=("down", "query", "up"),
        rslora=False,
        head_modules=("classifier",),
        base="toy",
    )
