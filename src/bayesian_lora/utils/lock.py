"""One writer at a time: an advisory lock on a folder, released by the system if its holder dies."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from bayesian_lora.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: there, nothing stops a second writer
    fcntl = None

LOCK = "run.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the block; the file says who does, and goes when it ends.

    A lock whose process has died is free again: the system has released it.

    Raises:
        InputError: another process holds it (its pid and host are named).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with _held(path) as file:
        file.seek(0)
        file.truncate()
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            if fcntl is None:  # there, an open file cannot be removed
                file.close()
            path.unlink(missing_ok=True)


def _held(path: Path) -> IO[str]:
    """The open lock file, locked.

    A holder that ends removes its file; whoever had opened that very file then holds a lock on
    nothing, so the file must still be the one under its name.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read().strip()
            raise InputError(
                f"{path.parent}: another process writes this run ({holder}); wait for it, stop "
                "it, or name another folder with output.dir=…"
            ) from error
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()
