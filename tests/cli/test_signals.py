"""The command as a real process: interrupted, terminated, killed, started twice; it goes on.

The runs end as an undisturbed one does, to the last bit.
"""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from bayesian_lora.data.synthetic import generate
from bayesian_lora.models.sources import MINILM_PACKAGE
from bayesian_lora.utils.checkpoint import read_checkpoint
from bayesian_lora.utils.lock import LOCK
from tests.experiment.kill_harness import ONE_THREAD, last_logged
from tests.experiment.same_runs import BASE, assert_same_run, read

MAIN = [sys.executable, "-c", "from bayesian_lora.cli.main import main; main()"]
PATIENCE_S = 120.0
Write = Callable[[], tuple[Path, Path]]
SETTINGS: dict[str, Any] = BASE | {
    "device": "cpu",
    "sampler": BASE["sampler"] | {"thin": 5, "num_samples": 16},
    "output": {"checkpoint_seconds": 3600},
}
"""10 steps of the warm start, 4 of burn-in, 40 of sampling; a checkpoint where a phase begins."""


def environment() -> dict[str, str]:
    """One thread, and the console entry beside this Python."""
    scripts = str(Path(sys.executable).parent)
    return os.environ | ONE_THREAD | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command to its end."""
    command = [*MAIN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


@contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command under way; it is dead after the block."""
    process = subprocess.Popen(
        [*MAIN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # As at a terminal: what a shell runs in its background is started to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Until a process has come so far; it must not end before."""
    until = time.monotonic() + PATIENCE_S
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


def as_printed(text: str) -> subprocess.CompletedProcess[str]:
    """The one command that a text says to go on with, run by a shell."""
    (line,) = [line for line in text.splitlines() if "go on with: " in line]
    command = line.split("go on with: ")[1]
    return subprocess.run(command, shell=True, capture_output=True, text=True, env=environment())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def write(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write a config; it and the folder it names, which has a blank in its name."""

    def written() -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp("a run")
        model = SETTINGS["model"] | {"name": str(tiny_models["bert"])}
        output = SETTINGS["output"] | {"dir": str(root / "out")}
        path = root / "small.yaml"
        path.write_text(yaml.safe_dump(SETTINGS | {"model": model, "output": output}))
        return path, root / "out"

    return written


@pytest.fixture(scope="module")
def whole(write: Write) -> Path:
    """The undisturbed run."""
    config, folder = write()
    done = run("train", config, "train.lr=4e-3")
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "phase"),
    [(signal.SIGTERM, 143, "sampling"), (signal.SIGINT, 130, "map")],
)
def test_a_signal_leaves_a_run_that_goes_on_as_printed(
    write: Write, whole: Path, number: int, status: int, phase: str
) -> None:
    config, folder = write()
    with started("train", config, "train.lr=4e-3") as process:
        wait_for(process, lambda: last_logged(folder) == phase)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status
    assert "Traceback" not in err
    assert err.splitlines()[0].startswith("Stopped; go on with: ")
    assert read(folder / "run.json")["status"] == "stopped"
    assert not (folder / LOCK).exists()
    state = read_checkpoint(folder / "checkpoint")[0]["state"]
    taken = state["warm"]["step"] if phase == "map" else state["chains"]["step"]
    lines = (folder / "log.jsonl").read_text().splitlines()
    fitted = [json.loads(line)["phase"] == "map" for line in lines]
    assert taken == fitted.count(phase == "map"), "the checkpoint lacks no step"
    done = as_printed(err)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_one_writer_and_a_stale_lock(write: Write, whole: Path) -> None:
    config, folder = write()
    arguments = ("train", config, "train.lr=4e-3")
    with started(*arguments) as process:
        wait_for(process, lambda: last_logged(folder) == "burn_in")
        process.send_signal(signal.SIGSTOP)
        before = snapshot(folder)
        refused = run(*arguments)
        assert snapshot(folder) == before
        process.send_signal(signal.SIGCONT)
        wait_for(process, lambda: last_logged(folder) == "sampling")
        process.kill()
        process.wait()
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"(pid {process.pid} on {socket.gethostname()})" in refused.stderr
    assert f"pid {process.pid} " in (folder / LOCK).read_text(), "the lock of a dead process"
    before = snapshot(folder)
    refused = run(*arguments, "--no-resume")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "already holds a run (status: running)" in refused.stderr
    assert snapshot(folder) == before
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_run(folder, whole)


VARY = "sampler.name=sgld,psgld"


@pytest.fixture(scope="module")
def whole_comparison(write: Write) -> Path:
    config, folder = write()
    assert run("compare", config, VARY).returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [True, False], ids=["in a run", "before a run"])
def test_a_comparison_that_is_terminated_goes_on(
    write: Write, whole_comparison: Path, sampling: bool
) -> None:
    config, folder = write()
    second = folder / "sampler.name=psgld"

    def reached() -> bool:
        if sampling:
            return last_logged(second) == "sampling"
        record = folder / "comparison.json"
        return record.is_file() and read(record)["cells"][1]["status"] == "running"

    with started("compare", config, VARY) as process:
        wait_for(process, reached)
        process.terminate()
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert "1 of 2 cells are done" in out
    cells = read(folder / "comparison.json")["cells"]
    assert [cell["status"] for cell in cells] == ["finished", "interrupted"]
    done = as_printed(out + err)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("already done") == 1
    assert ("Going on with the run" in done.stdout) == sampling
    for cell in cells:
        assert_same_run(folder / cell["folder"], whole_comparison / cell["folder"])


@pytest.mark.slow
def test_kills_of_a_run_with_the_packaged_encoder(tmp_path: Path) -> None:
    """48 examples of training; killed in every phase."""
    pytest.importorskip(MINILM_PACKAGE, reason=f"{MINILM_PACKAGE} (extra: offline) not installed")
    sampler = {"burn_in": 4, "thin": 4, "num_samples": 4, "chains": 2, "step_size": 1.0e-5}
    settings = BASE | {"model": {"name": "minilm"}, "sampler": sampler, "device": "cpu"}
    data: dict[str, Any] = {"name": "small", "batch_size": 8, "max_length": 48, "files": {}}
    for split, size in (("train", 48), ("validation", 20)):
        made = generate(split, size=size)
        rows = zip(made.texts[0], made.labels.tolist(), strict=True)
        data["files"][split] = str(tmp_path / f"{split}.csv")
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *rows])
    data |= {"text_columns": ["text"], "label_names": ["0", "1"]}
    config = tmp_path / "minilm.yaml"
    config.write_text(yaml.safe_dump(settings | {"data": data}))
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    done = run("train", config, f"output.dir={whole}")
    assert (done.returncode, done.stderr) == (0, "")
    arguments = ("train", config, f"output.dir={folder}")
    for phase in ("map", "burn_in", "sampling"):
        with started(*arguments) as process:
            wait_for(process, lambda phase=phase: last_logged(folder) == phase)
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL
        assert read(folder / "run.json")["status"] == "running"
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_run(folder, whole)
