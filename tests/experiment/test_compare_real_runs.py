"""`compare` with real runs: two samplers and two step sizes, of which one is unstable."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bayesian_lora.config import load_config
from bayesian_lora.experiment.compare import compare, failed_cells
from bayesian_lora.experiment.train import train
from bayesian_lora.progress import Progress

QUIET = Progress(quiet=True)
SMALL: dict[str, Any] = {
    "data": {"name": "synthetic", "train_examples": 32, "batch_size": 8, "max_length": 48},
    "model": {"lora": {"rank": 2, "alpha": 4.0}},
    "prior": {"std": 0.3},
    "train": {"epochs": 1, "lr": 5.0e-3},
    "sampler": {"burn_in": 2, "thin": 2, "num_samples": 4, "chains": 2},
}


def cells_of(root: Path) -> dict[str, dict[str, Any]]:
    record = json.loads((root / "comparison.json").read_text(), parse_constant=pytest.fail)
    return {entry["name"]: entry for entry in record["cells"]}


@pytest.fixture(scope="module")
def real(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of real runs: two samplers and an unstable step, from one warm start."""
    root = tmp_path_factory.mktemp("real")
    path = root / "small.yaml"
    small = SMALL | {"model": {"name": str(tiny_models["bert"]), **SMALL["model"]}}
    path.write_text(yaml.safe_dump(small | {"output": {"dir": str(root / "out")}}))
    return compare(path, ["sampler.name=sgld,sghmc", "sampler.step_size=1e-3,1e3"], QUIET)


def test_real_runs_are_compared_by_their_metrics(real: Path) -> None:
    found = cells_of(real)
    good = [name for name, entry in found.items() if entry["status"] == "finished"]
    assert good == [f"sampler.name={s},sampler.step_size=1e-3" for s in ("sgld", "sghmc")]
    assert failed_cells(real) == [name for name in found if name not in good]
    table = csv.DictReader((real / "comparison.csv").read_text().splitlines())
    rows = dict(zip(found, table, strict=True))
    for name in good:
        metrics = json.loads((real / name / "metrics.json").read_text())
        row = rows[name]
        ensemble, d = metrics["ensemble"], metrics["diagnostics"]
        wanted = {n: ensemble[n] for n in ("accuracy", "nll", "ece", "brier")}
        wanted |= {"map_nll": metrics["map"]["nll"]["mean"], "rhat_max": d["rhat_max"]}
        wanted |= {"map_ensemble_nll": metrics["map_ensemble"]["nll"], "t_eff": d["t_eff"]}
        assert {n: float(row[n]) for n in wanted} == wanted
        assert row["verdict"] == d["verdict"]
        evaluations = metrics["cost"].get("sampling_gradient_evaluations")
        ess = "" if evaluations is None else str(1000 * d["ess_bulk_min"] / evaluations)
        assert row["ess_per_1000"] == ess
    for name in failed_cells(real):
        assert "step_size" in found[name]["error"]


def test_real_runs_share_the_warm_start_and_sample_as_if_alone(
    real: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    first, other = (real / f"sampler.name={s},sampler.step_size=1e-3" for s in ("sgld", "sghmc"))
    for m in range(2):
        part = Path("map") / f"chain_{m}" / "adapter_model.safetensors"
        assert (first / part).read_bytes() == (other / part).read_bytes()
    assert {entry["warm_start"] for entry in cells_of(real).values()} == {first.name}
    config = load_config(other / "config.yaml")
    assert config.train.starts_from == str(first)
    config.train.starts_from, config.output.dir = None, str(tmp_path / "alone")
    alone = train(config, QUIET)
    for k in (1, 4):
        part = Path("samples") / f"sample_{k:04d}" / "adapter_model.safetensors"
        assert (alone / part).read_bytes() == (other / part).read_bytes()
