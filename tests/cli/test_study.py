"""`bayesian-lora study` as a person calls it: help, mistakes, exit status."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bayesian_lora.cli import main as cli
from bayesian_lora.cli.study import EPILOG
from bayesian_lora.errors import InputError
from bayesian_lora.experiment import study as runner
from bayesian_lora.experiment.study_config import load_study
from bayesian_lora.experiment.study_context import Context, Step
from bayesian_lora.report.page import Page

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "lora_ensembling" / "study_demo.yaml"
Call = Callable[..., tuple[object, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command's status, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["study", *map(str, arguments)])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of a study's steps: one that fails while the list is not empty."""
    failing = ["no such base"]

    def make(context: Context, folder: Path) -> dict[str, int]:
        if failing:
            raise InputError(failing[0])
        return {"value": 1}

    monkeypatch.setattr(runner, "plan_steps", lambda _: [Step("one", "the one", {}, make)])
    monkeypatch.setattr(runner.observations, "observations", lambda _: Page("t", "", []))
    return failing


def test_help_has_examples_that_parse(call: Call) -> None:
    code, printed, _ = call("--help")
    assert code == 0
    text = " ".join(printed.split())
    assert "Examples: bayesian-lora study configs/" in text
    assert "--report-only" in text
    assert "Exit status 1 if a step failed" in text
    for line in EPILOG.split("\n\n")[1:]:
        _, command, config, *overrides = line.split()
        assert command == "study"
        assert load_study(ROOT / config, overrides).config.tasks


def test_exit_status_says_whether_a_step_failed(
    call: Call, one_step: list[str], tmp_path: Path
) -> None:
    given = (DEMO, f"output.dir={tmp_path / 'out'}")
    code, printed, err = call(*given)
    assert (code, err) == (1, "")
    assert "one failed: no such base" in printed.splitlines()
    one_step.clear()
    code, printed, err = call(*given)
    assert (code, err) == (0, "")
    assert printed.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'observations.html'}"


def test_the_report_alone_makes_no_step(call: Call, one_step: list[str], tmp_path: Path) -> None:
    page = tmp_path / "out" / "observations.html"
    given = (DEMO, f"output.dir={tmp_path / 'out'}")
    code, _, err = call(*given, "--report-only")
    assert code == 2
    assert "no study there to report on" in err
    assert list(tmp_path.iterdir()) == []
    call(*given)
    page.unlink()
    one_step.clear()  # made now, the step would succeed
    code, _, err = call(*given, "--report-only")
    assert (code, err) == (1, "")
    assert page.is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.yaml"], "config 'nowhere.yaml' not found"),
        ([str(DEMO), "sead=1"], "seed"),
        ([str(DEMO), "tasks"], "write key=value"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    call: Call, arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, err = call(*arguments)
    assert (code, printed) == (2, "")
    assert err.startswith("Error: ")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
