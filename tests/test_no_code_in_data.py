"""Whatever a config, a model's folder or a run's files hold, none of it is executed.

A sentinel is a file that the planted code would make; controls show that it does when run.
"""

import json
import pickle
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from bayesian_lora.config import build_config, load_config
from bayesian_lora.data.hub import read_hub
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.cells import make_plan
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.models.peft_io import read_member
from bayesian_lora.models.sources import ModelSource, load_pretrained, resolve_model
from bayesian_lora.utils.files import read_npz

REASON = r"never executed.*use an architecture that transformers has"
AUTO_MAP = {
    "AutoConfig": "planted.Config",
    "AutoModel": "planted.Model",
    "AutoModelForSequenceClassification": "planted.Model",
    "AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"],
}
PLANTED = """
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
open({sentinel!r}, "w").close()
class Config(BertConfig):
    model_type = "planted"
class Model(BertForSequenceClassification):
    config_class = Config
class Tokenizer(BertTokenizer):
    mark = "planted"
"""


class Payload:
    """Unpickled, it makes the sentinel."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.sentinel,)


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "sentinel"


@pytest.fixture
def model(tiny_models: dict[str, Path], tmp_path: Path, sentinel: Path) -> Path:
    """A BERT's folder with a module of its own beside the weights."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["bert"], folder)
    (folder / "planted.py").write_text(PLANTED.format(sentinel=str(sentinel)))
    return folder


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tokenizer_of(folder: Path) -> Any:
    return load_pretrained(AutoTokenizer, resolve_model(str(folder)))


def one_line(caught: pytest.ExceptionInfo[InputError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "text",
    [
        "trust_remote_code: true",
        "model: {trust_remote_code: true}",
        "data: {trust_remote_code: false}",
        "model: {lora: {trust_remote_code: 1}}",
        "prior: {candidates: [{trust_remote_code: 1}]}",
        "compare: {model.trust_remote_code: [true, false]}",
    ],
)
def test_a_config_cannot_switch_on_code_from_the_hub(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"trust_remote_code: .*{REASON}") as caught:
        load_config(path)
    assert one_line(caught).startswith(f"{path}: ")
    with pytest.raises(InputError, match=REASON):
        build_config(yaml.safe_load(text))


@pytest.mark.parametrize(
    "override",
    [
        "trust_remote_code=true",
        "model.trust_remote_code=true",
        "data.trust_remote_code=false",
        "data={trust_remote_code: true}",
        "model[trust_remote_code]=1",
    ],
)
def test_nor_can_an_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(InputError, match=f"^override .*trust_remote_code: .*{REASON}") as caught:
        build_config({}, [override])
    one_line(caught)
    path = tmp_path / "config.yaml"
    path.write_text("")
    with pytest.raises(InputError, match=REASON):
        make_plan(path, [override, "sampler.name=sgld,psgld"])


def test_the_planted_module_would_make_the_sentinel(model: Path, sentinel: Path) -> None:
    runpy.run_path(str(model / "planted.py"))
    assert sentinel.exists()


@pytest.mark.parametrize("where", ["", "organisation/repository--"])
def test_an_architecture_of_the_folder_s_own_is_refused(
    model: Path, sentinel: Path, where: str
) -> None:
    planted = {k: f"{where}{v}" for k, v in AUTO_MAP.items() if isinstance(v, str)}
    change(model / "config.json", model_type="planted", auto_map=planted)
    with pytest.raises(InputError, match=REASON) as caught:
        build_huggingface_lora_model(str(model))
    assert "trust_remote_code" not in one_line(caught), "advice to switch it on"
    assert not sentinel.exists()


def test_an_unknown_architecture_without_code_is_one_line(model: Path) -> None:
    change(model / "config.json", model_type="planted")
    with pytest.raises(InputError, match="does not recognize this architecture") as caught:
        build_huggingface_lora_model(str(model))
    one_line(caught)


def test_a_known_architecture_is_the_library_s_own(model: Path, sentinel: Path) -> None:
    change(model / "config.json", auto_map=AUTO_MAP)
    network: Any = build_huggingface_lora_model(str(model)).base
    assert type(network).__module__ == "transformers.models.bert.modeling_bert"
    assert not sentinel.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_tokenizer_of_the_folder_s_own_is_not_used(
    model: Path, sentinel: Path, file: str
) -> None:
    change(model / file, auto_map=AUTO_MAP)
    tokenizer = tokenizer_of(model)
    assert type(tokenizer).__module__.startswith("transformers.")
    assert not hasattr(tokenizer, "mark")
    assert not sentinel.exists()


def test_a_tokenizer_class_that_only_the_folder_has_is_not_used(
    model: Path, sentinel: Path
) -> None:
    change(model / "config.json", model_type="planted", auto_map=AUTO_MAP)
    change(
        model / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": ["planted.Tokenizer", None]},
    )
    try:
        found = type(tokenizer_of(model)).__module__
    except InputError as error:
        found = f"transformers.: {error}"
    assert found.startswith("transformers.")
    assert not sentinel.exists()


class Advising:
    """A loader that fails as transformers does, whatever its words around the option."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> None:
        raise ValueError("contains custom code.\nPlease pass `trust_remote_code=True` to allow it.")


def test_advice_to_trust_is_not_passed_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^model\.name='mine': .*{REASON}") as caught:
        load_pretrained(Advising, ModelSource("mine", str(tmp_path), "mine"))
    assert "trust_remote_code" not in one_line(caught)


def as_bin(folder: Path, content: bytes | dict[str, Any], new_format: bool = True) -> None:
    """Weights as `pytorch_model.bin` in the place of safetensors."""
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=new_format)


@pytest.mark.parametrize("kind", ["zip", "old", "bare", "garbage"])
def test_a_pickle_in_the_place_of_weights_is_refused(
    model: Path, sentinel: Path, kind: str
) -> None:
    payload = Payload(sentinel)
    if kind in ("zip", "old"):
        as_bin(model, {"embeddings.word_embeddings.weight": payload}, kind == "zip")
    else:
        as_bin(model, pickle.dumps(payload, protocol=2) if kind == "bare" else b"no pickle")
    with pytest.raises(InputError, match="its weights are no plain tensors") as caught:
        build_huggingface_lora_model(str(model))
    assert "weights_only" not in one_line(caught), "advice to unpickle"
    assert not sentinel.exists()


def test_the_pickle_would_make_the_sentinel(sentinel: Path) -> None:
    pickle.loads(pickle.dumps(Payload(sentinel)))
    assert sentinel.exists()


def test_plain_tensors_in_the_older_format_are_read(model: Path) -> None:
    expected = build_huggingface_lora_model(str(model)).fingerprint()
    as_bin(model, load_file(model / "model.safetensors"))
    assert build_huggingface_lora_model(str(model)).fingerprint() == expected


def test_an_adapter_s_pickle_is_not_looked_at(tmp_path: Path, sentinel: Path) -> None:
    torch.save({"base_model.model.x": Payload(sentinel)}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: member file missing"):
        read_member(tmp_path)
    assert not sentinel.exists()


def test_arrays_of_objects_are_refused(tmp_path: Path, sentinel: Path) -> None:
    path = tmp_path / "traces.npz"
    np.savez(path, x=np.zeros(3), y=np.array([Payload(sentinel)], dtype=object))
    with pytest.raises(InputError, match="missing or damaged") as caught:
        read_npz(path)
    assert "allow_pickle=True" not in one_line(caught)
    assert not sentinel.exists()
    with np.load(path, allow_pickle=True) as control:
        assert len(control["y"]) == 1
    assert sentinel.exists()


@pytest.mark.parametrize("name", ["planted", "planted/planted.py"])
def test_a_data_set_s_script_is_not_run(tmp_path: Path, sentinel: Path, name: str) -> None:
    script = tmp_path / "planted" / "planted.py"
    script.parent.mkdir()
    script.write_text(f"open({str(sentinel)!r}, 'w').close()")
    with pytest.raises(InputError, match="scripts are no longer supported") as caught:
        read_hub(str(tmp_path / name), None, "train", ["text"], "label", ["a", "b"])
    one_line(caught)
    assert not sentinel.exists()


TAGS = [
    "!!python/object/apply:os.mkdir ['{}']",
    "!!python/object/new:os.mkdir ['{}']",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "!!python/object:pathlib.Path {{}}",
]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_of_yaml_make_no_objects(tmp_path: Path, sentinel: Path, tag: str) -> None:
    value, path = tag.format(sentinel), tmp_path / "config.yaml"
    path.write_text(f"seed: {value}")
    with pytest.raises(InputError, match="not a readable YAML file"):
        load_config(path)
    with pytest.raises(InputError, match="the value is not YAML"):
        build_config({}, [f"seed={value}"])
    assert not sentinel.exists()


def test_the_tag_would_make_the_sentinel(sentinel: Path) -> None:
    yaml.unsafe_load(TAGS[0].format(sentinel))
    assert sentinel.is_dir()
