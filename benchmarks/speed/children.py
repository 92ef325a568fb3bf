"""Processes of their own for what only a fresh one shows: memory, and the time to start."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MB = 1e6


def run_alone(*arguments: object) -> dict[str, Any]:
    """This script in a process of its own; the JSON of its last line."""
    command = [sys.executable, str(FOLDER), *(str(a) for a in arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def megabytes(name: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (at most so far) of this process.

    Not `ru_maxrss`: a process inherits its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / MB
    raise OSError(f"/proc/self/status has no {name}: memory is measured on Linux only")


def reset_peak() -> None:
    """`VmHWM` begins anew at what is resident; where that is forbidden it stays."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
