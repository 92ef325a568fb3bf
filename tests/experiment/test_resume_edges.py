"""Going on where it is delicate: torn checkpoints, other versions, starts of another run, the end.

Shapes: M chains, K members.
"""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.experiment import resume
from bayesian_lora.experiment.evaluate import evaluate_run
from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.train import train
from bayesian_lora.progress import Progress
from bayesian_lora.utils.checkpoint import NEWEST, PREVIOUS, Damaged, decode
from bayesian_lora.utils.lock import locked
from bayesian_lora.warm_start import StepReport

from .same_runs import QUIET, assert_same_run, config_of, read

Act = Callable[[Run, StepReport], None]


class Killed(BaseException):
    """The process is gone."""


def acting(patch: pytest.MonkeyPatch, phase: str, step: int, act: Act) -> None:
    """Let `act` happen after a step of a phase and its checkpoint."""
    kept = Run.on_step

    def on_step(self: Run, report: StepReport) -> None:
        kept(self, report)
        if (report.phase, report.step) == (phase, step):
            act(self, report)

    patch.setattr(Run, "on_step", on_step)


def die(run: Run, report: StepReport) -> None:
    raise Killed


def interrupted(model: Path, folder: Path, phase: str, step: int, *keys: str) -> None:
    """A run that died after a step, with nothing tidied up."""
    with pytest.MonkeyPatch.context() as patch:
        acting(patch, phase, step, die)
        patch.setattr(Run, "save", lambda self: None)
        patch.setattr("bayesian_lora.run_folder.RunFolder.finish", lambda *a, **k: None)
        with pytest.raises(Killed):
            train(config_of(model, folder, *keys), QUIET)


def test_a_damaged_checkpoint_never_replaces_the_whole_one(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """After the fallback, a crash at any moment of the next write leaves a whole one."""
    root = tmp_path / "run"
    interrupted(tiny_models["bert"], root, "sampling", 3)
    folder = root / "checkpoint"
    (folder / NEWEST).write_bytes((folder / NEWEST).read_bytes()[:-100])

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayesian_lora.utils.checkpoint.write_atomic", full)
        with pytest.raises(OSError, match="No space left"):
            train(config_of(tiny_models["bert"], root), QUIET)
    left = [folder / name for name in (NEWEST, PREVIOUS) if (folder / name).is_file()]
    assert [path for path in left if _whole(path)]
    train(config_of(tiny_models["bert"], root), QUIET)
    assert read(root / "run.json")["status"] == "finished"


def _whole(path: Path) -> bool:
    try:
        return bool(decode(path))
    except Damaged:
        return False


def test_a_checkpoint_of_another_version_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tiny_models["bert"], tmp_path / "run", "sampling", 2)
    monkeypatch.setattr(resume, "FORMAT", resume.FORMAT + 1)
    with pytest.raises(InputError, match="its checkpoint is another version's"):
        train(config_of(tiny_models["bert"], tmp_path / "run"), QUIET)


def test_a_run_whose_step_size_knows_its_length_is_not_extended(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    keys = ("sampler.variance_reduction=true", "sampler.step_size=auto")
    root = train(config_of(tiny_models["bert"], tmp_path / "run", *keys), QUIET)
    longer = config_of(tiny_models["bert"], root, *keys, "sampler.num_samples=8")
    with pytest.raises(InputError, match="so a longer run is another one") as refused:
        train(longer, QUIET)
    assert f"train.starts_from={root}" in str(refused.value)


def test_an_extension_says_how_many_steps_it_makes(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = train(config_of(tiny_models["bert"], tmp_path / "run"), QUIET)
    train(config_of(tiny_models["bert"], root, "sampler.num_samples=10"), Progress(terminal=False))
    assert "a chain will make 14" in capsys.readouterr().out
    assert read(root / "run.json")["account"]["steps"] == 4 + 2 * 5


def test_an_extension_that_goes_further_from_its_control_variate_says_how_hot_it_ends(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    keys = ("sampler.variance_reduction=true", "sampler.step_size=0.1")
    root = train(config_of(tiny_models["bert"], tmp_path / "run", *keys), QUIET)
    short = read(root / "run.json")["account"]
    train(config_of(tiny_models["bert"], root, *keys, "sampler.num_samples=40"), QUIET)
    account = read(root / "run.json")["account"]
    assert account["variance"] == short["variance"]
    assert account["variance_end"] > short["variance_end"]
    assert account["heat"] / short["heat"] == pytest.approx(
        account["variance_end"] / short["variance_end"]
    )


def test_dropping_may_be_allowed_after_the_run_stopped(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """The remedy that the message names."""

    def poison(run: Run, report: StepReport) -> None:
        next(iter(run.setup.model.chain_parameters().values())).data[1] = float("nan")

    for step, key in ((3, "stop"), (4, "drop")):  # the first step 4 was never made
        config = config_of(tiny_models["bert"], tmp_path / "run", f"sampler.on_nonfinite={key}")
        with pytest.MonkeyPatch.context() as patch:
            acting(patch, "sampling", step, poison)
            if key == "drop":
                train(config, QUIET)
                continue
            with pytest.raises(InputError, match=r"or set sampler\.on_nonfinite=drop"):
                train(config, QUIET)
    assert [x["chain"] for x in read(tmp_path / "run" / "run.json")["dropped_chains"]] == [1]


def test_a_dropped_chain_counts_nowhere_even_if_the_run_is_killed(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    def poison(run: Run, report: StepReport) -> None:
        next(iter(run.setup.model.chain_parameters().values())).data[1] = float("nan")

    keys = ("sampler.on_nonfinite=drop", "sampler.chains=3", "sampler.num_samples=9")
    root = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        acting(patch, "sampling", 4, poison)
        interrupted(tiny_models["bert"], root, "sampling", 5, *keys)
    assert "dropped_chains" not in read(root / "run.json")
    assert {row["chain"] for row in read(root / "ensemble.json")["members"]} == {0, 2}
    found = evaluate_run(root, progress=QUIET)
    assert [x["chain"] for x in found["diagnostics"]["dropped_chains"]] == [1]
    assert found["ensemble"]["k"] == 4


@pytest.mark.parametrize("gone", [True, False])
def test_a_run_that_goes_on_has_its_own_starts(
    tiny_models: dict[str, Path], tmp_path: Path, gone: bool
) -> None:
    """Whether the folder they came from is gone, or another one is named now."""
    model, first, second = tiny_models["bert"], tmp_path / "first", tmp_path / "second"
    train(config_of(model, first), QUIET)
    whole = train(config_of(model, tmp_path / "whole", f"train.starts_from={first}"), QUIET)
    interrupted(model, tmp_path / "run", "burn_in", 2, f"train.starts_from={first}")
    if gone:
        shutil.move(first, tmp_path / "elsewhere")
    else:
        train(config_of(model, second, "seed=3"), QUIET)
    named = first if gone else second
    train(config_of(model, tmp_path / "run", f"train.starts_from={named}"), QUIET)
    assert_same_run(tmp_path / "run", whole)
    assert f"starts_from: {first}" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_signal_during_the_last_draw_is_heard(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    kept = Run.keep_draw

    def last(self: Run, draw: int) -> None:
        kept(self, draw)
        if draw == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "keep_draw", last)
        with pytest.raises(SystemExit):
            train(config_of(tiny_models["bert"], tmp_path / "run"), QUIET)
    assert read(tmp_path / "run" / "run.json")["status"] == "stopped"
    whole = train(config_of(tiny_models["bert"], tmp_path / "whole"), QUIET)
    train(config_of(tiny_models["bert"], tmp_path / "run"), QUIET)
    assert_same_run(tmp_path / "run", whole)


def test_the_time_before_a_kill_is_counted(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(np.arange(0.0, 1e6))
    monkeypatch.setattr("bayesian_lora.experiment.run.time.monotonic", lambda: next(clock))
    interrupted(tiny_models["bert"], tmp_path / "run", "sampling", 4)
    tree = decode(tmp_path / "run" / "checkpoint" / NEWEST)
    assert tree["seconds"]["train_s"] > 10, "a tick of this clock or more at every step"
    assert tree["seconds"]["sample_s"] > 8


def test_figures_are_not_stored_beside_a_writer(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = train(config_of(tiny_models["bert"], tmp_path / "run"), QUIET)
    before = (root / "metrics.json").read_bytes()
    with locked(root):
        evaluate_run(root, progress=Progress(terminal=False))
    assert "Not stored: " in capsys.readouterr().out
    assert (root / "metrics.json").read_bytes() == before
