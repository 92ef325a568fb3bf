"""Injuries to the files of a run, and what a command makes of them.

A command on an injured run must give what it gives on the whole one, or refuse it in one line that
names a file and a remedy, with every file left as it was.
"""

import copy
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save

from bayesian_lora import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.evaluate import evaluate_run
from bayesian_lora.experiment.train import train
from bayesian_lora.utils.files import write_json

from .same_runs import QUIET, assert_same_run, config_of, read

LONGER = "sampler.num_samples=8"
Kind = Literal["removed", "emptied", "truncated", "flipped", "replaced"]
KINDS: tuple[Kind, ...] = ("removed", "emptied", "truncated", "flipped", "replaced")
REMEDY = re.compile(
    r"restore|overwrite=true|output\.dir=|remove|take .* out|name another|name a run"
)
PLACES = {"config.yaml": 7, "run.json": 6, "ensemble.json": 7, "members.jsonl": 4}
"""Bits flipped, and half as many cuts, in files that have more ways to be wrong than others."""
PLACES_BY_SUFFIX = {".npz": 4, ".safetensors": 2, ".json": 1, ".jsonl": 2, ".csv": 1}
MEMBERS = ("samples/sample", "map/chain", "map/last/chain")
LOGS = ("log.jsonl", "metrics.csv")


@dataclass(frozen=True)
class Fault:
    """One injury.

    file: relative to the run; place: the length kept, the number of the bit, or (replaced) 0 for
    the file under the same name in another run, 1 for another member's of the same run.
    """

    kind: Kind
    file: str
    place: int = 0

    def inflict(self, root: Path, other: Path) -> bool:
        """Injure the run; False if that changes nothing (the replacement is equal)."""
        path = root / self.file
        content = path.read_bytes()
        if self.kind == "removed":
            path.unlink()
            return True
        changed = self._changed(content, root, other)
        path.write_bytes(changed)
        return changed != content

    def _changed(self, content: bytes, root: Path, other: Path) -> bytes:
        if self.kind == "emptied":
            return b""
        if self.kind == "truncated":
            return content[: self.place]
        if self.kind == "flipped":
            bits = bytearray(content)
            bits[self.place // 8] ^= 1 << self.place % 8
            return bytes(bits)
        if self.place == 0:
            return (other / self.file).read_bytes()
        folder = (root / self.file).parent
        sibling = next(p for p in sorted(folder.parent.iterdir()) if p != folder and p.is_dir())
        return (sibling / Path(self.file).name).read_bytes()


def faults_of(root: Path, kind: Kind, seed: int) -> Iterator[Fault]:
    """All files of a run under one kind of injury; places are drawn by seed."""
    rng = np.random.default_rng(seed)
    for name in sorted(snapshot(root)):
        size = (root / name).stat().st_size
        places = PLACES.get(name) or PLACES_BY_SUFFIX[Path(name).suffix]
        if kind == "flipped":
            yield from (Fault(kind, name, int(i)) for i in rng.integers(0, 8 * size, places))
        elif kind == "truncated":
            cuts = rng.integers(1, size, (places + 1) // 2)
            yield from (Fault(kind, name, int(i)) for i in cuts)
        elif kind != "replaced" or not name.endswith("adapter_config.json"):  # equal in all runs
            yield Fault(kind, name)
            if kind == "replaced" and name.startswith(MEMBERS):
                yield Fault(kind, name, place=1)


def snapshot(root: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


@dataclass
class Findings:
    """Outcomes counted, and what should not have happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str, outcome: str, complaints: list[str]) -> None:
        self.outcomes[outcome] += 1
        self.wrong += [f"{what}: {outcome}: {text}" for text in complaints]

    def settle(self) -> None:
        """Show the counts; fail if anything was wrong."""
        print(dict(self.outcomes))
        assert not self.wrong, f"{len(self.wrong)} wrong:\n" + "\n".join(self.wrong)


@dataclass(frozen=True)
class Command:
    """Something done to a run's folder: `act`, and `check` that its result is the expected one."""

    name: str
    act: Callable[[Path], Any]
    check: Callable[[Path, Any], None]


def trial(
    command: Command, folder: Path, names: tuple[str, ...] | None = None
) -> tuple[str, list[str]]:
    """Run a command on an injured folder: its outcome and complaints.

    Outcomes: ``same``, ``refused``, ``different``, ``crashed``. `names`: files of which one must be
    named in a refusal; None takes any of the folder's.
    """
    before = snapshot(folder)
    try:
        result = command.act(folder)
    except InputError as error:
        return "refused", _complaints(str(error), folder, before, names)
    except Exception as error:
        return "crashed", [f"{type(error).__name__}: {error}"[:300]]
    try:
        command.check(folder, result)
    except (AssertionError, InputError, ValueError, OSError) as error:
        return "different", [" ".join(str(error).split())[:300]]
    return "same", []


def _complaints(
    text: str, folder: Path, before: dict[str, bytes], names: tuple[str, ...] | None
) -> list[str]:
    found = []
    if "\n" in text:
        found.append(f"more than one line: {text!r}")
    known = names or tuple(before)
    if not any(name in text or Path(name).parent.as_posix() in text for name in known):
        found.append(f"names no file: {text}")
    if not REMEDY.search(text):
        found.append(f"no remedy: {text}")
    after = snapshot(folder)
    changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    if changed:
        found.append(f"refused, but changed {', '.join(changed)} ({text[:120]})")
    return found


def examine(
    runs: tuple[Path, Path], faults: list[Fault], commands: list[Command], scratch: Path
) -> Findings:
    """Every fault under every command, each on a fresh copy of the first run.

    runs: the one that is injured, and another of the same shape to take files from.
    """
    run, other = runs
    findings = Findings()
    for fault in faults:
        for command in commands:
            folder = scratch / "run"
            shutil.copytree(run, folder)
            if fault.inflict(folder, other):
                # A file of another run is whole: whatever it disagrees with may be named.
                names = None if fault.kind == "replaced" else (fault.file,)
                findings.add(f"{fault} {command.name}", *trial(command, folder, names))
            shutil.rmtree(folder)
    return findings


@dataclass
class Runs:
    """Runs of one config, each as a pair: seed 0, which is injured, and seed 1, to take from."""

    model: Path
    finished: tuple[Path, Path]
    sampling: tuple[Path, Path]
    fitting: tuple[Path, Path]
    longer: Path
    figures: dict[str, Any]

    def load(self) -> Command:
        return Command("load", Ensemble.load, partial(_same_ensemble, self.finished[0]))

    def evaluate(self) -> Command:
        return Command("eval", evaluated, partial(_same_figures, self))

    def extend(self) -> Command:
        return Command("extend", partial(_trained, self, LONGER), partial(_same_run, self.longer))

    def resume(self) -> Command:
        check = partial(_same_run, self.finished[0])
        return Command("resume", partial(_trained, self), check)


def evaluated(folder: Path) -> dict[str, Any]:
    figures = copy.deepcopy(evaluate_run(folder, progress=QUIET))
    del figures["cost"]
    return json.loads(json.dumps(figures))


def _trained(runs: Runs, *arguments: Any) -> None:
    *keys, folder = arguments
    train(config_of(runs.model, folder, *keys), QUIET)


def _same_ensemble(expected: Path, folder: Path, found: Ensemble) -> None:
    wanted = Ensemble.load(expected)
    assert (found.records, found.provenance) == (wanted.records, wanted.provenance)
    same_tensors(expected, folder, found)
    _same_peft_configs(expected / "samples", folder / "samples")


def same_tensors(expected: Path, _: Path, found: Ensemble) -> None:
    """The members of the ensemble in `expected`, bit for bit."""
    wanted = Ensemble.load(expected)
    for ours, theirs in zip(found.members, wanted.members, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _same_figures(runs: Runs, folder: Path, found: dict[str, Any]) -> None:
    assert found == runs.figures
    stored = read(folder / "metrics.json")
    del stored["cost"]
    assert stored == runs.figures
    arrays = [folder / "predictions" / "validation.npz" for folder in (folder, runs.finished[0])]
    with np.load(arrays[0]) as ours, np.load(arrays[1]) as theirs:
        for name in theirs.files:
            np.testing.assert_array_equal(ours[name], theirs[name])
    _same_peft_configs(runs.finished[0], folder)


def _same_run(expected: Path, folder: Path, _: None) -> None:
    """The logs apart, which no run reads: a line of them may be injured."""
    for name in LOGS:
        shutil.copy(expected / name, folder / name)
    assert_same_run(folder, expected)
    _same_peft_configs(expected, folder)


def _same_peft_configs(expected: Path, folder: Path) -> None:
    """PEFT reads them, so a member with another one is another member."""
    for path in expected.rglob("adapter_config.json"):
        name = path.relative_to(expected).as_posix()
        if (folder / name).parent.is_dir():
            assert (folder / name).is_file(), f"{name} is gone"
            assert (folder / name).read_bytes() == path.read_bytes(), f"{name} is another one"


def shrunk(name: str, content: bytes) -> bytes:
    """An array's file whose header gives it two rows, then one: a single bit of the digit."""
    place = content.index(b"'shape': (2, ", content.index(name.encode())) + len("'shape': (2, ")
    assert content[place : place + 1] == b"2"
    return content[:place] + b"0" + content[place + 1 :]


def rewrite(root: Path, change: str) -> None:
    """Change a member and record its new sha256, or change the paths: a manifest that lies."""
    path = root / "samples" / "sample_0003" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "lora_A" in name)
    if change == "nan":
        tensors[name][0, 0] = float("nan")
    elif change == "shape":
        tensors[name] = tensors[name][:1].contiguous()
    else:
        del tensors[name]
    path.write_bytes(save(tensors, {"format": "pt"}))
    manifest = read(root / "ensemble.json")
    manifest["members"][2]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(root / "ensemble.json", manifest)
