"""A small run, and whether two folders hold the same one.

Shapes: M chains, K members.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayesian_lora.config import Config, build_config
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import read_starts, read_traces
from bayesian_lora.utils.files import read_json

BASE: dict[str, Any] = {
    "data": {"name": "synthetic", "train_examples": 40, "batch_size": 8, "max_length": 48},
    "model": {"lora": {"rank": 2, "alpha": 4.0}},
    "prior": {"std": 0.3},
    "train": {"epochs": 2, "lr": 5.0e-3, "early_stopping": True},
    "sampler": {"step_size": 1.0e-3, "burn_in": 4, "thin": 2, "num_samples": 6, "chains": 2},
    "output": {"checkpoint_seconds": 0},
}
"""2 × 5 steps of the warm start, 4 of burn-in, 6 of sampling; a checkpoint after each."""
QUIET = Progress(quiet=True)


def config_of(model: Path, folder: Path, *overrides: str) -> Config:
    """`BASE` for a model and a folder."""
    return build_config(BASE, [f"model.name={model}", f"output.dir={folder}", *overrides])


def read(path: Path) -> dict[str, Any]:
    """A JSON file of a run, without NaN or infinity in it."""
    json.loads(path.read_text(), parse_constant=pytest.fail)
    return read_json(path, "file")


def assert_same_run(found: Path, expected: Path) -> None:
    """Members, warm starts of both kinds, traces, milestones, predictions, figures and log, to the
    last bit; costs apart.
    """
    ours, theirs = (weights(root) for root in (found, expected))
    assert ours.keys() == theirs.keys()
    assert ours
    for name in theirs:
        assert ours[name] == theirs[name], name
    assert (found / "members.jsonl").read_bytes() == (expected / "members.jsonl").read_bytes()
    lists = [read(root / "ensemble.json") for root in (found, expected)]
    for name in ("members", "starts", "starts_are", "alternatives", "alternatives_reason"):
        assert lists[0][name] == lists[1][name], name
    milestones = [read(root / "run.json")["milestones"] for root in (found, expected)]
    assert milestones[0] == milestones[1]
    assert_same_arrays(read_traces(found), read_traces(expected))
    assert_same_arrays(read_starts(found) or {}, read_starts(expected) or {})
    predictions = "predictions/validation.npz"
    with np.load(found / predictions) as a, np.load(expected / predictions) as b:
        assert_same_arrays(dict(a), dict(b))
    metrics = [read(root / "metrics.json") for root in (found, expected)]
    costs = [row.pop("cost") for row in metrics]
    assert costs[0]["gradient_evaluations"] == costs[1]["gradient_evaluations"]
    assert metrics[0] == metrics[1]
    lines = [(root / "log.jsonl").read_text().splitlines() for root in (found, expected)]
    assert [_without_rate(x) for x in lines[0]] == [_without_rate(x) for x in lines[1]]
    assert (found / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()


def assert_same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit, under the same names."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def weights(root: Path) -> dict[str, bytes]:
    """Every weights file of members and warm starts, by its path in the run."""
    paths = [p for sub in ("samples", "map") for p in (root / sub).rglob("*.safetensors")]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in paths}


def _without_rate(line: str) -> dict[str, Any]:
    row = json.loads(line)
    row.pop("examples_per_s", None)  # a milestone has none
    return row
