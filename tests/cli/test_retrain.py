"""`bayesian-lora retrain` on a small stack of two adapters of the embedded task."""

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bayesian_lora.cli.main import main
from bayesian_lora.composition import task_data
from bayesian_lora.composition.stack_files import read_stack, write_stack
from bayesian_lora.data import preparation
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.tasks import TaskSpec
from tests.composition.stacks import make_stack

LABELS = {"first": 2, "second": 2}
QUICK = ("--examples", "80", "--epochs", "2")


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    stack = make_stack(tiny_models["bert"], labels=LABELS)
    tasks = {
        name: dataclasses.replace(task, data="synthetic", label_names=("negative", "positive"))
        for name, task in stack.tasks.items()
    }
    write_stack(tmp_path / "stack", stack.changed(tasks=tasks))
    return tmp_path / "stack"


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["retrain", *arguments])
    return int(ended.value.code or 0)


def test_a_stack_is_trained_measured_and_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*QUICK, "--lr", "0.01", "--data-dir", str(tmp_path)]
    assert command(str(folder), "--on", "first", *options) == 0
    out = tmp_path / "stack-on-first"
    told = capsys.readouterr().out
    assert "first: 72 train, 8 held out" in told
    assert told.index("Before:") < told.index("After:") < told.index(f"Written: {out}")
    before, after = read_stack(folder), read_stack(out)
    assert after.facts["retrained"]["variant"]["tasks"] == ["first"]
    moved = [n for n, t in after.factors.items() if not t.equal(before.factors[n])]
    assert len(moved) == len(before.factors)
    assert all(t.equal(before.heads["second"][n]) for n, t in after.heads["second"].items())
    figures = json.loads((out / "retrain_metrics.json").read_text())
    assert figures["after"]["first"]["validation"]["nll"] > 0
    assert figures["before"]["first"] != figures["after"]["first"]
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["trainer/global_step"] for row in rows] == ["3", "6"]
    assert float(rows[0]["train/loss"]) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--on", "third"], "Error: no task 'third': the stack carries first, second"),
        (["--on", "first,first"], "Error: task 'first' is named twice"),
        (["--on", "first", "--part", "third"], "no part 'third'"),
        (["--on", "first", "--lr", "0"], "Error: --lr=0.0: must be a positive number"),
        (["--on", "first", "--mixing", "mean"], "Error: --mixing='mean': choose alternate or sum"),
        (["--on", "first", "--distillation", "-1"], "Error: --distillation=-1.0: must be"),
        (["--on", "first", "--examples", "90000"], "Error: task 'first': --examples=90000: 90000"),
        (["--on", "first", "--out", "stack/stack.json"], "stack.json is a file; name another"),
        (["--on", "first", *QUICK, "--lr", "1e30"], "Error: --lr=1e+30: chain 0: "),
        (["--on", "first", "--data-dir", "/no/such"], "--data-dir='/no/such' is not a folder"),
        (["--on", ","], "the stack carries first, second"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    assert command(str(folder), *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert [path.name for path in folder.parent.iterdir()] == ["stack"]


def test_a_folder_that_holds_something_is_not_written_to(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(folder), "--on", "first", "--out", str(folder)) == 2
    assert f"{folder}: already holds stack.json; name another folder with --out" in (
        capsys.readouterr().err
    )
    assert command(str(folder.parent / "none"), "--on", "first") == 2
    assert "stack.json" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder.parent)
    assert command(str(folder), "--on", "first", *QUICK) == 2
    printed = capsys.readouterr()
    assert f"{folder.parent} cannot be written to; name another folder" in printed.err
    assert printed.out == ""


def test_only_tasks_that_are_trained_need_training_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    load = task_data.load_split

    def watched(spec: TaskSpec, split: str, **options: Any) -> Examples:
        asked.append(split)
        return load(spec, split, **options)

    monkeypatch.setattr(task_data, "load_split", watched)
    monkeypatch.setattr(preparation, "load_split", watched)
    options = ("--on", "second", *QUICK, "--distillation", "1", "--out", str(tmp_path / "out"))
    assert command(str(folder), *options) == 0
    assert asked.count("validation") == 2
    figures = json.loads((tmp_path / "out" / "retrain_metrics.json").read_text())["after"]
    assert {task: list(splits) for task, splits in figures.items()} == {
        "first": ["validation", "shifted"],
        "second": ["validation", "shifted"],
    }
    assert asked.count("train") == 1, "one task's, and once"


@pytest.mark.parametrize("rest", [["retrain", "--on", "first"], ["gate"]])
def test_a_growth_is_not_taken_for_a_stack(
    folder: Path, capsys: pytest.CaptureFixture[str], rest: list[str]
) -> None:
    """Its columns were fitted on top of one another; nothing is written."""
    (folder / "columns.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main([rest[0], str(folder), *rest[1:]])
    assert ended.value.code == 2
    assert "columns build on one another" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["stack"]
