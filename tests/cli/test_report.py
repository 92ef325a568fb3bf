"""`bayesian-lora report` as a person calls it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bayesian_lora.cli import main as cli
from bayesian_lora.cli.report import EPILOG, report
from tests.report.finished_runs import write_run

Call = Callable[..., tuple[object, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command's status, standard output and standard error."""
    if all(command.callback is not report for command in cli.app.registered_commands):
        cli.app.command(epilog=EPILOG)(report)

    def run(*arguments: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", *map(str, arguments)])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def test_help_has_examples(call: Call) -> None:
    code, printed, _ = call("--help")
    text = " ".join(printed.split())
    assert code == 0
    assert "Examples: bayesian-lora report runs/demo" in text
    assert "RUN|COMPARISON" in text
    assert "asks the network for nothing" in text


def test_it_writes_the_file_and_says_where(call: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "run", shifted=False)
    out = tmp_path / "page.html"
    code, printed, _ = call(tmp_path / "run", "--out", out)
    assert code == 0
    assert f"Report: {out}" in printed
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_what_is_no_folder_is_one_line(call: Call, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("words")
    code, _, error = call(tmp_path / name)
    assert code == 2
    assert error.startswith("Error: ")
    assert "not a folder" in error
    assert error.count("\n") == 1


def test_a_file_that_is_no_page_is_not_replaced(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, shifted=False)
    kept = (run / "metrics.json").read_bytes()
    code, _, error = call(run, "--out", run / "metrics.json")
    assert code == 2
    assert "no HTML page, so it is not replaced" in error
    assert (run / "metrics.json").read_bytes() == kept
    for _ in range(2):  # a page of before is
        assert call(run, "--out", tmp_path / "page.html")[0] == 0
