"""`bayesian-lora` itself: help, version, and mistakes in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bayesian_lora.cli.main import main
from bayesian_lora.config import build_config, dump_run_config


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
