"""The seed's two scripts: thin fronts of the command line."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
TRAIN, EVAL = SCRIPTS / "train_lora_hf.py", SCRIPTS / "eval_lora_hf.py"
SMALL = """\
data: {{name: synthetic, train_examples: 32, batch_size: 8, max_length: 48}}
model: {{name: {model}, lora: {{rank: 2, alpha: 4.0}}}}
train: {{epochs: 1}}
sampler: {{burn_in: 2, thin: 2, num_samples: 4, chains: 2}}
"""


def arguments(script: Path, given: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", [script.name, *given])
    return runpy.run_path(str(script))["arguments"]()


def run(script: Path, given: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", [script.name, *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("script", [TRAIN, EVAL])
def test_they_are_short(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 40


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--config", "c.yaml"], ["train", "c.yaml"]),
        (["--config", "c.yaml", "a=1", "b.c=x y"], ["train", "c.yaml", "a=1", "b.c=x y"]),
        (["a=1", "--config", "c.yaml", "b=2"], ["train", "c.yaml", "a=1", "b=2"]),
    ],
)
def test_train_takes_a_config_and_overrides(
    given: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arguments(TRAIN, given, monkeypatch) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        (["--k", "20"], ["--k", "20"]),
        (["--single"], ["--single"]),
        (["--split", "shifted"], ["--split", "shifted"]),
        (["--k", "2", "a=1"], ["a=1", "--k", "2"]),
        (["a=1", "--k", "2", "b=2"], ["a=1", "b=2", "--k", "2"]),
    ],
)
def test_eval_takes_members_a_split_and_overrides(
    given: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--config", "c.yaml", *given]
    assert arguments(EVAL, given, monkeypatch) == ["eval", "c.yaml", *expected]


@pytest.mark.parametrize("given", [[], ["--config", "c", "--k", "1", "--single"]])
def test_eval_refuses_what_makes_no_sense(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(EVAL, given, monkeypatch) == 2
    assert "error:" in capsys.readouterr().err


def test_the_seeds_way_from_training_to_evaluation(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(SMALL.format(model=tiny_models["bert"]))
    given = ["--config", "tiny.yaml"]
    assert run(TRAIN, [*given, "sampler.num_samples=6"], monkeypatch) == 0
    assert "Saved sample 6/6: runs/tiny/samples/sample_0006\n" in capsys.readouterr().out
    for flags, k in (([], 6), (["--k", "4"], 4), (["--single"], 1)):
        assert run(EVAL, [*given, *flags], monkeypatch) == 0
        out = capsys.readouterr().out
        assert "Found 6 LoRA samples in runs/tiny\n" in out
        assert f"\nLoRA Ensemble@{k} — Acc: " in out
    assert run(EVAL, [*given, "--split", "shifted"], monkeypatch) == 0
    assert Path("runs/tiny/metrics.shifted.json").is_file()
    assert run(TRAIN, given, monkeypatch) == 2
    assert "sampler.num_samples: 6 there, 4 here" in capsys.readouterr().err


def test_a_real_process_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    config = SCRIPTS.parent / "configs" / "experiment_sst2_roberta_sam_sgld.yaml"
    command = [sys.executable, str(TRAIN), "--config", str(config), "sampler.rho=-1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "sampler.rho=-1.0" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
