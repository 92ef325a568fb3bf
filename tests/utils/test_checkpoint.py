"""States on disk: equal after reading, two generations, and no damage is ever taken for a state."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesian_lora.utils.checkpoint import (
    NEWEST,
    PREVIOUS,
    Damaged,
    decode,
    encode,
    read_checkpoint,
    write_checkpoint,
)

TREE: dict[str, Any] = {
    "model": {"a": torch.arange(6.0).reshape(2, 3), "empty": torch.zeros(0, 4)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.ones(2)}, 1: {}}},
    "generators": [torch.arange(8, dtype=torch.uint8), torch.tensor([True, False])],
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "exact": 0.1 + 0.2,
    "inf": math.inf,
    "none": None,
    "flag": True,
    "count": 2**60,
    "word": "α → β",
    "list": [1, [2.5, "x"], {}],
}


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TREE)
    found, trouble = read_checkpoint(tmp_path)
    assert trouble is None
    assert_equal(found, TREE)
    assert not list(tmp_path.glob("*.tmp"))


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        encode({"a": {1, 2}})


def test_two_generations_are_kept(tmp_path: Path) -> None:
    for number in range(3):
        write_checkpoint(tmp_path, {"number": number})
    assert decode(tmp_path / NEWEST) == {"number": 2}
    assert decode(tmp_path / PREVIOUS) == {"number": 1}


def test_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none")


@given(st.data())
def test_no_damage_is_taken_for_a_state(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut anywhere, or one bit changed anywhere: refused; the older generation stands in."""
    folder = tmp_path_factory.mktemp("damage")
    write_checkpoint(folder, {"number": 1})
    write_checkpoint(folder, TREE)
    newest = folder / NEWEST
    content = bytearray(newest.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    newest.write_bytes(bytes(content))
    try:
        found, trouble = read_checkpoint(folder)
    except Damaged:
        pytest.fail("the older generation is whole")
    if trouble is None:  # a bit of the header that says nothing, such as its padding
        assert_equal(found, TREE)
    else:
        assert found == {"number": 1}
        assert NEWEST in trouble


def test_both_damaged(tmp_path: Path) -> None:
    for _ in range(2):
        write_checkpoint(tmp_path, TREE)
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(Damaged, match=NEWEST):
        read_checkpoint(tmp_path)


def test_a_crash_between_the_renames_leaves_the_older_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"number": 1})
    (tmp_path / NEWEST).replace(tmp_path / PREVIOUS)
    assert read_checkpoint(tmp_path) == ({"number": 1}, None)
