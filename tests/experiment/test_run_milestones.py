"""Milestones of a run: in the log, in `run.json`, on screen; the same after any interruption."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.train import train
from bayesian_lora.monitoring import milestones
from bayesian_lora.progress import Progress
from bayesian_lora.warm_start import StepReport

from .same_runs import QUIET, assert_same_run, config_of, read

KEYS = ("sampler.trace_every=1", "sampler.num_samples=4", "sampler.thin=32", "train.epochs=1")
KEYS = (*KEYS, "output.checkpoint_seconds=3600")
STEPS = 64
FIGURES = {"step", "rows", "chains", "ess_min", "ess_median", "quantity", "mcse", "ess_per_step"}


@pytest.fixture(scope="module", autouse=True)
def early() -> Iterator[None]:
    """30 steps in the place of 1,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(milestones, "FIRST", 30)
        yield


@pytest.fixture(scope="module")
def whole(
    early: None, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run that was not disturbed, and what it printed."""
    config = config_of(tiny_models["bert"], tmp_path_factory.mktemp("whole") / "run", *KEYS)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        root = train(config, Progress(terminal=False))
    return root, printed.getvalue()


class Killed(BaseException):
    """The process is gone."""


def logged(root: Path) -> list[dict]:
    lines = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == "milestone"]


def test_a_run_tells_its_milestones_once(whole: tuple[Path, str]) -> None:
    root, printed = whole
    (told,) = logged(root)
    kept = read(root / "run.json")["milestones"]
    assert [row["step"] for row in kept] == [30, STEPS]
    assert told == {"phase": "milestone", **kept[0]}
    assert kept[0].keys() >= FIGURES
    assert kept[0]["rows"] == 30
    assert not kept[0]["quantity"].startswith("raw[")
    assert printed.count("After 30 sampling steps: effective sample size at least") == 1


@pytest.mark.parametrize("kill_at", [29, 30, 45])
def test_a_killed_run_goes_on_to_the_same_milestones(
    kill_at: int, whole: tuple[Path, str], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    on_step = Run.on_step

    def dying(self: Run, report: StepReport) -> None:
        on_step(self, report)
        if (report.phase, report.step) == ("sampling", kill_at):
            self.checkpoint()
            raise Killed

    config = config_of(tiny_models["bert"], tmp_path / "run", *KEYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "on_step", dying)
        patch.setattr(Run, "save", lambda self: None)
        patch.setattr("bayesian_lora.run_folder.RunFolder.finish", lambda *_, **__: None)
        with pytest.raises(Killed):
            train(config, QUIET)
    train(config, QUIET)
    assert_same_run(tmp_path / "run", whole[0])


def test_a_run_of_fits_has_none(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(tiny_models["bert"], tmp_path / "run", "sampler.name=map", "train.epochs=1")
    assert read(train(config, QUIET) / "run.json")["milestones"] is None
