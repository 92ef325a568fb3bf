"""What a report reads of a folder, and what it says of files that are missing or broken."""

import json
from pathlib import Path

import numpy as np
import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.report.run_files import read_run
from bayesian_lora.utils.files import append_json_line, read_npz, write_json, write_npz
from tests.report.finished_runs import CHAINS, EXAMPLES, MEMBERS, ROWS, write_run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def test_everything_is_read(root: Path) -> None:
    found = read_run(root)
    assert found.split == "validation"
    assert sorted(found.predictions) == ["shifted", "validation"]
    assert found.predictions["validation"].logits.shape == (MEMBERS, EXAMPLES, 2)
    assert found.traces["log_posterior"].shape == (CHAINS, ROWS)
    assert found.chains == tuple(range(CHAINS))
    assert list(found.others) == ["shifted"]
    assert found.milestones[0]["step"] == 1000
    assert found.sampled
    assert not found.regression
    assert found.missing == {}


def test_without_metrics_there_is_nothing_to_report(root: Path) -> None:
    (root / "metrics.json").unlink()
    with pytest.raises(InputError, match="bayesian-lora eval"):
        read_run(root)


def test_nan_logits_are_named(root: Path) -> None:
    path = root / "predictions" / "validation.npz"
    arrays = read_npz(path)
    arrays["logits"][3, 7, 1] = np.nan
    write_npz(path, arrays)
    found = read_run(root)
    assert list(found.predictions) == ["shifted"]
    why = found.missing["predictions of validation"]
    assert "validation.npz" in why
    assert "NaN" in why
    assert "\n" not in why


def test_predictions_of_another_split_are_refused(root: Path) -> None:
    folder = root / "predictions"
    (folder / "shifted.npz").replace(folder / "validation.npz")
    found = read_run(root)
    assert found.predictions == {}
    assert "another run or split" in found.missing["predictions of validation"]


def test_chains_that_were_dropped_are_left_out(root: Path) -> None:
    metrics = json.loads((root / "metrics.json").read_text())
    del metrics["checksum"]
    metrics["diagnostics"]["dropped_chains"] = [{"chain": 1, "step": 5}]
    write_json(root / "metrics.json", metrics)
    before = read_npz(root / "traces" / "part_00001.npz")["log_posterior"]
    found = read_run(root)
    assert found.chains == (0, 2, 3)
    assert (found.traces["log_posterior"] == before[[0, 2, 3]]).all()


def test_damaged_traces_are_said(root: Path) -> None:
    (root / "traces" / "part_00001.npz").write_bytes(b"not an archive")
    found = read_run(root)
    assert found.traces == {}
    assert "part_00001.npz" in found.missing["traces"]


def test_a_run_without_traces_says_so(root: Path) -> None:
    (root / "traces" / "part_00001.npz").unlink()
    assert read_run(root).missing["traces"] == "no traces were recorded"


def test_milestones_come_from_the_log_where_the_run_has_not_ended(root: Path) -> None:
    run = json.loads((root / "run.json").read_text())
    del run["checksum"], run["milestones"]
    write_json(root / "run.json", run)
    log = root / "log.jsonl"
    append_json_line(log, {"phase": "milestone", "step": 1000, "ess_min": 3.0})
    append_json_line(log, {"phase": "sampling", "step": 1001, "said": "milestone"})
    with log.open("a") as file:
        file.write('{"phase": "milestone", "st')  # the machine lost power here
    assert [row["step"] for row in read_run(root).milestones] == [1000]


def test_a_part_that_is_not_there_has_a_reason(root: Path) -> None:
    found = read_run(root)
    assert found.part("calibration")[0] == found.metrics["calibration"]
    assert found.part("nothing") == (None, found.part("nothing")[1])
    assert "bayesian-lora eval" in found.part("nothing")[1]
