"""The folder of a run: what may begin in it, and the files that are written along the way."""

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora import __version__
from bayesian_lora.errors import InputError
from bayesian_lora.utils.files import (
    append_json_line,
    read_json,
    read_npz,
    write_atomic,
    write_json,
    write_npz,
)
from bayesian_lora.utils.lock import LOCK

BEGINNING = "beginning"
PACKAGES = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors")


class RunFolder:
    """`runs/<experiment>/`: config, status, log, traces, predictions, metrics.

    Statuses in `run.json`: ``beginning`` (an old run is cleared away), ``running``, ``sampled``,
    ``finished``, ``stopped`` (with the reason).
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.status: dict[str, Any] = {}
        self.parts = 0
        self.sums: dict[str, str] = {}
        self._began = time.time()

    def check_free(self, overwrite: bool) -> None:
        """Refuse a folder that holds something, unless it is a run and may be replaced.

        Raises:
            InputError: says what is there and how to go on; also if no folder can be made there.
        """
        nearest = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not nearest.is_dir():
            raise InputError(
                f"output.dir={str(self.root)!r}: {nearest} is a file; name another folder"
            )
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(
                f"output.dir={str(self.root)!r}: {nearest} cannot be written to; "
                "name another folder"
            )
        left = (LOCK, "run.json.tmp")  # by a process that died over its first file
        if not self.root.is_dir() or all(path.name in left for path in self.root.iterdir()):
            return
        record = self.root / "run.json"
        if not record.is_file():
            what = "a comparison" if (self.root / "comparison.json").is_file() else "other files"
            raise InputError(
                f"output.dir={str(self.root)!r} holds {what} and no run; "
                "name another folder with output.dir=…"
            )
        if not overwrite:
            status = read_json(record, "run").get("status", "unknown")
            raise InputError(
                f"output.dir={str(self.root)!r} already holds a run (status: {status}): go on "
                f"with it (no --no-resume), evaluate it with 'bayesian-lora eval {self.root}', "
                "keep both with output.dir=<new folder>, or replace it with output.overwrite=true"
            )

    def begin(self, config_text: str, facts: dict[str, Any]) -> None:
        """Clear a replaced run; write `config.yaml` and the first `run.json`."""
        self.root.mkdir(parents=True, exist_ok=True)
        # Killed in what follows, it is still a run's folder.
        write_json(self.root / "run.json", {"status": BEGINNING})
        for old in self.root.iterdir():  # the folder itself may be a link or a mount
            if old.name in (LOCK, "run.json"):
                continue
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        write_atomic(self.root / "config.yaml", config_text)
        self.status = {
            "status": "running",
            "started": _now(),
            "pid": os.getpid(),
            "versions": versions(),
            "git_commit": git_commit(),
            **facts,
        }
        self._write_status()

    def reopen(self, state: dict[str, Any]) -> None:
        """Go on with a run: cut what was appended after its checkpoint, a `position` verified."""
        self.status = read_json(self.root / "run.json", "run")
        self.status |= {"status": "running", "pid": os.getpid(), "resumed": _now()}
        for name in ("reason", "traces", "ended", "wall_s", "members", "t_eff"):
            self.status.pop(name, None)
        self._began = time.time() - state["wall_s"]
        self.parts = state["trace_parts"]
        self.sums = dict(state["trace_sums"])
        log = self.root / "log.jsonl"
        if log.is_file():
            os.truncate(log, min(log.stat().st_size, state["log_bytes"]))
        for path in (self.root / "traces").glob("part_*.npz"):
            number = path.stem.removeprefix("part_")
            if number.isdigit() and int(number) > self.parts:
                path.unlink()
        self._write_status()

    def verify(self, state: dict[str, Any]) -> None:
        """The traces up to a `position` are whole.

        Raises:
            InputError: one is missing or damaged.
        """
        check_parts(self.root, state["trace_parts"])
        for name, sha256 in state["trace_sums"].items():
            read_npz(self.root / "traces" / name, sha256)

    def position(self) -> dict[str, Any]:
        """Where the appended files stand."""
        log = self.root / "log.jsonl"
        return {
            "wall_s": time.time() - self._began,
            "trace_parts": self.parts,
            "trace_sums": dict(self.sums),
            "log_bytes": log.stat().st_size if log.is_file() else 0,
        }

    def finish(self, status: str, **facts: Any) -> None:
        """The last `run.json`: status, wall time and whatever else is known."""
        wall = time.time() - self._began
        traces = {"parts": self.parts, "starts": self.starts_written(), "sha256": self.sums}
        self.status |= {"status": status, "ended": _now(), "wall_s": round(wall, 2), **facts}
        self.status["traces"] = traces
        self._write_status()

    def _write_status(self) -> None:
        write_json(self.root / "run.json", self.status)

    def log(self, line: dict[str, Any]) -> None:
        """One line of `log.jsonl`."""
        append_json_line(self.root / "log.jsonl", line)

    def write_traces(self, arrays: dict[str, np.ndarray]) -> None:
        """The next `traces/part_….npz`, numbered from 1: arrays (M, rows) named by quantity."""
        if arrays:
            path = _part(self.root, self.parts + 1)
            self.sums[path.name] = write_npz(path, arrays)
            self.parts += 1

    def starts_written(self) -> bool:
        """Whether `write_starts` has been called."""
        return (self.root / "traces" / "starts.npz").is_file()

    def write_starts(self, row: dict[str, np.ndarray]) -> None:
        """`traces/starts.npz`: the same quantities (M,) before the first sampling step."""
        self.sums["starts.npz"] = write_npz(self.root / "traces" / "starts.npz", row)

    def write_predictions(self, split: str, arrays: dict[str, np.ndarray]) -> None:
        """`predictions/<split>.npz`."""
        write_npz(self.root / "predictions" / f"{split}.npz", arrays)

    def metrics_path(self, split: str, default_split: str) -> Path:
        """`metrics.json` of the default split, `metrics.<split>.json` of any other."""
        return self.root / ("metrics.json" if split == default_split else f"metrics.{split}.json")

    def write_metrics(self, split: str, default_split: str, value: dict[str, Any]) -> Path:
        """The figures of a split, at `metrics_path`."""
        path = self.metrics_path(split, default_split)
        write_json(path, value)
        return path


def read_traces(root: Path) -> dict[str, np.ndarray]:
    """All parts joined, arrays (M, rows).

    Raises:
        InputError: a damaged part, or one that is missing.
    """
    ended = _ended_with(root)
    check_parts(root, ended.get("parts", 0))
    sums = ended.get("sha256", {})
    paths = sorted((root / "traces").glob("part_*.npz"))
    parts = [read_npz(path, sums.get(path.name)) for path in paths]
    chains = [{name: x.shape[:-1] for name, x in part.items()} for part in parts]
    if odd := [path for path, found in zip(paths, chains, strict=True) if found != chains[0]]:
        raise InputError(f"{odd[0]}: damaged, its quantities or chains are not those of part 1")
    for path, part in zip(paths, parts, strict=True):
        if odd := [n for n, x in part.items() if x.ndim != 2 or x.dtype.kind not in "biuf"]:
            raise InputError(f"{path}: damaged, {odd[0]} is no array (chains, rows) of numbers")
    names = parts[0].keys() if parts else ()
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in names}


def read_starts(root: Path) -> dict[str, np.ndarray] | None:
    """What `RunFolder.write_starts` wrote, None where it is not there.

    Raises:
        InputError: damaged, or gone since the run ended.
    """
    path = root / "traces" / "starts.npz"
    ended = _ended_with(root)
    sha256 = ended.get("sha256", {}).get(path.name)
    return read_npz(path, sha256) if path.is_file() or ended.get("starts") else None


def check_parts(root: Path, number: int) -> None:
    """Raises InputError unless the first `number` parts of the traces are there."""
    for part in range(1, number + 1):
        if not (path := _part(root, part)).is_file():
            raise InputError(f"{path}: missing, though the run wrote it; restore it")


def _part(root: Path, number: int) -> Path:
    return root / "traces" / f"part_{number:05d}.npz"


def _ended_with(root: Path) -> dict[str, Any]:
    """What a run that has ended says of its traces."""
    path = root / "run.json"
    traces = (read_json(path, "run").get("traces") or {}) if path.is_file() else {}
    kinds = {"parts": int, "sha256": dict}
    if not isinstance(traces, dict) or any(
        type(traces.get(name, kind())) is not kind for name, kind in kinds.items()
    ):
        raise InputError(f"{path}: damaged, traces is {traces!r}; restore it")
    return traces


def versions() -> dict[str, str]:
    """Python's, ours and the versions of the packages a result depends on."""
    found = {"python": platform.python_version(), "bayesian_lora": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of the working tree this package is run from, None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    # Before the first commit git prints "HEAD" and fails.
    return done.stdout.strip() if done.returncode == 0 else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
