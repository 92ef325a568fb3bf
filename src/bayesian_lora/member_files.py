"""Members on disk: PEFT folders up to 500, packed safetensors above; each with its sha256."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from bayesian_lora.errors import InputError
from bayesian_lora.models.peft_io import CONFIG_FILE, WEIGHTS_FILE, read_member, write_member
from bayesian_lora.models.sources import file_sha256
from bayesian_lora.utils.files import append_json_line, write_atomic

FOLDER_LIMIT = 500
PACK_SIZE = 100


@dataclass(frozen=True)
class MemberRecord:
    """One line of `members.jsonl`.

    path: relative to the run, a PEFT folder or a pack; index: the place in a pack, else None;
    sha256: of the weights file (of a pack: of this member's tensors); noise_std: of the Gaussian
    likelihood, None for classification; config_sha256: of the PEFT config beside the weights.
    """

    path: str
    chain: int
    draw: int
    step: int
    weight: float = 1.0
    sha256: str = ""
    noise_std: float | None = None
    index: int | None = None
    config_sha256: str = ""


def parse_record(row: Any) -> MemberRecord:
    """A record from its JSON object.

    Raises:
        TypeError: a field missing, unknown, or of the wrong kind (named).
    """
    record = MemberRecord(**row)
    noise, index = record.noise_std, record.index
    kinds = {
        "path": isinstance(record.path, str),
        "sha256": isinstance(record.sha256, str),
        "config_sha256": isinstance(record.config_sha256, str),
        **{name: _is_count(getattr(record, name)) for name in ("chain", "draw", "step")},
        "index": index is None or _is_count(index),
        "weight": _is_number(record.weight) and record.weight >= 0,
        "noise_std": noise is None or (_is_number(noise) and noise > 0),
    }
    if wrong := [name for name, right in kinds.items() if not right]:
        raise TypeError(f"a member's {wrong[0]} is {getattr(record, wrong[0])!r}")
    return record


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # also not NaN


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


class MemberWriter:
    """Writes members one by one and keeps their records; `members.jsonl` grows with them.

    Args:
        root: the run's folder.
        config_text: the PEFT config of every member.
        expected: the number of members to come; it decides between folders and packs.
    """

    def __init__(self, root: Path, config_text: str, expected: int) -> None:
        self.root, self.config_text = root, config_text
        self.packed = expected > FOLDER_LIMIT
        self.records: list[MemberRecord] = []
        self.width = 4 if expected <= 9_999 else 6
        self.index_file = root / "members.jsonl"
        self._index_size, self._index_digest = 0, hashlib.sha256()
        self._pack: list[tuple[Mapping[str, Tensor], MemberRecord]] = []

    def __len__(self) -> int:
        """Members so far, those of the unfinished pack too."""
        return len(self.records) + len(self._pack)

    def add(self, member: Mapping[str, Tensor], record: MemberRecord) -> Path:
        """Write one member (packed: when its pack is full or at `flush`); its path.

        Raises:
            InputError: a tensor that is not finite; nothing is written.
        """
        check_record(member, record)
        number = len(self)
        if self.packed:
            self._pack.append((member, record))
            path = self._pack_path(number)
            if len(self._pack) == PACK_SIZE:
                self.flush()
            return path
        path = self.root / "samples" / f"sample_{number + 1:0{self.width}d}"
        self._note(write_folder(self.root, path, member, self.config_text, record))
        return path

    def flush(self) -> None:
        """Write the members of an unfinished pack."""
        if not self._pack:
            return
        path = self._pack_path(len(self.records))
        tensors = {
            f"{i}/{name}": tensor.contiguous()
            for i, (member, _) in enumerate(self._pack)
            for name, tensor in member.items()
        }
        write_atomic(path, save(tensors))
        for i, (member, record) in enumerate(self._pack):
            self._note(_placed(record, self.root, path, tensors_sha256(member), i))
        self._pack = []

    def state_dict(self) -> dict[str, Any]:
        """The index as it stands, and the members of the unfinished pack."""
        pack = [[dict(member), dataclasses.asdict(record)] for member, record in self._pack]
        index = {"size": self._index_size, "sha256": self._index_digest.hexdigest()}
        return {"index": index, "pack": pack}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`: what was written since is forgotten, and will be written again.

        Raises:
            InputError: the index is not what it was.
        """
        size, wanted = state["index"]["size"], state["index"]["sha256"]
        content = self.index_file.read_bytes()[:size] if self.index_file.is_file() else b""
        digest = hashlib.sha256(content)
        if digest.hexdigest() != wanted:
            raise InputError(
                f"{self.index_file}: damaged, its first {size} bytes are not those the run wrote; "
                "restore it, or begin again with output.overwrite=true"
            )
        try:
            self.records = [parse_record(json.loads(line)) for line in content.splitlines()]
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{self.index_file}: damaged, {error}; restore it") from error
        self._index_size, self._index_digest = size, digest
        packs = PackReader(self.root)
        for record in self.records:
            read_verified(self.root, record, packs)
        if self.index_file.is_file():
            os.truncate(self.index_file, size)
        self._pack = [(member, MemberRecord(**record)) for member, record in state["pack"]]

    def _pack_path(self, number: int) -> Path:
        return self.root / "samples" / f"pack_{number // PACK_SIZE + 1:04d}.safetensors"

    def _note(self, record: MemberRecord) -> None:
        self.records.append(record)
        line = append_json_line(self.index_file, dataclasses.asdict(record), sync=True)
        self._index_size += len(line)
        self._index_digest.update(line)


def write_folder(
    root: Path, path: Path, member: Mapping[str, Tensor], config_text: str, record: MemberRecord
) -> MemberRecord:
    """Write one member as a PEFT folder; its record with path and sha256.

    Raises:
        InputError: a tensor that is not finite; nothing is written.
    """
    check_record(member, record)
    weights = write_member(path, member, config_text)
    config_sha256 = hashlib.sha256(config_text.encode()).hexdigest()
    record = dataclasses.replace(record, config_sha256=config_sha256)
    return _placed(record, root, path, hashlib.sha256(weights).hexdigest(), None)


def check_record(member: Mapping[str, Tensor], record: MemberRecord) -> None:
    """Refuse a member, or its noise scale, that is not finite.

    Raises:
        InputError: naming chain, draw and tensor.
    """
    noise = {} if record.noise_std is None else {"noise_std": torch.tensor(record.noise_std)}
    check_finite({**member, **noise}, f"chain {record.chain}, draw {record.draw}")


def _placed(
    record: MemberRecord, root: Path, path: Path, sha256: str, index: int | None
) -> MemberRecord:
    relative = path.relative_to(root).as_posix()
    return dataclasses.replace(record, path=relative, sha256=sha256, index=index)


class PackReader:
    """Reads packs, each once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._packs: dict[str, dict[str, Tensor]] = {}

    def read(self, record: MemberRecord) -> dict[str, Tensor]:
        path = self.root / record.path
        if record.path not in self._packs:
            try:
                self._packs[record.path] = load_file(path)
            except (OSError, safetensors.SafetensorError) as error:
                raise InputError(
                    f"{path}: member file missing or damaged ({error}); restore it"
                ) from error
        prefix = f"{record.index}/"
        pack = self._packs[record.path]
        return {n.removeprefix(prefix): t for n, t in pack.items() if n.startswith(prefix)}


def read_verified(root: Path, record: MemberRecord, packs: PackReader) -> dict[str, Tensor]:
    """A member's tensors, checked: inside the run's folder, sha256 as recorded, finite.

    Raises:
        InputError: naming the member and what is wrong with it.
    """
    path = root / record.path
    files = (path,) if record.index is not None else (path, path / WEIGHTS_FILE)
    try:
        inside = all(file.resolve().is_relative_to(root.resolve()) for file in files)
    except (OSError, ValueError, RuntimeError) as error:  # NUL, half a character, a loop of links
        raise InputError(f"{record.path!r}: no path of a member ({error}); restore it") from error
    if not inside:
        raise InputError(f"{record.path}: a member's path must lie inside {root}; restore it")
    if record.index is not None:
        member = packs.read(record)
        found = tensors_sha256(member)
    else:
        member = read_member(path)
        found = file_sha256(path / WEIGHTS_FILE)
    if found != record.sha256:
        raise InputError(
            f"{path}: damaged member, its sha256 is {found[:12]}…, recorded {record.sha256[:12]}…; "
            "restore the file or remove the member from ensemble.json"
        )
    if record.index is None and record.config_sha256:
        _check_config(path / CONFIG_FILE, record.config_sha256)
    check_finite(member, str(path), "; restore it, or remove it from ensemble.json")
    return member


def _check_config(path: Path, sha256: str) -> None:
    """What PEFT would make of the weights is recorded too."""
    if not path.is_file() or file_sha256(path) != sha256:
        raise InputError(f"{path}: missing, or not the recorded file; restore it")


def check_finite(member: Mapping[str, Tensor], what: str, remedy: str = "") -> None:
    """Refuse NaN and infinity.

    Raises:
        InputError: naming the first tensor that has some.
    """
    for name, tensor in member.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{what}: {name} is not finite; the member is refused{remedy}")


def tensors_sha256(member: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(member):
        digest.update(name.encode())
        digest.update(member[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
