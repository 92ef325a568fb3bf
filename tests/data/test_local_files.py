"""The readers of TSV, CSV, JSON and Parquet files, on small files written here."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from bayesian_lora.data.examples import Table
from bayesian_lora.data.local_files import (
    LocalLayout,
    read_csv,
    read_file,
    read_glue_tsv,
    read_layout,
)
from bayesian_lora.errors import InputError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def columns(table: Table) -> dict[str, list]:
    return {name: list(values) for name, values in table.columns.items()}


def test_glue_tsv_has_no_quoting(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'sentence\tlabel\n"never closed\t1\nsays "hi" \t0\n" x "\t1\n')
    table = read_glue_tsv(path, ["sentence", "label"])
    assert columns(table)["sentence"] == ['"never closed', 'says "hi" ', '" x "']
    assert columns(table)["label"] == ["1", "0", "1"]
    assert [table.place(row) for row in (0, 2)] == [f"{path}:2", f"{path}:4"]


def test_glue_tsv_with_other_columns_windows_ends_mark_and_no_last_newline(tmp_path: Path) -> None:
    content = "\ufeffindex\tsentence\tx\tlabel\r\n0\ta\t-\tyes\r\n1\tb\t-\tno"
    table = read_glue_tsv(write(tmp_path / "a.tsv", content), ["label", "sentence", "index"])
    assert columns(table) == {"label": ["yes", "no"], "sentence": ["a", "b"], "index": ["0", "1"]}


def test_glue_tsv_without_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "gj04\t1\t\tA sentence.\ngj04\t0\t*\tSentence a.\n")
    table = read_glue_tsv(path, ["text", "label"], header=("source", "label", "mark", "text"))
    assert columns(table) == {"text": ["A sentence.", "Sentence a."], "label": ["1", "0"]}
    assert table.place(0) == f"{path}:1"


line_free = st.text(st.characters(codec="utf-8", exclude_characters="\t\n"))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(line_free, st.sampled_from("01")), min_size=1))
def test_glue_tsv_gives_back_any_text(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    path = write(tmp_path_factory.mktemp("tsv") / "a.tsv", content)
    table = columns(read_glue_tsv(path, ["text", "label"]))
    assert list(zip(table["text"], table["label"], strict=True)) == rows


any_text = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(any_text, any_text), min_size=1), delimiter=st.sampled_from([",", "\t"])
)
def test_quoted_files_give_back_any_text(
    rows: list[tuple[str, str]], delimiter: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    name = "x.csv" if delimiter == "," else "x.tsv"
    path = write(tmp_path_factory.mktemp("csv") / name, buffer.getvalue())
    table = columns(read_file(path, ["b", "a"]))
    assert list(zip(table["a"], table["b"], strict=True)) == rows


def test_csv_names_the_line_where_a_row_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines\x85",1\n\nplain,0\n')
    table = read_csv(path, ["text", "label"])
    assert columns(table)["text"] == ["two\nlines\x85", "plain"]
    assert [table.place(row) for row in (0, 1)] == [f"{path}:2", f"{path}:5"]


def test_a_text_longer_than_csvs_own_limit_is_read(tmp_path: Path) -> None:
    before, long = csv.field_size_limit(), "word " * 60_000
    path = write(tmp_path / "a.csv", f'text,label\n"{long}",1\nplain,0\n')
    assert len(long) > before
    assert columns(read_csv(path, ["text", "label"]))["text"] == [long, "plain"]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([{"t": "é", "y": 1, "more": 0}, {"y": "no", "t": "b"}])),
        ("a.jsonl", '{"t": "é", "y": 1}\n\n{"t": "b", "y": "no"}\n'),
        ("a.json", '{"t": "\\u00e9", "y": 1}\r\n{"t": "b", "y": "no"}'),
        ("A.JSONL", '{"t": "é", "y": 1}\n{"t": "b", "y": "no"}'),
    ],
)
def test_json_as_a_list_or_one_object_a_line(name: str, content: str, tmp_path: Path) -> None:
    table = read_file(write(tmp_path / name, content), ["t", "y"])
    assert columns(table) == {"t": ["é", "b"], "y": [1, "no"]}


def test_json_places(tmp_path: Path) -> None:
    lines = read_file(write(tmp_path / "a.jsonl", '\n{"t": 1}\n\n{"t": 2}'), ["t"])
    assert lines.place(1) == f"{tmp_path / 'a.jsonl'}:4"
    listed = read_file(write(tmp_path / "a.json", '[{"t": 1},\n{"t": 2}]'), ["t"])
    assert listed.place(1) == f"{tmp_path / 'a.json'}, row 1"


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"t": ["a", None], "y": [0, 1], "z": [0.5, 0.5]}), path)
    assert columns(read_file(path, ["t", "y"])) == {"t": ["a", None], "y": [0, 1]}


MALFORMED = [
    ("a.csv", "", "the file is empty"),
    ("a.csv", "\n \n", "the file is empty"),
    ("a.json", "", "the file is empty"),
    ("a.parquet", "", "not a Parquet file"),
    ("a.parquet", "t,y\na,1\n", "not a Parquet file"),
    ("a.csv", "t,z\na,1\n", "no column 'y', columns found: t, z"),
    ("a.json", '[{"t": "a"}]', "row 0: no column 'y', columns found: t"),
    ("a.jsonl", '{"t": "a", "y": 1}\n{"t": "a"}', ":2: no column 'y', columns found: t"),
    ("a.jsonl", '{"t": "a", "y": 1}\n3', ":2: found int, must be an object"),
    ("a.jsonl", '{"t": "a", "y": 1}\n{"t": ', ":2: not valid JSON"),
    ("a.json", '[{"t": "a", "y": 1},', "not valid JSON"),
    ("a.csv", 't,y\na,1\n"b\nc",1\nd\n', ":5: 1 fields found, 2 expected"),
    ("a.csv", "t,y\na,1,2\n", ":2: 3 fields found, 2 expected"),
    ("a.csv", 't,y\na,1\n"never closed,1\nb,0\n', ":3: malformed row"),
    ("a.tsv", 't\ty\na\t1\n"b"c\t1\n', ":3: malformed row"),
    ("a.csv", b"t,y\na,1\n\xff,1\n", ":3: not UTF-8"),
    ("a.jsonl", b'{"t": "a", "y": 1}\n{"t": "\xe9", "y": 1}\n', ":2: not UTF-8"),
    ("a.xlsx", "t", "extension must be one of .csv, .tsv, .json, .jsonl, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED)
def test_a_bad_file_is_named_with_the_place(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as raised:
        read_file(path, ["t", "y"])
    assert str(path) in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"t": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column 'y', columns found: t"):
        read_file(tmp_path / "a.parquet", ["t", "y"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.files .*gone\.csv: no such file"):
        read_file(tmp_path / "gone.csv", ["t"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("sentence\tlabel\na\t1\tx\n", ":2: 3 fields found, 2 expected"),
        ("sentence\tlabel\na\t1\n\nb\t0\n", ":3: 1 fields found, 2 expected"),
        ("text\tlabel\na\t1\n", "no column 'sentence', columns found: text, label"),
        (b"sentence\tlabel\na\t1\nb\xff\t1\n", ":3: not UTF-8"),
    ],
)
def test_a_bad_glue_file_is_named_with_the_place(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as raised:
        read_glue_tsv(write(tmp_path / "dev.tsv", content), ["sentence", "label"])
    assert str(raised.value).startswith(f"{tmp_path / 'dev.tsv'}")
    assert message in str(raised.value)


LAYOUT = LocalLayout(
    {"test": ("official.csv", "other.csv")},
    columns={"text": ("title", "body")},
    header=("label", "title", "body"),
)


def test_layout_joins_columns_and_announces_a_stand_in(tmp_path: Path) -> None:
    notes: list[str] = []
    write(tmp_path / "other.csv", '"1","A title"," a body"\n')
    table = read_layout(LAYOUT, tmp_path, "test", ["text", "label"], notes.append)
    assert columns(table) == {"text": ["A title  a body"], "label": ["1"]}
    assert table.place(0) == f"{tmp_path / 'other.csv'}:1"
    assert len(notes) == 1
    assert "official.csv is not in" in notes[0]
    assert "test is read from other.csv instead" in notes[0]

    write(tmp_path / "official.csv", '"2","B","b"\n')
    table = read_layout(LAYOUT, tmp_path, "test", ["text", "label"], notes.append)
    assert columns(table) == {"text": ["B b"], "label": ["2"]}
    assert len(notes) == 1


def test_layout_without_its_file_names_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read_layout(LAYOUT, tmp_path, "test", ["text", "label"], print)
    assert f"data.dir {tmp_path} has no official.csv or other.csv" in str(raised.value)
    with pytest.raises(InputError, match=r"gone does not exist, so there is no official\.csv"):
        read_layout(LAYOUT, tmp_path / "gone", "test", ["text", "label"], print)
