"""`sampler.name: map`: the members are the warm starts; what such a run leaves, and resumes.

Shapes: M chains, K members.
"""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from bayesian_lora import Ensemble
from bayesian_lora.cli.main import main
from bayesian_lora.config import dump_config
from bayesian_lora.ensemble import map_ensemble, other_starts, why_no_other_starts
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.building import build_model
from bayesian_lora.experiment.compare import compare
from bayesian_lora.experiment.evaluate import NO_SAMPLING, evaluate_run
from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.run_metrics import split_names
from bayesian_lora.experiment.train import train
from bayesian_lora.models.sources import resolve_model
from bayesian_lora.utils.files import read_json
from bayesian_lora.warm_start import StepReport

from .same_runs import QUIET, config_of, weights
from .small_runs import Make, made_once

KEYS = (
    "sampler.name=map",
    "train.epochs=3",
    "train.schedule=plateau",
    "train.plateau_patience=0",
    "train.lr=0.05",
    "train.patience=2",
)


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A run of MAP fits with these keys as well, made once."""
    return made_once(tiny_models["bert"], lambda: tmp_path_factory.mktemp("map"), *KEYS)


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_members_are_the_warm_starts_equally_weighted(made: Make) -> None:
    root = made()
    ensemble, starts = Ensemble.load(root), map_ensemble(root)
    assert ensemble.records == starts.records
    assert ensemble.chains.tolist() == [0, 1]
    assert ensemble.weights.tolist() == [0.5, 0.5]
    files = [f"{where}/chain_{m}" for where in ("map", "map/last") for m in (0, 1)]
    assert sorted(weights(root)) == [f"{name}/adapter_model.safetensors" for name in files]
    first, second = ensemble.members
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert read_json(root / "run.json", "run")["members"] == 2


def test_nothing_claims_to_be_a_posterior(made: Make) -> None:
    root = made()
    sampler = Ensemble.load(root).provenance.sampler
    assert (sampler["name"], sampler["tempering"], sampler["law"]) == ("map", "none", None)
    assert sampler["exactness"] == "MAP fits, not posterior draws"
    figures = read_json(root / "metrics.json", "metrics")
    alone = {k: v for k, v in figures["ensemble"].items() if k != "k"}
    assert alone == figures["map_ensemble"]
    diagnostics = figures["diagnostics"]
    for name in ("rhat_max", "ess_bulk_min", "t_eff", "departures"):
        assert diagnostics[name] is None
        assert diagnostics[f"{name}_reason"] == NO_SAMPLING
    assert diagnostics["verdict"] == "not available"
    assert diagnostics["reason"] == NO_SAMPLING


def test_what_is_printed_of_one_fit(made: Make, capsys: pytest.CaptureFixture[str]) -> None:
    root = made("sampler.chains=1")
    with pytest.raises(SystemExit, match="0"):
        main(["eval", str(root)])
    printed = capsys.readouterr().out
    assert "Sampler: map (a MAP fit, no posterior draw)" in printed
    assert NO_SAMPLING in printed
    assert "posterior ensemble" not in printed
    assert "Temperature" not in printed


def test_evaluating_again_gives_the_same_figures(made: Make) -> None:
    root = made()
    before = read_json(root / "metrics.json", "metrics")
    again = evaluate_run(root, progress=QUIET)
    for figures in (before, again):
        figures.pop("cost", None)
    assert again == before
    assert evaluate_run(root, members=1, progress=QUIET)["ensemble"]["k"] == 1


def test_metrics_csv_has_every_epoch_and_the_evaluation(made: Make) -> None:
    root = made()
    table = rows(root)
    head = "set chain epoch trainer/global_step lr-Adam train/loss train/acc val/loss val/acc"
    assert list(table[0]) == head.split()
    *epochs, last = table
    assert [row["chain"] for row in epochs] == ["mean", "0", "1"] * 3
    assert [row["epoch"] for row in epochs[::3]] == ["0", "1", "2"]
    assert [row["trainer/global_step"] for row in epochs[::3]] == ["5", "10", "15"]
    for i in range(0, len(epochs), 3):
        for name in ("lr-Adam", "train/loss", "train/acc", "val/loss", "val/acc"):
            mean, *each = (float(row[name]) for row in epochs[i : i + 3])
            assert mean == pytest.approx(sum(each) / 2, rel=1e-5)
    figures = read_json(root / "metrics.json", "metrics")["ensemble"]
    assert last["set"] == "validation"
    assert float(last["val/loss"]) == pytest.approx(figures["nll"], rel=1e-6)
    assert float(last["val/acc"]) == pytest.approx(figures["accuracy"], rel=1e-6)


def test_a_single_chain_has_one_row_an_epoch_and_sampling_runs_have_rows_too(
    made: Make, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    assert [row["chain"] for row in rows(made("sampler.chains=1"))] == [*["mean"] * 3, "ensemble"]
    sampled = train(config_of(tiny_models["bert"], tmp_path / "run"), QUIET)
    assert len(rows(sampled)) == 2 * 3 + 1


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("step", [1, 5, 6, 10, 15])
def test_a_killed_run_goes_on_to_the_same_fits_and_rows(
    step: int,
    made: Make,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also at the end of an epoch, between its row and the checkpoint that knows it."""
    kept = Run.on_step
    config = config_of(tiny_models["bert"], tmp_path / "run", *KEYS)

    def dying(self: Run, report: StepReport) -> None:
        if report.step == step:
            raise Killed
        kept(self, report)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "on_step", dying)
        patch.setattr("bayesian_lora.run_folder.RunFolder.finish", lambda *_, **__: None)
        with pytest.raises(Killed):
            train(config, QUIET)
    train(config, QUIET)
    whole = made()
    assert weights(tmp_path / "run") == weights(whole)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    figures = [read_json(r / "metrics.json", "metrics") for r in (tmp_path / "run", whole)]
    for one in figures:
        one.pop("cost")
    assert figures[0] == figures[1]


def test_a_finished_run_is_not_extended_but_replaced(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(tiny_models["bert"], tmp_path / "run", *KEYS, "train.epochs=1")
    train(config, QUIET)
    with pytest.raises(InputError, match="already holds this run") as error:
        train(config, QUIET)
    assert "num_samples" not in str(error.value)
    with pytest.raises(InputError, match=r"sampler\.chains: 2 there, 1 here"):
        train(config_of(tiny_models["bert"], tmp_path / "run", *KEYS, "sampler.chains=1"), QUIET)
    config.output.overwrite = True
    train(config, QUIET)
    assert len(rows(tmp_path / "run")) == 3 + 1


def test_a_sampler_can_start_from_a_map_run(
    made: Make, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    keys = [key for key in KEYS if not key.startswith("sampler")]
    config = config_of(tiny_models["bert"], tmp_path / "run", *keys, f"train.starts_from={made()}")
    root = train(config, QUIET)
    for own, other in zip(map_ensemble(root), map_ensemble(made()), strict=True):
        assert all(torch.equal(own[name], other[name]) for name in other)
    ours, theirs = other_starts(root), other_starts(made())
    assert ours.keys() == theirs.keys() == {"last", "early_stopped"}
    for kind, fits in theirs.items():
        assert ours[kind].records == fits.records, "also the step that each is of"
        assert why_no_other_starts(root) is None
    assert len(Ensemble.load(root)) == 6


def test_a_comparison_puts_fits_beside_samplers(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(tiny_models["bert"], tmp_path / "out", "train.epochs=1")
    (tmp_path / "c.yaml").write_text(dump_config(config))
    root = compare(tmp_path / "c.yaml", ["sampler.name=map,sgld"], QUIET)
    cells = read_json(root / "comparison.json", "comparison")["cells"]
    assert [cell["status"] for cell in cells] == ["finished", "finished"]
    assert [cell["warm_start"] for cell in cells] == ["sampler.name=map"] * 2
    assert [cell["k"] for cell in cells] == [2, 6]
    assert cells[0]["metrics"]["map_ensemble"] == cells[1]["metrics"]["map_ensemble"]


def test_several_validation_splits_are_all_evaluated_under_the_seeds_names(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    paths = {}
    for name in ("train", "validation", "validation_other", "extra"):
        paths[name] = tmp_path / f"{name}.csv"
        lines = [f"the film was {('bad', 'good')[i % 2]} {i},{i % 2}" for i in range(20)]
        paths[name].write_text("\n".join(["text,label", *lines]))
    files = ",".join(f"{name}: {path}" for name, path in paths.items())
    own = ("data.name=own", f"data.files={{{files}}}", "data.text_columns=[text]")
    own = (*own, "data.label_names=[a,b]", "data.train_examples=null")
    root = train(config_of(tiny_models["bert"], tmp_path / "run", *KEYS, *own), QUIET)
    last = rows(root)[-1]
    names = {"": ("validation", 0), ".validation_other": ("validation_other", 1)}
    for suffix, (split, index) in names.items():
        figures = read_json(root / f"metrics{suffix}.json", "metrics")
        assert figures["split"] == split
        loss = last[f"val_{split}/loss/dataloader_idx_{index}"]
        assert float(loss) == pytest.approx(figures["ensemble"]["nll"], rel=1e-6)
        assert last[f"val_{split}/acc/dataloader_idx_{index}"]
    assert not (root / "metrics.extra.json").exists()
    assert split_names(["matched", "mismatched"])["mismatched"] == (
        "val_mismatched/",
        "/dataloader_idx_1",
    )


def factors(config: Any, labels: int) -> dict[str, torch.Tensor]:
    source = resolve_model(config.model.name)
    return dict(build_model(config, source, labels, torch.device("cpu")).chain_parameters())


def test_an_init_seed_gives_tasks_the_same_factors_and_no_more(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    def of(labels: int, *keys: str) -> dict[str, torch.Tensor]:
        return factors(config_of(tiny_models["bert"], tmp_path, *KEYS, *keys), labels)

    first, other = of(2, "seed=1", "train.init_seed=9"), of(3, "seed=2", "train.init_seed=9")
    same, head = of(3, "seed=1"), "classifier.weight"
    for name in first:
        if name.endswith("lora_A"):
            assert torch.equal(first[name], other[name]), name
            assert not torch.equal(first[name], same[name])
            assert not torch.equal(first[name][0], first[name][1])
    assert torch.equal(other[head], of(3, "seed=2")[head])
    assert not torch.equal(other[head], same[head])


def test_equal_seeds_alone_give_tasks_the_same_factors(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(tiny_models["bert"], tmp_path, *KEYS)
    two, three = factors(config, 2), factors(config, 3)
    assert all(torch.equal(two[n], three[n]) for n in two if n.endswith(("lora_A", "lora_B")))
    config.train.init_seed = config.seed
    again = factors(config, 2)
    assert all(torch.equal(two[n], again[n]) for n in two)


def test_a_missing_tracker_ends_the_run_before_anything_is_written(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = config_of(tiny_models["bert"], tmp_path / "run", *KEYS, "track=wandb")
    with pytest.raises(InputError, match="pip install wandb"):
        train(config, QUIET)
    assert not (tmp_path / "run").exists()
