"""Token ids kept on disk, so that a set is tokenised once: found by what they depend on.

Shapes: N texts.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora.errors import InputError
from bayesian_lora.utils.files import read_npz, write_npz

VARIABLE = "BAYESIAN_LORA_CACHE"
FORMAT = 1
COLUMNS = ("input_ids", "token_type_ids")


def default_folder() -> Path | None:
    """BAYESIAN_LORA_CACHE, else bayesian-lora in the user's cache; None (no cache) if it is ''."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given).expanduser() if given else None
    root = os.environ.get("XDG_CACHE_HOME")
    # The standard bids to ignore a relative path.
    if root and Path(root).is_absolute():
        return Path(root) / "bayesian-lora"
    try:
        return Path.home() / ".cache" / "bayesian-lora"
    except RuntimeError:  # a user without a home, as in containers
        return None


def cache_key(texts: Sequence[list[str]], tokenizer: Any, max_length: int) -> str | None:
    """sha256 over texts, tokenizer and length; None if the tokenizer cannot be told from others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    import tokenizers

    backend.no_truncation()  # left from the last call, and set anew in the next
    backend.no_padding()
    # What acts beside the backend, or is no part of its text.
    names = ("truncation_side", "model_input_names", "split_special_tokens")
    own = [getattr(tokenizer, name, None) for name in names]
    kind = [FORMAT, tokenizers.__version__, type(tokenizer).__name__, own, max_length]
    digest = hashlib.sha256(repr(kind).encode())
    digest.update(backend.to_str().encode(errors="surrogatepass"))
    for column in texts:
        raw = [text.encode(errors="surrogatepass") for text in column]
        digest.update(np.array([len(column), *map(len, raw)], dtype=np.int64).tobytes())
        digest.update(b"".join(raw))
    return digest.hexdigest()


def read_tokens(folder: Path, key: str, size: int) -> dict[str, np.ndarray] | None:
    """Lengths (N,) and flat columns by name; None if they are not there, or damaged."""
    try:
        found = read_npz(_path(folder, key))
    except InputError:
        return None
    lengths, ids = found.get("lengths"), found.get("input_ids")
    if lengths is None or ids is None or lengths.dtype != np.int64 or lengths.shape != (size,):
        return None
    flat = [column for name, column in found.items() if name != "lengths"]
    whole = all(c.shape == (lengths.sum(),) and c.dtype == np.int32 for c in flat)
    return found if whole and found.keys() <= {"lengths", *COLUMNS} else None


def write_tokens(folder: Path, key: str, columns: dict[str, np.ndarray]) -> None:
    """Keep them, if that is possible: a full or read-only disk must not stop a run."""
    path = _path(folder, key)
    # A name of its own: runs that start together write the same set.
    own = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        write_npz(own, columns)
        own.replace(path)
    except OSError:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def _path(folder: Path, key: str) -> Path:
    return folder / "tokens" / f"{key}.npz"
