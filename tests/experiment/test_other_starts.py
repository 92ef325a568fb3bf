"""Warm starts of both kinds, last epoch and early-stopped: stored, read, taken over, resumed.

Shapes: M chains.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesian_lora import Ensemble
from bayesian_lora.ensemble import map_ensemble, other_starts, why_no_other_starts
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.train import train
from bayesian_lora.manifest import read_manifest, write_manifest
from bayesian_lora.utils.files import write_json
from bayesian_lora.warm_start import StepReport

from .same_runs import QUIET, assert_same_run, config_of, read
from .small_runs import Make, made_once

KEYS = ("sampler.name=map", "train.epochs=4", "train.lr=0.05")
PER_EPOCH = 5


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A run of MAP fits with these keys as well, made once."""
    return made_once(tiny_models["bert"], lambda: tmp_path_factory.mktemp("starts"), *KEYS)


def same_tensors(a: Ensemble, b: Ensemble) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)


def best_epochs(root: Path) -> list[int]:
    """The epoch of lowest held-out loss of each chain, by `metrics.csv`."""
    lines = [line.split(",") for line in (root / "metrics.csv").read_text().splitlines()]
    place = {name: i for i, name in enumerate(lines[0])}
    rows = [line for line in lines[1:] if line[place["chain"]] in ("0", "1")]
    losses = [[float(r[place["val/loss"]]) for r in rows if r[place["chain"]] == m] for m in "01"]
    return [int(np.argmin(chain)) for chain in losses]


def test_both_kinds_are_stored_and_one_is_what_sampling_starts_from(made: Make) -> None:
    """The same two fits whichever counts, each under the step that it is of."""
    stopped, last = made(), made("train.early_stopping=false")
    steps = [(epoch + 1) * PER_EPOCH for epoch in best_epochs(stopped)]
    assert steps != [4 * PER_EPOCH] * 2, "else nothing is shown"
    for root, kind, folder in ((stopped, "early_stopped", "last"), (last, "last", "early_stopped")):
        found = other_starts(root)
        assert found.keys() == {"last", "early_stopped"}
        assert why_no_other_starts(root) is None
        assert found[kind].records == map_ensemble(root).records
        other = found[folder].records
        assert [r.path for r in found[kind].records] == ["map/chain_0", "map/chain_1"]
        assert [r.path for r in other] == [f"map/{folder}/chain_{m}" for m in (0, 1)]
        assert [r.step for r in found["early_stopped"].records] == steps
        assert [r.step for r in found["last"].records] == [4 * PER_EPOCH] * 2
    for kind, fits in other_starts(stopped).items():
        assert same_tensors(fits, other_starts(last)[kind])
    assert not same_tensors(*other_starts(stopped).values())


def test_without_held_out_data_there_is_one_kind_and_a_reason(made: Make) -> None:
    root = made("train.early_stopping=false", "data.validation_share=0")
    assert list(other_starts(root)) == ["last"]
    assert "nothing is held out of train" in str(why_no_other_starts(root))
    assert sorted(p.name for p in (root / "map").iterdir()) == ["chain_0", "chain_1"]
    assert read(root / "ensemble.json")["alternatives"] == {}


def test_a_folder_of_an_earlier_version_still_loads(made: Make, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made(), tmp_path / "run"))
    write_manifest(root, *read_manifest(root))
    assert "alternatives" not in read(root / "ensemble.json")
    assert other_starts(root) == {}
    assert "not of which epoch" in str(why_no_other_starts(root))
    assert len(Ensemble.load(root)) == len(map_ensemble(root)) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"starts_are": "best"},
        {"starts_are": "last"},
        {"starts_are": None},
        {"alternatives": None},
        {"alternatives": {"best": []}},
        {"alternatives": {"last": [{"path": 3}]}},
        {"alternatives_reason": 5},
    ],
)
def test_a_wrong_list_of_them_is_refused_in_one_line(
    changes: dict[str, object], made: Make, tmp_path: Path
) -> None:
    """`starts_are: last` beside alternatives that are of the last epoch too."""
    root = tmp_path / "run"
    root.mkdir()
    value = read(made() / "ensemble.json")
    write_json(root / "ensemble.json", value | changes)
    with pytest.raises(InputError, match=r"ensemble\.json: damaged, .*; restore the file") as error:
        other_starts(root)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(("early", "kind"), [("true", "early_stopped"), ("false", "last")])
def test_a_run_that_takes_over_warm_starts_takes_both_and_starts_from_its_own_kind(
    made: Make, tiny_models: dict[str, Path], tmp_path: Path, early: str, kind: str
) -> None:
    """Whichever the other run started from."""
    keys = [f"train.starts_from={made()}", f"train.early_stopping={early}"]
    whole = train(config_of(tiny_models["bert"], tmp_path / "whole", *keys), QUIET)
    for name, fits in other_starts(made()).items():
        ours = other_starts(whole)[name]
        assert [r.step for r in ours.records] == [r.step for r in fits.records]
        assert same_tensors(ours, fits)
    assert read(whole / "ensemble.json")["starts_are"] == kind
    assert same_tensors(map_ensemble(whole), other_starts(made())[kind])


def test_one_kind_is_taken_with_its_reason(
    made: Make, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    none = made("train.early_stopping=false", "data.validation_share=0")
    keys = [f"train.starts_from={none}", "data.validation_share=0", "train.early_stopping=false"]
    root = train(config_of(tiny_models["bert"], tmp_path / "none", *keys), QUIET)
    assert list(other_starts(root)) == ["last"]
    assert why_no_other_starts(root) == why_no_other_starts(none)


def test_damaged_fits_of_the_other_kind_are_refused_before_anything_is_written(
    made: Make, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(made(), tmp_path / "donor"))
    file = root / "map" / "last" / "chain_1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="last/chain_1: damaged member"):
        other_starts(root)
    config = config_of(tiny_models["bert"], tmp_path / "run", f"train.starts_from={root}")
    with pytest.raises(InputError, match="last/chain_1: damaged member"):
        train(config, QUIET)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_other_fits_are_damaged_does_not_go_on(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    root = train(config_of(tiny_models["bert"], tmp_path / "run", "train.epochs=1"), QUIET)
    file = root / "map" / "last" / "chain_0" / "adapter_model.safetensors"
    whole = file.read_bytes()
    longer = config_of(tiny_models["bert"], root, "train.epochs=1", "sampler.num_samples=8")
    file.unlink()
    with pytest.raises(InputError, match="map/last/chain_0"):
        train(longer, QUIET)
    assert len(Ensemble.load(root)) == 6
    file.write_bytes(whole)
    assert len(Ensemble.load(train(longer, QUIET))) == 8


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("step", [PER_EPOCH, 2 * PER_EPOCH + 2, 4 * PER_EPOCH])
def test_a_killed_fit_goes_on_to_both(
    step: int, made: Make, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """With patience too, where both fits of a chain that has ended are held."""
    keys = ("sampler.name=sgld", "train.patience=3")
    config = config_of(tiny_models["bert"], tmp_path / "run", *KEYS, *keys)
    kept = Run.on_step

    def dying(self: Run, report: StepReport) -> None:
        kept(self, report)
        if (report.phase, report.step) == ("map", step):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "on_step", dying)
        patch.setattr("bayesian_lora.run_folder.RunFolder.finish", lambda *_, **__: None)
        with pytest.raises(Killed):
            train(config, QUIET)
    train(config, QUIET)
    assert_same_run(tmp_path / "run", made(*keys))
