"""A state on disk: nested dicts and lists of tensors and plain values, whole or refused.

One safetensors file holds the tensors; its metadata hold the tree as JSON and a sha256 over both,
so that a torn or altered file is noticed. Two generations are kept.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from bayesian_lora.utils.files import write_atomic

NEWEST, PREVIOUS = "newest.safetensors", "previous.safetensors"


class Damaged(Exception):
    """A checkpoint file that is torn, altered or no checkpoint."""


def write_checkpoint(folder: Path, tree: Any) -> None:
    """Write the newest generation; the one before it is kept.

    A crash at any moment leaves at least one whole generation.
    """
    content = encode(tree)
    newest = folder / NEWEST
    if newest.is_file():
        newest.replace(folder / PREVIOUS)
    write_atomic(newest, content)


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one, whole or not."""
    return any((folder / name).is_file() for name in (NEWEST, PREVIOUS))


def drop_newest(folder: Path) -> None:
    """Remove a newest generation that is damaged: the next one must not move it over the whole."""
    (folder / NEWEST).unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> tuple[Any, str | None]:
    """The newest whole generation, and what was wrong with a newer one, if anything.

    Raises:
        FileNotFoundError: there is no checkpoint.
        Damaged: there are files, none of them whole.
    """
    trouble = None
    paths = [path for name in (NEWEST, PREVIOUS) if (path := folder / name).is_file()]
    if not paths:
        raise FileNotFoundError(folder)
    for path in paths:
        try:
            return decode(path), trouble
        except Damaged as error:
            trouble = trouble or str(error)
    raise Damaged(trouble)


def encode(tree: Any) -> bytes:
    """A tree of dicts (str or int keys), lists, tensors, numbers, strings, booleans and None."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_fold(tree, tensors))
    metadata = {"tree": text, "sha256": _digest(text, tensors)}
    if not tensors:
        tensors["empty"] = torch.zeros(0)
    return save(tensors, metadata)


def decode(path: Path) -> Any:
    """Undo `encode`.

    Raises:
        Damaged: the file is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["tree"]
        tensors.pop("empty", None)
        whole = metadata["sha256"] == _digest(text, tensors)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, struct.error) as error:
        raise Damaged(f"{path}: not readable ({error})") from error
    if not whole:
        raise Damaged(f"{path}: altered, its sha256 is not the recorded one")
    try:
        return _unfold(json.loads(text), tensors)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise Damaged(f"{path}: no checkpoint of this version ({error})") from error


def _fold(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _fold(v, tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_fold(v, tensors) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _unfold(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unfold(v, tensors) for key, v in content}
    return [_unfold(v, tensors) for v in content]


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
