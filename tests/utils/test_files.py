"""Files that are whole or absent."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.utils.files import (
    append_json_line,
    read_json,
    read_npz,
    write_atomic,
    write_json,
    write_npz,
)


@pytest.mark.parametrize("content", ["θ → ΔW\n", b"\x00\xff", ""])
def test_write_atomic_makes_folders_and_replaces(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, "old and longer than the new one")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_crash_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: int) -> None:
        raise OSError(28, "No space left on device")

    json_path, npz_path = tmp_path / "x.json", tmp_path / "x.npz"
    write_json(json_path, {"old": 1})
    write_npz(npz_path, {"old": np.ones(3)})
    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="No space"):
        write_json(json_path, {"new": 2})
    with pytest.raises(OSError, match="No space"):
        write_npz(npz_path, {"new": np.ones(3)})
    assert read_json(json_path, "test") == {"old": 1}
    assert list(read_npz(npz_path)) == ["old"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, -float("inf")]])
def test_what_is_no_json_is_not_written(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "x.json", {"kept": None})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"x": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_json_line(tmp_path / "x.jsonl", {"x": value})
    assert read_json(tmp_path / "x.json", "test") == {"kept": None}
    assert not (tmp_path / "x.jsonl").exists()


def test_lines_are_appended_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = [{"step": 1, "text": "two\nlines"}, {"step": 2, "loss": [0.1, 0.2]}]
    for row in rows:
        append_json_line(path, row)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found, so there is no run here"),
        (b"", "damaged, it is not readable JSON"),
        (b'{"status": "fini', "damaged, it is not readable JSON"),
        (b"\xff\xfe{}", "damaged, it is not readable JSON"),
        (b"[1, 2]", "a JSON object is expected"),
    ],
)
def test_read_json_names_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_json(path, "run")
    assert str(path) in str(raised.value)


def test_arrays_keep_names_types_and_bits(tmp_path: Path) -> None:
    arrays = {
        "delta_w_norm[bert.encoder.layer.0]": np.array([[1.0, np.nan], [np.inf, 1e-300]]),
        "labels": np.arange(4),
        "logits": np.zeros((2, 0, 3), dtype=np.float32),
    }
    write_npz(tmp_path / "new" / "x.npz", arrays)
    found = read_npz(tmp_path / "new" / "x.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.npz"]


def test_any_damage_to_an_archive_is_one_line(tmp_path: Path) -> None:
    """Cut or flipped anywhere: read back the same, or refused with the file's name."""
    path = tmp_path / "part.npz"
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(2)}
    write_npz(path, arrays)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 13)]
    damaged += [
        whole[:i] + bytes([whole[i] ^ 0x15]) + whole[i + 1 :] for i in range(0, len(whole), 7)
    ]
    refused: list[str] = []
    for content in [*damaged, b"not an archive"]:
        path.write_bytes(content)
        try:
            found = read_npz(path)
        except InputError as error:
            refused.append(str(error))
            continue
        for name in found.keys() & arrays.keys():  # a flip may fall into a name or a date
            np.testing.assert_array_equal(found[name], arrays[name])
    assert len(refused) > len(damaged) / 2
    assert all(str(path) in message for message in refused)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "single.npy", np.ones(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    for name in ("x.npz", "single.npz", "absent.npz"):
        with pytest.raises(InputError, match=name):
            read_npz(tmp_path / name)
