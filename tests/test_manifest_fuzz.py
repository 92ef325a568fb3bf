"""Whatever stands in a run's files, their readers give a value or one clear line.

Each file is damaged byte by byte and, as a tree of values, place by place: with the checksum it
had, without one, and with that of the damaged tree, behind which the inner checks lie.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from bayesian_lora.config import build_config
from bayesian_lora.errors import InputError
from bayesian_lora.experiment import compare, resume
from bayesian_lora.member_files import MemberWriter
from bayesian_lora.run_folder import read_traces
from bayesian_lora.utils import checkpoint
from bayesian_lora.utils.checkpoint import NEWEST, encode
from bayesian_lora.utils.files import CHECKSUM, write_npz

from .fuzzing import budgets, damaged_bytes, damaged_trees, outcome, search, to_json
from .run_files import FILES, write_members

FULL = 1500
"""Inputs of each of a file's two tests, bytes and trees."""


@pytest.fixture(autouse=True)
def _only_these_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_facts` without a set-up; the run's config is not read, and nothing is made durable,
    ten thousand times over.
    """
    monkeypatch.setattr(resume, "run_facts", lambda setup: {"device": "cpu", "threads": 1})
    monkeypatch.setattr(resume, "load_run_config", lambda root: build_config({}))
    monkeypatch.setattr(compare, "_is_of", lambda folder, config: True)
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.mark.parametrize("name", FILES)
@budgets(FULL)
def test_json_with_damaged_bytes(tmp_path: Path, name: str, examples: int) -> None:
    path, read = FILES[name](tmp_path)
    whole = path.read_bytes()
    plain = {k: v for k, v in json.loads(whole).items() if k != CHECKSUM}
    bare = json.dumps(plain, indent=2).encode()

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        read()

    assert outcome(lambda: attempt(whole)) == outcome(lambda: attempt(bare)) == "value"
    found = search(damaged_bytes(whole) | damaged_bytes(bare), attempt, examples)
    assert found["refused"]


@pytest.mark.parametrize("name", FILES)
@budgets(FULL)
def test_json_with_damaged_values(tmp_path: Path, name: str, examples: int) -> None:
    path, read = FILES[name](tmp_path)
    tree = json.loads(path.read_bytes())

    def attempt(given: tuple[Any, str]) -> None:
        damaged, checksum = given
        path.write_text(with_checksum(damaged, checksum), encoding="utf-8")
        read()

    kinds = st.sampled_from(["own", "none", "recomputed"])
    found = search(st.tuples(damaged_trees(tree), kinds), attempt, examples)
    assert found["value"]
    assert found["refused"]


def with_checksum(tree: Any, kind: str) -> str:
    """JSON text with the checksum that the tree has, none, or its own."""
    if kind == "own" or not isinstance(tree, dict):
        return to_json(tree)
    bare = {key: value for key, value in tree.items() if key != CHECKSUM}
    if kind == "none":
        return to_json(bare)
    try:  # what a reader makes of it: of two equal keys the last
        seen = json.loads(to_json(bare))
        text = json.dumps(seen, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return to_json(bare)
    return to_json({**bare, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()})


@budgets(FULL)
@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_the_list_of_members(tmp_path: Path, kind: str, examples: int) -> None:
    """`members.jsonl`, with the checksum of the checkpoint or that of the damaged list."""
    writer = write_members(tmp_path)
    state, path = writer.state_dict(), writer.index_file
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    lines = damaged_trees(rows).map(lambda x: x if isinstance(x, list) else [x])
    contents = {
        "bytes": damaged_bytes(whole),
        "values": lines.map(lambda x: "\n".join(map(to_json, x)).encode("utf-8", "replace")),
    }

    def attempt(given: tuple[bytes, bool]) -> None:
        content, recomputed = given
        path.write_bytes(content)
        own = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        again = MemberWriter(tmp_path, "", 2)
        again.load_state_dict({**state, "index": own} if recomputed else state)
        assert recomputed or again.records == writer.records

    found = search(st.tuples(contents[kind], st.booleans()), attempt, examples)
    assert found["value"]
    assert found["refused"]


TREE = {
    "stage": "chains",
    "state": {"model": {"a": torch.ones(2, 3)}, "list": [1, 2.5, None, True], 3: torch.zeros(0)},
    "count": torch.tensor(3, dtype=torch.int64),
}


@budgets(FULL)
def test_a_checkpoint_with_damaged_bytes(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "checkpoint" / NEWEST
    path.parent.mkdir()

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        resume.read_state(tmp_path)

    assert search(damaged_bytes(encode(TREE)), attempt, examples)["refused"]


@budgets(FULL)
def test_a_checkpoint_with_damaged_values(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "checkpoint" / NEWEST
    path.parent.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    folded = checkpoint._fold(TREE, tensors)
    seal = checkpoint._digest(json.dumps(folded), tensors)

    def attempt(given: tuple[Any, bool]) -> None:
        tree, recomputed = given
        text = to_json(tree)
        digest = checkpoint._digest(text, tensors) if recomputed else seal
        path.write_bytes(save(tensors, {"tree": text, "sha256": digest}))
        resume.read_state(tmp_path)

    found = search(st.tuples(damaged_trees(folded), st.booleans()), attempt, examples)
    assert found["value"]
    assert found["refused"]


DTYPES = ["<f8", "<f4", ">f8", "<i8", "|b1", "<c16", "<U3", "|S2", "<M8[s]", "|O"]
SHAPES = [(), (0,), (2,), (2, 3), (2, 0), (1, 3), (2, 3, 1)]


def archive(parts: list[tuple[str, bytes]]) -> bytes:
    """A zip file with right checksums, whatever it holds."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, part in parts:
            file.writestr(zipfile.ZipInfo(name), part)
    return content.getvalue()


def npy(dtype: str, shape: tuple[int, ...]) -> bytes:
    content = io.BytesIO()
    np.save(content, np.zeros(shape, dtype=np.dtype(dtype)), allow_pickle=True)
    return content.getvalue()


PARTS = st.builds(npy, st.sampled_from(DTYPES), st.sampled_from(SHAPES))
NAMES = st.sampled_from(["a.npy", "b.npy", "a", "a\nb.npy", "../a.npy", "é.npy", ".npy"])
ENTRY = st.tuples(NAMES, PARTS | PARTS.flatmap(damaged_bytes))
ARCHIVES = st.lists(ENTRY, max_size=3, unique_by=lambda entry: entry[0]).map(archive)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of numpy, on headers of Python 2
@budgets(2 * FULL)
def test_traces(tmp_path: Path, examples: int) -> None:
    """Bytes of a whole file, and archives of right checksums around arrays of any kind."""
    path = tmp_path / "traces" / "part_00001.npz"
    write_npz(path, {"a": np.zeros((2, 3)), "b": np.ones((2, 3))})

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        for values in read_traces(tmp_path).values():
            assert values.ndim == 2
            assert np.isfinite(values.astype(float)).any() or values.size == 0 or values.any()

    found = search(damaged_bytes(path.read_bytes()) | ARCHIVES, attempt, examples)
    assert found["value"]
    assert found["refused"]


def unguarded(text: str) -> Any:
    return json.loads(text)["format"]


def multiline(text: str) -> Any:
    error = InputError("one line")
    error.args = ("two\nlines",)
    raise error


def endless(text: str) -> Any:
    while True:
        len(text)


@pytest.mark.parametrize("reader", [unguarded, multiline, endless])
def test_the_search_finds_a_reader_without_checks(
    monkeypatch: pytest.MonkeyPatch, reader: Callable[[str], Any]
) -> None:
    monkeypatch.setattr("tests.fuzzing.SECONDS", 0.1)
    texts = damaged_trees({"format": 1}).map(to_json)
    with pytest.raises(BaseException, match=r".*") as found:  # a hang is no `Exception`
        search(texts, reader, 50)
    assert not isinstance(found.value, InputError | KeyboardInterrupt)
