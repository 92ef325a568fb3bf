"""The configs of `configs/lora_ensembling/`: alike but for the task, and what a run of one logs."""

import csv
import re
from pathlib import Path

import pytest

from bayesian_lora.config import load_config
from bayesian_lora.config_schema import Config
from bayesian_lora.experiment.cells import differences, settings_of
from bayesian_lora.experiment.train import train
from bayesian_lora.utils.files import read_json

from .same_runs import QUIET

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "lora_ensembling"
TASKS = ("sst2", "cola", "mnli")


def config_of(task: str, *overrides: str) -> Config:
    return load_config(FOLDER / f"{task}.yaml", overrides)


@pytest.mark.parametrize("task", TASKS)
def test_a_baseline_is_one_rank_one_fit_on_query_key_and_value(task: str) -> None:
    config = config_of(task)
    lora, train_keys = config.model.lora, config.train
    assert (lora.rank, lora.target_modules) == (1, ["query", "key", "value"])
    assert (config.sampler.name, config.sampler.chains) == ("map", 1)
    assert (train_keys.schedule, train_keys.early_stopping) == ("plateau", True)
    assert config.data.name == task
    assert config.output.dir == f"runs/lora_ensembling/{task}"
    assert config.data.train_examples is None or config.data.train_examples <= 10_000


@pytest.mark.parametrize("task", TASKS)
def test_a_baseline_begins_with_the_command_that_runs_it(task: str) -> None:
    first, *rest = (FOLDER / f"{task}.yaml").read_text().splitlines()
    assert first == f"# bayesian-lora train configs/lora_ensembling/{task}.yaml"
    assert any("model.name=bert-base-uncased" in line for line in rest)


def test_baselines_differ_in_their_task_alone_and_so_share_their_initial_factors() -> None:
    first, *others = (settings_of(config_of(task)) for task in TASKS)
    for other in others:
        odd = [line.partition(":")[0] for line in differences(first, other)]
        assert set(odd) <= {"data.name", "data.train_examples", "train.epochs"}
    assert first["train.init_seed"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_short_run_on_real_data_logs_the_seeds_names(
    task: str, real_data: Path, tmp_path: Path
) -> None:
    short = ("data.train_examples=200", "train.epochs=1", f"output.dir={tmp_path / 'run'}")
    root = train(config_of(task, *short, f"data.dir={real_data}"), QUIET)
    with (root / "metrics.csv").open(newline="") as file:
        epoch, last = csv.DictReader(file)
    for name in ("epoch", "trainer/global_step", "lr-Adam", "train/loss", "train/acc"):
        assert re.fullmatch(r"[\d.e-]+", epoch[name]), name
    assert 0 < float(epoch["val/acc"]) < 1
    if task == "mnli":
        for i, split in enumerate(("matched", "mismatched")):
            assert float(last[f"val_{split}/loss/dataloader_idx_{i}"]) > 0
            assert float(last[f"val_{split}/acc/dataloader_idx_{i}"]) > 0.2
        assert read_json(root / "metrics.mismatched.json", "metrics")["split"] == "mismatched"
        return
    assert float(last["val/loss"]) > 0
    assert ("val/mcc" in last) == (task == "cola")
