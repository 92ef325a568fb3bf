"""A disk that fills, or cannot be written: one clear error, nothing lost, the same run afterwards.

Two kinds of full: a small tmpfs (where the test may mount one) fills as a whole, RLIMIT_FSIZE ends
any one file. The command runs in forked children, which have everything imported already.
"""

import gc
import os
import resource
import shlex
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from bayesian_lora import Ensemble
from bayesian_lora.cli.main import main
from bayesian_lora.experiment.evaluate import evaluate_run
from bayesian_lora.experiment.resume import read_state
from bayesian_lora.experiment.train import train
from bayesian_lora.utils.checkpoint import read_checkpoint

from .same_runs import BASE, QUIET, assert_same_run, config_of, read
from .test_resume import Killed, kill_after

RARE = "output.checkpoint_seconds=3600"
"""A checkpoint between phases only, so that a small disk fills with something else."""
OFTEN = "output.checkpoint_seconds=0"


@pytest.fixture(scope="module")
def whole(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(config_of(tiny_models["bert"], folder), QUIET)


@pytest.fixture
def arguments(tiny_models: dict[str, Path], tmp_path: Path) -> list[str]:
    """`train` with the base config and its model."""
    config = tmp_path / "base.yaml"
    config.write_text(yaml.safe_dump(BASE))
    return ["train", str(config), f"model.name={tiny_models['bert']}"]


def command(arguments: list[str], limit: int | None = None) -> tuple[int, str]:
    """Status and standard error of the command, in a child; no file may be longer than `limit`."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside idle threads
        child = os.fork()
    if child == 0:
        os.close(reading)
        _child(arguments, limit, writing)
    os.close(writing)
    with os.fdopen(reading) as stream:
        errors = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), errors


def _child(arguments: list[str], limit: int | None, errors: int) -> None:
    status = 70
    os.dup2(errors, 2)
    try:
        sys.stderr = os.fdopen(2, "w", closefd=False)
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", closefd=False)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        gc.collect()
        sys.stderr.flush()
        os._exit(status)


def assert_stopped(status: int, errors: str, folder: Path) -> str | None:
    """One clear error; what is complete is whole. The command that goes on, if a run has begun."""
    assert status == 1, errors
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    lines = errors.splitlines()
    assert lines[-1].startswith("Error: "), errors
    assert sum("Error" in line for line in lines) == 1, errors
    assert not list(folder.rglob("*.tmp"))
    assert not list(folder.rglob("run.lock")) or not (folder / "run.json").exists()
    if (folder / "ensemble.json").is_file() and read(folder / "ensemble.json")["members"]:
        found = Ensemble.load(folder)
        assert len(found) == len(read(folder / "ensemble.json")["members"])
    with suppress(FileNotFoundError):
        _, trouble = read_checkpoint(folder / "checkpoint")
        assert trouble is None
    begun = (folder / "run.json").is_file() and (folder / "config.yaml").is_file()
    assert ("go on with: " in errors) == begun, errors
    if not begun:
        return None
    return errors.partition("go on with: ")[2].splitlines()[0]


def assert_goes_on(told: str | None, arguments: list[str], folder: Path, whole: Path) -> None:
    """With room, what is there can be evaluated, and the very command leads to the same run."""
    if (folder / "traces").is_dir() and read(folder / "ensemble.json")["members"]:
        evaluate_run(folder, progress=QUIET)
    words = shlex.split(told) if told else ["bayesian-lora", *arguments]
    status, errors = command(words[1:])
    assert status == 0, errors
    assert errors == ""
    assert_same_run(folder, whole)


def moment(folder: Path) -> tuple[str, ...]:
    """When a run ended: the files it has, and the lines of its log."""
    log = folder / "log.jsonl"
    lines = len(log.read_bytes().splitlines()) if log.is_file() else 0
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return (*files, str(lines))


Mount = Callable[..., None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """`mount(folder, *options)`, undone at the end; skips where the test may not mount."""
    mounted: list[Path] = []

    def run(folder: Path, *options: str) -> None:
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no mount here: {done.stderr.strip()}")
        mounted.append(folder)

    if sys.platform != "linux" or os.geteuid():
        pytest.skip("only root may mount a small disk")
    yield run
    for folder in dict.fromkeys(reversed(mounted)):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(
    mount: Mount, disk: Path, arguments: list[str], sizes: list[int], whole: Path, key: str
) -> set[tuple[str, ...]]:
    """Runs on disks of so many KiB, each gone on with more room; the moments they ended at."""
    moments = set()
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "tmpfs")
    for size in sizes:
        mount(disk, "-o", f"remount,size={size}k")
        folder = disk / "run"
        given = [*arguments, key, f"output.dir={folder}"]
        status, errors = command(given)
        if status == 0:  # at last there was room for all
            assert_same_run(folder, whole)
            break
        moments.add(moment(folder))
        told = assert_stopped(status, errors, folder)
        mount(disk, "-o", "remount,size=64m")
        assert_goes_on(told, given, folder, whole)
        shutil.rmtree(folder)
    return moments


def test_a_disk_fills(mount: Mount, arguments: list[str], whole: Path, tmp_path: Path) -> None:
    fill(mount, tmp_path / "disk", arguments, [120, 300], whole, RARE)


@pytest.mark.slow
def test_a_disk_fills_at_any_moment(
    mount: Mount, arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    """From too small for the config to just large enough."""
    moments = fill(mount, tmp_path / "a", arguments, [4, 8, 12, *range(20, 400, 20)], whole, RARE)
    moments |= fill(mount, tmp_path / "b", arguments, list(range(100, 340, 40)), whole, OFTEN)
    print(len(moments))
    assert len(moments) >= 10, moments


LIMITS = [500, 1420, 1800, 2000, 2400, 2700, 3000, 3500, 3800, 20_000]


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_no_file_may_grow(arguments: list[str], whole: Path, tmp_path: Path, limit: int) -> None:
    given = [*arguments, OFTEN, f"output.dir={tmp_path / 'run'}"]
    told = assert_stopped(*command(given, limit), tmp_path / "run")
    assert_goes_on(told, given, tmp_path / "run", whole)


@contextmanager
def unwritable(mount: Mount, folder: Path) -> Iterator[None]:
    """Mounted read-only: permissions do not keep root from writing."""
    mount(folder, "--bind", str(folder))
    mount(folder, "-o", "remount,ro,bind")
    try:
        yield
    finally:
        mount(folder, "-o", "remount,rw,bind")


@pytest.mark.slow
@pytest.mark.parametrize("name", [".", "checkpoint", "samples"])
def test_a_folder_becomes_read_only(
    mount: Mount,
    arguments: list[str],
    tiny_models: dict[str, Path],
    whole: Path,
    tmp_path: Path,
    name: str,
) -> None:
    folder = tmp_path / "run"
    given = [*arguments, OFTEN, f"output.dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 17)
        with pytest.raises(Killed):
            train(config_of(tiny_models["bert"], folder), QUIET)
    told = assert_unwritable(mount, folder / name, given, folder)
    assert_goes_on(told, given, folder, whole)


def assert_unwritable(mount: Mount, place: Path, given: list[str], folder: Path) -> str | None:
    """The command on a run of which one folder cannot be written."""
    with unwritable(mount, place):
        status, errors = command(given)
        assert "Read-only file system" in errors
        told = assert_stopped(status, errors, folder)
    assert read_state(folder)[1] is None
    return told


@pytest.mark.slow
@pytest.mark.parametrize("limit", [3100, 50_000])
def test_the_command_itself(arguments: list[str], whole: Path, tmp_path: Path, limit: int) -> None:
    """As a user starts it, in a process of its own."""
    given = [*arguments, OFTEN, f"output.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", "from bayesian_lora.cli.main import main; main()", *given],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    told = assert_stopped(done.returncode, done.stderr, tmp_path / "run")
    assert_goes_on(told, given, tmp_path / "run", whole)
