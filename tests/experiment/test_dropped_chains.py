"""`sampler.on_nonfinite`: a chain that cannot go on stops the run, or is dropped with a record.

Shapes: M chains, K members.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesian_lora import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.evaluate import evaluate_run
from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.train import train
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import read_starts, read_traces
from bayesian_lora.samplers.failures import Diverged
from bayesian_lora.warm_start import StepReport

from .same_runs import QUIET, assert_same_run, config_of, read

DROP = ("sampler.on_nonfinite=drop", "sampler.chains=3", "sampler.num_samples=9")
KINDS = [(), ("train.starts=shared",)]
MORE_KINDS = [
    ("sampler.variance_reduction=true",),
    ("sampler.name=sgnht",),
    ("sampler.name=asgld",),
    ("sampler.name=sam_sgld",),
]


class Poison:
    """NaN in the first factor of chain 1 after a step of a phase, once a run."""

    def __init__(self, phase: str, step: int) -> None:
        self.phase, self.step = phase, step

    def install(self, patch: pytest.MonkeyPatch, kill_at: tuple[str, int] | None = None) -> None:
        kept = Run.on_step

        def on_step(run: Run, report: StepReport) -> None:
            kept(run, report)
            if (report.phase, report.step) == (self.phase, self.step) and 1 in run.alive:
                place = run.alive.index(1)
                next(iter(run.setup.model.chain_parameters().values())).data[place] = float("nan")
            if (report.phase, report.step) == kill_at:
                raise Killed

        patch.setattr(Run, "on_step", on_step)


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.mark.parametrize(
    "keys",
    [*KINDS, *(pytest.param(keys, marks=pytest.mark.slow) for keys in MORE_KINDS)],
    ids=" ".join,
)
def test_the_others_go_on_as_if_it_had_never_been(
    tiny_models: dict[str, Path], tmp_path: Path, patch: pytest.MonkeyPatch, keys: tuple[str, ...]
) -> None:
    exact = (*DROP, *keys, "model.dtype=float64")
    whole = train(config_of(tiny_models["bert"], tmp_path / "whole", *exact), QUIET)
    Poison("sampling", 3).install(patch)
    found = train(config_of(tiny_models["bert"], tmp_path / "run", *exact), QUIET)
    a, b = Ensemble.load(found), Ensemble.load(whole)
    assert [(r.chain, r.draw) for r in a.records] == [(m, t) for t in range(3) for m in (0, 2)]
    others = {(r.chain, r.draw): member for r, member in zip(b.records, b.members, strict=True)}
    for record, member in zip(a.records, a.members, strict=True):
        for name, tensor in others[record.chain, record.draw].items():
            torch.testing.assert_close(member[name], tensor, rtol=1e-9, atol=1e-10)


def test_what_is_left_of_it_on_disk(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its record, its early samples (listed, not in the ensemble), NaN where its traces end."""
    Poison("sampling", 3).install(patch)
    root = train(config_of(tiny_models["bert"], tmp_path / "run", *DROP), QUIET)
    record = {
        "chain": 1,
        "phase": "sampling",
        "after_step": 3,
        "reason": "the loss is not finite",
    }
    assert read(root / "run.json")["dropped_chains"] == [record]
    assert read(root / "ensemble.json")["sampler"]["dropped_chains"] == [record]
    assert len((root / "members.jsonl").read_text().splitlines()) == 3 + 2 + 2
    traces = read_traces(root)["log_posterior"]
    assert traces.shape == (3, 6)
    assert np.isfinite(traces[[0, 2]]).all()
    assert np.isnan(traces[1, 3:]).all()
    assert np.isfinite((read_starts(root) or {})["log_posterior"]).all()
    figures = read(root / "metrics.json")
    assert figures["ensemble"]["k"] == 6
    assert figures["diagnostics"]["dropped_chains"] == [record]
    assert figures["diagnostics"]["rhat_max"] is not None
    lines = (root / "log.jsonl").read_text().splitlines()
    assert '"loss": [' in lines[-1]
    assert "null" in lines[-1].split("loss")[1].split("]")[0]
    again = evaluate_run(root, progress=Progress())
    assert again["diagnostics"] == figures["diagnostics"]
    told = "Chain 1 was dropped, with its samples, in sampling after step 3: the loss is not finite"
    assert told in capsys.readouterr().out
    assert figures["diagnostics"]["departures"] is None
    assert "40 steps" in figures["diagnostics"]["departures_reason"]


def test_a_chain_that_climbs_is_reported(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pushed away after burn-in: said as it happens, in the record, and once more at the end."""
    kept = Run.on_step

    def push(run: Run, report: StepReport) -> None:
        kept(run, report)
        if report.phase == "sampling":
            for tensor in run.setup.model.chain_parameters().values():
                tensor.data[1] *= 1.15

    patch.setattr(Run, "on_step", push)
    keys = ("sampler.burn_in=40", "sampler.num_samples=40", "output.checkpoint_seconds=60")
    config = config_of(tiny_models["bert"], tmp_path / "run", *keys)
    root = train(config, Progress(terminal=False))
    (found,) = read(root / "run.json")["departures"]
    assert found["chain"] == 1
    assert found["step"] > 40
    assert found["energy"] > found["mean"] + 6 * found["sd"]
    assert read(root / "metrics.json")["diagnostics"]["departures"] == [found]
    out = capsys.readouterr().out
    assert "Warning: chain 1: energy per example" in out
    assert f"Chain 1 left its energies of burn-in at step {found['step']}" in out


@pytest.mark.parametrize("phase", [("map", 4), ("burn_in", 2), ("sampling", 6)])
def test_a_chain_is_dropped_in_any_phase(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    phase: tuple[str, int],
) -> None:
    """Also where the last step led to the last draw."""
    Poison(*phase).install(patch)
    root = train(config_of(tiny_models["bert"], tmp_path / "run", *DROP), QUIET)
    assert {r.chain for r in Ensemble.load(root).records} == {0, 2}
    wanted = {f"chain_{m}" for m in range(3) if phase[0] != "map" or m != 1}
    for folder in (root / "map", root / "map" / "last"):
        assert {p.name for p in folder.glob("chain_*")} == wanted
    (record,) = read(root / "run.json")["dropped_chains"]
    assert (record["phase"], record["after_step"]) == phase


@pytest.mark.parametrize("kill_at", [("burn_in", 3), ("sampling", 4), ("sampling", 6)])
def test_a_run_with_a_dropped_chain_goes_on_to_the_same_bits(
    tiny_models: dict[str, Path], tmp_path: Path, kill_at: tuple[str, int]
) -> None:
    poison = Poison("burn_in", 2)
    with pytest.MonkeyPatch.context() as patch:
        poison.install(patch)
        whole = train(config_of(tiny_models["bert"], tmp_path / "whole", *DROP), QUIET)
    config = config_of(tiny_models["bert"], tmp_path / "run", *DROP)
    with pytest.MonkeyPatch.context() as patch:
        poison.install(patch, kill_at)
        patch.setattr(Run, "save", lambda self: None)
        with pytest.raises(Killed):
            train(config, QUIET)
    train(config, QUIET)
    assert_same_run(tmp_path / "run", whole)


def test_by_default_the_run_stops_and_names_the_chain(
    tiny_models: dict[str, Path], tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    Poison("sampling", 3).install(patch)
    config = config_of(tiny_models["bert"], tmp_path / "run", *DROP, "sampler.on_nonfinite=stop")
    with pytest.raises(InputError, match="chain 1: the loss is not finite in sampling") as stopped:
        train(config, QUIET)
    assert "sampler.on_nonfinite=drop" in str(stopped.value)
    assert len(Ensemble.load(tmp_path / "run")) == 3, "what was collected is kept"


def test_the_last_chain_is_never_dropped(
    tiny_models: dict[str, Path], tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    one = ("sampler.on_nonfinite=drop", "train.lr=1e30")
    with pytest.raises(InputError, match="not finite in warm start") as stopped:
        train(config_of(tiny_models["bert"], tmp_path / "run", *one), QUIET)
    assert isinstance(stopped.value.__cause__, Diverged)


def test_a_key_without_effect_asks_for_no_second_chain(
    tiny_models: dict[str, Path], tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """`u_mode` is another sampler's: one chain of sgld may go on alone."""
    Poison("sampling", 3).install(patch)
    keys = ("sampler.on_nonfinite=drop", "sampler.u_mode=cross_chain")
    root = train(config_of(tiny_models["bert"], tmp_path / "run", *keys), QUIET)
    assert {r.chain for r in Ensemble.load(root).records} == {0}
