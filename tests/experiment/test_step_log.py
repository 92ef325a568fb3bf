"""The step log: its lines, how many there are, and the rate they give."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesian_lora.experiment import step_log
from bayesian_lora.experiment.step_log import StepLogger, milestone_line
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import RunFolder
from bayesian_lora.warm_start import StepReport


def test_rates_count_the_time_of_a_phases_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Iterator[float] = iter(np.arange(0.0, 100.0, 2.0))
    monkeypatch.setattr(step_log.time, "monotonic", lambda: next(clock))
    logger = StepLogger(RunFolder(tmp_path), Progress(quiet=True), 1.0, [0, 1])
    report = StepReport("burn_in", 1, 3, torch.ones(2), None, 0.1, 16)
    logger.begin("burn_in", 3)
    for step in (1, 2, 3):
        logger.step(dataclasses.replace(report, step=step))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 < line["examples_per_s"] <= 16 / 2 for line in lines)


def test_long_phases_are_logged_a_hundred_times(tmp_path: Path) -> None:
    logger = StepLogger(RunFolder(tmp_path), Progress(quiet=True), 1.0, [0, 1])
    report = StepReport("sampling", 1, 1050, torch.ones(2), torch.ones(2), 0.1, 16)
    logger.begin("sampling", 1050)
    heat = torch.tensor([float("inf"), 1.5])
    for step in range(1, 1051):
        logger.step(dataclasses.replace(report, step=step, t_eff=heat if step == 10 else None))
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(10, 1051, 10))
    assert lines[0]["t_eff"] == [None, 1.5]


def test_a_dropped_chain_keeps_its_place_as_null(tmp_path: Path) -> None:
    alive = [0, 1, 2]
    logger = StepLogger(RunFolder(tmp_path), Progress(quiet=True), 1.0, alive)
    alive.remove(1)
    logger.begin("sampling", 1)
    logger.step(StepReport("sampling", 1, 1, torch.tensor([0.5, 2.0]), None, 0.1, 16))
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["loss"] == [0.5, None, 2.0]


def test_a_milestone_is_a_line_of_its_own_and_one_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = StepLogger(RunFolder(tmp_path), Progress(terminal=False), 1.0, [0, 1])
    row = {"step": 10_000, "ess_min": 123.4, "quantity": "log_posterior", "ess_per_step": 0.00617}
    logger.milestone(row)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line == {"phase": "milestone", **row}
    told = "After 10,000 sampling steps: effective sample size at least 123 (log_posterior)"
    assert told in capsys.readouterr().out
    assert milestone_line(row | {"note": "at most"}).endswith("; at most")
    none = milestone_line(row | {"ess_min": None, "ess_min_reason": "3 rows"})
    assert none == "After 10,000 sampling steps: no effective sample size (3 rows)"
