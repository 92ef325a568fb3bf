"""A growth on disk: an adapter folder a task with the columns it knows, and `columns.json`.

``tasks/<task>/`` is an ordinary PEFT folder (K = 1) or an ensemble's (K > 1) of the columns up to
the task's own and its head: its predictions are the task's. `columns.json` lists tasks, columns
and sha256, and comes after them; `stack.json`, the last, says that the whole is a stack.

Shapes: K members, R rank, N examples, C classes.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.assessment.evaluation import evaluate
from bayesian_lora.composition.columns import columns_of, is_factor, masked, part_of
from bayesian_lora.composition.stack import Part, Stack, StackTask
from bayesian_lora.ensemble import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.manifest import MANIFEST
from bayesian_lora.member_files import (
    PackReader,
    parse_record,
    read_verified,
    write_folder,
)
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.models.peft_io import adapter_config
from bayesian_lora.models.sources import file_sha256
from bayesian_lora.models.task_heads import is_reserved
from bayesian_lora.predict import Predictions
from bayesian_lora.utils.files import read_json, read_npz, write_json, write_npz
from bayesian_lora.utils.lock import LOCK
from bayesian_lora.utils.lora_params import stack as stacked

COLUMNS = "columns.json"
STACK = "stack.json"
KIND = "sequential growth"
FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Grown:
    """A stack that grew, and what is known of it.

    stack: parts are tasks, each with its columns; report: by task, as `grow` says; settings: what
    every task was fitted with; data: by task, what it was fitted to; logits: by task (K, N, C), on
    its default split right after its training.
    """

    stack: Stack
    report: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    data: dict[str, dict[str, Any]]
    logits: dict[str, np.ndarray]


def is_grown(folder: Path) -> bool:
    """Whether a folder is a growth's."""
    return (folder / COLUMNS).is_file()


def check_names(names: Sequence[str]) -> None:
    """Raises InputError for no tasks, a name given twice, or one no folder can have."""
    if not names:
        raise InputError("no task to grow: name at least one, such as sst2")
    folders = [name.casefold() for name in names]  # on systems without case too
    if twice := [name for name in names if folders.count(name.casefold()) > 1]:
        raise InputError(
            f"task {twice[0]!r} is named twice: each task grows once; to train it again on new "
            f"columns, give it a second name, as in again={twice[0]}"
        )
    for name in names:
        if not _NAME.fullmatch(name):
            raise InputError(f"task name {name!r}: use letters, digits, - and _ only")
        if is_reserved(name):
            raise InputError(
                f"task name {name!r}: Python's modules use that word; give the task another name, "
                f"as in {name}-task={name}"
            )


def check_baselines(
    baselines: Mapping[str, Mapping[str, float]], own: Mapping[str, Sequence[str]]
) -> None:
    """Raises InputError for a baseline of a figure that evaluation has not; own: by task."""
    for task, figures in baselines.items():
        one = Predictions(np.eye(2)[None], np.arange(2), np.ones(1), np.arange(2))
        known = {n: v for n, v in evaluate(own.get(task, ()), False, one).items() if v is not None}
        if odd := [name for name in figures if name not in known]:
            raise InputError(
                f"baseline of {task}: no figure {odd[0]!r}; choose of {', '.join(known)}"
            )


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Mark a folder as a growth's with these settings; one that has a task stays as it is."""
    if not is_grown(folder) or not _listed(folder)["tasks"]:
        write_json(folder / COLUMNS, {"format": FORMAT, "settings": dict(settings), "tasks": []})


def write_columns(folder: Path, grown: Grown) -> None:
    """Add the tasks that the folder lacks; those it has are not written again.

    Raises:
        InputError: a tensor that is not finite.
    """
    begin(folder, grown.settings)
    listed = {row["name"]: row for row in _listed(folder)["tasks"]}
    rows = []
    for name, task in grown.stack.tasks.items():
        own = listed.get(name) or _write_task(folder, grown, task)
        rows.append({**own, "report": grown.report[name]})
    model, lora = grown.stack.model, dataclasses.asdict(grown.stack.spec)
    head = {"format": FORMAT, "model": model, "lora": lora, "members": len(grown.stack)}
    write_json(folder / COLUMNS, {**head, "settings": grown.settings, "tasks": rows})
    names = [row["name"] for row in rows]
    write_json(folder / STACK, {**head, "kind": KIND, "tasks": names, "columns": COLUMNS})


def _write_task(folder: Path, grown: Grown, task: StackTask) -> dict[str, Any]:
    """A task's adapter folder and predictions; what `columns.json` says of them."""
    path = folder / "tasks" / task.name
    if path.exists():  # listed nowhere: of a growth that was stopped while it wrote
        shutil.rmtree(path)
    own = masked(grown.stack, task.name)
    ensemble = own.ensemble(task.name)
    if len(own) == 1:
        text = adapter_config(own.spec)
        member, record = ensemble.members[0], ensemble.records[0]
        files: dict[str, Any] = dataclasses.asdict(write_folder(folder, path, member, text, record))
    else:
        ensemble.save(path)
        files = {"manifest": file_sha256(path / MANIFEST)}
    logits = write_npz(_logits_file(folder, task.name), {"logits": grown.logits[task.name]})
    return {
        **dataclasses.asdict(task),
        "columns": list(part_of(grown.stack, task.name).columns),
        "files": files,
        "logits": logits,
        "examples": grown.data[task.name],
    }


def _logits_file(folder: Path, task: str) -> Path:
    return folder / "predictions" / f"{task}.npz"


def read_columns(folder: Path) -> Grown:
    """Undo `write_columns`; every file is checked against its sha256.

    Raises:
        InputError: no growth there, one without a finished task, or a file damaged (named).
    """
    path, value = folder / COLUMNS, _listed(folder)
    if not value["tasks"]:
        raise InputError(f"{path}: no task has grown yet; run the same sequential command again")
    try:
        rows = {row["name"]: row for row in value["tasks"]}
        check_names(list(rows))
        members = {name: _read_task(folder, row) for name, row in rows.items()}
        return Grown(
            _joined(value, rows, members),
            {name: row["report"] for name, row in rows.items()},
            value["settings"],
            {name: row["examples"] for name, row in rows.items()},
            {n: _read_logits(folder, n, row["logits"]) for n, row in rows.items()},
        )
    except InputError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error!r}); restore the file") from error


def _listed(folder: Path) -> dict[str, Any]:
    value = read_json(folder / COLUMNS, "sequential growth")
    if value.get("format") != FORMAT or not isinstance(value.get("tasks"), list):
        raise InputError(
            f"{folder / COLUMNS}: format {value.get('format')!r}, this version reads {FORMAT}"
        )
    return value


def _read_task(folder: Path, row: Mapping[str, Any]) -> dict[str, Tensor]:
    """A task's factors and head, (K, …)."""
    path = folder / "tasks" / row["name"]
    if "manifest" not in row["files"]:
        record = parse_record(dict(row["files"]))
        return stacked([read_verified(folder, record, PackReader(folder))])
    if file_sha256(path / MANIFEST) != row["files"]["manifest"]:
        raise InputError(f"{path / MANIFEST}: not the recorded file; restore it")
    return Ensemble.load(path).state()


def _read_logits(folder: Path, task: str, sha256: str) -> np.ndarray:
    return read_npz(_logits_file(folder, task), sha256)["logits"]


def _joined(
    value: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
    members: Mapping[str, Mapping[str, Tensor]],
) -> Stack:
    """The whole stack: the last task's factors, and every task's head.

    Raises:
        ValueError: the folders' columns are not those of one growth.
    """
    lora: dict[str, Any] = dict(value["lora"])
    lora |= {name: tuple(lora[name]) for name in ("target_modules", "head_modules")}
    spec = LoraSpec(**lora)
    columns = {name: (int(row["columns"][0]), int(row["columns"][1])) for name, row in rows.items()}
    starts = [0, *(stop for _, stop in columns.values())]
    if [start for start, _ in columns.values()] != starts[:-1] or starts[-1] != spec.rank:
        raise ValueError("columns that do not lie side by side")
    last = members[list(members)[-1]]
    factors = {name: t for name, t in last.items() if is_factor(name)}
    for task, own in members.items():
        for name, tensor in factors.items():
            if not torch.equal(own[name], columns_of(name, tensor, (0, columns[task][1]))):
                raise ValueError(f"task {task!r} has other columns {name} than later tasks")
    size = int(value["members"])
    kinds = {f.name for f in dataclasses.fields(StackTask)}
    tasks = {n: StackTask(**{k: row[k] for k in kinds}) for n, row in rows.items()}
    return Stack(
        value["model"],
        spec,
        {
            name: dataclasses.replace(task, label_names=tuple(task.label_names))
            for name, task in tasks.items()
        },
        tuple(Part(name, KIND, columns[name], task=name) for name in rows),
        factors,
        {n: {k: t for k, t in own.items() if not is_factor(k)} for n, own in members.items()},
        np.full(size, 1 / size),
        {"kind": KIND},
    )


def resumable(
    folder: Path,
    settings: Mapping[str, Any],
    wanted: Sequence[str],
    data: Mapping[str, Mapping[str, Any]] | None = None,
) -> Grown | None:
    """What a folder has of a growth with these settings and tasks; None where it has none.

    data: by task, as `Grown.data`; left out where it is not known yet.

    Raises:
        InputError: the folder holds something else, or a growth that began otherwise (how).
    """
    if not is_grown(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: a file; name a folder with --out")
        if folder.exists() and any(entry.name != LOCK for entry in folder.iterdir()):
            raise InputError(
                f"{folder}: holds files, but no sequential growth; name another folder with --out"
            )
        return None
    value = _listed(folder)
    if not value["tasks"]:
        return None
    names = [row["name"] for row in value["tasks"]]
    shared = min(len(names), len(wanted))
    if names[:shared] != list(wanted[:shared]):
        i = next(i for i in range(shared) if names[i] != wanted[i])
        raise InputError(
            f"{folder}: its task {i + 1} is {names[i]!r}, asked for is {wanted[i]!r}; begin as "
            f"it did ({' '.join(names)}), or name another folder with --out"
        )
    _same(folder, "", value["settings"], settings)
    for row in value["tasks"][:shared]:
        if data is not None:
            _same(folder, f"{row['name']}: ", row["examples"], data[row["name"]])
    return read_columns(folder)


def _same(folder: Path, what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises InputError naming the first difference of two JSON objects."""
    plain = json.loads(json.dumps(dict(new)))
    for key in sorted({*old, *plain}):
        if old.get(key) != plain.get(key):
            a, b = (str(side.get(key)) for side in (old, plain))
            raise InputError(
                f"{folder}: {what}{key} was {a[:60]} when it began, now it is {b[:60]}; give the "
                "same, or name another folder with --out"
            )
