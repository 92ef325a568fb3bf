"""`bayesian-lora sequential` as a person calls it: growth, going on, mistakes in one line."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bayesian_lora.cli import main as cli
from bayesian_lora.cli.sequential import EPILOG
from bayesian_lora.composition.column_files import read_columns
from bayesian_lora.data.glue_datasets import TASKS, get_task, load_split

Call = Callable[..., tuple[object, str, str]]
QUICK = ("--examples", "40", "--epochs", "1", "--batch-size", "20", "--device", "cpu")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command's status, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["sequential", *map(str, arguments)])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.fixture
def base(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["bert"]


def test_help_has_examples(call: Call) -> None:
    code, printed, _ = call("--help")
    assert code == 0
    text = " ".join(printed.split())
    assert "Examples: bayesian-lora sequential sst2 cola mnli" in text
    for option in ("--rank-per-task", "--alpha", "--no-transfer", "--seeds", "--data-dir"):
        assert option in text


def test_tasks_grow_and_more_are_added_in_the_same_folder(
    call: Call, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "grown"
    options = ("--model", base, "--seeds", "2", *QUICK, "--out", out)
    code, printed, error = call("synthetic", "again=synthetic", *options)
    assert (code, error) == (0, "")
    assert "Forward transfer" in printed
    assert f"Evaluate it: bayesian-lora eval {out}" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["synthetic", "again", "identical"] in [line[:3] for line in lines]
    assert ["synthetic", "1"] in [line[:2] for line in lines]
    assert ["again", "2"] in [line[:2] for line in lines]
    code, printed, error = call(
        "synthetic", "again=synthetic", "third=synthetic", *options, "--no-transfer"
    )
    assert (code, error) == (0, "")
    assert "again: has grown already" in printed
    found = read_columns(out)
    assert list(found.stack.tasks) == ["synthetic", "again", "third"]
    assert (len(found.stack), found.stack.spec.rank) == (2, 3)
    assert found.report["third"]["transfer"] is None
    assert found.report["again"]["transfer"] is not None
    assert found.stack.tasks["again"].max_length == 64  # the model reads no more


def test_what_is_printed_is_what_was_found(call: Call, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    _, printed, _ = call("a=synthetic", "b=synthetic", "--model", base, *QUICK, "--out", out)
    report = read_columns(out).report
    shown = [" ".join(line.split()) for line in printed.splitlines()]
    own = report["a"]["after"]["validation"]
    added = report["a"]["parameters"]
    assert (
        f"a 1 {added['columns']:,} + {added['head']:,} validation "
        f"accuracy {own['accuracy']:.4f} nll {own['nll']:.4f}"
    ) in shown
    change = -report["a"]["later"]["b"]["forgetting_unmasked"]["nll"]["mean"]
    assert any(line.startswith("a b identical") and f"nll {change:+.4f}" in line for line in shown)
    gain = report["b"]["transfer"]["nll"]["mean"]
    assert any(line.startswith("b ") and line.endswith(f"nll {gain:+.4f}") for line in shown)
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["epoch"]) for row in rows] == [("a", "0"), ("b", "0")]
    history = report["b"]["fit"]["history"]
    assert float(rows[1]["val/loss"]) == pytest.approx(history[0]["val/loss"])
    mean = report["b"]["angles"][0]["mean"]
    assert any(
        f"b a {mean['cosine']:.4f} (±{mean['random']['cosine']:.4f})" in line for line in shown
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["synthetc"], "did you mean synthetic?"),
        (["synthetic", "synthetic"], "'synthetic' is named twice"),
        (["stsb"], "regression"),
        (["synthetic", "--rank-per-task", "33"], "32 wide"),
        (["synthetic", "--max-length", "65"], "--max-length=65: "),
        (["synthetic", "--alpha", "-1"], "--alpha=-1.0: must be a positive"),
        (["synthetic", "--lr", "0"], "--lr=0.0: must be a positive"),
        (["synthetic", "--target", "quary"], "'quary' matches no linear layer"),
        (["synthetic", "--target", ","], "layers (): give at least 1"),
        (["a/b=synthetic"], "letters"),
        (["=synthetic"], "letters"),
        (["synthetic", "--data-dir", "nowhere"], "--data-dir='nowhere' is not a folder"),
        (["synthetic", "--device", "tpu"], "--device='tpu'"),
        (["a=synthetic", "--examples", "90000"], "task 'a': --examples=90000: 90000 examples"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    arguments: list[str], words: str, call: Call, base: Path, tmp_path: Path
) -> None:
    code, _, error = call(*arguments, "--model", base, "--out", tmp_path / "out")
    assert code == 2
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert words in error
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    call: Call, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    code, printed, error = call("synthetic", "--model", base, "--out", tmp_path / "out")
    assert (code, printed) == (2, "")
    assert f"{tmp_path} cannot be written to" in error


def test_the_folder_is_called_after_the_tasks(
    call: Call, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, *_ = call("a=synthetic", "b=synthetic", "--model", base, *QUICK, "--no-transfer")
    assert code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["sequential-a-b"]


def test_the_examples_can_be_run(real_data: Path) -> None:
    """No task has fewer training examples than an example of the help asks for."""
    asked = 0
    for line in EPILOG.split("\n\n")[1:]:
        words = line.split()
        if "--examples" in words:
            asked += 1
            count = int(words[words.index("--examples") + 1])
            tasks = [word for word in words[2:] if word in TASKS]
            assert "cola" in tasks
            for task in tasks:
                assert len(load_split(get_task(task), "train", data_dir=real_data)) >= count
    assert asked > 0


def test_a_growth_that_diverges_is_one_line_and_can_go_on(
    call: Call, base: Path, tmp_path: Path
) -> None:
    options = ("--model", base, *QUICK, "--no-transfer", "--out", tmp_path / "out")
    code, _, error = call("synthetic", *options, "--lr", "1e30")
    assert code == 2
    assert error.startswith("Error: --lr=1e+30: chain 0: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "stack.json").exists()
    assert call("synthetic", *options, "--lr", "0.001")[0] == 0


def test_another_beginning_in_the_same_folder_is_refused(
    call: Call, base: Path, tmp_path: Path
) -> None:
    options = ("--model", base, *QUICK, "--no-transfer", "--out", tmp_path / "out")
    assert call("synthetic", *options)[0] == 0
    code, _, error = call("other=synthetic", "synthetic", *options)
    assert code == 2
    assert "its task 1 is 'synthetic', asked for is 'other'" in error
    code, _, error = call("synthetic", "other=synthetic", *options, "--lr", "0.5")
    assert code == 2
    assert "lr was 0.001 when it began, now it is 0.5" in error
