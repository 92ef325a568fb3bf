"""Files that are whole or absent: written under a temporary name, synced, renamed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora.errors import InputError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` in one step; a crash leaves the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; NaN and infinity are refused, they are not JSON."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_json_line(path: Path, value: Any) -> None:
    """One line at the end of a JSONL file; NaN and infinity are refused, they are not JSON."""
    line = json.dumps(value, allow_nan=False) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found, so there is no {what} here") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged, it is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged, a JSON object is expected")
    return value


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Named arrays in one file, without pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Undo `write_npz`.

    Raises:
        InputError: missing or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive raises whatever its first odd byte leads to
        raise InputError(f"{path}: missing or damaged ({error})") from error
