"""One writer at a time: an advisory lock on a folder, released by the system if its holder dies."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bayesian_lora.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: there, nothing stops a second writer
    fcntl = None

LOCK = "run.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the block. A lock whose process has died is free again.

    Raises:
        InputError: another process holds it (its pid and host are named).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise InputError(
                    f"{folder}: another process writes this run ({file.read().strip()}); wait for "
                    "it, stop it, or name another folder with output.dir=…"
                ) from error
        file.seek(0)
        file.truncate()
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
        file.seek(0)
        file.truncate()
