"""Files of texts whose columns are found: which are taken or refused, and how quotes are read."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from bayesian_lora.data.text_files import TextFile, read_texts
from bayesian_lora.errors import InputError

ONE = [("sentence",)]
TWO = [("premise", "hypothesis")]
LABELS = ("label",)


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def read(path: Path, wanted: list[tuple[str, ...]] = ONE) -> TextFile:
    return read_texts(path, wanted, LABELS, reader="the model of sst2")


def texts(found: TextFile) -> list[list[str]]:
    return [list(found.table.columns[name]) for name in found.texts]


@pytest.mark.parametrize(
    ("header", "wanted", "expected"),
    [
        ("sentence,text,label", ONE, ("sentence",)),  # the reader's own name goes first
        ("id,label,text,genre", ONE, ("text",)),  # then a usual one
        ("id,review,label", ONE, ("review",)),  # then whatever is left
        ("Index,remark", ONE, ("remark",)),
        ("question,sentence,label", ONE, ("sentence",)),  # asked for by its name
        ("premise,hypothesis,x,label", TWO, ("premise", "hypothesis")),
        ("sentence1,sentence2,genre,label", TWO, ("sentence1", "sentence2")),
        ("left,right,label", TWO, ("left", "right")),
    ],
)
def test_columns_are_found(
    header: str, wanted: list[tuple[str, ...]], expected: tuple[str, ...], tmp_path: Path
) -> None:
    row = ",".join(f"cell {i}" for i in range(header.count(",") + 1))
    found = read(write(tmp_path / "a.csv", f"{header}\n{row}\n"), wanted)
    assert found.texts == expected
    assert found.label == ("label" if "label" in header else None)
    assert texts(found) == [[f"cell {header.split(',').index(name)}"] for name in expected]
    assert found.size == 1


@pytest.mark.parametrize(
    ("header", "wanted", "number"),
    [
        ("sentence1,sentence2,label", ONE, 2),
        ("question,sentence,label", [("text",)], 2),  # a pair's question is not dropped unsaid
        ("sentence,label", TWO, 1),
        ("id,label", ONE, 0),
        ("a,b,c", TWO, 3),
    ],
)
def test_another_number_of_texts_is_refused(
    header: str, wanted: list[tuple[str, ...]], number: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.csv", f"{header}\n{','.join('x' * (header.count(',') + 1))}\n")
    with pytest.raises(InputError) as error:
        read(path, wanted)
    message = str(error.value)
    assert f"columns found: {header.replace(',', ', ')}, which is {number} beside label and id" in (
        message
    )
    assert f"reads {len(wanted[0])} text{'s' * (len(wanted[0]) - 1)} an example" in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "list", "parquet"])
def test_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    rows = [{"n": 1, "sentence": "it 's fine", "label": 0}, {"n": 2, "sentence": "é", "label": 1}]
    path = tmp_path / f"a.{'json' if kind == 'list' else kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "list":
        write(path, json.dumps(rows, indent=1))
    elif kind in ("json", "jsonl"):
        write(path, "\n" + "\n".join(map(json.dumps, rows)))
    else:
        mark = "," if kind == "csv" else "\t"
        lines = [list(rows[0]), *([str(x) for x in row.values()] for row in rows)]
        blank = "\n" if kind == "csv" else ""  # which a CSV may begin with
        write(path, blank + "\n".join(map(mark.join, lines)))
    found = read(path)
    assert (found.texts, found.label) == (("sentence",), "label")
    assert texts(found) == [["it 's fine", "é"]]
    assert [str(label) for label in found.table.columns["label"]] == ["0", "1"]


def test_tsv_without_quoting_keeps_lone_quotes(tmp_path: Path) -> None:
    rows = ['"good" film', 'a "lone quote', '"opened here', 'and closed" there', "plain"]
    lines = "".join(f"{text}\t0\n" for text in rows)
    assert texts(read(write(tmp_path / "a.tsv", f"sentence\tlabel\n{lines}"))) == [rows]


def test_quotes_that_a_quoted_reader_would_close_rows_later_swallow_none(tmp_path: Path) -> None:
    # Quoted, the two rows would be one: '"begins\t0\nends"' is a field.
    path = write(tmp_path / "a.tsv", 'label\tsentence\n0\t"begins\n1\tends"\n')
    assert texts(read(path)) == [['"begins', 'ends"']]


def test_quoted_tsv_is_read_as_such(tmp_path: Path) -> None:
    quoted = 'sentence\tlabel\n"He said ""no"""\t0\n"two\nlines"\t1\n"a\ttab"\t1\n'
    assert texts(read(write(tmp_path / "a.tsv", quoted))) == [
        ['He said "no"', "two\nlines", "a\ttab"]
    ]
    simple = 'sentence\tlabel\n"He said ""no"""\t0\nplain\t1\n'
    assert texts(read(write(tmp_path / "b.tsv", simple))) == [['He said "no"', "plain"]]


MALFORMED = [
    ("a.txt", "sentence\nx\n", "the extension must be one of .csv, .tsv, .json, .jsonl, .parquet"),
    ("a.csv", "", "the file is empty"),
    ("a.tsv", "", "the file is empty"),
    ("a.jsonl", "{oops", "a.jsonl:1: not valid JSON"),
    ("a.json", '["a text"]', "found str, must be an object"),
    ("a.parquet", "not one", "not a Parquet file"),
    ("a.csv", "sentence,label\nx,1,2\n", "3 fields found, 2 expected"),
    ("a.csv", "label,label\n1,1\n", "which is 0 beside label and id"),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED)
def test_what_is_wrong_with_a_file_is_one_line(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


def test_a_text_column_that_is_the_label_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,x\na,b\n")
    with pytest.raises(InputError, match="column 'label' would be text and label"):
        read_texts(path, [("label",)], LABELS, reader="the model")
