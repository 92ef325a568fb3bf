"""`bayesian-lora` itself: help, version, and mistakes in one line."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bayesian_lora.cli.main import main
from bayesian_lora.composition.column_files import begin
from bayesian_lora.composition.gate_files import write_gated
from bayesian_lora.composition.gates import Gated, GateOptions
from bayesian_lora.config import build_config, dump_run_config
from tests.composition.stacks import make_stack


def call(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.mark.parametrize("command", ["train", "eval", "doctor"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"Examples?: bayesian-lora {command}", printed)


def test_the_root_help_lists_the_commands_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom bayesian_lora.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)\n"
        "print('loaded:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("train", "eval", "doctor", "loaded: []"):
        assert name in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from bayesian_lora import __version__

    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == __version__


def test_a_mistake_is_one_line_on_stderr_of_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bayesian_lora.cli.main", "train", str(tmp_path / "no.yaml")]
    code = "from bayesian_lora.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command[3:]], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: config ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_operating_system_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr("bayesian_lora.config.load_config", full)
    assert call("train", "x.yaml") == 1
    assert capsys.readouterr().err == "Error: runs/x: No space left on device\n"


def test_eval_refuses_overrides_that_the_run_was_not_made_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    own = build_config({"model": {"name": "minilm"}, "sampler": {"chains": 2}})
    (run / "config.yaml").write_text(dump_run_config(own))
    config = tmp_path / "other.yaml"
    config.write_text(f"model: {{name: roberta-base}}\noutput: {{dir: {run}}}\n")
    for where in (run, config):
        assert call("eval", str(where), "model.name=bert-base-uncased") == 2
        assert f"{run} was made with model.name=minilm; " in capsys.readouterr().err
    # What agrees, and what may differ, gets as far as the missing record.
    assert call("eval", str(config), "sampler.chains=2", "device=cpu", "data.dir=x") == 2
    assert "run.json: not found" in capsys.readouterr().err


@pytest.fixture
def stack(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A gated stack's folder."""
    found = make_stack(tiny_models["bert"], labels={"first": 2, "second": 2})
    tasks = {n: dataclasses.replace(task, data="synthetic") for n, task in found.tasks.items()}
    gated = Gated(found.changed(tasks=tasks), GateOptions("arrow"), {})
    write_gated(tmp_path / "gated", gated)
    return tmp_path / "gated"


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("gate.safetensors", "gate.safetensors: cannot be read"),
        ("stack.json", "a gate without its experts, it has no stack.json; restore the folder"),
    ],
)
def test_a_gated_stack_is_no_plain_one_whatever_is_missing(
    stack: Path, capsys: pytest.CaptureFixture[str], lost: str, words: str
) -> None:
    (stack / lost).unlink()
    assert call("eval", str(stack)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (stack / "metrics.json").exists()


def test_a_growth_without_a_task_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path, {})
    assert call("eval", str(tmp_path)) == 2
    assert "no task has grown yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cpu", "'cpu': an override is KEY=VALUE, such as device=cpu"),
        ("seed=1", "seed: a stack takes data.dir=… and device=… alone"),
        ("data.dir=/no/such", "data.dir='/no/such' is not a folder"),
        ("device=tpu", "device='tpu': choose"),
    ],
)
def test_overrides_of_a_stack_are_told_as_they_are_given(
    stack: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    assert call("eval", str(stack), override) == 2
    assert f"Error: {words}" in capsys.readouterr().err


def test_help_of_eval_names_stacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval", "--help") == 0
    assert "The folder of a run or stack" in " ".join(capsys.readouterr().out.split())
