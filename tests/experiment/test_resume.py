"""A run that was stopped anywhere goes on to the very same samples, traces and figures.

Shapes: M chains, K members.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bayesian_lora import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.train import train
from bayesian_lora.progress import Progress
from bayesian_lora.utils.checkpoint import NEWEST
from bayesian_lora.utils.rng import derive_seed
from bayesian_lora.warm_start import StepReport

from .same_runs import QUIET, assert_same_run, config_of, read

Make = Callable[..., Path]


class Killed(BaseException):
    """The process is gone: nothing is tidied up."""


@pytest.fixture(scope="module")
def whole(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The uninterrupted run of these overrides, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            made[overrides] = train(config_of(tiny_models["bert"], folder, *overrides), QUIET)
        return made[overrides]

    return run


def kill_after(monkeypatch: pytest.MonkeyPatch, steps: int, checkpoint: bool = True) -> None:
    """Die after so many optimiser steps in all, after or before the step's checkpoint."""
    kept, left = Run.on_step, [steps]

    def dying(self: Run, report: StepReport) -> None:
        left[0] -= 1
        if left[0] == 0 and not checkpoint:
            raise Killed
        kept(self, report)
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(Run, "on_step", dying)
    monkeypatch.setattr(Run, "save", lambda self: None)
    monkeypatch.setattr("bayesian_lora.run_folder.RunFolder.finish", lambda *a, **k: None)


POINTS = [1, 9, 11, 14, 19]
MORE = [pytest.param(n, marks=pytest.mark.slow) for n in (5, 10, 13, 15, 17, 20)]
KINDS = [
    ("sampler.chains=1", "sampler.num_samples=3"),
    ("train.starts=shared",),
    ("sampler.variance_reduction=true",),
    ("sampler.name=csgld", "sampler.cycle_steps=4"),
    ("sampler.name=sam_sgld_rank1",),
]
MORE_KINDS = [
    ("prior.std=auto", "prior.candidates=[0.1,0.3]"),
    ("sampler.name=psgld", "sampler.step_size=auto"),
    ("sampler.name=asgld",),
    ("sampler.name=sghmc", "sampler.integrator=baoab"),
    ("sampler.name=sgnht",),
    ("sampler.name=sam_sgld",),
    ("sampler.name=sam_sgld_rank1", "sampler.u_mode=cross_chain"),
]


@pytest.mark.parametrize("steps", [*POINTS, *MORE])
def test_a_killed_run_goes_on_to_the_same_bits(
    whole: Make, tiny_models: dict[str, Path], tmp_path: Path, steps: int
) -> None:
    config = config_of(tiny_models["bert"], tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, steps)
        with pytest.raises(Killed):
            train(config, QUIET)
    assert read(tmp_path / "run" / "run.json")["status"] == "running"
    train(config, QUIET)
    assert_same_run(tmp_path / "run", whole())


@pytest.mark.parametrize(
    "keys",
    [*KINDS, *(pytest.param(keys, marks=pytest.mark.slow) for keys in MORE_KINDS)],
    ids=lambda keys: " ".join(keys),
)
def test_every_kind_of_run_goes_on(
    whole: Make, tiny_models: dict[str, Path], tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """Killed four times: in the warm start, in burn-in, before a checkpoint, while collecting."""
    config = config_of(tiny_models["bert"], tmp_path / "run", *keys)
    for steps, checkpoint in ((7, True), (5, True), (2, False), (3, True)):
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, steps, checkpoint)
            with pytest.raises(Killed):
                train(config, QUIET)
    train(config, QUIET)
    assert_same_run(tmp_path / "run", whole(*keys))


@pytest.mark.parametrize("steps", [17, 18])
def test_traces_are_appended_part_by_part(
    whole: Make,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    """Also where parts were written after the last checkpoint: they are made again."""
    monkeypatch.setattr("bayesian_lora.experiment.run.ROWS_A_PART", 2)
    config = config_of(tiny_models["bert"], tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, steps, checkpoint=steps % 2 == 0)
        with pytest.raises(Killed):
            train(config, QUIET)
    train(config, QUIET)
    parts = sorted(path.name for path in (tmp_path / "run" / "traces").glob("part_*"))
    assert parts == [f"part_0000{n}.npz" for n in (1, 2, 3)]
    assert_same_run(tmp_path / "run", whole())


@pytest.mark.parametrize("keys", [(), ("sampler.name=csgld", "sampler.cycle_steps=4")])
def test_a_finished_run_is_extended(
    whole: Make, tiny_models: dict[str, Path], tmp_path: Path, keys: tuple[str, ...]
) -> None:
    train(config_of(tiny_models["bert"], tmp_path / "run", *keys), QUIET)
    longer = (*keys, "sampler.num_samples=10")
    train(config_of(tiny_models["bert"], tmp_path / "run", *longer), QUIET)
    assert len(Ensemble.load(tmp_path / "run")) == 10
    assert_same_run(tmp_path / "run", whole(*longer))


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT as at a terminal: tests in a shell's background are started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_step_and_leaves_a_checkpoint(
    whole: Make, tiny_models: dict[str, Path], tmp_path: Path, number: int, status: int
) -> None:
    config = config_of(tiny_models["bert"], tmp_path / "run", "output.checkpoint_seconds=3600")
    kept = Run.keep_draw

    def interrupt(self: Run, draw: int) -> None:
        kept(self, draw)
        if draw == 0:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "keep_draw", interrupt)
        expected = KeyboardInterrupt if status == 130 else SystemExit
        with pytest.raises(expected):
            train(config, QUIET)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert read(tmp_path / "run" / "run.json")["status"] == "stopped"
    assert len(Ensemble.load(tmp_path / "run")) == 2, "what was collected can be evaluated"
    train(config, QUIET)
    assert_same_run(tmp_path / "run", whole())


def test_a_signal_that_is_ignored_stays_ignored(
    whole: Make, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """As a shell sets it for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept = Run.keep_draw

    def interrupt(self: Run, draw: int) -> None:
        kept(self, draw)
        signal.raise_signal(signal.SIGINT)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "keep_draw", interrupt)
            train(config_of(tiny_models["bert"], tmp_path / "run"), QUIET)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same_run(tmp_path / "run", whole())


def test_a_torn_checkpoint_falls_back_to_the_older_one(
    whole: Make, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_models["bert"], tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 16)
        with pytest.raises(Killed):
            train(config, QUIET)
    newest = tmp_path / "run" / "checkpoint" / NEWEST
    newest.write_bytes(newest.read_bytes()[:-100])
    train(config, Progress())
    assert "going on from the one before it" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole())


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("seed=1", "seed: 0 there, 1 here"),
        ("sampler.step_size=2e-3", "sampler.step_size: 0.001 there, 0.002 here"),
        ("sampler.num_samples=4", "sampler.num_samples: 6 there, 4 here"),
        ("prior.std=0.2", "prior.std"),
    ],
)
def test_another_config_is_refused_and_nothing_is_lost(
    whole: Make, tiny_models: dict[str, Path], key: str, words: str
) -> None:
    folder = whole()
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    with pytest.raises(InputError, match="of another config") as refused:
        train(config_of(tiny_models["bert"], folder, key), QUIET)
    assert words in str(refused.value)
    assert "output.overwrite=true" in str(refused.value)
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before


def test_a_finished_run_is_not_made_twice(whole: Make, tiny_models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="already holds this run"):
        train(config_of(tiny_models["bert"], whole()), QUIET)


def test_every_chains_seeds_are_recorded_and_distinct(whole: Make) -> None:
    seeds = read(whole() / "run.json")["chain_seeds"]
    assert seeds.keys() == {"init", "order", "dropout", "batches", "noise", "probe"}
    assert seeds["noise"] == [derive_seed(0, chain, "noise") for chain in range(2)]
    assert len({seed for row in seeds.values() for seed in row}) == 2 * 6


def test_the_same_seed_gives_the_same_bits(
    whole: Make, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    assert_same_run(train(config_of(tiny_models["bert"], tmp_path / "run"), QUIET), whole())


def test_members_are_equal_in_memory_too(whole: Make) -> None:
    """`assert_same_run` can fail: another seed's members differ."""
    a, b = Ensemble.load(whole()), Ensemble.load(whole("seed=1"))
    first, second = a.members[0], b.members[0]
    assert any(not torch.equal(first[name], second[name]) for name in first)
