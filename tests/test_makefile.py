"""The Makefile, the configs and the requirement files: what the README and the seed promise."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bayesian_lora.config import SAMPLERS, load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TEXT = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-zA-Z0-9][\w-]*):(?!=)", TEXT, flags=re.MULTILINE)
EXPERIMENTS = {
    "sst2-bert-sgld": "experiment_sst2_bert_sgld",
    "sst2-roberta-sam-sgld": "experiment_sst2_roberta_sam_sgld",
    "mrpc-distilbert-asgld": "experiment_mrpc_distilbert_asgld",
    "imdb-bert-sam-sgld-r1": "experiment_imdb_bert_sam_sgld_r1",
}

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@needs_make
def test_help_lists_every_target_with_a_line() -> None:
    shown = {
        words[0]: words[1] for line in make("help").splitlines() if (words := line.split(None, 1))
    }
    assert set(shown) == set(TARGETS)
    assert len(TARGETS) == len(set(TARGETS)) > 10
    assert make() == make("help")


def test_no_target_is_taken_for_a_file() -> None:
    """A file or folder named like a target would silence it."""
    declared = TEXT[TEXT.index(".PHONY:") :].split("\n\n")[0]
    for target in TARGETS:
        stem = re.sub(r"^(experiment|eval)-", "", target)
        listed = target in declared.split() or re.search(rf"^\w+ := .*\b{stem}\b", TEXT, re.M)
        assert listed, target


@needs_make
@pytest.mark.parametrize(("stem", "config"), EXPERIMENTS.items())
def test_the_seeds_targets_run_its_scripts(stem: str, config: str) -> None:
    arguments = 'ARGS=model.name=minilm "data.name=a b"'
    for target, script in ((f"experiment-{stem}", "train"), (f"eval-{stem}", "eval")):
        command = make("-n", target, arguments).splitlines()[-1]
        wanted = f"scripts/{script}_lora_hf.py --config configs/{config}.yaml"
        assert command.endswith(f'{wanted} model.name=minilm "data.name=a b"')
    assert (ROOT / "configs" / f"{config}.yaml").is_file()


@needs_make
@pytest.mark.parametrize(("target", "script"), [("experiments-all", "train"), ("eval-all", "eval")])
def test_all_four_run_in_one_go(target: str, script: str) -> None:
    plan = make("-n", target)
    for config in EXPERIMENTS.values():
        assert f"scripts/{script}_lora_hf.py --config configs/{config}.yaml" in plan


@needs_make
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_can_be_planned_and_names_files_that_are_there(target: str) -> None:
    for name in re.findall(r"\b(?:configs|scripts)/[\w./-]+\.\w+", make("-n", target)):
        assert (ROOT / name).is_file(), name


def test_the_seeds_configs_are_there() -> None:
    names = {path.stem for path in CONFIGS}
    assert {*EXPERIMENTS.values(), "experiment_comparison_sst2_bert", "demo"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_begins_with_the_command_that_runs_it(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert re.search(r"\b[Nn]eeds\b", second)
    target = re.match(r"# make ([\w-]+)", first)
    command = re.search(r"bayesian-lora (?:train|compare) (\S+?\.yaml)", first)
    assert target or command, first
    if command:
        assert ROOT / command[1] == path
    if target:
        assert target[1] in TARGETS
        recipe = TEXT[TEXT.index(f"\n{target[1]}:") :].split("\n\n")[0]
        assert path.stem in recipe


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_valid(path: Path) -> None:
    name = re.search(r"^sampler:\n  name: (\w+)", path.read_text(), re.M)
    assert name is not None
    assert name[1] in SAMPLERS
    config = load_config(path)
    assert config.output.dir == f"runs/{path.stem}"
    assert config.sampler.num_samples == 20
    assert config.sampler.chains == 4


def test_the_requirement_files_are_the_projects_dependencies() -> None:
    """Together all of them, each once, and no others."""
    project = (ROOT / "pyproject.toml").read_text()
    block = project[project.index("\ndependencies = [") :].split("\n]")[0]
    listed: list[str] = []
    for name in ("requirements.txt", "requirements_lora.txt"):
        first, *lines = (ROOT / name).read_text().split("\n")[:-1]
        assert first == "-c constraints.txt"
        assert lines
        listed += lines
    assert sorted(listed) == sorted(re.findall(r'^  "(.+)",$', block, re.M))
