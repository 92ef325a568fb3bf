"""`bayesian-lora gate` on a small stack of two adapters of the embedded task."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bayesian_lora.cli import main as cli
from bayesian_lora.composition.gate_files import load_gated
from bayesian_lora.composition.stack_files import write_stack
from tests.composition.stacks import make_stack

LABELS = {"first": 2, "second": 2}
QUICK = ("--examples", "80", "--epochs", "2", "--lr", "0.02")
Call = Callable[..., tuple[object, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command's status, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["gate", *map(str, arguments)])
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    stack = make_stack(tiny_models["bert"], labels=LABELS, members=2)
    tasks = {
        name: dataclasses.replace(task, data="synthetic", label_names=("negative", "positive"))
        for name, task in stack.tasks.items()
    }
    write_stack(tmp_path / "stack", stack.changed(tasks=tasks))
    return tmp_path / "stack"


def test_a_gate_is_trained_measured_and_written(call: Call, folder: Path) -> None:
    code, told, _ = call(folder, *QUICK, "--kind", "token", "--posterior-steps", "2")
    out = folder.with_name("stack-gated")
    assert code == 0
    assert "first: 72 train, 8 held out" in told
    assert "Without being told the task:" in told
    assert told.index("acc | task") < told.index(f"Written: {out}")
    gated = load_gated(out)
    assert (gated.options.kind, gated.options.posterior_steps, len(gated.stack)) == ("token", 2, 2)
    figures = json.loads((out / "gate_metrics.json").read_text())
    assert 0 < figures["tasks"]["first"]["joint_accuracy"] < 1
    assert figures["uncertainty"]["mutual_information"] > 0
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["chain"] for row in rows] == ["0", "1"] * 2
    code, again, _ = call(out, "--eval")
    assert code == 0
    table = told[told.index("Without being") : told.index("Written:")]
    assert table.strip() in again
    assert json.loads((out / "gate_metrics.json").read_text()) == figures


def test_arrow_trains_nothing(call: Call, folder: Path, tmp_path: Path) -> None:
    code, told, _ = call(folder, *QUICK, "--kind", "arrow", "--top-k", 1, "--out", tmp_path / "a")
    assert code == 0
    assert "Epoch" not in told
    assert load_gated(tmp_path / "a").state == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "router"], "Error: --kind='router': choose one of adapter, layer"),
        (["--top-k", "3"], "--top-k=3: "),
        (["--temperature", "0"], "--temperature=0.0"),
        (["--kind", "arrow", "--unfrozen"], "has no parameters"),
        (["--lr", "0"], "--lr=0.0: must be a positive number"),
        (["--data-dir", "/no/such"], "--data-dir='/no/such' is not a folder"),
        (["--eval"], "a stack without a gate"),
        (["--eval", "--epochs", "2"], "--epochs: --eval trains and writes nothing new; leave it"),
        (["--eval", "--out", "new"], "--out: --eval trains and writes nothing new; leave it out"),
        (["--examples", "90000"], "task 'first': --examples=90000: 90000 examples asked for"),
        (["--out", "stack"], "stack: already holds stack.json; name another folder"),
        ([*QUICK, "--lr", "1e30"], "Error: --lr=1e+30: chains 0, 1: "),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    call: Call,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    code, _, error = call(folder, *arguments)
    assert code == 2
    assert words in error
    assert error.count("\n") == 1
    assert [path.name for path in folder.parent.iterdir()] == ["stack"]


def test_a_compressed_stack_is_refused(call: Call, folder: Path) -> None:
    from bayesian_lora.composition.merging import compress
    from bayesian_lora.composition.stack_files import read_stack

    small = folder.with_name("small")
    write_stack(small, compress(read_stack(folder), 1))
    code, _, error = call(small, *QUICK)
    assert code == 2
    assert "no columns of its own" in error
    assert not folder.with_name("small-gated").exists()


def test_help_has_examples(call: Call) -> None:
    code, told, _ = call("--help")
    assert code == 0
    assert "bayesian-lora gate runs/stack-sst2-cola --posterior-steps 500" in told
    assert "no text comes with its task" in " ".join(told.split())
