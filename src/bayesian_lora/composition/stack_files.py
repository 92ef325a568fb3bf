"""`stack.json` and `tasks/<task>/`: a stack on disk, each task loadable on its own.

A task's folder is an ordinary PEFT adapter (the shared factors and that task's head) or, for
K > 1 members, an ensemble of them. `stack.json` comes last: a folder that has it is whole.

Shapes: K members.
"""

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.composition.stack import Part, Stack, StackTask
from bayesian_lora.ensemble import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.manifest import MANIFEST
from bayesian_lora.member_files import check_finite
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.models.peft_io import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    read_member,
    write_member,
)
from bayesian_lora.models.sources import file_sha256
from bayesian_lora.models.task_heads import is_reserved
from bayesian_lora.utils.files import read_json, write_json
from bayesian_lora.utils.lora_params import stack as stack_members

STACK_FILE = "stack.json"
TASKS_FOLDER = "tasks"
FORMAT = 1
BESIDE = ("gate.safetensors",)
"""What others put into a stack's folder before the stack itself."""
_OWN = ("format", "model", "spec", "tasks", "parts", "weights", "facts", "files")


def is_stack(folder: str | Path) -> bool:
    """Whether a folder holds a stack."""
    return (Path(folder) / STACK_FILE).is_file()


def check_writable(folder: str | Path) -> None:
    """Refuse a folder that cannot be made or written into.

    Raises:
        InputError: it or a folder above it is a file, or may not be written to.
    """
    root = Path(os.path.abspath(folder))
    nearest = next(path for path in (root, *root.parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise InputError(f"{nearest} is a file; name another folder with --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{nearest} cannot be written to; name another folder with --out")


def check_free(folder: str | Path, beside: Sequence[str] = BESIDE) -> None:
    """Refuse a folder that cannot be written into, or holds something, but for files `beside`.

    Raises:
        InputError: as `check_writable`, or what it holds already.
    """
    check_writable(folder)
    root = Path(folder)
    held = sorted(p.name for p in root.iterdir() if p.name not in beside) if root.is_dir() else []
    if held:
        raise InputError(
            f"{root}: already holds {held[0]}; name another folder with --out, or remove this one"
        )


def write_stack(folder: str | Path, stack: Stack, extra: Mapping[str, Any] | None = None) -> None:
    """Write a stack into a new folder; `extra` are more sections of `stack.json`.

    Raises:
        InputError: the folder holds something already, or a tensor is not finite; nothing is
            written.
    """
    root, extra = Path(folder), dict(extra or {})
    assert not extra.keys() & {*_OWN}, "a section of stack.json that write_stack writes"
    check_free(root)
    for task in stack.tasks:
        for k, member in enumerate(stack.ensemble(task)):
            check_finite(member, f"stack, task {task}, member {k}", "; nothing is written")
    stack = _of_known_base(stack)
    tasks = root / TASKS_FOLDER
    try:
        for task in stack.tasks:
            _write_task(tasks / task, stack, task)
        files = {
            path.relative_to(root).as_posix(): file_sha256(path)
            for path in sorted(tasks.rglob("*"))
            if path.is_file()
        }
        write_json(root / STACK_FILE, {**_facts(stack), "files": files, **extra})
    except BaseException:  # the folder was free: what lies in it is this call's
        shutil.rmtree(tasks, ignore_errors=True)
        raise


def _of_known_base(stack: Stack) -> Stack:
    """With the base's fingerprint where ensembles are written: they belong to known weights."""
    if len(stack) == 1 or stack.model["fingerprint"] is not None:
        return stack
    from bayesian_lora.composition.stack_model import build_stack_model

    found = build_stack_model(stack).fingerprint()
    return stack.changed(model={**stack.model, "fingerprint": found})


def _write_task(folder: Path, stack: Stack, task: str) -> None:
    ensemble = stack.ensemble(task)
    if len(stack) == 1:
        write_member(folder, ensemble.members[0], adapter_config(stack.spec))
        return
    ensemble.save(folder)


def _facts(stack: Stack) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": dict(stack.model),
        "spec": dataclasses.asdict(stack.spec),
        "tasks": {name: dataclasses.asdict(task) for name, task in stack.tasks.items()},
        "parts": [dataclasses.asdict(part) for part in stack.parts],
        "weights": [float(weight) for weight in stack.weights],
        "facts": dict(stack.facts),
    }


def read_extra(folder: str | Path) -> dict[str, Any]:
    """The sections of `stack.json` that `write_stack` was given as `extra`.

    Raises:
        InputError: no stack there, or its `stack.json` is damaged.
    """
    value = read_json(Path(folder) / STACK_FILE, "stack")
    return {name: section for name, section in value.items() if name not in _OWN}


def read_stack(folder: str | Path) -> Stack:
    """Undo `write_stack`; every file is checked against its sha256. Of a growth, all its columns.

    Raises:
        InputError: no stack there, or a file of it missing, damaged or not finite (named).
    """
    from bayesian_lora.composition.column_files import is_grown, read_columns

    root = Path(folder)
    if is_grown(root):
        return read_columns(root).stack
    path = root / STACK_FILE
    value = read_json(path, "stack")
    if value.get("format") != FORMAT:
        raise InputError(f"{path}: format {value.get('format')!r}, this version reads {FORMAT}")
    try:
        described = _parse(value)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: damaged, {error!r}; restore the file") from error
    _check_files(root, described, value["files"])
    factors: dict[str, Tensor] = {}
    heads = {}
    for task in described.tasks:
        where = root / TASKS_FOLDER / task
        members = _read_task(where, len(described))
        own = {n for n in members if n.endswith((".lora_A", ".lora_B"))}
        heads[task] = {name: members[name] for name in sorted(members) if name not in own}
        shared = {name: members[name] for name in sorted(own)}
        _check_shared(where, shared, factors or shared, described.spec)
        factors = factors or shared
    return described.changed(factors=factors, heads=heads)


def _parse(value: dict[str, Any]) -> Stack:
    """All but the tensors; raises KeyError, TypeError, ValueError … for what cannot be."""
    lora = dict(value["spec"])
    for name in ("target_modules", "head_modules"):
        lora[name] = tuple(_texts(lora[name]))
    spec = LoraSpec(**lora)
    tasks = {name: _task(name, row) for name, row in value["tasks"].items()}
    parts = tuple(_part(row, spec.rank) for row in value["parts"])
    weights = np.array([float(weight) for weight in value["weights"]])
    wrong = {
        "spec.rank": type(spec.rank) is not int or spec.rank < 1,
        "spec.alpha": not 0 < float(spec.alpha) < math.inf,
        "spec.dropout": not 0 <= float(spec.dropout) < 1,
        "spec.rslora": not isinstance(spec.rslora, bool),
        "spec.base": not isinstance(spec.base, str),
        "tasks": not tasks,
        "model": not all(isinstance(value["model"][key], str) for key in ("name", "dtype")),
        "facts": not isinstance(value["facts"], dict),
        "files": not all(isinstance(text, str) for text in value["files"].values()),
        "weights": not (weights.size and (weights >= 0).all() and abs(weights.sum() - 1) < 1e-6),
        "a part's task": not {part.task for part in parts} <= {*tasks, None},
    }
    if named := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"{named[0]} is not what a stack has")
    return Stack(value["model"], spec, tasks, parts, {}, {}, weights, value["facts"])


def _task(name: str, row: Mapping[str, Any]) -> StackTask:
    task = StackTask(**{**row, "label_names": tuple(_texts(row["label_names"]))})
    texts = (name, task.data, task.likelihood)
    right = all(isinstance(text, str) for text in texts) and task.name == name
    if not right or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or is_reserved(name):
        raise ValueError(f"task {name!r}")
    if type(task.max_length) is not int or task.max_length < 1:
        raise ValueError(f"max_length {task.max_length!r}")
    return task


def _part(row: Mapping[str, Any], rank: int) -> Part:
    start, stop = row["columns"]
    part = Part(**{**row, "columns": (start, stop)})
    whole = type(start) is int and type(stop) is int and 0 <= start <= stop <= rank
    if not (whole and isinstance(part.name, str) and isinstance(part.source, str)):
        raise ValueError(f"part {part.name!r} of columns {start} to {stop}")
    if not math.isfinite(part.weight):
        raise ValueError(f"weight {part.weight!r}")
    return part


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{value!r} is no list of names")
    return value


def _check_files(root: Path, stack: Stack, files: Mapping[str, str]) -> None:
    """Every task's files are listed, and what is listed is there, in place, and as recorded."""
    needed = (CONFIG_FILE, WEIGHTS_FILE) if len(stack) == 1 else (MANIFEST,)
    for name in (f"{TASKS_FOLDER}/{task}/{file}" for task in stack.tasks for file in needed):
        if name not in files:
            raise InputError(f"{root / STACK_FILE}: damaged, it does not list {name}; restore it")
    for name, sha256 in files.items():
        parts = Path(name).parts
        if (
            len(parts) < 3
            or parts[0] != TASKS_FOLDER
            or parts[1] not in stack.tasks
            or ".." in parts
        ):
            raise InputError(
                f"{root / STACK_FILE}: damaged, {name!r} is no file of a task; restore it"
            )
        path = root / name
        if file_sha256(path) != sha256:  # or missing, which it says itself
            raise InputError(f"{path}: damaged, its sha256 is not the recorded one; restore it")


def _read_task(folder: Path, members: int) -> dict[str, Tensor]:
    """A task's tensors (K, …)."""
    if members == 1:
        state = {name: tensor[None] for name, tensor in read_member(folder).items()}
    else:
        ensemble = Ensemble.load(folder)
        if len(ensemble) != members:
            raise InputError(
                f"{folder}: {len(ensemble)} members, stack.json says {members}; restore them"
            )
        state = stack_members(ensemble.members)
    check_finite(state, str(folder), "; restore it")
    return state


def _check_shared(
    folder: Path, factors: Mapping[str, Tensor], first: Mapping[str, Tensor], spec: LoraSpec
) -> None:
    """All tasks have the same factors, of the stack's rank."""
    same = factors.keys() == first.keys() and all(
        torch.equal(factors[name], first[name]) for name in factors
    )
    ranks = {t.shape[1 if name.endswith("A") else 2] for name, t in factors.items()}
    if not same or ranks != {spec.rank}:
        raise InputError(
            f"{folder}: damaged, its factors are not the stack's (rank {spec.rank}, the same for "
            "every task); restore it"
        )
