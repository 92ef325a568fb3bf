"""Files that are whole or absent: written under a temporary name, synced, renamed.

JSON objects carry a checksum of themselves, so that a flipped bit is not taken for a figure.
"""

import errno
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bayesian_lora.errors import InputError

CHECKSUM = "checksum"


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that stands under `path` once the block has ended well, as a whole.

    A crash leaves the old file or the new one; a failure (a full disk) removes what it had
    written, so that nothing but the room it needs is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a loss of power, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` in one step; see `atomic`."""
    with atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented JSON and its checksum; NaN and infinity are refused, they are not JSON."""
    whole = {**value, CHECKSUM: _checksum(value)}
    write_atomic(path, json.dumps(whole, indent=2, allow_nan=False) + "\n")


def append_json_line(path: Path, value: Any, sync: bool = False) -> bytes:
    """One line at the end of a JSONL file; NaN and infinity are refused, they are not JSON.

    Returns:
        The line's bytes; with `sync` they are on the disk itself.
    """
    line = (json.dumps(value, allow_nan=False) + "\n").encode()
    with path.open("ab") as file:
        file.write(line)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    return line


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object, checked against its checksum if it has one.

    Raises:
        InputError: missing, unreadable, not JSON, not an object, or changed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: not found, so there is no {what} here; restore it, or name another folder"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: damaged, it is not readable JSON ({error}); restore it"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged, a JSON object is expected; restore it")
    given = value.pop(CHECKSUM, None)
    try:
        changed = given is not None and given != _checksum(value)
    except RecursionError:  # nested a little less deeply than what cannot be read
        changed = True
    if changed:
        raise InputError(
            f"{path}: damaged, or changed since it was written (its checksum differs); restore "
            "it, or take its checksum line out if the change is yours"
        )
    return value


def _finite(text: str) -> float:
    """A JSON number; NaN, infinity and what is too large for a float are none."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _checksum(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """Named arrays in one file, without pickle; its sha256."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_npz(path: Path, sha256: str | None = None) -> dict[str, np.ndarray]:
    """Undo `write_npz`.

    Raises:
        InputError: missing, damaged, or not the file of this sha256.
    """
    try:
        content = path.read_bytes()
        if sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise ValueError("its sha256 is not the recorded one")
        # numpy reads as many bytes as the array's header says, which may be too few for the CRC.
        if (bad := zipfile.ZipFile(io.BytesIO(content)).testzip()) is not None:
            raise ValueError(f"bad CRC of {bad}")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive raises whatever its first odd byte leads to
        # numpy's advice on pickled data is to load it unsafely.
        why = "it holds pickled data" if "pickle" in str(error) else str(error)
        raise InputError(f"{path}: missing or damaged ({why}); restore it") from error
    if odd := [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]:
        raise InputError(f"{path}: damaged, {odd[0]} is no array; restore it")
    return arrays
