"""Members on disk: folders, packs, checksums, and the records beside them.

Shapes: K members.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bayesian_lora import member_files
from bayesian_lora.errors import InputError
from bayesian_lora.member_files import (
    MemberRecord,
    MemberWriter,
    PackReader,
    check_finite,
    parse_record,
    read_verified,
    tensors_sha256,
    write_folder,
)
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.models.peft_io import WEIGHTS_FILE, adapter_config

LAYER = "bert.encoder.layer.0.attention.self.query"
SPEC = LoraSpec(2, 4.0, 0.0, ("query",), False, ("classifier",), "bert-base-uncased")
CONFIG = adapter_config(SPEC)


def member(k: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(k)
    shapes = {f"{LAYER}.lora_A": (2, 6), f"{LAYER}.lora_B": (6, 2), "classifier.weight": (3, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def record(k: int, noise_std: float | None = None) -> MemberRecord:
    return MemberRecord("", chain=k % 2, draw=k // 2, step=10 * (k // 2 + 1), noise_std=noise_std)


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of 3 for ensembles of more than 4."""
    monkeypatch.setattr(member_files, "FOLDER_LIMIT", 4)
    monkeypatch.setattr(member_files, "PACK_SIZE", 3)


def write(root: Path, size: int, flush: bool = True) -> MemberWriter:
    writer = MemberWriter(root, CONFIG, size)
    for k in range(size):
        writer.add(member(k), record(k))
    if flush:
        writer.flush()
    return writer


def assert_read_back(root: Path, records: list[MemberRecord]) -> None:
    packs = PackReader(root)
    for k, row in enumerate(records):
        found = read_verified(root, row, packs)
        assert found.keys() == member(k).keys()
        for name, tensor in member(k).items():
            assert torch.equal(found[name], tensor)


def test_members_are_folders_with_their_checksums(tmp_path: Path) -> None:
    writer = write(tmp_path, 4)
    names = [f"samples/sample_000{k}" for k in (1, 2, 3, 4)]
    assert [row.path for row in writer.records] == names
    lines = (tmp_path / "members.jsonl").read_text().splitlines()
    assert [parse_record(json.loads(line)) for line in lines] == writer.records
    for row in writer.records:
        assert row.index is None
        weights = (tmp_path / row.path / WEIGHTS_FILE).read_bytes()
        assert row.sha256 == hashlib.sha256(weights).hexdigest()
        assert json.loads((tmp_path / row.path / "adapter_config.json").read_text())["r"] == 2
    assert_read_back(tmp_path, writer.records)


def test_the_number_in_a_name_has_six_digits_beyond_9999(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member_files, "FOLDER_LIMIT", 10**9)
    for expected, name in ((9_999, "sample_0001"), (10_000, "sample_000001")):
        writer = MemberWriter(tmp_path / str(expected), CONFIG, expected)
        assert writer.add(member(0), record(0)).name == name


def test_a_folder_outside_the_index(tmp_path: Path) -> None:
    rows = [
        write_folder(tmp_path, tmp_path / "map" / f"chain_{k}", member(k), CONFIG, record(k))
        for k in range(2)
    ]
    assert [row.path for row in rows] == ["map/chain_0", "map/chain_1"]
    assert not (tmp_path / "members.jsonl").exists()
    assert_read_back(tmp_path, rows)


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("limit", [3, 10**9])
def test_a_writer_goes_on_from_its_state(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written after the state was taken is forgotten and written again."""
    monkeypatch.setattr(member_files, "FOLDER_LIMIT", limit)
    first = MemberWriter(tmp_path, CONFIG, 8)
    for k in range(4):
        first.add(member(k), record(k))
    state = first.state_dict()
    for k in range(4, 8):
        first.add(member(100 + k), record(k))
    first.flush()
    second = MemberWriter(tmp_path, CONFIG, 8)
    second.load_state_dict(state)
    assert len(second) == 4
    for k in range(4, 8):
        second.add(member(k), record(k))
    second.flush()
    whole = write(tmp_path / "whole", 8)
    assert second.records == whole.records
    index = "members.jsonl"
    assert (tmp_path / index).read_bytes() == (tmp_path / "whole" / index).read_bytes()
    assert_read_back(tmp_path, second.records)


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_writer_refuses_another_index_than_its_own(tmp_path: Path, damage: str) -> None:
    state = write(tmp_path, 4).state_dict()
    index = tmp_path / "members.jsonl"
    content = bytearray(index.read_bytes())
    content[content.index(b'"draw": ') + 8] ^= 1
    if damage == "remove":
        index.unlink()
    else:
        index.write_bytes(content if damage == "flip" else content[:-3])
    with pytest.raises(InputError, match=r"members\.jsonl: damaged, its first"):
        MemberWriter(tmp_path, CONFIG, 4).load_state_dict(state)


@pytest.mark.usefixtures("small_packs")
def test_many_members_are_packed(tmp_path: Path) -> None:
    writer = write(tmp_path, 8)
    packs = [f"samples/pack_000{n}.safetensors" for n in (1, 1, 1, 2, 2, 2, 3, 3)]
    assert [row.path for row in writer.records] == packs
    assert [row.index for row in writer.records] == [0, 1, 2, 0, 1, 2, 0, 1]
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"members.jsonl", *packs}
    assert_read_back(tmp_path, writer.records)


@pytest.mark.usefixtures("small_packs")
def test_a_pack_is_written_when_it_is_full(tmp_path: Path) -> None:
    writer = write(tmp_path, 8, flush=False)
    assert len(writer.records) == 6
    assert len((tmp_path / "members.jsonl").read_text().splitlines()) == 6
    writer.flush()
    writer.flush()
    assert len(writer.records) == 8
    assert len((tmp_path / "members.jsonl").read_text().splitlines()) == 8


def test_five_hundred_are_the_limit_of_folders(tmp_path: Path) -> None:
    assert not MemberWriter(tmp_path, CONFIG, 500).packed
    assert MemberWriter(tmp_path, CONFIG, 501).packed


def test_each_pack_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_packs: None
) -> None:
    writer = write(tmp_path, 8)
    read: list[str] = []
    load = member_files.load_file

    def count(path: Path) -> dict[str, Tensor]:
        read.append(path.name)
        return load(path)

    monkeypatch.setattr(member_files, "load_file", count)
    assert_read_back(tmp_path, writer.records)
    assert read == ["pack_0001.safetensors", "pack_0002.safetensors", "pack_0003.safetensors"]


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_written(tmp_path: Path, size: int, bad: float) -> None:
    writer = MemberWriter(tmp_path, CONFIG, size)
    broken = member(0)
    broken["classifier.weight"][1, 2] = bad
    with pytest.raises(InputError, match=r"chain 1, draw 2: classifier\.weight is not finite"):
        writer.add(broken, record(5))
    with pytest.raises(InputError, match="noise_std is not finite"):
        writer.add(member(0), record(0, noise_std=bad))
    writer.flush()
    assert writer.records == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("size", [4, 8])
def test_damage_is_found_and_named(tmp_path: Path, size: int) -> None:
    row = write(tmp_path, size).records[1]
    file = tmp_path / row.path / (WEIGHTS_FILE if row.index is None else "")
    whole = file.read_bytes()
    for content in (whole[:-4] + b"\0\0\0\1", whole[: len(whole) // 2], b""):
        file.write_bytes(content)
        with pytest.raises(InputError, match="damaged") as raised:
            read_all(tmp_path)
        assert str(tmp_path / row.path) in str(raised.value)
    file.unlink()
    with pytest.raises(InputError, match="missing") as raised:
        read_verified(tmp_path, row, PackReader(tmp_path))
    assert str(tmp_path / row.path) in str(raised.value)


def read_all(root: Path) -> None:
    for line in (root / "members.jsonl").read_text().splitlines():
        read_verified(root, parse_record(json.loads(line)), PackReader(root))


@pytest.mark.usefixtures("small_packs")
def test_a_place_that_the_pack_does_not_have(tmp_path: Path) -> None:
    row = write(tmp_path, 8).records[0]
    for index in (1, 7):
        wrong = dataclasses.replace(row, index=index)
        with pytest.raises(InputError, match="damaged member"):
            read_verified(tmp_path, wrong, PackReader(tmp_path))


@pytest.mark.parametrize("path", ["../elsewhere/samples/sample_0001", "{root}/elsewhere/x"])
def test_members_outside_the_run_are_not_read(tmp_path: Path, path: str) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    row = write(elsewhere, 1).records[0]
    outside = MemberRecord(path.format(root=tmp_path), 0, 0, 1, sha256=row.sha256)
    with pytest.raises(InputError, match="must lie inside"):
        read_verified(run, outside, PackReader(run))


def test_a_file_changed_to_other_finite_numbers_is_refused_too(tmp_path: Path) -> None:
    row = write(tmp_path, 1).records[0]
    write(tmp_path / "other", 2)
    other = tmp_path / "other" / "samples" / "sample_0002" / WEIGHTS_FILE
    (tmp_path / row.path / WEIGHTS_FILE).write_bytes(other.read_bytes())
    with pytest.raises(InputError, match="sha256"):
        read_verified(tmp_path, row, PackReader(tmp_path))


def test_a_members_checksum_is_of_names_and_bits() -> None:
    one = member(0)
    turned = dict(reversed(one.items()))
    assert tensors_sha256(one) == tensors_sha256(turned)
    assert tensors_sha256(one) != tensors_sha256(member(1))
    renamed = {name.replace("lora_A", "lora_C"): t for name, t in one.items()}
    assert tensors_sha256(one) != tensors_sha256(renamed)


def test_check_finite_names_the_tensor() -> None:
    check_finite(member(0), "here")
    with pytest.raises(InputError, match="here: x is not finite"):
        check_finite({"w": torch.ones(2), "x": torch.tensor([1.0, math.nan])}, "here")


GOOD = {"path": "samples/sample_0001", "chain": 0, "draw": 0, "step": 5, "sha256": "ab"}


@pytest.mark.parametrize(
    "change",
    [
        {"path": 5},
        {"chain": "0"},
        {"draw": None},
        {"step": 1.5},
        {"weight": -1.0},
        {"weight": math.nan},
        {"weight": "heavy"},
        {"noise_std": 0.0},
        {"noise_std": math.inf},
        {"index": "first"},
        {"sha256": None},
        {"colour": "red"},
    ],
)
def test_records_of_the_wrong_kind_are_refused(change: dict[str, object]) -> None:
    assert parse_record({**GOOD, "weight": 1, "noise_std": 0.3}).noise_std == 0.3
    with pytest.raises(TypeError, match=next(iter(change))):
        parse_record({**GOOD, **change})


@pytest.mark.parametrize("row", [None, [], "x", {}, {"path": "x"}])
def test_what_is_no_record_is_refused(row: object) -> None:
    with pytest.raises(TypeError):
        parse_record(row)
