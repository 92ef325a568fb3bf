"""Where a model's files come from, and what is said when they cannot be had."""

import hashlib
import importlib.util
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoTokenizer

from bayesian_lora.errors import InputError
from bayesian_lora.models import sources
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.models.sources import ModelSource, file_sha256, load_pretrained, resolve_model
from bayesian_lora.utils.hub import PROXIES


class Loader:
    """Stands for an Auto class: remembers what it was asked for, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, []

    def from_pretrained(self, path: str, **options: Any) -> str:
        self.calls.append((path, options))
        if self.error is not None:
            raise self.error
        return "loaded"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the installed package of `minilm`: its model folder."""
    folder = tmp_path / sources.MINILM_PACKAGE / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"the weights")
    spec = SimpleNamespace(origin=str(folder.parent / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sources, "MINILM_SHA256", hashlib.sha256(b"the weights").hexdigest())
    return folder


def test_minilm_is_the_package_s_folder(package: Path) -> None:
    assert resolve_model("minilm") == ModelSource(
        "minilm", str(package), "sentence-transformers/all-MiniLM-L6-v2"
    )


def test_tampered_minilm_weights_are_refused(package: Path) -> None:
    (package / "model.safetensors").write_bytes(b"the Weights")
    found = hashlib.sha256(b"the Weights").hexdigest()
    with pytest.raises(InputError, match=rf"sha256 {found}, expected .*--force-reinstall"):
        resolve_model("minilm")


def test_minilm_without_its_weights_is_refused(package: Path) -> None:
    (package / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        resolve_model("minilm")


def test_minilm_without_its_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'bayesian-lora\[offline\]'"):
        resolve_model("minilm")


@pytest.mark.skipif(
    importlib.util.find_spec(sources.MINILM_PACKAGE) is None, reason="the offline extra is absent"
)
def test_the_pinned_sha256_is_that_of_the_published_package() -> None:
    folder = Path(resolve_model("minilm").path)
    assert file_sha256(folder / "model.safetensors") == (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    )


def test_a_folder_is_its_own_source(tiny_models: dict[str, Path]) -> None:
    path = str(tiny_models["bert"])
    assert resolve_model(path) == ModelSource(path, path, path)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert resolve_model("~/m").path == str(tmp_path / "m")


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder has no config\.json.*save_pretrained"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["roberta-base", "org/model", "~nobody-of-this-name/model"])
def test_any_other_name_is_the_hub_s(name: str) -> None:
    assert resolve_model(name) == ModelSource(name, name, name)


def test_file_sha256(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 5000)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    for wrong in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            file_sha256(wrong)


@pytest.mark.parametrize(
    "name", ["no-such-organisation/no-such-model", "./not/a/folder", "a name", "~nobody/x", "a/b/c"]
)
def test_a_model_that_is_not_to_be_had_is_one_clear_line(name: str) -> None:
    """The test session is offline (HF_HUB_OFFLINE)."""
    with pytest.raises(InputError) as caught:
        build_huggingface_lora_model(name)
    message = str(caught.value)
    assert message.startswith(f"model.name={name!r}: could not be loaded (")
    assert "Known names: minilm, bert-base-uncased" in message
    assert message.endswith("give a local folder, or model.name=minilm, which needs no network")
    assert "\n" not in message


@pytest.mark.parametrize("damage", ["cut", "empty", "absent", "config"])
def test_a_damaged_model_folder_is_one_clear_line(
    tiny_models: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["bert"], folder)
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "absent":
        weights.unlink()
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="could not be loaded") as caught:
        build_huggingface_lora_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [OSError("a\nb"), ValueError("a"), ImportError("a"), SafetensorError("a")]
)
def test_what_loaders_raise_becomes_one_line(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(InputError, match=r"^model\.name='mine': could not be loaded \(a\)"):
        load_pretrained(Loader(error), ModelSource("mine", str(tmp_path), "mine"))


def test_code_from_the_hub_is_never_run(tmp_path: Path) -> None:
    loader = Loader()
    assert load_pretrained(loader, ModelSource("m", str(tmp_path), "m"), num_labels=3) == "loaded"
    assert loader.calls == [(str(tmp_path), {"trust_remote_code": False, "num_labels": 3})]


def use_hub(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """The hub is at a port of this machine, and nobody chose to be offline."""
    for name in ("HF_HUB_OFFLINE", *PROXIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader()
    with socket.create_server(("127.0.0.1", 0)) as server:
        use_hub(monkeypatch, server.getsockname()[1])
        load_pretrained(loader, ModelSource("org/model", "org/model", "org/model"))
    assert loader.calls == [("org/model", {"trust_remote_code": False})]


def test_a_hub_that_does_not_answer_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its client would retry for most of a minute."""
    use_hub(monkeypatch, 1)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    loader = Loader()
    with pytest.raises(InputError, match="hub is not reachable and its cache on disk lacks"):
        load_pretrained(loader, ModelSource("org/model", "org/model", "org/model"))
    assert loader.calls == []


def test_without_the_hub_its_cache_serves(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(tiny_models["bert"], repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")

    model = build_huggingface_lora_model("org/tiny", 3)

    here = build_huggingface_lora_model(str(tiny_models["bert"]), 3)
    assert model.fingerprint() == here.fingerprint()
    assert model.info.spec.base == "org/tiny"
    tokenizer = load_pretrained(AutoTokenizer, model.info.source)
    assert tokenizer("very good")["input_ids"][0] == tokenizer.cls_token_id
