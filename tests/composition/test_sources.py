"""An adapter is read from wherever it lies, with all that is known of it there.

Shapes: K members.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bayesian_lora.composition.sources import read_source, read_sources
from bayesian_lora.composition.stack_files import write_stack
from bayesian_lora.composition.stacking import stack_sources
from bayesian_lora.ensemble import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.models.peft_io import read_member, read_spec
from tests.composition.adapters import write_peft, write_run


@pytest.fixture(scope="module")
def run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on CoLA with three members of unlike weights."""
    root = tmp_path_factory.mktemp("runs") / "mine"
    return write_run(root, tiny_models["bert"], "cola", 1, chains=3, weights=[1.0, 2.0, 0.0])


@pytest.fixture
def foreign(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A PEFT folder called sst2, of which nothing else is known."""
    return write_peft(tmp_path / "sst2", tiny_models["bert"], "sst2", 2)


def test_a_run_is_all_its_members_with_their_weights(run: Path) -> None:
    found, wanted = read_source(str(run)), Ensemble.load(run)
    assert found.name == "cola"
    assert found.path == str(run)
    assert len(found) == 3
    np.testing.assert_allclose(found.weights, [1 / 3, 2 / 3, 0.0])
    assert found.spec == wanted.provenance.spec
    assert found.model == wanted.provenance.model
    assert found.task == wanted.provenance.task
    for own, other in zip(found.members, wanted, strict=True):
        assert all(torch.equal(own[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("inside", ["map/chain_2", "samples/sample_0003"])
def test_one_adapter_of_a_run_knows_the_run(run: Path, inside: str) -> None:
    """The third member has no weight in the run, and all of it on its own."""
    found, whole = read_source(str(run / inside)), read_source(str(run))
    assert (found.name, found.model, found.task) == ("cola", whole.model, whole.task)
    assert found.weights.tolist() == [1.0]
    assert all(torch.equal(found.members[0][n], t) for n, t in whole.members[2].items())


def test_a_folder_beside_a_runs_members_is_not_taken_for_one(run: Path, foreign: Path) -> None:
    shutil.copytree(foreign, run / "map" / "theirs")
    found = read_source(str(run / "map" / "theirs"))
    shutil.rmtree(run / "map" / "theirs")
    assert (found.name, found.model, found.task) == ("theirs", None, None)


def test_a_damaged_member_of_a_run_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "map" / "chain_1"
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n: t + 1 for n, t in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=rf"{folder}: damaged member, its sha256"):
        read_source(str(folder))
    assert read_source(str(tmp_path / "run")).name == "cola", "the others are whole"


def test_a_folder_of_anyones_is_known_by_its_config_and_name(foreign: Path) -> None:
    found = read_source(str(foreign))
    assert found.spec == read_spec(foreign)
    assert found.model is None
    assert found.task == {
        "name": "sst2",
        "label_names": ["negative", "positive"],
        "likelihood": "categorical",
    }
    assert set(found.head) == {"classifier.weight", "classifier.bias"}
    assert found.widths["bert.encoder.layer.0.attention.self.query"] == (32, 32)
    assert len(found.widths) == 4
    member = read_member(foreign)
    assert all(torch.equal(found.members[0][name], tensor) for name, tensor in member.items())


def test_older_adapters_with_pickled_tensors_are_read(foreign: Path) -> None:
    wanted = read_member(foreign)
    weights = foreign / "adapter_model.safetensors"
    torch.save(load_file(weights), foreign / "adapter_model.bin")
    weights.unlink()
    for path in (foreign, foreign / "adapter_model.bin"):
        found = read_source(str(path))
        assert found.name == "sst2"
        assert all(torch.equal(found.members[0][n], t) for n, t in wanted.items())


def test_a_state_dict_takes_the_config_beside_it(foreign: Path, tmp_path: Path) -> None:
    weights = foreign / "adapter_model.safetensors"
    assert read_source(str(weights)).spec == read_spec(foreign)
    shutil.copy(weights, foreign / "other.safetensors")
    beside = read_source(str(foreign / "other.safetensors"))
    assert (beside.name, beside.spec) == ("other", read_spec(foreign))
    shutil.copy(weights, tmp_path / "alone.safetensors")
    alone = read_source(str(tmp_path / "alone.safetensors"))
    assert (alone.name, alone.spec, alone.model, alone.task) == ("alone", None, None, None)


def test_a_stacks_task_is_an_adapter_again(run: Path, foreign: Path, tmp_path: Path) -> None:
    single = str(run / "map" / "chain_0")
    stack = stack_sources(read_sources([single, f"mine={foreign}"]))
    write_stack(tmp_path / "stack", stack)
    found = read_source(str(tmp_path / "stack" / "tasks" / "cola"))
    assert found.spec == stack.spec
    assert (found.task or {})["name"] == "cola"
    assert (found.model or {})["fingerprint"] == stack.model["fingerprint"] is not None
    with pytest.raises(InputError, match=r"a stack of several tasks; name one .*cola.*mine"):
        read_source(str(tmp_path / "stack"))


def test_a_task_of_stacked_ensembles_is_an_ensemble(run: Path, foreign: Path, tmp_path: Path):
    write_stack(tmp_path / "stack", stack_sources(read_sources([str(run), str(foreign)])))
    found = read_source(str(tmp_path / "stack" / "tasks" / "sst2"))
    assert (found.name, len(found)) == ("sst2", 3)
    np.testing.assert_allclose(found.weights, [1 / 3, 2 / 3, 0.0])


def test_names_are_given_or_taken_from_task_and_folder(foreign: Path, run: Path) -> None:
    arguments = [f"sst2={run}", str(foreign), str(foreign), str(run), f"SST2-2={run}"]
    names = [source.name for source in read_sources(arguments)]
    assert names == ["sst2", "sst2-2", "sst2-3", "cola", "SST2-2-2"]
    assert (read_source(f"mine={run}").task or {})["name"] == "cola"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("lr=0.1, v2.0", "lr-0-1-v2-0"), ("train", "train-adapter"), ("…", "adapter")],
)
def test_folders_names_become_names_of_tasks(
    tiny_models: dict[str, Path], tmp_path: Path, folder: str, name: str
) -> None:
    write_peft(tmp_path / folder, tiny_models["bert"], "sst2", 1)
    assert read_source(str(tmp_path / folder)).name == name


def test_a_name_of_a_task_with_other_outputs_is_only_a_name(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_peft(tmp_path / "adapter", tiny_models["bert"], "sst2", 1)
    assert read_source(f"mnli={folder}").task is None
    assert (read_source(f"cola={folder}").task or {})["name"] == "cola"


@pytest.mark.parametrize("name", ["a.b", "a b", "values", "train", ""])
def test_a_name_that_no_head_can_have_is_refused(foreign: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"cannot name an adapter; use letters, digits"):
        read_source(f"{name}={foreign}")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path}/none: not found; name a PEFT folder"):
        read_source(str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"no adapter there; name a PEFT folder"):
        read_source(f"mine={tmp_path}")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match=r"notes.txt: a file of an unknown kind; a state dict"):
        read_source(str(tmp_path / "notes.txt"))
    with pytest.raises(InputError, match="not found"):
        read_source("nul\0byte")


def test_numbers_that_are_not_finite_are_named(foreign: Path) -> None:
    path = foreign / "adapter_model.safetensors"
    weights = load_file(path)
    key = next(name for name in weights if "lora_B" in name)
    weights[key][0, 0] = float("nan")
    save_file(weights, path)
    name = key.removeprefix("base_model.model.").removesuffix(".weight")
    with pytest.raises(InputError, match=rf"{path}: {name} is not finite"):
        read_source(str(foreign))


def test_adapters_that_are_more_than_plain_lora_are_refused(foreign: Path) -> None:
    path = foreign / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(InputError, match="has DoRA, which plain LoRA does not cover"):
        read_source(str(foreign))
