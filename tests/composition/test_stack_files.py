"""A stack on disk is whole or refused, and read back as it was.

Shapes: K members.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bayesian_lora.composition import stack_files
from bayesian_lora.composition.sources import read_sources
from bayesian_lora.composition.stack import Part, Stack
from bayesian_lora.composition.stack_files import (
    STACK_FILE,
    check_free,
    is_stack,
    read_extra,
    read_stack,
    write_stack,
)
from bayesian_lora.composition.stacking import stack_sources
from bayesian_lora.ensemble import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.models.peft_io import CONFIG_FILE, WEIGHTS_FILE, read_spec
from bayesian_lora.utils.files import write_json
from tests.composition.adapters import lora_model, toy_source, write_peft
from tests.fuzzing import budgets, damaged_bytes, damaged_trees, search, to_json

MODULES = {"net.layer.0.query": (9, 9), "net.layer.0.up": (9, 14)}


def make(members: int = 1) -> Stack:
    """Of two adapters, the second with a gap in its modules."""
    sources = [
        toy_source("sst2", MODULES, members=members, weights=range(1, members + 1), seed=1),
        toy_source("cola", {"net.layer.0.up": (9, 14)}, classes=3, seed=2),
    ]
    return stack_sources(sources, weights=[1.0, 0.5])


def assert_same(found: Stack, wanted: Stack) -> None:
    for field in ("model", "spec", "tasks", "parts", "facts"):
        assert getattr(found, field) == getattr(wanted, field)
    np.testing.assert_allclose(found.weights, wanted.weights, atol=1e-15)
    pairs = [(found.factors, wanted.factors)]
    pairs += [(found.heads[task], wanted.heads[task]) for task in wanted.tasks]
    for own, other in pairs:
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in other)


@pytest.mark.parametrize("members", [1, 3, pytest.param(501, marks=pytest.mark.slow)])
def test_a_stack_is_read_back_as_it_was_written(tmp_path: Path, members: int) -> None:
    stack = make(members)
    root = tmp_path / "runs" / "stack"
    assert not is_stack(root)
    write_stack(root, stack, {"history": [{"epoch": 1, "val/loss": 0.5}]})
    assert is_stack(root)
    found = read_stack(root)
    assert len(found) == members
    assert_same(found, stack)
    assert read_extra(root) == {"history": [{"epoch": 1, "val/loss": 0.5}]}


def test_a_task_is_an_ordinary_peft_folder(tmp_path: Path) -> None:
    stack = make()
    write_stack(tmp_path / "stack", stack)
    for task in stack.tasks:
        folder = tmp_path / "stack" / "tasks" / task
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
        assert read_spec(folder) == stack.spec
        head = load_file(folder / WEIGHTS_FILE)["base_model.model.classifier.weight"]
        assert torch.equal(head, stack.heads[task]["classifier.weight"][0])


def test_a_task_of_several_members_is_an_ensemble(tmp_path: Path) -> None:
    write_stack(tmp_path / "stack", make(3))
    found = Ensemble.load(tmp_path / "stack" / "tasks" / "cola")
    assert found.provenance.task["label_names"] == ["0", "1", "2"]
    np.testing.assert_allclose(found.weights, np.array([1, 2, 3]) / 6)


def test_an_ensemble_on_unknown_weights_gets_their_fingerprint(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Members say what they belong to, and adapters of anyone's do not."""
    names = ("sst2", "cola")
    folders = [
        str(write_peft(tmp_path / task, tiny_models["bert"], task, seed))
        for seed, task in enumerate(names)
    ]
    single = stack_sources(read_sources(folders))
    twice = single.changed(
        factors={name: torch.cat([t, t]) for name, t in single.factors.items()},
        heads={
            task: {name: torch.cat([t, t]) for name, t in head.items()}
            for task, head in single.heads.items()
        },
        weights=np.array([0.5, 0.5]),
    )
    write_stack(tmp_path / "stack", twice)
    assert len(read_stack(tmp_path / "stack")) == 2
    model = Ensemble.load(tmp_path / "stack" / "tasks" / "cola").provenance.model
    assert model["fingerprint"] == lora_model(tiny_models["bert"], "cola", 1).fingerprint()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "stack"
    root.mkdir()
    (root / "notes.txt").write_text("mine")
    for refused in (lambda: write_stack(root, make()), lambda: check_free(root)):
        with pytest.raises(InputError, match=r"already holds notes.txt; name another folder"):
            refused()
    assert [p.name for p in root.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match=r"notes.txt is a file; name another folder"):
        write_stack(root / "notes.txt" / "stack", make())
    write_stack(tmp_path / "other", make())
    with pytest.raises(InputError, match=r"already holds stack\.json"):
        write_stack(tmp_path / "other", make())


def test_a_place_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "stack"):
        with pytest.raises(InputError, match=rf"{tmp_path} cannot be written to; name another"):
            check_free(folder)


def test_a_gate_may_lie_beside(tmp_path: Path) -> None:
    root = tmp_path / "stack"
    root.mkdir()
    (root / "gate.safetensors").write_bytes(b"theirs")
    write_stack(root, make())
    (root / "metrics.json").write_text("{}")
    assert_same(read_stack(root), make())
    assert (root / "gate.safetensors").read_bytes() == b"theirs"


@pytest.mark.parametrize("members", [1, 3])
def test_a_stack_that_is_not_finite_is_not_written(tmp_path: Path, members: int) -> None:
    stack = make(members)
    stack.heads["cola"]["classifier.weight"][-1, 0, 0] = float("nan")
    with pytest.raises(InputError, match=rf"task cola, member {members - 1}: classifier.weight"):
        write_stack(tmp_path / "stack", stack)
    assert not (tmp_path / "stack").exists()


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stack_files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        write_stack(tmp_path / "stack", make())
    monkeypatch.undo()
    write_stack(tmp_path / "stack", make())
    assert_same(read_stack(tmp_path / "stack"), make())


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, flip])
@pytest.mark.parametrize("members", [1, 3])
def test_every_file_that_is_damaged_is_named(
    tmp_path: Path, members: int, damage: Callable[[Path], None]
) -> None:
    write_stack(tmp_path / "whole", make(members))
    files = sorted(p for p in (tmp_path / "whole").rglob("*") if p.is_file())
    assert len(files) == (5 if members == 1 else 1 + 2 * (2 + 2 * members))
    for number, file in enumerate(files):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", root)
        path = root / file.relative_to(tmp_path / "whole")
        damage(path)
        with pytest.raises(InputError) as caught:
            read_stack(root)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).isprintable()


def rewrite(root: Path, **sections: Any) -> None:
    """Other sections, and a checksum that fits them."""
    value = json.loads((root / STACK_FILE).read_text())
    value.pop("checksum")
    write_json(root / STACK_FILE, value | sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"format": 2}, r"stack.json: format 2, this version reads 1"),
        ({"tasks": {}}, r"stack.json: damaged, .*tasks is not what a stack has"),
        ({"weights": [0.5]}, r"stack.json: damaged, .*weights is not what a stack has"),
        ({"files": {"../x": "0"}}, r"damaged, '../x' is no file of a task"),
        ({"files": {"tasks/sst2/../../../x": "0"}}, r"is no file of a task; restore it"),
        ({"parts": [dataclasses.asdict(Part("a", "b", (0, 9)))]}, r"part 'a' of columns 0 to 9"),
        (
            {"parts": [dataclasses.asdict(Part("a", "b", (0, 1), task="mnli"))]},
            r"a part's task is not what a stack has",
        ),
        ({"spec": {"rank": 2}}, r"stack.json: damaged, KeyError\('target_modules'\)"),
    ],
)
def test_a_description_that_cannot_be_is_refused(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    write_stack(tmp_path / "stack", make())
    if "files" in sections:
        whole = json.loads((tmp_path / "stack" / STACK_FILE).read_text())["files"]
        sections = {"files": whole | sections["files"]}
    rewrite(tmp_path / "stack", **sections)
    with pytest.raises(InputError, match=message):
        read_stack(tmp_path / "stack")


@pytest.mark.parametrize("members", [1, 3])
def test_a_file_that_is_not_listed_is_not_trusted(tmp_path: Path, members: int) -> None:
    write_stack(tmp_path / "stack", make(members))
    rewrite(tmp_path / "stack", files={})
    with pytest.raises(InputError, match=r"stack.json: damaged, it does not list tasks/sst2/"):
        read_stack(tmp_path / "stack")


def test_tasks_of_different_factors_are_no_stack(tmp_path: Path) -> None:
    root = tmp_path / "stack"
    write_stack(root, make())
    path = root / "tasks" / "cola" / WEIGHTS_FILE
    weights = load_file(path)
    name = next(key for key in weights if "lora_B" in key)
    save_file(weights | {name: weights[name] + 1}, path)
    files = json.loads((root / STACK_FILE).read_text())["files"]
    key = f"tasks/cola/{WEIGHTS_FILE}"
    rewrite(root, files=files | {key: stack_files.file_sha256(path)})
    with pytest.raises(InputError, match=r"tasks/cola: damaged, its factors are not the stack's"):
        read_stack(root)


@budgets(1_000)
@pytest.mark.parametrize("checked", [True, False])
def test_whatever_stands_in_stack_json_is_read_or_refused(
    tmp_path: Path, examples: int, checked: bool
) -> None:
    root = tmp_path / "stack"
    write_stack(root, make())
    tree = json.loads((root / STACK_FILE).read_text())
    if not checked:
        del tree["checksum"]

    def read(damaged: Any) -> None:
        (root / STACK_FILE).write_text(to_json(damaged), encoding="utf-8", errors="surrogatepass")
        assert len(read_stack(root)) == 1

    found = search(damaged_trees(tree), read, examples)
    assert found["refused"] > examples / 8
    assert found["value"] > 0


@budgets(1_000)
def test_any_bytes_of_stack_json_are_read_or_refused(tmp_path: Path, examples: int) -> None:
    root = tmp_path / "stack"
    write_stack(root, make())
    content = (root / STACK_FILE).read_bytes()

    def read(damaged: bytes) -> None:
        (root / STACK_FILE).write_bytes(damaged)
        assert len(read_stack(root)) == 1

    assert search(damaged_bytes(content), read, examples)["refused"] > examples / 8
