"""What can be predicted with: runs, saved ensembles, a stack's tasks; their labels and columns.

Shapes: K members, N texts, C classes.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayesian_lora.composition.stack_files import write_stack
from bayesian_lora.config import build_config, dump_run_config
from bayesian_lora.ensemble import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.predicting import (
    Found,
    find,
    found_threshold,
    open_service,
    wanted,
)
from bayesian_lora.manifest import Provenance
from bayesian_lora.member_files import MemberRecord
from bayesian_lora.metrics import uncertainty_per_example
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.predict import Predictions
from bayesian_lora.run_folder import RunFolder
from bayesian_lora.utils.files import write_json
from tests.composition.stacks import make_stack

K = 4
TEXTS = ["the food was good", "it was bad", "a slow service and a cold room"]


@pytest.fixture(scope="module")
def saved(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """K random members, two of each chain."""
    stack = make_stack(tiny_models["bert"], members=K)
    task = stack.ensemble("long")
    root = tmp_path_factory.mktemp("predicting") / "saved"
    changed(task, name="mine", label_names=["short", "long"]).save(root)
    return root


def changed(ensemble: Ensemble, drop: str = "", **task: Any) -> Ensemble:
    """Of another task."""
    given = {**ensemble.provenance.task, **task}
    given.pop(drop, None)
    provenance = dataclasses.replace(ensemble.provenance, task=given)
    records = [
        MemberRecord("", chain=k % 2, draw=k // 2, step=0, noise_std=record.noise_std)
        for k, record in enumerate(ensemble.records)
    ]
    return Ensemble(provenance, records, ensemble.members)


def test_answers_are_those_of_the_ensemble(saved: Path) -> None:
    service, predictor = open_service(find(saved), device="cpu")
    expected = Ensemble.load(saved).predict(TEXTS)
    np.testing.assert_allclose(predictor(TEXTS).logits, expected.logits, atol=1e-6)
    answers = service.answer(TEXTS)
    assert [a["label"] for a in answers] == [("short", "long")[c] for c in expected.predicted]
    found = [a["probability"] for a in answers]
    np.testing.assert_allclose(found, expected.confidence, rtol=1e-5)
    one = open_service(find(saved), k=1, device="cpu")[0].answer(TEXTS)
    alone = Ensemble.load(saved).subset(1).predict(TEXTS)
    np.testing.assert_allclose([a["probability"] for a in one], alone.confidence, rtol=1e-5)


def test_texts_that_reach_the_models_length_are_counted(saved: Path) -> None:
    _, predictor = open_service(find(saved), device="cpu")
    predictor(TEXTS)
    assert predictor.cut == 0
    assert predictor.max_length == 32
    predictor(["good " * 100, *TEXTS, "good " * 30])
    predictor(["good " * 29])  # and two special tokens
    assert predictor.cut == 2


def test_names_of_the_registry_stand_in_where_none_are_stored(saved: Path, tmp_path: Path) -> None:
    bare = Ensemble.load(saved)
    for name, labels in (("sst2", ["negative", "positive"]), ("ag_news", []), ("mine", [])):
        changed(bare, "label_names", name=name).save(tmp_path / name)
        assert find(tmp_path / name).provenance.task["label_names"] == labels
    answers = open_service(find(tmp_path / "mine"), device="cpu")[0].answer(TEXTS)
    assert [a["label"] for a in answers] == Ensemble.load(saved).predict(TEXTS).predicted.tolist()


def test_a_fine_tuned_base_model_lends_its_names(
    saved: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_models["bert"], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config |= {"id2label": {"0": "brief", "1": "lengthy"}, "label2id": {"brief": 0, "lengthy": 1}}
    (base / "config.json").write_text(json.dumps(config))
    ensemble = changed(Ensemble.load(saved), "label_names")
    model = {**ensemble.provenance.model, "name": str(base)}
    provenance = dataclasses.replace(ensemble.provenance, model=model)
    Ensemble(provenance, ensemble.records, ensemble.members).save(tmp_path / "saved")
    service, _ = open_service(find(tmp_path / "saved"), device="cpu")
    assert service.label_names == ("brief", "lengthy")


def test_a_stacks_tasks_predict_and_the_stack_names_them(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    for members in (1, 2):
        stack, root = make_stack(tiny_models["bert"], members=members), tmp_path / str(members)
        write_stack(root, stack)
        service, predictor = open_service(find(root / "tasks" / "third"), device="cpu")
        assert service.labels == ["third0", "third1", "third2"]
        expected = stack.ensemble("third").predict(TEXTS)
        np.testing.assert_allclose(predictor(TEXTS).probs, expected.probs, atol=1e-5)
        with pytest.raises(InputError, match=r"a stack of several tasks; .*third"):
            find(root)


def test_what_is_no_run_is_named(saved: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no such folder; name the folder of a run"):
        find(tmp_path / "nothing")
    with pytest.raises(InputError, match="a file; name the folder of a run"):
        find(saved / "ensemble.json")
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "comparison.json").write_text("{}")
    with pytest.raises(InputError, match="a comparison; name the folder of one of its cells"):
        find(tmp_path / "cells")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text(dump_run_config(build_config({})))
    with pytest.raises(InputError, match="the run has no samples yet"):
        find(tmp_path / "begun")
    foreign = tmp_path / "foreign"
    stack = make_stack(tiny_models["bert"])
    write_stack(tmp_path / "stack", stack)
    shutil.copytree(tmp_path / "stack" / "tasks" / "long", foreign)
    with pytest.raises(InputError, match=r"foreign: an adapter of which task, .* not recorded"):
        find(foreign)


def test_another_base_model_is_refused(saved: Path, tiny_models: dict[str, Path]) -> None:
    found = find(saved)
    other = build_huggingface_lora_model(str(tiny_models["bert"]), 2, rank=2).fingerprint()[:-1]
    model = {**found.provenance.model, "fingerprint": other + "x"}
    wrong = Ensemble(
        dataclasses.replace(found.provenance, model=model),
        Ensemble.load(saved).records,
        Ensemble.load(saved).members,
    )
    with pytest.raises(InputError, match="the members were sampled on"):
        open_service(dataclasses.replace(found, ensemble=wrong), device="cpu")


def test_mistakes_are_told_before_the_model_is_loaded(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayesian_lora.experiment.predicting.load_model", pytest.fail)
    found = find(saved)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"k": K + 1}, "k=5: this ensemble has 4 members"),
        ({"tolerance": 2.0}, "tolerance=2.0: a distance"),
        ({"device": "abacus"}, "device='abacus': choose"),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            open_service(found, **options)


def found_with(columns: tuple[str, ...], likelihood: str = "categorical") -> Found:
    task = {"name": "mine", "likelihood": likelihood, "label_names": []}
    return Found(Path("x"), Provenance({"num_labels": 2}, task, {}, {}), columns)


def test_columns_are_the_tasks_own_or_those_named() -> None:
    one, two, bare = found_with(("sentence",)), found_with(("a", "b")), found_with(())
    assert (wanted(one).usual, wanted(one).width) == ((("sentence",), ("text",)), 1)
    assert (wanted(two).usual, wanted(two).width) == ((("a", "b"), ("text", "pair")), 2)
    assert (wanted(bare).usual, wanted(bare).width) == ((("text",),), None)
    assert wanted(one, "review").texts == ("review",)
    assert wanted(two, "b", "a").texts == wanted(bare, "b", "a").texts == ("b", "a")
    assert wanted(one, keep=["id", "gold=label"]).kept == {"id": "id", "gold": "label"}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (("a",), {"pair": "b"}, "--pair b: names the second .* first with --text"),
        (("a",), {"text": "a", "pair": "b"}, "--pair b: mine is a task on one text"),
        (("a", "b"), {"text": "a"}, "--text a: mine is a task on two texts"),
        (("a",), {"keep": ["label"]}, "--keep label: .* as in --keep my_label=label"),
        (("a",), {"keep": ["text"]}, "--keep text: .* column 'text' already"),
        (("a",), {"keep": ["id", "id"]}, "--keep id: .* column 'id' already"),
        (("a",), {"keep": ["sd=x"]}, "--keep sd=x: .* as in --keep my_sd=x"),
    ],
)
def test_columns_that_do_not_fit(columns: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wanted(found_with(columns), **options)


@pytest.fixture
def evaluated(saved: Path, tmp_path: Path) -> Path:
    """With stored predictions of 200 examples, of which the surest are right."""
    root = Path(shutil.copytree(saved, tmp_path / "evaluated"))
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (1, 200, 2)) + rng.normal(0, 0.3, (K, 200, 2))
    p = Predictions(logits, np.zeros(200, np.int64), np.full(K, 1 / K), np.arange(200))
    labels = np.where(p.confidence > 0.8, p.predicted, 1 - p.predicted)
    folder = RunFolder(root)
    arrays = {"logits": logits, "labels": labels, "weights": p.weights, "example_id": p.example_id}
    folder.write_predictions("validation", arrays)
    write_json(root / "metrics.json", {"split": "validation", "n": 200})
    return root


def test_the_threshold_is_found_on_the_runs_own_predictions(evaluated: Path) -> None:
    found = find(evaluated)
    limit, split = found_threshold(found, 0.0, 0, "max_probability")
    assert split == "validation"
    assert (limit.n, limit.risk) == (200, 0.0)
    assert 0.15 < limit.above <= 0.2 + 1e-9
    two, _ = found_threshold(found, 0.2, 0, "predictive_entropy", k=2)
    with np.load(evaluated / "predictions" / "validation.npz") as stored:
        first = stored["logits"][:2]
    entropy = uncertainty_per_example(first, np.full(2, 0.5))["predictive_entropy"]
    assert np.isclose(entropy, two.above, rtol=0, atol=1e-12).sum() == 1
    with pytest.raises(InputError, match="--k 5: the run has 4 samples; choose 1 to 4"):
        found_threshold(found, 0.2, 0, "predictive_entropy", k=5)


def test_without_an_evaluation_there_is_no_threshold_to_find(saved: Path) -> None:
    with pytest.raises(InputError, match=r"has no metrics.json, .* evaluate the run first"):
        found_threshold(find(saved), 0.1, 0.95, "predictive_entropy")


def test_a_loaded_model_serves_many_blocks(saved: Path) -> None:
    service, _ = open_service(find(saved), device="cpu")
    whole = service.answer(TEXTS)
    for block in (1, 2):
        found = list(service.stream(TEXTS, block))
        for name in ("probability", "entropy", "mutual_information"):
            np.testing.assert_allclose(
                [a[name] for a in found], [a[name] for a in whole], atol=1e-5
            )
