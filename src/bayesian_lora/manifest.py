"""`ensemble.json`: what members belong to, how they came about, and which they are."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayesian_lora.errors import InputError
from bayesian_lora.kept_fits import KINDS, FitKind
from bayesian_lora.member_files import MemberRecord, parse_record
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.utils.files import read_json, write_json

MANIFEST = "ensemble.json"
FORMAT = 1
_NUMBER = (int, float)
_KINDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "model": {"name": str, "fingerprint": str, "dtype": str, "num_labels": int, "max_length": int},
    "task": {"name": str, "likelihood": str},
    "lora": {
        "rank": int,
        "alpha": _NUMBER,
        "dropout": _NUMBER,
        "target_modules": list,
        "head_modules": list,
    },
    "sampler": {"name": str, "temperature": _NUMBER, "tempering": str, "starts": str},
}
"""What evaluation reads of a manifest's head, by section."""


@dataclass(frozen=True)
class Provenance:
    """What the members belong to and how they came about; the head of `ensemble.json`.

    model: name, base (public id), fingerprint of the frozen weights, num_labels, max_length,
    dtype; task: name, label_names, likelihood; sampler: name, step_size, temperature, t_eff,
    exactness, chains, starts, num_examples, prior.
    """

    model: dict[str, Any]
    task: dict[str, Any]
    lora: dict[str, Any]
    sampler: dict[str, Any]

    @property
    def spec(self) -> LoraSpec:
        values = dict(self.lora)
        for name in ("target_modules", "head_modules"):
            values[name] = tuple(values[name])
        return LoraSpec(**values)


@dataclass(frozen=True)
class Alternatives:
    """Which epoch's fits the warm starts are, and those of the other epoch.

    starts_are: ``last`` or ``early_stopped``, None where it is not known; records: of the other
    kind, under its name; reason: why there are none.
    """

    starts_are: FitKind | None = None
    records: dict[str, list[MemberRecord]] = field(default_factory=dict)
    reason: str | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON; `parse_alternatives` undoes it."""
        rows = {k: [dataclasses.asdict(r) for r in given] for k, given in self.records.items()}
        return {
            "starts_are": self.starts_are,
            "alternatives": rows,
            "alternatives_reason": self.reason,
        }


def parse_alternatives(value: dict[str, Any]) -> Alternatives:
    """From `Alternatives.facts`; of a manifest without them, nothing is known.

    Raises:
        TypeError: a value of the wrong kind (named).
    """
    kind, rows = value.get("starts_are"), value.get("alternatives", {})
    reason = value.get("alternatives_reason")
    if kind is not None and kind not in KINDS:
        raise TypeError(f"starts_are is {kind!r}")
    if not isinstance(rows, dict) or any(name not in KINDS or name == kind for name in rows):
        raise TypeError(f"alternatives is {rows!r}")
    if rows and kind is None:
        raise TypeError("starts_are is missing beside alternatives")
    if reason is not None and not isinstance(reason, str):
        raise TypeError(f"alternatives_reason is {reason!r}")
    return Alternatives(kind, {k: [parse_record(r) for r in rows[k]] for k in rows}, reason)


def write_manifest(
    root: Path,
    provenance: Provenance,
    records: Sequence[MemberRecord],
    starts: Sequence[MemberRecord] = (),
    alternatives: Alternatives | None = None,
) -> None:
    """`ensemble.json`: provenance, the member list, and the warm starts the members came from."""
    head = dataclasses.asdict(provenance)
    lists = {"members": records, "starts": starts}
    rows = {name: [dataclasses.asdict(r) for r in given] for name, given in lists.items()}
    others = {} if alternatives is None else alternatives.facts()
    write_json(root / MANIFEST, {"format": FORMAT, **head, **rows, **others})


def read_manifest(root: Path) -> tuple[Provenance, list[MemberRecord], list[MemberRecord]]:
    """Undo `write_manifest`: provenance, members, warm starts.

    Raises:
        InputError: not there, damaged, or of a later format.
    """
    provenance, records, starts, _ = read_whole_manifest(root)
    return provenance, records, starts


def read_whole_manifest(
    root: Path,
) -> tuple[Provenance, list[MemberRecord], list[MemberRecord], Alternatives]:
    """As `read_manifest`, and the alternatives to the warm starts.

    Raises:
        InputError: as `read_manifest`.
    """
    path = root / MANIFEST
    value = read_json(path, "ensemble")
    if value.get("format") != FORMAT:
        raise InputError(f"{path}: format {value.get('format')!r}, this version reads {FORMAT}")
    try:
        for section, kinds in _KINDS.items():
            for name, kind in kinds.items():
                if not isinstance(value[section][name], kind):
                    raise TypeError(f"{section}.{name} is {value[section][name]!r}")
        names = [field.name for field in dataclasses.fields(Provenance)]
        provenance = Provenance(**{name: value[name] for name in names})
        records, starts = ([parse_record(row) for row in value[k]] for k in ("members", "starts"))
        alternatives = parse_alternatives(value)
        _check_spec(provenance.spec)
    except KeyError as error:
        raise InputError(f"{path}: damaged, {error} is missing; restore the file") from error
    except TypeError as error:
        raise InputError(f"{path}: damaged, {error}; restore the file") from error
    return provenance, records, starts, alternatives


def _check_spec(spec: LoraSpec) -> None:
    """Raises TypeError for an adapter that there cannot be."""
    right = {
        "rank": type(spec.rank) is int and 1 <= spec.rank < 2**31,
        "alpha": 0 < spec.alpha <= sys.float_info.max,
        "dropout": 0 <= spec.dropout < 1,
        "target_modules": all(isinstance(name, str) for name in spec.target_modules),
        "head_modules": all(isinstance(name, str) for name in spec.head_modules),
        "rslora": isinstance(spec.rslora, bool),
        "base": isinstance(spec.base, str),
    }
    if wrong := [name for name, good in right.items() if not good]:
        raise TypeError(f"lora.{wrong[0]} is {getattr(spec, wrong[0])!r}")
