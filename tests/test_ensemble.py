"""`Ensemble`: load, look at, predict, save, and the manifest that says where members come from.

Shapes: K members, N examples, C classes.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bayesian_lora import Ensemble, member_files
from bayesian_lora.adaptive import FEWEST
from bayesian_lora.config import build_config
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.synthetic import generate
from bayesian_lora.ensemble import load_model, map_ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.train import train
from bayesian_lora.manifest import read_manifest, write_manifest
from bayesian_lora.models.sources import load_pretrained
from bayesian_lora.progress import Progress

K, SHOWN = 6, 40
PAIRS = [("the food was good", "the service was bad"), ("the room was clean", "it was loud")]


@pytest.fixture(scope="module")
def run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw: dict[str, Any] = {
        "data": {"train_examples": 40, "batch_size": 8, "max_length": 48},
        "model": {"name": str(tiny_models["bert"]), "lora": {"rank": 2, "alpha": 4.0}},
        "train": {"epochs": 1},
        "sampler": {"step_size": 1e-3, "burn_in": 2, "thin": 2, "num_samples": K, "chains": 2},
        "output": {"dir": str(tmp_path_factory.mktemp("ensemble") / "run")},
    }
    return train(build_config(raw), Progress(quiet=True))


@pytest.fixture(scope="module")
def ensemble(run: Path) -> Ensemble:
    return Ensemble.load(run)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Another run folder, which a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def same(a: Ensemble, b: Ensemble) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)
        for x, y in zip(a, b, strict=True)
    )


def test_length_iteration_and_state(ensemble: Ensemble) -> None:
    assert len(ensemble) == len(list(ensemble)) == K
    state = ensemble.state()
    for k, member in enumerate(ensemble):
        assert all(torch.equal(state[name][k], tensor) for name, tensor in member.items())
    np.testing.assert_allclose(ensemble.weights, np.full(K, 1 / K))
    assert ensemble.noise_std is None


def test_subsets_are_the_first_draws_of_every_chain(ensemble: Ensemble) -> None:
    part = ensemble.subset(4)
    assert [(r.draw, r.chain) for r in part.records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert part.weights.sum() == pytest.approx(1.0)
    assert same(ensemble.subset(K), ensemble)
    last = ensemble.latest()
    assert (len(last), last.records[0].draw, last.records[0].chain) == (1, 2, 1)
    for k in (0, -1, K + 1):
        with pytest.raises(InputError, match=f"k={k}: this ensemble has 6 members"):
            ensemble.subset(k)


def test_predict_gives_the_stored_predictions(run: Path, ensemble: Ensemble) -> None:
    with np.load(run / "predictions" / "validation.npz") as stored:
        expected, weights = stored["logits"], stored["weights"]
    texts = generate("validation").texts[0]
    found = ensemble.predict(texts)
    assert found.logits.shape == (K, len(texts), 2)
    np.testing.assert_allclose(found.logits, expected, atol=1e-5)
    np.testing.assert_allclose(found.weights, weights)
    assert set(found.labels) == {-1}
    few = ensemble.predict(tuple(texts[7:9]))
    np.testing.assert_allclose(few.logits, expected[:, 7:9], atol=1e-5)
    part = ensemble.subset(2).predict(texts[:3])
    np.testing.assert_allclose(part.logits, expected[:2, :3], atol=1e-5)


def test_a_tolerance_leaves_members_out(ensemble: Ensemble) -> None:
    model = load_model(ensemble.provenance)
    tokenizer = load_pretrained(AutoTokenizer, model.info.source)
    data = TokenisedSet(generate("validation"), tokenizer, 48)
    whole = ensemble.predict_set(model, data)
    assert whole.members_used is None
    near = ensemble.predict_set(model, data, tolerance=0.2)
    assert near.members_used is not None
    assert near.members_used.min() >= FEWEST
    assert near.members_used.mean() < K
    assert 0 < np.abs(near.probs - whole.probs).max() < 0.2
    same_again = ensemble.predict_set(model, data, tolerance=1e-9)
    np.testing.assert_allclose(same_again.probs, whole.probs, atol=1e-6)
    texts = generate("validation").texts[0]
    by_texts = ensemble.predict(texts, tolerance=0.2)
    np.testing.assert_array_equal(by_texts.members_used, near.members_used)
    np.testing.assert_allclose(by_texts.probs, near.probs, atol=1e-6)
    assert ensemble.predict(texts[:3]).members_used is None


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0, float("nan"), 2])
def test_a_wrong_tolerance_is_refused_before_the_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, tolerance: float
) -> None:
    monkeypatch.setattr("bayesian_lora.ensemble.load_model", pytest.fail)
    with pytest.raises(InputError, match=f"tolerance={tolerance}: .* between 0 and 1"):
        Ensemble.load(run).predict(["the food was good"], tolerance=tolerance)


def test_a_tolerance_needs_classes_and_members_to_leave_out(ensemble: Ensemble) -> None:
    with pytest.raises(InputError, match="with 4 members none can be left out"):
        ensemble.subset(4).predict(["a film"], tolerance=0.01)
    records = [dataclasses.replace(record, noise_std=0.5) for record in ensemble.records]
    scores = Ensemble(ensemble.provenance, records, ensemble.members)
    with pytest.raises(InputError, match="a regression has no probabilities"):
        scores.predict(["a film"], tolerance=0.01)


def test_pairs_of_texts_go_through_the_pair_encoding(ensemble: Ensemble) -> None:
    found = ensemble.predict(PAIRS)
    assert found.logits.shape == (K, 2, 2)
    as_lists = ensemble.predict([list(pair) for pair in PAIRS])  # type: ignore[misc]
    np.testing.assert_array_equal(found.logits, as_lists.logits)
    glued = ensemble.predict([" ".join(pair) for pair in PAIRS])
    assert not np.allclose(found.logits, glued.logits)


@pytest.mark.parametrize(
    "texts", [[], "the food was good", [("a", "b", "c")], [("a", "b"), "c"], ["a", 3], [3], [[]]]
)
def test_what_is_no_list_of_texts_is_refused(ensemble: Ensemble, texts: Any) -> None:
    with pytest.raises(InputError, match="texts"):
        ensemble.predict(texts)


def test_a_saved_copy_is_the_same_ensemble(
    ensemble: Ensemble, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    ensemble.save(tmp_path / "copy")
    copy = Ensemble.load(tmp_path / "copy")
    assert same(copy, ensemble)
    assert copy.provenance == ensemble.provenance
    assert copy.records == ensemble.records
    texts = generate("shifted", size=SHOWN).texts[0]
    np.testing.assert_array_equal(copy.predict(texts).logits, ensemble.predict(texts).logits)
    with pytest.raises(InputError, match="already holds an ensemble"):
        ensemble.subset(2).save(tmp_path / "copy")
    assert same(Ensemble.load(tmp_path / "copy"), ensemble)


def test_a_saved_part_keeps_its_records(ensemble: Ensemble, tmp_path: Path) -> None:
    ensemble.latest().save(tmp_path / "last")
    last = Ensemble.load(tmp_path / "last")
    assert same(last, ensemble.latest())
    assert (last.records[0].draw, last.records[0].chain) == (2, 1)
    assert last.records[0].path == "samples/sample_0001"


def test_weights_are_kept_and_normalised(ensemble: Ensemble, tmp_path: Path) -> None:
    numbers = (1.0, 0.0, 2.0, 1.0, 0.0, 0.0)
    records = [
        dataclasses.replace(r, weight=w) for r, w in zip(ensemble.records, numbers, strict=True)
    ]
    Ensemble(ensemble.provenance, records, ensemble.members).save(tmp_path / "w")
    found = Ensemble.load(tmp_path / "w")
    np.testing.assert_allclose(found.weights, np.array(numbers) / 4)
    assert found.predict(["a film"]).weights.tolist() == found.weights.tolist()


def test_many_members_are_packed_and_any_can_be_exported(
    ensemble: Ensemble,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.setattr(member_files, "FOLDER_LIMIT", 5)
    monkeypatch.setattr(member_files, "PACK_SIZE", 4)
    ensemble.save(tmp_path / "packed")
    files = sorted(p.name for p in (tmp_path / "packed" / "samples").iterdir())
    assert files == ["pack_0001.safetensors", "pack_0002.safetensors"]
    packed = Ensemble.load(tmp_path / "packed")
    assert same(packed, ensemble)
    packed.export(4, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_models["bert"], num_labels=2)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    texts = generate("validation", size=5).texts[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["bert"])
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    np.testing.assert_allclose(logits.numpy(), packed.predict(texts).logits[4], atol=1e-5)


def test_the_warm_starts_are_an_ensemble_too(run: Path) -> None:
    starts = map_ensemble(run)
    assert [(r.chain, r.path) for r in starts.records] == [(0, "map/chain_0"), (1, "map/chain_1")]
    np.testing.assert_allclose(starts.weights, [0.5, 0.5])
    assert starts.predict(["the food was good"]).logits.shape == (2, 1, 2)


def test_a_manifest_without_members_is_not_loaded(copy: Path) -> None:
    provenance, _, _ = read_manifest(copy)
    write_manifest(copy, provenance, [])
    with pytest.raises(InputError, match="lists no members yet"):
        Ensemble.load(copy)
    with pytest.raises(InputError, match="at least one member"):
        Ensemble(provenance, [], [])


def test_a_folder_without_an_ensemble(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ensemble\.json: not found"):
        Ensemble.load(tmp_path)


Tamper = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda m: m.update(format=2), "format 2, this version reads 1"),
        (lambda m: m.pop("format"), "format None"),
        (lambda m: m.pop("model"), "'model' is missing"),
        (lambda m: m.pop("members"), "'members' is missing"),
        (lambda m: m["model"].pop("fingerprint"), "'fingerprint' is missing"),
        (lambda m: m["sampler"].pop("temperature"), "'temperature' is missing"),
        (lambda m: m["lora"].pop("target_modules"), "damaged, 'target_modules' is missing"),
        (lambda m: m["lora"].pop("rslora"), "damaged"),
        (lambda m: m["lora"].update(rank="8"), "lora.rank is '8'"),
        (lambda m: m["lora"].update(colour="red"), "damaged"),
        (lambda m: m.update(model=["bert"]), "damaged"),
        (lambda m: m.update(members=None), "damaged"),
        (lambda m: m.update(members={"a": 1}), "damaged"),
        (lambda m: m["members"][2].pop("path"), "damaged"),
        (lambda m: m["members"][2].update(path=7), "a member's path is 7"),
        (lambda m: m["members"][2].update(weight=None), "a member's weight is None"),
        (lambda m: m["members"][2].update(path="../run2/x"), "must lie inside"),
        (lambda m: m["members"][2].update(path="/etc"), "must lie inside"),
        (lambda m: m["members"][2].update(path="samples/no"), "samples/no.*missing"),
        (lambda m: m["members"][2].update(sha256="0" * 64), "sample_0003.*sha256"),
        (lambda m: m["members"][2].update(index=0), "sample_0003.*damaged"),
    ],
)
def test_a_tampered_manifest_is_refused_in_one_line(
    copy: Path, tamper: Tamper, message: str
) -> None:
    manifest = json.loads((copy / "ensemble.json").read_text())
    del manifest["checksum"]  # as someone does who changes it by hand
    tamper(manifest)
    (copy / "ensemble.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message) as raised:
        Ensemble.load(copy)
    assert "\n" not in str(raised.value)


def test_a_flipped_bit_in_the_manifest_is_not_taken_for_a_figure(copy: Path) -> None:
    text = (copy / "ensemble.json").read_text()
    (copy / "ensemble.json").write_text(text.replace('"temperature": 1.0', '"temperature": 1.8'))
    with pytest.raises(InputError, match=r"ensemble\.json: damaged, or changed since"):
        Ensemble.load(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "not json"])
def test_a_manifest_that_is_no_json_object_is_refused(copy: Path, content: str) -> None:
    (copy / "ensemble.json").write_text(content)
    with pytest.raises(InputError, match=r"ensemble\.json: damaged"):
        Ensemble.load(copy)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda m: m["lora"].update(rank=4),
        lambda m: m["lora"].update(target_modules=["key"]),
        lambda m: m["model"].update(num_labels=3),
        lambda m: m["model"].update(fingerprint="0" * 64),
    ],
)
def test_members_that_do_not_fit_their_model_are_refused(copy: Path, tamper: Tamper) -> None:
    manifest = json.loads((copy / "ensemble.json").read_text())
    del manifest["checksum"]  # as someone does who changes it by hand
    tamper(manifest)
    (copy / "ensemble.json").write_text(json.dumps(manifest))
    loaded = Ensemble.load(copy)
    with pytest.raises(InputError):
        loaded.predict(["the food was good"])


def test_members_of_different_shapes_are_refused(ensemble: Ensemble) -> None:
    odd = {name: tensor[..., :1] for name, tensor in ensemble.members[1].items()}
    mixed = Ensemble(ensemble.provenance, ensemble.records[:2], [ensemble.members[0], odd])
    with pytest.raises(InputError, match="do not fit"):
        mixed.predict(["the food was good"])
