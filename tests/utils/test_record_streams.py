"""Records as JSON lines and CSV, block by block, and files that are whole or named otherwise."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.utils.record_streams import RecordWriter, check_out, part_of, streamed

NAMES, NESTED = ("id", "text", "probs", "sure"), {"probs": ("no", "yes")}
ROWS: list[dict[str, Any]] = [
    {"id": 7, "text": 'a "quoted",\ntext \u00e9', "probs": {"no": 0.25, "yes": 0.75}, "sure": True},
    {"id": [1, "\u00e9"], "text": "", "probs": None, "sure": None, "not named": 3},
]


def written(kind: str, *blocks: list[dict[str, Any]]) -> str:
    file = io.BytesIO()
    writer = RecordWriter(file, kind, NAMES, NESTED)
    for block in blocks:
        writer.write(block)
    writer.close()
    assert writer.written == sum(map(len, blocks))
    return file.getvalue().decode()


def test_json_lines_read_back_as_they_were() -> None:
    text = written("jsonl", ROWS[:1], ROWS[1:])
    assert text.count("\n") == 2
    found = [json.loads(line) for line in text.splitlines()]
    assert found[0] == ROWS[0]
    assert found[1] == {name: ROWS[1][name] for name in NAMES}
    assert "\u00e9" in text


def test_csv_reads_back_with_a_column_for_each_key() -> None:
    text = written("csv", ROWS[:1], ROWS[1:])
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    assert list(found[0]) == ["id", "text", "probs.no", "probs.yes", "sure"]
    assert found[0] == {
        **{"id": "7", "text": ROWS[0]["text"]},
        **{"probs.no": "0.25", "probs.yes": "0.75", "sure": "true"},
    }
    assert found[1] == {
        **{"id": '[1, "\u00e9"]', "text": ""},
        **{"probs.no": "", "probs.yes": "", "sure": ""},
    }


def test_no_records_are_a_header_alone() -> None:
    assert written("csv") == "id,text,probs.no,probs.yes,sure\n"
    assert written("jsonl") == ""


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_every_block_is_seen_through(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("wb") as file:
        writer = RecordWriter(file, kind, NAMES, NESTED)
        before = 0
        for _ in range(3):
            writer.write(ROWS)
            assert path.stat().st_size > before
            before = path.stat().st_size


def test_what_is_no_json_number_is_never_written() -> None:
    for kind in ("jsonl", "csv"):
        with pytest.raises(ValueError, match="JSON"):
            written(kind, [{"id": float("nan")}])


def test_a_file_stands_under_its_name_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.csv"
    with streamed(path) as file:
        file.write(b"half")
        file.flush()
        assert part_of(path).read_bytes() == b"half"
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert os.listdir(path.parent) == ["answers.csv"]


def test_what_a_failure_had_written_stays_and_the_old_file_too(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    path.write_text("old")
    assert failed(path, b"half")
    assert path.read_text() == "old"
    assert part_of(path).read_text() == "half"
    part_of(path).unlink()
    assert failed(path, b"")
    assert not part_of(path).exists()


def failed(path: Path, content: bytes) -> bool:
    """Whether a block that wrote this much and raised was let fail."""
    try:
        with streamed(path) as file:
            file.write(content)
            raise KeyError
    except KeyError:
        return True


def test_a_file_that_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    check_out(path, overwrite=False)
    check_out(tmp_path / "new" / "answers.csv", overwrite=False)
    part_of(path).write_text("half")
    with pytest.raises(InputError, match=r"answers.csv.part was left by .* stopped; .*--overwrite"):
        check_out(path, overwrite=False)
    path.write_text("old")
    with pytest.raises(InputError, match=r"exists already; .*--overwrite"):
        check_out(path, overwrite=False)
    check_out(path, overwrite=True)


def test_where_no_file_can_be_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(InputError, match="not a file; name another"):
            check_out(path, overwrite=True)
    with pytest.raises(InputError, match="cannot be written into"):
        check_out(tmp_path / "file" / "answers", overwrite=True)
