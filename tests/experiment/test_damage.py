"""Damaged files of a run: the very same results or one clear refusal, never other figures."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save

from bayesian_lora import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.compare import compare
from bayesian_lora.experiment.evaluate import evaluate_run
from bayesian_lora.experiment.train import train
from bayesian_lora.utils import checkpoint, files

from .damage import (
    KINDS,
    LONGER,
    Command,
    Fault,
    Kind,
    Runs,
    evaluated,
    examine,
    faults_of,
    rewrite,
    same_tensors,
    shrunk,
    trial,
)
from .same_runs import BASE, QUIET, config_of, read
from .test_resume import Killed, kill_after


@pytest.fixture(scope="module")
def runs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Finished, and killed in the warm start and while collecting; traces in several parts."""
    root, model = tmp_path_factory.mktemp("runs"), tiny_models["bert"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayesian_lora.experiment.run.ROWS_A_PART", 2)
        patch.chdir(root)

        def made(name: str, seed: int, steps: int | None = None, *keys: str) -> Path:
            config = config_of(model, root / f"{name}{seed}", f"seed={seed}", *keys)
            if steps is None:
                return train(config, QUIET)
            with pytest.MonkeyPatch.context() as killing:
                kill_after(killing, steps)
                with pytest.raises(Killed):
                    train(config, QUIET)
            return root / f"{name}{seed}"

        finished = (made("finished", 0), made("finished", 1))
        yield Runs(
            model,
            finished,
            sampling=(made("sampling", 0, 18), made("sampling", 1, 18)),
            fitting=(made("fitting", 0, 7), made("fitting", 1, 7)),
            longer=made("longer", 0, None, LONGER),
            figures=evaluated(finished[0]),
        )


def some(faults: list[Fault], number: int) -> list[Fault]:
    """A few of many, drawn at random."""
    return [faults[int(i)] for i in np.random.default_rng(9).integers(0, len(faults), number)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_injured_finished_run_is_whole_or_refused(
    runs: Runs, tmp_path: Path, kind: Kind
) -> None:
    faults = list(faults_of(runs.finished[0], kind, seed=1))
    commands = [runs.load(), runs.evaluate(), runs.extend()]
    examine(runs.finished, faults, commands, tmp_path).settle()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_injured_stopped_run_goes_on_or_is_refused(
    runs: Runs, tmp_path: Path, kind: Kind
) -> None:
    faults = list(faults_of(runs.sampling[0], kind, seed=2))
    examine(runs.sampling, faults, [runs.resume()], tmp_path).settle()


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_injuries(runs: Runs, tmp_path: Path, kind: Kind) -> None:
    finished = some(list(faults_of(runs.finished[0], kind, seed=3)), 1)
    commands = [runs.load(), runs.evaluate(), runs.extend()]
    examine(runs.finished, finished, commands, tmp_path).settle()
    stopped = some(list(faults_of(runs.sampling[0], kind, seed=4)), 1)
    examine(runs.sampling, stopped, [runs.resume()], tmp_path).settle()


@pytest.mark.parametrize("generation", ["newest", "previous"])
def test_another_runs_checkpoint_is_refused_before_there_are_members(
    runs: Runs, tmp_path: Path, generation: str
) -> None:
    """The index of members says nothing yet: the checkpoint itself must say whose it is."""
    fault = Fault("replaced", f"checkpoint/{generation}.safetensors")
    examine(runs.fitting, [fault], [runs.resume()], tmp_path).settle()


@pytest.mark.parametrize("file", ["traces/part_00001.npz", "traces/part_00003.npz"])
def test_a_header_that_hides_rows_is_noticed(runs: Runs, tmp_path: Path, file: str) -> None:
    """NumPy then reads less than the file has, so that zip never checks what was read."""
    shutil.copytree(runs.finished[0], tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_bytes(shrunk("log_posterior.npy", path.read_bytes()))
    outcome, complaints = trial(runs.evaluate(), tmp_path / "run", (file,))
    assert (outcome, complaints) == ("refused", [])


@pytest.mark.parametrize("change", ["nan", "shape", "gone"])
def test_a_bad_member_with_its_sha256_adjusted(runs: Runs, tmp_path: Path, change: str) -> None:
    shutil.copytree(runs.finished[0], tmp_path / "run")
    rewrite(tmp_path / "run", change)
    for command in (runs.load(), runs.evaluate()):
        outcome, complaints = trial(command, tmp_path / "run", ("samples/sample_0003",))
        assert (outcome, complaints) == ("refused", []), command.name


@pytest.mark.parametrize("way", ["..", "absolute", "linked folder", "linked file"])
def test_a_member_outside_the_folder_is_refused(runs: Runs, tmp_path: Path, way: str) -> None:
    """Though it is the very member: a manifest does not reach out of its run."""
    root, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(runs.finished[0], root)
    inside = root / "samples" / "sample_0001"
    shutil.copytree(inside, outside)
    if way == "linked folder":
        shutil.rmtree(inside)
        inside.symlink_to(outside)
    elif way == "linked file":
        (inside / "adapter_model.safetensors").unlink()
        (inside / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    else:
        manifest = read(root / "ensemble.json")
        path = "samples/../../outside" if way == ".." else str(outside)
        manifest["members"][0]["path"] = path
        files.write_json(root / "ensemble.json", manifest)
    for command in (runs.load(), runs.evaluate()):
        outcome, complaints = trial(command, root, ("samples/sample_0001", "outside"))
        assert (outcome, complaints) == ("refused", []), command.name


def test_members_of_another_base_model(runs: Runs, tmp_path: Path) -> None:
    """Everything of the members is whole, but the encoder under their name is another one."""
    model = tmp_path / "model"
    shutil.copytree(runs.model, model)
    folder = train(config_of(model, tmp_path / "run"), QUIET)
    weights = load_file(model / "model.safetensors")
    weights[next(name for name in sorted(weights) if "query.weight" in name)][0, 0] += 0.01
    (model / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    with pytest.raises(InputError, match=r"has fingerprint .* give the same base weights"):
        evaluate_run(folder, progress=QUIET)
    with pytest.raises(InputError, match="the base model's weights changed since the run began"):
        train(config_of(model, folder, LONGER), QUIET)
    shutil.rmtree(folder / "samples")
    shutil.copytree(runs.finished[0] / "samples", folder / "samples")
    with pytest.raises(InputError, match=r"sample_0001.*; restore"):
        Ensemble.load(folder)


@pytest.mark.slow
def test_packed_members(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of four: one is full, the other is not when the run ends."""
    monkeypatch.setattr("bayesian_lora.member_files.FOLDER_LIMIT", 3)
    monkeypatch.setattr("bayesian_lora.member_files.PACK_SIZE", 4)
    pair = tuple(
        train(config_of(runs.model, tmp_path / f"packed{seed}", f"seed={seed}"), QUIET)
        for seed in (0, 1)
    )
    packs = sorted(p.name for p in (pair[0] / "samples").iterdir())
    assert packs == ["pack_0001.safetensors", "pack_0002.safetensors"]
    faults = [f for kind in KINDS for f in faults_of(pair[0], kind, 5) if "pack" in f.file]
    commands = [runs.load(), runs.evaluate()]
    commands[0] = Command("load", Ensemble.load, partial(same_tensors, runs.finished[0]))
    findings = examine((pair[0], pair[1]), faults, commands, tmp_path)
    findings.settle()
    assert findings.outcomes["refused"] == len(faults) * 2


@pytest.mark.slow
def test_a_comparisons_record(runs: Runs, tmp_path: Path) -> None:
    """It is made again from the cells, or refused; the cells stay."""
    config = tmp_path / "base.yaml"
    config.write_text(yaml.safe_dump(BASE))
    arguments = [f"model.name={runs.model}", "sampler.name=sgld,sghmc"]

    def compared(folder: Path) -> None:
        compare(config, [*arguments, f"output.dir={folder}"], QUIET)

    compared(tmp_path / "whole")
    expected = (tmp_path / "whole" / "comparison.csv").read_bytes()

    def same(folder: Path, _: None) -> None:
        assert (folder / "comparison.csv").read_bytes() == expected

    names = ("comparison.json", "comparison.csv")
    size = (tmp_path / "whole" / names[0]).stat().st_size
    rng = np.random.default_rng(6)
    faults = [Fault(kind, name) for kind in ("removed", "emptied") for name in names]
    faults += [Fault("truncated", names[0], int(i)) for i in rng.integers(1, size, 4)]
    faults += [Fault("flipped", names[0], int(i)) for i in rng.integers(0, 8 * size, 8)]
    pair = (tmp_path / "whole", tmp_path / "whole")
    examine(pair, faults, [Command("compare", compared, same)], tmp_path).settle()


def test_a_flipped_weight_would_be_caught(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the manifest's checksum the harness reports other figures, not silence."""
    text = (runs.finished[0] / "ensemble.json").read_bytes()
    digit = text.index(b'"weight": 1.0', text.index(b'"members"')) + len('"weight": ')
    fault = Fault("flipped", "ensemble.json", 8 * digit + 1)  # 1.0 → 3.0
    commands = [runs.load(), runs.evaluate()]
    findings = examine(runs.finished, [fault], commands, tmp_path)
    assert (findings.outcomes, findings.wrong) == ({"refused": 2}, [])

    def unchecked(path: Path, what: str) -> Any:
        return json.loads(path.read_text())

    monkeypatch.setattr("bayesian_lora.manifest.read_json", unchecked)
    findings = examine(runs.finished, [fault], commands, tmp_path)
    assert findings.outcomes == {"different": 2}
    assert len(findings.wrong) == 2


def test_a_flipped_checkpoint_would_be_caught(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the checkpoint's sha256 the resumed run differs, and the harness says so."""
    unsealed = tmp_path / "unsealed"
    shutil.copytree(runs.sampling[0], unsealed)
    tree, _ = checkpoint.read_checkpoint(unsealed / "checkpoint")
    monkeypatch.setattr(checkpoint, "_digest", lambda text, tensors: "")
    checkpoint.write_checkpoint(unsealed / "checkpoint", tree)
    parameter = next(iter(tree["state"]["model"].values())).numpy().tobytes()
    name = f"checkpoint/{checkpoint.NEWEST}"
    sign = 8 * ((unsealed / name).read_bytes().index(parameter) + 3) + 7
    pair = (unsealed, runs.sampling[1])
    findings = examine(pair, [Fault("flipped", name, sign)], [runs.resume()], tmp_path)
    assert findings.outcomes == {"different": 1}
    assert len(findings.wrong) == 1
