"""What a folder holds of a run, whether it may go on, and how one is stopped in good order."""

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

from bayesian_lora.config import MAP, Config, load_run_config
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.cells import differences, identity, settings_of
from bayesian_lora.experiment.setup import Setup, run_facts
from bayesian_lora.manifest import parse_alternatives
from bayesian_lora.member_files import PackReader, parse_record, read_verified
from bayesian_lora.run_folder import BEGINNING, RunFolder, versions
from bayesian_lora.utils.checkpoint import Damaged, read_checkpoint
from bayesian_lora.utils.files import read_json

FORMAT = 4
ELSEWHERE = "keep both with output.dir=<new folder>, or replace it with output.overwrite=true"


def find_earlier(config: Config, resume: bool = True) -> bool:
    """Whether the output folder holds a run of this config that can go on.

    A finished run goes on if only `sampler.num_samples` has been raised, or its figures are not
    whole. `resume=False` refuses any run. `output`, `data.dir` and
    `train.starts_from` may differ: they say where things lie.

    Raises:
        InputError: it holds something else, or a run that differs (the differences are listed).
    """
    assert config.output.dir is not None
    root = Path(config.output.dir)
    if config.output.overwrite or not resume or not (root / "run.json").is_file():
        RunFolder(root).check_free(config.output.overwrite)
        return False
    status = read_json(root / "run.json", "run").get("status", "unknown")
    if status == BEGINNING:  # and the process died over it
        return False
    theirs = load_own_config(root)
    old, new = settings_of(theirs), settings_of(config)
    longer = new["sampler.num_samples"] > old["sampler.num_samples"]
    if longer:
        _check_extension(root, config)
        old["sampler.num_samples"] = new["sampler.num_samples"]
    for key in ("data.dir", "sampler.on_nonfinite"):  # of which nothing so far depends
        old[key] = new[key]
    if found := differences(old, new):
        raise InputError(
            f"output.dir={str(root)!r} holds a run ({status}) of another config "
            f"({'; '.join(found)}): {ELSEWHERE}"
        )
    drawn = config.sampler.name != MAP
    longer_words = "extend it with a larger sampler.num_samples, " if drawn else ""
    if status == "finished" and not longer and _has_figures(root):
        raise InputError(
            f"output.dir={str(root)!r} already holds this run (status: finished): evaluate it with "
            f"'bayesian-lora eval {root}', {longer_words}or {ELSEWHERE}"
        )
    return True


def _check_extension(root: Path, config: Config) -> None:
    """Raises InputError where a longer run would have had another step size from the start."""
    if config.sampler.step_size == "auto" and config.sampler.variance_reduction:
        raise InputError(
            f"sampler.num_samples={config.sampler.num_samples}: with variance_reduction, "
            "step_size=auto is chosen for the run's length, so a longer run is another one; begin "
            f"it with output.dir=<new folder> train.starts_from={root}"
        )


def load_own_config(root: Path) -> Config:
    """A run's config; `run.json` must be of the same run.

    Raises:
        InputError: as `load_run_config`, or it is not.
    """
    config = load_run_config(root)
    if read_json(root / "run.json", "run").get("settings", own := identity(config)) != own:
        raise InputError(
            f"{root / 'run.json'}: of another run than config.yaml beside it; restore the one that "
            "was changed"
        )
    return config


def _has_figures(root: Path) -> bool:
    try:
        return bool(read_json(root / "metrics.json", "metrics"))
    except InputError:
        return False


def read_state(root: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The newest whole checkpoint of a run, None if it ended before its first; and a warning.

    Raises:
        InputError: there are checkpoints and none is whole, or there are samples and none.
    """
    try:
        tree, trouble = read_checkpoint(root / "checkpoint")
    except FileNotFoundError as error:
        if not any((root / name).exists() for name in ("samples", "members.jsonl")):
            return None, None  # nothing was drawn: the warm start is fitted again, to the same bits
        raise _nothing_to_go_on_from(root, "its checkpoint is gone") from error
    except Damaged as error:
        raise _nothing_to_go_on_from(root, str(error)) from error
    return tree, None if trouble is None else f"{trouble}; going on from the one before it"


def _nothing_to_go_on_from(root: Path, why: str) -> InputError:
    return InputError(
        f"{root}: no whole checkpoint to go on from ({why}); evaluate what it has with "
        f"'bayesian-lora eval {root}', or begin again with output.overwrite=true"
    )


def check_own(root: Path, tree: dict[str, Any], config: Config) -> None:
    """A checkpoint is of this run, and the warm starts that it goes on from are whole.

    Raises:
        InputError: it is not.
    """
    if tree.get("format") != FORMAT:
        raise _nothing_to_go_on_from(root, "its checkpoint is another version's")
    if tree["settings"] != identity(config):
        raise _nothing_to_go_on_from(root, f"{root / 'checkpoint'} is another run's")
    packs = PackReader(root)
    others = parse_alternatives(tree["other_starts"]).records.values()
    for record in chain(map(parse_record, tree["starts"]), *others):
        read_verified(root, record, packs)


def check_same_inputs(root: Path, setup: Setup) -> list[str]:
    """Data and base model are those the run began with; warnings where bits may differ.

    Raises:
        InputError: they are not.
    """
    run = read_json(root / "run.json", "run")
    data = run.get("data")
    pairs = {
        "the data": (
            data.get("fingerprint") if isinstance(data, dict) else None,
            setup.raw.fingerprint(),
        ),
        "the base model's weights": (run.get("model_fingerprint"), setup.fingerprint),
    }
    for what, (old, new) in pairs.items():
        if old != new:
            raise InputError(
                f"output.dir={str(root)!r}: {what} changed since the run began, so it cannot go "
                f"on; {ELSEWHERE}"
            )
    here = run_facts(setup) | {"versions": versions()}
    odd = [name for name in ("device", "threads", "versions") if run.get(name) != here[name]]
    if not odd:
        return []
    told = ", ".join(f"{name} {run.get(name)} there, {here[name]} here" for name in odd)
    return [f"{told}: samples may differ in their last bits from an uninterrupted run's"]


def how_to_go_on(root: Path) -> str | None:
    """The command that goes on with a run that was stopped; None where none has begun."""
    if not all((root / name).is_file() for name in ("run.json", "config.yaml")):
        return None
    return f"go on with: {shlex.join(['bayesian-lora', 'train', str(root / 'config.yaml')])}"


class Stop:
    """SIGINT and SIGTERM wait for the end of a step while `stepping`; a second one does not."""

    def __init__(self) -> None:
        self.stepping = False
        self.requested: int | None = None

    def raise_if_requested(self) -> None:
        """Raises KeyboardInterrupt or SystemExit(143), as the signal would have."""
        if self.requested is not None:
            _raise(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None or not self.stepping:
            _raise(number)
        self.requested = number

    @contextmanager
    def installed(self) -> Iterator["Stop"]:
        """The handlers, for the block; only in the main thread, where Python delivers signals.

        What the process was started to ignore (SIGINT in a shell's background) stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        heard = [
            n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN
        ]
        old = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
