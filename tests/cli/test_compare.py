"""`bayesian-lora compare` as a person calls it: help, mistakes, exit status, the table shown."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bayesian_lora.cli import main as cli
from bayesian_lora.cli.compare import EPILOG, compare
from bayesian_lora.config import load_config
from bayesian_lora.experiment.cells import make_plan

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "experiment_comparison_sst2_bert.yaml"
SMALL = {
    "data": {"name": "synthetic", "train_examples": 24, "batch_size": 8, "max_length": 48},
    "model": {"lora": {"rank": 2, "alpha": 4.0}},
    "prior": {"std": 0.3},
    "train": {"epochs": 1, "lr": 5.0e-3},
    "sampler": {"step_size": 1.0e-3, "burn_in": 2, "thin": 1, "num_samples": 2, "chains": 1},
}
Call = Callable[..., tuple[object, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command's status, standard output and standard error."""
    if all(command.callback is not compare for command in cli.app.registered_commands):
        cli.app.command(epilog=EPILOG)(compare)

    def run(*arguments: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *map(str, arguments)])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.fixture
def config(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    small = SMALL | {"model": {"name": str(tiny_models["bert"]), **SMALL["model"]}}
    path.write_text(yaml.safe_dump(small | {"output": {"dir": str(tmp_path / "out")}}))
    return path


def test_help_has_examples(call: Call) -> None:
    code, printed, _ = call("--help")
    assert code == 0
    text = " ".join(printed.split())
    assert "Usage: " in text
    assert "Examples: bayesian-lora compare configs/" in text
    assert "KEY=V1,V2" in text
    assert "Exit status 1 if a cell failed" in text


def test_a_comparison_from_start_to_end(config: Path, call: Call) -> None:
    arguments = [config, "sampler.temperature=1,0.5"]
    code, printed, err = call(*arguments)
    assert (code, err) == (0, "")
    root = config.parent / "out"
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("sampler.temperature  "))
    rows = list(csv.DictReader((root / "comparison.csv").read_text().splitlines()))
    for line, row in zip(lines[at + 1 : at + 3], rows, strict=True):
        assert line.split()[0] == row["sampler.temperature"]
        assert f"{float(row['nll']):.4f}" in line.split()
        assert row["rhat_max"] == ""
        assert "n/a" in line.split()
    first, second = (f"sampler.temperature={t}" for t in ("1", "0.5"))
    assert f"Warm starts of {first} were taken by {second}" in printed
    assert lines[-1] == f"Comparison: {root / 'comparison.csv'}"
    code, again, _ = call(*arguments)
    assert code == 0
    assert again.count("already done") == 2
    assert again.splitlines()[-6:] == lines[-6:]


def test_a_failed_cell_is_status_1_and_the_others_are_there(config: Path, call: Call) -> None:
    code, printed, _ = call(config, "sampler.step_size=1e3,1e-3")
    assert code == 1
    cells = json.loads((config.parent / "out" / "comparison.json").read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["failed", "finished"]
    assert cells[0]["error"] in printed


def test_mistakes_are_one_line_and_status_2(config: Path, call: Call) -> None:
    for argument, message in (
        ("sampler.name=sgld", "nothing to compare"),
        ("sampler.name=sgld,pslgd", "cell sampler.name=pslgd: "),
    ):
        code, printed, err = call(config, argument)
        assert (code, printed) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert not (config.parent / "out").exists()


def test_a_mistake_is_answered_before_torch_is_loaded(config: Path) -> None:
    code = (
        "import sys\nfrom bayesian_lora.cli.compare import compare\n"
        "from bayesian_lora.errors import InputError\n"
        f"try: compare({str(config)!r}, ['sampler.name=sgld'])\n"
        "except InputError: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_interrupt_is_status_130_and_says_how_to_go_on(
    config: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bayesian_lora.experiment.compare.train", interrupted)
    code, printed, err = call(config, "seed=1,2")
    assert code == 130
    assert f"go on with: bayesian-lora compare {config} seed=1,2\n" in printed
    assert err == "Interrupted.\n"


def test_the_configs_comparison_is_of_the_seeds_four_samplers() -> None:
    first = CONFIG.read_text().splitlines()[0]
    assert first == "# bayesian-lora compare configs/experiment_comparison_sst2_bert.yaml"
    plan = make_plan(CONFIG)
    names = [cell.config.sampler.name for cell in plan.cells]
    assert names == ["sgld", "asgld", "sam_sgld", "sam_sgld_rank1"]
    assert plan.root == Path("runs") / CONFIG.stem
    assert load_config(CONFIG).sampler.num_samples == 20
