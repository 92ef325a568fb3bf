"""`bayesian-lora retrain` on a small stack of two adapters of the embedded task."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from bayesian_lora.cli.main import main
from bayesian_lora.composition.stack_files import read_stack, write_stack
from tests.composition.stacks import make_stack

LABELS = {"first": 2, "second": 2}


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
    options = ["--examples", "80", "--epochs", "2", "--lr", "0.01", "--data-dir", str(tmp_path)]
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
    figures = json.loads((out / "stack.json").read_text())["figures"]
    assert figures["after"]["first"]["validation"]["nll"] > 0
    assert figures["before"]["first"] != figures["after"]["first"]
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["trainer/global_step"] for row in rows] == ["3", "6"]
    assert float(rows[0]["train/loss"]) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--on", "third"], "the stack carries first, second"),
        (["--on", "first", "--part", "third"], "no part 'third'"),
        (["--on", "first", "--mixing", "mean"], "alternate or sum"),
        (["--on", "first", "--lr", "0"], "lr=0.0: must be a positive number"),
        (["--on", "first", "--data-dir", "/no/such"], "--data-dir='/no/such' is not a folder"),
        (["--on", ","], "the stack carries first, second"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert command(str(folder), *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert [path.name for path in folder.parent.iterdir()] == ["stack"]


def test_a_folder_that_holds_something_is_not_written_to(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(folder), "--on", "first", "--out", str(folder)) == 2
    assert "exists already" in capsys.readouterr().err
    assert command(str(folder.parent / "none"), "--on", "first") == 2
    assert "stack.json" in capsys.readouterr().err
