"""Adapters from anywhere: PEFT folders, runs, saved ensembles, a stack's tasks, plain state dicts.

Shapes: K members, R rank, D widths, C classes.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bayesian_lora.composition.column_files import is_grown
from bayesian_lora.composition.columns import masked
from bayesian_lora.composition.stack_files import STACK_FILE, is_stack, read_stack
from bayesian_lora.composition.state_dicts import check_adapter, head_outputs, read_tensors
from bayesian_lora.data.glue_datasets import TASKS
from bayesian_lora.ensemble import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.manifest import MANIFEST, read_whole_manifest
from bayesian_lora.member_files import MemberRecord, PackReader, read_verified
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.models.peft_io import CONFIG_FILE, WEIGHTS_FILE, read_spec
from bayesian_lora.models.task_heads import is_reserved

BIN_FILE = "adapter_model.bin"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_LEVELS_ABOVE = 3  # a run's manifest above map/chain_0, a stack's above tasks/sst2


@dataclass(frozen=True)
class Source:
    """One adapter, or an ensemble of K members, and what is known of it.

    name: as it will be called, without dots; path: where it was read; spec: None of a plain state
    dict without `adapter_config.json`; members: our names → tensors, float32 or float64; weights
    (K,) summing to 1; model: name, base, fingerprint, dtype, num_labels, max_length; task: name,
    label_names, likelihood; sampler: as `Provenance`'s, None of what was not sampled. These three
    are None where nothing tells. places: each member's chain and draw, empty where nothing tells.
    """

    name: str
    path: str
    spec: LoraSpec | None
    members: tuple[Mapping[str, Tensor], ...]
    weights: np.ndarray
    model: dict[str, Any] | None
    task: dict[str, Any] | None
    sampler: dict[str, Any] | None = None
    places: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        """K."""
        return len(self.members)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Module → (D_in, D_out)."""
        first = self.members[0]
        return {
            name.removesuffix(".lora_A"): (
                first[name].shape[1],
                first[name.removesuffix("A") + "B"].shape[0],
            )
            for name in first
            if name.endswith(".lora_A")
        }

    @property
    def head(self) -> tuple[str, ...]:
        """The names of the head's tensors, none if the adapter has no head."""
        return tuple(n for n in sorted(self.members[0]) if not n.endswith((".lora_A", ".lora_B")))


def read_sources(arguments: Sequence[str]) -> list[Source]:
    """`read_source` of each; a name that comes again is numbered: ``sst2``, ``sst2-2``.

    Raises:
        InputError: as `read_source`.
    """
    found: list[Source] = []
    taken: set[str] = set()
    for argument in arguments:
        source = read_source(argument)
        name, number = source.name, 1
        while name.casefold() in taken:  # names are folders, on systems without case too
            number += 1
            name = f"{source.name}-{number}"
        taken.add(name.casefold())
        found.append(dataclasses.replace(source, name=name))
    return found


def read_source(argument: str) -> Source:
    """An adapter or ensemble: ``PATH`` or ``NAME=PATH``.

    The path is a PEFT folder (of a run, of a stack, or anyone's), the folder of a run or a saved
    ensemble, or a plain state dict in PEFT's naming: ``.safetensors``, or ``.pt``, ``.pth`` and
    ``.bin``, of which only tensors are read. Without a name it is called after its task, or else
    its folder.

    Raises:
        InputError: nothing to be read there, damaged, not LoRA, or not finite (the tensor named).
    """
    name, path = name_and_path(argument)
    source = _read(path)
    if name is not None:
        source = dataclasses.replace(source, name=name)
    if source.task is None:
        source = dataclasses.replace(source, task=_registered(source))
    return source


def name_and_path(argument: str) -> tuple[str | None, Path]:
    name, given, path = argument.partition("=")
    if os.path.exists(argument) or not given or "/" in name or os.sep in name:
        return None, Path(os.path.expanduser(argument))
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or is_reserved(name):
        raise InputError(
            f"{argument}: {name!r} cannot name an adapter; use letters, digits, - and _, and no "
            "word that Python's modules use, as in sst2=PATH"
        )
    return name, Path(os.path.expanduser(path))


def _default_name(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "adapter"
    return f"{name}-adapter" if is_reserved(name) else name


def _registered(source: Source) -> dict[str, Any] | None:
    """The task that an adapter is named after, if its head has that task's outputs."""
    task = TASKS.get(source.name)
    if task is None or head_outputs(source.members[0]) != task.num_labels:
        return None
    labels = list(task.label_names)
    return {"name": task.name, "label_names": labels, "likelihood": task.likelihood}


def _read(path: Path) -> Source:
    if path.name in (WEIGHTS_FILE, BIN_FILE) and (path.parent / CONFIG_FILE).is_file():
        path = path.parent
    if path.is_file():
        return _read_state_dict(path)
    if (path / MANIFEST).is_file():
        return _of_ensemble(path, Ensemble.load(path))
    if is_stack(path):
        tasks = ", ".join(str(path / "tasks" / name) for name in read_stack(path).tasks)
        raise InputError(f"{path}: a stack of several tasks; name one of them: {tasks}")
    if (path / CONFIG_FILE).is_file():
        return _read_inside(path) or _read_foreign(path)
    what = "no adapter there" if path.is_dir() else "not found"
    raise InputError(
        f"{path}: {what}; name a PEFT folder ({CONFIG_FILE}), the folder of a run or ensemble "
        f"({MANIFEST}), or a state dict ({', '.join(SUFFIXES)})"
    )


def _of_ensemble(path: Path, ensemble: Ensemble) -> Source:
    provenance = ensemble.provenance
    spec = provenance.spec
    check_adapter(ensemble.members[0], spec, str(path))  # the others have the same tensors
    return Source(
        name=_default_name(provenance.task["name"]),
        path=str(path),
        spec=spec,
        members=tuple(ensemble),
        weights=ensemble.weights,
        model=dict(provenance.model),
        task=dict(provenance.task),
        sampler=dict(provenance.sampler),
        places=tuple((record.chain, record.draw) for record in ensemble.records),
    )


def _read_inside(folder: Path) -> Source | None:
    """A PEFT folder of a run, an ensemble or a stack, verified; None if it belongs to none."""
    place = folder.resolve()
    for root in place.parents[:_LEVELS_ABOVE]:
        if (root / MANIFEST).is_file():
            provenance, members, starts, others = read_whole_manifest(root)
            fits = [*starts, *(record for rows in others.records.values() for record in rows)]
            for record in (*members, *fits):
                if record.index is None and (root / record.path).resolve() == place:
                    member = read_verified(root, record, PackReader(root))
                    found = _of_ensemble(folder, Ensemble(provenance, [_alone(record)], [member]))
                    # A warm start is a fit: it was not sampled as the run's members were.
                    return dataclasses.replace(found, sampler=None) if record in fits else found
        if (root / STACK_FILE).is_file() and place.parent == root / "tasks":
            stack = read_stack(root)
            if place.name in stack.tasks:
                # A growth's task never knew the columns that came after its own.
                own = masked(stack, place.name) if is_grown(root) else stack
                return _of_ensemble(folder, own.ensemble(place.name))
    return None


def _alone(record: MemberRecord) -> MemberRecord:
    """A member on its own has all the weight, also one that weighs nothing among others."""
    return dataclasses.replace(record, weight=1.0)


def _read_foreign(folder: Path) -> Source:
    spec = read_spec(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file() and (folder / BIN_FILE).is_file():
        file = folder / BIN_FILE
    return _single(folder.resolve().name, folder, spec, file)


def _read_state_dict(path: Path) -> Source:
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: a file of an unknown kind; a state dict ends with {', '.join(SUFFIXES)}"
        )
    beside = (path.parent / CONFIG_FILE).is_file()
    return _single(path.stem, path, read_spec(path.parent) if beside else None, path)


def _single(name: str, path: Path, spec: LoraSpec | None, file: Path) -> Source:
    member = read_tensors(file)
    check_adapter(member, spec, str(file))
    return Source(_default_name(name), str(path), spec, (member,), np.ones(1), None, None)
