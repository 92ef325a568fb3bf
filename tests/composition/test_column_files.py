"""A growth on disk: each task an adapter of its own, resumed, and refused where it is damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesian_lora.composition import column_files, sequential
from bayesian_lora.composition.column_files import (
    Grown,
    check_baselines,
    is_grown,
    read_columns,
    write_columns,
)
from bayesian_lora.composition.fit import Recipe
from bayesian_lora.composition.sequential import grow
from bayesian_lora.composition.sources import read_source
from bayesian_lora.composition.stack import StackTask
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.ensemble import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.stack_eval import evaluate_folder
from bayesian_lora.models.peft_io import read_member
from bayesian_lora.progress import Progress
from bayesian_lora.utils.files import read_json, write_json
from tests.composition.growths import CLASSES, grown, growth, same, task
from tests.composition.stacks import make_data, make_sets


def evaluated(folder: Path, split: str | None = None) -> dict[str, Any]:
    quiet = Progress(quiet=True)
    found: dict[str, Any] = evaluate_folder(folder, split=split, device="cpu", progress=quiet)
    return found["tasks"]


@pytest.fixture(scope="module")
def made(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Grown]:
    """A folder of two grown tasks, and what was grown."""
    folder = tmp_path_factory.mktemp("grown") / "out"
    return folder, grown(tiny_models["bert"], ["one", "two"], folder=folder)


@pytest.fixture
def folder(made: tuple[Path, Grown], tmp_path: Path) -> Path:
    """A copy of it to damage or go on with."""
    return shutil.copytree(made[0], tmp_path / "out")


def peft_logits(folder: Path, base: Path, classes: int, data: TokenisedSet) -> np.ndarray:
    """What PEFT makes of a task's folder, (N, C)."""
    import peft
    import transformers

    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=classes
    )
    model = peft.PeftModel.from_pretrained(network, str(folder)).eval()
    with torch.no_grad():
        inputs = data.batch(np.arange(len(data))).inputs
        return model(**inputs).logits.numpy()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_peft_loads_each_task_with_its_own_predictions(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models[family]
    found = grown(base, ["one", "two"], folder=tmp_path / "out")
    sets = make_sets(base, CLASSES)
    for rank, name in enumerate(["one", "two"], start=1):
        own = tmp_path / "out" / "tasks" / name
        logits = peft_logits(own, base, CLASSES[name], sets[name])
        assert np.abs(logits - found.logits[name][0]).max() < 1e-5
        assert json.loads((own / "adapter_config.json").read_text())["r"] == rank


def test_a_growth_is_read_as_it_was_written(made: tuple[Path, Grown]) -> None:
    folder, found = made
    again = read_columns(folder)
    assert same(found, again)
    assert again.stack.spec == found.stack.spec
    assert again.stack.tasks == found.stack.tasks
    assert again.stack.parts == found.stack.parts
    assert again.stack.model == found.stack.model
    assert again.report == json.loads(json.dumps(found.report))
    assert is_grown(folder)
    listed = read_json(folder / "columns.json", "growth")["tasks"]
    assert [(row["name"], row["columns"]) for row in listed] == [("one", [0, 1]), ("two", [1, 2])]
    assert read_json(folder / "stack.json", "stack")["tasks"] == ["one", "two"]


def test_several_members_are_an_ensemble_a_task(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models["bert"]
    of = growth(base, members=2)
    found = grown(base, ["one", "two"], of=of, folder=tmp_path / "out")
    assert same(found, read_columns(tmp_path / "out"))
    ensemble = Ensemble.load(tmp_path / "out" / "tasks" / "one")
    data = make_sets(base, CLASSES)["one"]
    logits = ensemble.predict(data.examples.texts[0]).logits
    assert np.allclose(logits, found.logits["one"], atol=1e-5)


def test_growth_goes_on_from_the_tasks_it_has(
    folder: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_models["bert"]
    kept = {p: p.stat().st_mtime_ns for p in (folder / "tasks").rglob("*") if p.is_file()}
    fits: list[int] = []
    fit = sequential.fit
    monkeypatch.setattr(sequential, "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))
    found = grown(base, folder=folder)
    assert len(fits) == 1
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    whole = grown(base)
    assert same(found, whole)
    assert same(read_columns(folder), whole)
    assert list(found.report["one"]["later"]) == ["two", "three"]
    assert found.report["one"]["later"]["three"]["identical"] is True
    fits.clear()
    assert same(grown(base, ["one", "two"], folder=folder), whole)  # a part of what has grown
    assert fits == []


@pytest.mark.parametrize("place", ["write_folder", "write_npz", "write_json"])
def test_a_growth_stopped_while_it_writes_goes_on_to_the_same(
    place: str,
    folder: Path,
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever file was last, the tasks that were there are there still."""
    base = tiny_models["bert"]
    write = getattr(column_files, place)

    def stopped(*arguments: Any, **options: Any) -> Any:
        if place == "write_folder":  # after it: the folder is there and nowhere listed
            write(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(column_files, place, stopped)
        with pytest.raises(KeyboardInterrupt):
            grown(base, folder=folder)
    assert list(read_columns(folder).stack.tasks) == ["one", "two"]
    assert same(grown(base, folder=folder), grown(base))


def test_a_growth_stopped_in_its_first_task_begins_again(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = tiny_models["bert"], tmp_path / "out"

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sequential, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            grown(base, ["one"], folder=folder)
    assert not (folder / "stack.json").exists()
    with pytest.raises(InputError, match="no task has grown yet"):
        read_columns(folder)
    other = growth(base, seed=1)  # nothing has grown: anything may begin here
    assert same(grown(base, ["one"], of=other, folder=folder), grown(base, ["one"], of=other))
    assert read_columns(folder).settings["seed"] == 1


@pytest.mark.parametrize(
    ("names", "change", "words"),
    [
        (["two", "one"], {}, "its task 1 is 'one', asked for is 'two'"),
        (["one", "three"], {}, "its task 2 is 'two', asked for is 'three'"),
        (["one", "two", "three"], {"rank": 2}, "rank_per_task was 1 .*now it is 2"),
        (["one", "two", "three"], {"alpha": 4.0}, "scaling was 8.0 .*now it is 4.0"),
        (["one", "two", "three"], {"members": 2}, "members was 1 .*now it is 2"),
        (["one", "two", "three"], {"seed": 5}, "seed was 0 .*now it is 5"),
        (["one", "two", "three"], {"target_modules": ("query",)}, "target_modules was"),
        (["one", "two", "three"], {"recipe": Recipe(epochs=7)}, "batch_size was 16"),
    ],
)
def test_another_beginning_is_refused_with_what_differs(
    names: list[str],
    change: dict[str, Any],
    words: str,
    folder: Path,
    tiny_models: dict[str, Path],
) -> None:
    base = tiny_models["bert"]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=words):
        grown(base, names, of=growth(base, **change), folder=folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_other_data_or_another_base_are_refused(folder: Path, tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    tasks = [task(name) for name in CLASSES]
    with pytest.raises(InputError, match=r"one: .*was .* when it began"):
        grow(growth(base), tasks, make_data(base, CLASSES, size=40), folder=folder, alone=False)
    other = growth(tiny_models["roberta"])
    with pytest.raises(InputError, match="fingerprint was"):
        grow(other, tasks, make_data(base, CLASSES), folder=folder, alone=False)


def test_a_folder_of_something_else_is_left_alone(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for place, words in ((other, "holds files"), (other / "notes.txt", "a file")):
        with pytest.raises(InputError, match=words):
            grown(tiny_models["bert"], ["one"], folder=place)
    assert [p.name for p in other.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match=r"columns\.json: not found"):
        read_columns(other)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("tasks/one/adapter_model.safetensors", "damaged"),
        ("tasks/two/adapter_model.safetensors", "damaged"),
        ("tasks/one/adapter_config.json", "not the recorded file"),
        ("predictions/one.npz", "damaged"),
        ("columns.json", "damaged"),
    ],
)
def test_a_damaged_or_missing_file_is_named(file: str, words: str, folder: Path) -> None:
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=words) as raised:
        read_columns(folder)
    assert file.rpartition("/")[0] in str(raised.value)
    (folder / file).unlink()
    with pytest.raises(InputError, match=r"missing|not found"):
        read_columns(folder)


def _swap_columns(value: dict[str, Any]) -> None:
    value["tasks"][0]["columns"] = [1, 2]


def _rename(value: dict[str, Any]) -> None:
    value["tasks"][0]["name"] = "../one"


def _forget(value: dict[str, Any]) -> None:
    del value["tasks"][0]["files"]


def _later_format(value: dict[str, Any]) -> None:
    value["format"] = 2


def _members(value: dict[str, Any]) -> None:
    value["members"] = "x"


def _foreign(value: dict[str, Any]) -> None:
    value["tasks"][0]["files"] = value["tasks"][1]["files"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_swap_columns, "side by side"),
        (_rename, "letters"),
        (_forget, "files"),
        (_later_format, "format 2"),
        (_members, "damaged"),
        (_foreign, "damaged"),
    ],
)
def test_a_list_that_no_growth_has_is_refused(change: Any, words: str, folder: Path) -> None:
    value = read_json(folder / "columns.json", "growth")
    change(value)
    write_json(folder / "columns.json", value)
    with pytest.raises(InputError, match=words):
        read_columns(folder)


def test_what_is_not_finite_is_not_written(made: tuple[Path, Grown], tmp_path: Path) -> None:
    found = made[1]
    factors = dict(found.stack.factors)
    name = next(iter(factors))
    factors[name] = torch.full_like(factors[name], float("nan"))
    odd = Grown(
        found.stack.changed(factors=factors),
        found.report,
        found.settings,
        found.data,
        found.logits,
    )
    with pytest.raises(InputError, match="not finite"):
        write_columns(tmp_path / "out", odd)
    assert not (tmp_path / "out" / "stack.json").exists()


def test_each_task_is_evaluated_with_its_own_mask(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models["bert"]
    from bayesian_lora.experiment.task_sets import training_sets
    from bayesian_lora.models.sources import resolve_model

    labels = ("negative", "positive")
    tasks = [StackTask(n, "synthetic", labels, "categorical", 32) for n in ("a", "b")]
    data = training_sets({t.name: t for t in tasks}, resolve_model(str(base)), None, 48, 0)
    found = grow(growth(base), tasks, data, folder=tmp_path / "out", alone=False)
    figures = evaluated(tmp_path / "out")
    for name in ("a", "b"):
        for split, now in figures[name].items():
            then = found.report[name]["after"][split]
            assert now["accuracy"] == then["accuracy"]
            assert now["nll"] == pytest.approx(then["nll"], abs=1e-9)
        assert figures[name]["validation"]["largest_difference"] == 0.0
        assert "largest_difference" not in figures[name]["shifted"]
    assert evaluated(tmp_path / "out", split="shifted")["a"].keys() == {"shifted"}


def test_an_earlier_task_is_read_as_it_was_trained(
    folder: Path, made: tuple[Path, Grown], tiny_models: dict[str, Path]
) -> None:
    """Without the columns of later tasks, as its own files have it."""
    source = read_source(str(folder / "tasks" / "one"))
    own = read_member(folder / "tasks" / "one")
    assert source.spec is not None
    assert source.spec.rank == 1
    assert source.spec.scaling == made[1].stack.spec.scaling
    (member,) = source.members
    assert member.keys() == own.keys()
    assert all(torch.equal(member[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize(
    ("names", "words"),
    [(["train"], "'train': Python's modules"), (["One", "one"], "'One' is named twice")],
)
def test_names_that_no_growth_can_have(
    tiny_models: dict[str, Path], tmp_path: Path, names: list[str], words: str
) -> None:
    tasks = [StackTask(name, "synthetic", ("a", "b"), "categorical", 32) for name in names]
    with pytest.raises(InputError, match=words):
        grow(growth(tiny_models["bert"]), tasks, {}, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_baseline_of_an_unknown_figure_is_refused_before_the_training(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    given = {"two": {"acuracy": 0.5}}
    with pytest.raises(InputError, match=r"baseline of two: no figure 'acuracy'; .*accuracy"):
        grown(tiny_models["bert"], ["one", "two"], baselines=given, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_baselines({"two": {"mcc": 0.1, "nll": 0.5}}, {"two": ("mcc",)})
