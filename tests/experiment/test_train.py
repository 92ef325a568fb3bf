"""`train` beyond a plain run: seeds, starts, temperature, longer runs, and every way to end early.

Whole runs are judged in tests/cli/test_whole_run.py. Shapes: M chains, K members.
"""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesian_lora import Ensemble
from bayesian_lora.cli.main import main
from bayesian_lora.config import Config, build_config, dump_config
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.train import train
from bayesian_lora.progress import Progress
from bayesian_lora.samplers.base import Sampler

SMALL: dict[str, Any] = {
    "data": {"name": "synthetic", "train_examples": 32, "batch_size": 8, "max_length": 48},
    "model": {"lora": {"rank": 2, "alpha": 4.0}},
    "prior": {"std": 0.3},
    "train": {"epochs": 1, "lr": 5.0e-3},
    "sampler": {"step_size": 1.0e-3, "burn_in": 2, "thin": 2, "num_samples": 4, "chains": 2},
}

Make = Callable[..., Path]


def config_of(model: Path, folder: Path, *overrides: str) -> Config:
    keys = [f"model.name={model}", f"output.dir={folder}", *overrides]
    return build_config(SMALL, keys)


@pytest.fixture(scope="module")
def make(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Run with these overrides; the run's folder. Equal ones are run once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str, again: bool = False) -> Path:
        if again or overrides not in made:
            folder = tmp_path_factory.mktemp("train") / "run"
            config = config_of(tiny_models["bert"], folder, *overrides)
            made[overrides] = train(config, Progress(quiet=True))
        return made[overrides]

    return run


def tensors(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [dict(member) for member in Ensemble.load(folder)]


def assert_same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> None:
    for first, second in zip(a, b, strict=True):
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


def logits(folder: Path) -> np.ndarray:
    with np.load(folder / "predictions" / "validation.npz") as archive:
        return archive["logits"]


def read(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_the_same_seed_gives_the_same_bits(make: Make) -> None:
    first = make()
    second = make(again=True)
    assert first != second
    assert_same(tensors(first), tensors(second))
    np.testing.assert_array_equal(logits(first), logits(second))
    other = make("seed=1")
    assert not np.allclose(logits(first), logits(other))


def test_members_differ_within_and_between_chains(make: Make) -> None:
    flat = [torch.cat([t.flatten() for t in member.values()]) for member in tensors(make())]
    gaps = [(a - b).norm().item() for i, a in enumerate(flat) for b in flat[:i]]
    assert min(gaps) > 0.01


@pytest.mark.parametrize("keys", [(), ("train.starts=shared",)])
def test_a_longer_run_extends_a_shorter_one(make: Make, keys: tuple[str, ...]) -> None:
    """Nor do traces and heat, which fall at other steps, change a draw."""
    short = tensors(make(*keys))
    long = tensors(make(*keys, "sampler.num_samples=8", "sampler.trace_every=3"))
    assert len(long) == 8
    assert_same(short, long[:4])


def test_a_chain_does_not_depend_on_how_many_run_beside_it(make: Make) -> None:
    """Up to rounding: matrix products of other shapes are summed in another order."""
    two = tensors(make("model.dtype=float64"))
    four = tensors(make("model.dtype=float64", "sampler.chains=4", "sampler.num_samples=8"))
    for draw in (0, 1):
        for chain in (0, 1):
            a, b = two[2 * draw + chain], four[4 * draw + chain]
            for name, tensor in a.items():
                torch.testing.assert_close(tensor, b[name], atol=1e-9, rtol=0, msg=name)


def run_aloud(config: Config) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(config)
    return printed.getvalue()


def test_shared_starts_are_labelled_and_spread(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    keys = ["train.starts=shared", "train.jitter=0.05"]
    printed = run_aloud(config_of(tiny_models["bert"], tmp_path / "run", *keys))
    assert "starts: within one mode" in printed
    assert "one shared fit" in printed
    sampler = read(tmp_path / "run" / "ensemble.json")["sampler"]
    assert sampler["starts"] == "within one mode"
    assert [p.name for p in sorted((tmp_path / "run" / "map").glob("chain_*"))] == ["chain_0"]
    metrics = read(tmp_path / "run" / "metrics.json")
    assert metrics["map"]["nll"]["sd"] is None
    assert metrics["map"]["nll"]["sd_reason"]
    with np.load(tmp_path / "run" / "traces" / "starts.npz") as starts:
        assert np.ptp(starts["log_posterior"]) > 0


@pytest.mark.parametrize(("temperature", "label"), [("0.5", "cold"), ("2", "hot")])
def test_a_tempered_posterior_is_called_so(
    tiny_models: dict[str, Path], tmp_path: Path, temperature: str, label: str
) -> None:
    key = f"sampler.temperature={temperature}"
    cold = " (cold)" if label == "cold" else ""
    printed = run_aloud(config_of(tiny_models["bert"], tmp_path / "run", key))
    assert f"Temperature {temperature}: a {label} posterior" in printed
    assert f"minibatch noise, {temperature}{cold} asked for" in printed
    sampler = read(tmp_path / "run" / "ensemble.json")["sampler"]
    assert (sampler["tempering"], sampler["temperature"]) == (label, float(temperature))


def test_without_epochs_the_chains_start_where_they_were_drawn(make: Make) -> None:
    folder = make("train.epochs=0", "sampler.burn_in=0", "data.validation_share=0")
    metrics = read(folder / "metrics.json")
    assert metrics["map_temperature_scaled"]["nll"] is None
    assert "data.validation_share" in metrics["map_temperature_scaled"]["reason"]
    assert metrics["cost"]["gradient_evaluations"] > 4  # steps, and the account


def test_a_run_is_replaced_only_when_told(make: Make, tiny_models: dict[str, Path]) -> None:
    folder = make("seed=5")
    (folder / "predictions" / "shifted.npz").write_text("of the old run")
    config = config_of(tiny_models["bert"], folder, "seed=6")
    before = (folder / "members.jsonl").read_text()
    with pytest.raises(InputError, match=r"output\.overwrite=true"):
        train(config, Progress(quiet=True))
    assert (folder / "members.jsonl").read_text() == before
    config.output.overwrite = True
    train(config, Progress(quiet=True))
    assert (folder / "members.jsonl").read_text() != before
    assert len((folder / "members.jsonl").read_text().splitlines()) == 4
    assert not (folder / "predictions" / "shifted.npz").exists()


def ended(config: Config, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Exit status and standard error of the command."""
    assert config.output.dir is not None
    path = Path(config.output.dir).parent / "config.yaml"
    path.write_text(dump_config(config))
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(path)])
    return stopped.value.code, capsys.readouterr().err


def test_a_warm_start_that_diverges_stops(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_models["bert"], tmp_path / "run", "train.lr=1e30")
    code, err = ended(config, capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert "not finite in warm start after step 1" in err
    run = read(tmp_path / "run" / "run.json")
    assert run["status"] == "stopped"
    assert "warm start after step 1" in run["reason"]
    assert run["members"] == 0


@pytest.mark.parametrize(
    ("burn_in", "thin", "place"),
    [(2, 2, "burn-in after step 1"), (0, 2, "sampling after step 1"), (0, 1, "sampling after")],
)
def test_an_absurd_step_size_stops_and_stores_no_diverged_draw(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    burn_in: int,
    thin: int,
    place: str,
) -> None:
    monkeypatch.setattr(Sampler, "stability", float("inf"))  # the account would refuse it
    keys = ["sampler.step_size=1e30", f"sampler.burn_in={burn_in}", f"sampler.thin={thin}"]
    code, err = ended(config_of(tiny_models["bert"], tmp_path / "run", *keys), capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert place in err
    assert "0 samples kept" in err
    assert read(tmp_path / "run" / "run.json")["status"] == "stopped"
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def stop_after(draws: int, how: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `how` happen once so many draws are kept."""
    keep = Run.keep_draw

    def keep_and_stop(self: Run, draw: int) -> None:
        keep(self, draw)
        if draw + 1 == draws:
            how(self)

    monkeypatch.setattr(Run, "keep_draw", keep_and_stop)


def diverge(run: Run) -> None:
    for tensor in run.setup.model.chain_parameters().values():
        tensor.data.fill_(float("nan"))


def interrupt(run: Run) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        (diverge, 2, "not finite in sampling after step 4: stopped, 4 samples kept"),
        (interrupt, 130, "Stopped; go on with: bayesian-lora train "),
    ],
)
def test_what_was_collected_before_the_end_can_be_used(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    make: Make,
    how: Callable[[Run], None],
    status: int,
    message: str,
) -> None:
    whole = tensors(make("sampler.num_samples=8", "sampler.trace_every=3"))
    stop_after(2, how, monkeypatch)
    keys = ["sampler.num_samples=8", "sampler.trace_every=1"]
    code, err = ended(config_of(tiny_models["bert"], tmp_path / "run", *keys), capsys)
    assert code == status
    assert message in err
    assert err.count("\n") == (1 if status == 2 else 2)
    run = read(tmp_path / "run" / "run.json")
    assert (run["status"], run["members"]) == ("stopped", 4)
    assert run["sample_s"] > 0
    assert_same(tensors(tmp_path / "run"), whole[:4])
    with np.load(tmp_path / "run" / "traces" / "part_00001.npz") as traces:
        assert traces["log_posterior"].shape == (2, 4)
    with pytest.raises(SystemExit) as evaluated:
        main(["eval", str(tmp_path / "run")])
    assert evaluated.value.code == 0
    assert "LoRA Ensemble@4 — " in capsys.readouterr().out


def test_the_progress_bar_is_closed_when_a_run_ends_early(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the terminal is left without a cursor."""
    stop_after(1, interrupt, monkeypatch)
    progress = Progress(terminal=True)
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(io.StringIO()):
        train(config_of(tiny_models["bert"], tmp_path / "run"), progress)
    assert progress._bar is None
