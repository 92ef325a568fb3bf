"""A study of LoRA ensembling: steps that build on one another, and one report of them.

Every step has a folder with its files and `step.json`: its settings, what it was made from, its
figures. A finished step is not made again unless its settings, or a step it needs, have changed;
what stood there before is kept beside it.
"""

import hashlib
import json
import math
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayesian_lora.errors import InputError
from bayesian_lora.experiment.cells import differences
from bayesian_lora.experiment.study_config import Study, load_study
from bayesian_lora.experiment.study_steps import Context, Step, plan_steps
from bayesian_lora.progress import Progress
from bayesian_lora.report import observations, page
from bayesian_lora.run_folder import git_commit, versions
from bayesian_lora.utils.files import read_json, write_json
from bayesian_lora.utils.lock import locked

RECORD, STEP, REPORT = "study.json", "step.json", "observations.html"
FORMAT = 1
"""Of the figures in `step.json`: with another one, steps that are quick to make are made again."""
Entry = dict[str, Any]


def run_study(
    path: str | Path,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    *,
    report_only: bool = False,
) -> Path:
    """Make every step that is not done, write the report, return the study's folder.

    A step that fails with `InputError` is recorded with its error (`failed_steps`); those that
    need it wait, the others go on.

    Args:
        path, overrides: see `load_study`.
        progress: where lines go.
        report_only: make no step, write the report of what is done and nothing else.

    Raises:
        InputError: wrong input, or a folder that holds something else or, for a report alone, no
            study of these settings (nothing is written).
    """
    progress = progress or Progress()
    study = load_study(path, overrides)
    steps = plan_steps(study)
    command = shlex.join(["bayesian-lora", "study", str(path), *overrides])
    runner = Runner(study, steps, progress, command)
    _check_folder(study.root, report_only)
    with locked(study.root), _resumable(runner, report_only):
        runner.open(report_only)
        if not report_only:
            progress.say(f"{len(steps)} steps, in {study.root}")
            for number, step in enumerate(steps, start=1):
                runner.run(step, f"[{number}/{len(steps)}] {step.title}")
        page.write(study.root / REPORT, observations.observations(runner.record()))
    for line in runner.closing_lines():
        progress.say(line)
    return study.root


def failed_steps(root: Path) -> list[str]:
    """Names of the steps of a study's folder that failed or wait for one that did."""
    steps = read_json(root / RECORD, "study")["steps"]
    return [name for name, entry in steps.items() if entry["status"] in ("failed", "waiting")]


def _check_folder(root: Path, report_only: bool) -> None:
    """Whether the study can have this folder, before anything is made there.

    Raises:
        InputError: a file in its place, or no study of which a report could be.
    """
    said = f"output.dir={str(root)!r}"
    if report_only and not (root / RECORD).is_file():
        raise InputError(f"{said}: no study there to report on; make it, without --report-only")
    nearest = next(place for place in (root, *root.parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"{said}: {nearest} is a file; name another folder")


@contextmanager
def _resumable(runner: "Runner", report_only: bool) -> Iterator[None]:
    """An interrupt leaves everything as it is and says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError):
        if not report_only:
            done = [name for name, e in runner.entries.items() if e["status"] == "finished"]
            runner.progress.say(
                f"\n{len(done)} of {len(runner.entries)} steps are done and stay in "
                f"{runner.study.root}; go on with: {runner.command}"
            )
        raise


class Runner:
    """A study's folder, step by step.

    Statuses: ``pending``, ``running``, ``finished``, ``failed`` (its error is kept), ``waiting``
    for a step that failed.
    """

    def __init__(
        self, study: Study, steps: Sequence[Step], progress: Progress, command: str
    ) -> None:
        self.study, self.steps, self.progress, self.command = study, steps, progress, command
        self.context = Context(study, progress)
        self.began = time.monotonic()
        self.made: Entry = {"command": command, "versions": versions(), "git_commit": git_commit()}
        self.entries: dict[str, Entry] = {}
        for step in steps:
            needs = {name: self.entries[name]["digest"] for name in step.needs}
            self.entries[step.name] = {
                "title": step.title,
                "status": "pending",
                "settings": step.settings,
                "needs": needs,
                "digest": _digest(step, needs),
                "figures": None,
                "seconds": None,
                "error": None,
            }

    def open(self, report_only: bool = False) -> None:
        """Take over the folder: a new one or a study's; find out which steps are done.

        Raises:
            InputError: it holds something else; of a report alone, a step of other settings.
        """
        root = self.study.root
        foreign = [p for p in root.iterdir() if p.name != "run.lock"] if root.is_dir() else []
        if foreign and not (root / RECORD).is_file():
            raise InputError(
                f"output.dir={str(root)!r} holds {foreign[0].name} and no study; name another "
                "folder with output.dir=…"
            )
        for name, entry in self.entries.items():
            stored = self._stored(name)
            if stored and stored["digest"] == entry["digest"]:
                entry |= {key: stored[key] for key in ("status", "figures", "seconds", "error")}
                if entry["status"] == "finished":
                    self.context.figures[name] = entry["figures"]
            elif stored and stored["status"] == "finished" and report_only:
                raise InputError(
                    f"{name} was made with other settings ({self._changes(name, stored)}); give "
                    "those, or make it anew, without --report-only"
                )
        if report_only:
            made = read_json(root / RECORD, "study")
            self.made = {key: made[key] for key in ("command", "versions", "git_commit")}
        else:
            self._write()

    def run(self, step: Step, title: str) -> None:
        """Make a step unless it is done; record how it ended."""
        entry = self.entries[step.name]
        if entry["status"] == "finished":
            self.progress.say(f"{title}: already done")
            return
        absent = [name for name in step.needs if self.entries[name]["status"] != "finished"]
        if absent:
            entry |= {"status": "waiting", "error": f"it needs {', '.join(absent)}"}
            self._write()
            self.progress.say(f"{title}: waits, it needs {', '.join(absent)}")
            return
        self.progress.say(f"\n{title}")
        folder = self._make_room(step)
        began, before = time.monotonic(), entry["seconds"] or 0.0
        entry |= {"status": "running", "error": None}
        self._write_step(step.name)
        try:
            figures = _plain(step.make(self.context, folder))
        except InputError as error:
            entry |= {"status": "failed", "error": str(error)}
            self.progress.say(f"{title} failed: {error}")
        else:
            entry |= {"status": "finished", "figures": figures}
            self.context.figures[step.name] = figures
            spent, so_far = (_clock(time.monotonic() - t) for t in (began, self.began))
            self.progress.say(f"{title}: done in {spent} ({so_far} since the start)")
        finally:
            self.progress.end()
            entry["seconds"] = round(time.monotonic() - began + before, 2)
            self._write_step(step.name)

    def record(self) -> Entry:
        """What the report is made of."""
        return {**self.made, "config": self.study.keys, "steps": self.entries}

    def closing_lines(self) -> list[str]:
        """What failed, and where the report is."""
        states = self.entries.items()
        failed = [f"{name} {e['status']}: {e['error']}" for name, e in states if e["error"]]
        seconds = sum(e["seconds"] or 0.0 for e in self.entries.values())
        report = self.study.root / REPORT
        return ["", *failed, f"All steps together took {_clock(seconds)}", f"Report: {report}"]

    def _make_room(self, step: Step) -> Path:
        """The step's folder, empty or with what the step can go on from."""
        folder = self.context.folder(step.name)
        stored = self._stored(step.name)
        if stored and stored["digest"] != self.entries[step.name]["digest"]:
            aside = next(
                place
                for i in range(1, 10**6)
                if not (place := folder.with_name(f"{folder.name}.{i}")).exists()
            )
            folder.rename(aside)
            words = self._changes(step.name, stored)
            self.progress.say(f"  changed since it was made ({words}); the former is in {aside}")
        elif stored and not step.resumes:
            shutil.rmtree(folder)  # what a step that did not end has left
        elif folder.is_dir() and not stored and any(folder.iterdir()):
            raise InputError(f"{folder}: holds no step of a study; move it away, or restore it")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _changes(self, name: str, stored: Entry) -> str:
        """What is another now than when the step in the folder was made."""
        entry = self.entries[name]
        why = differences(_flat(stored["settings"]), _flat(entry["settings"]))
        needs = entry["needs"]
        why += [f"{n} is another" for n in needs if stored["needs"].get(n) != needs[n]]
        return "; ".join(why[:3]) or "it was made by another version"

    def _stored(self, name: str) -> Entry | None:
        """The step's record in its folder, None where there is none."""
        path = self.context.folder(name) / STEP
        if not path.is_file():
            return None
        stored = read_json(path, "step")
        if not {"digest", "status", "settings", "needs", "figures", "error"} <= stored.keys():
            raise InputError(f"{path}: damaged, it is no step's record; restore it")
        return stored

    def _write_step(self, name: str) -> None:
        write_json(self.context.folder(name) / STEP, self.entries[name])
        self._write()

    def _write(self) -> None:
        states = {
            name: {key: e[key] for key in ("title", "status", "seconds", "error")}
            for name, e in self.entries.items()
        }
        record = {**self.record(), "steps": states}
        write_json(self.study.root / RECORD, _plain(record))


def _digest(step: Step, needs: Mapping[str, str]) -> str:
    form = None if step.resumes else FORMAT
    text = json.dumps([form, step.settings, needs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """As JSON has it: numbers that are not finite are null, arrays lists, keys texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's and torch's
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix[:-1]: value}
    parts = [_flat(item, f"{prefix}{key}.") for key, item in value.items()]
    return {key: item for part in parts for key, item in part.items()}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min"
