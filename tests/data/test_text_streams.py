"""Texts from lines, JSON lines and CSV: one record at a time, every mistake with its line."""

import csv
import io
import json
from collections.abc import Iterator
from typing import BinaryIO, cast

import pytest

from bayesian_lora.data import text_streams
from bayesian_lora.data.text_streams import Record, Wanted, read_records
from bayesian_lora.errors import InputError

PAIRS = Wanted(width=2, task="mrpc")


def read(content: str | bytes, kind: str, wanted: Wanted | None = None) -> list[Record]:
    data = content.encode() if isinstance(content, str) else content
    return list(read_records(io.BytesIO(data), "in", kind, wanted or Wanted()))


def texts(records: list[Record]) -> list[str]:
    return [record.texts[0] for record in records]


class Source:
    """A stream of lines that counts how many were asked for."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self.lines, self.asked = lines, 0

    def readline(self, _: int = -1) -> bytes:
        self.asked += 1
        return next(self.lines, b"")


def test_every_line_is_a_text_in_its_place_an_empty_one_too() -> None:
    found = read("one\n\n  three \r\n\x85four\u2028still four", "lines")
    assert texts(found) == ["one", "", "  three ", "\x85four\u2028still four"]
    assert [record.line for record in found] == [1, 2, 3, 4]
    assert read("", "lines") == []


def test_a_byte_order_mark_is_no_text() -> None:
    assert texts(read(b"\xef\xbb\xbfone\ntwo\n", "lines")) == ["one", "two"]
    assert texts(read(b"\xef\xbb\xbftext\none\n", "csv")) == ["one"]


def test_a_line_of_a_pair_has_one_tab() -> None:
    found = read("a b\tc\n\nd\t\n", "lines", PAIRS)
    assert [record.texts for record in found] == [("a b", "c"), ("", ""), ("d", "")]
    for line, count in (("alone", 1), ("a\tb\tc", 3)):
        with pytest.raises(InputError, match=rf"in:2: {count} texts .* mrpc reads 2: write FIRST"):
            read(f"a\tb\n{line}\n", "lines", PAIRS)
    assert read("a\tb\n", "lines")[0].texts == ("a\tb",)


def test_csv_texts_may_hold_quotes_commas_and_line_ends() -> None:
    wanted = ['said "no"', "a,b", "two\nlines", "two\r\nlines", ""]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["id", "review"])
    writer.writerows(enumerate(wanted))
    found = read(out.getvalue(), "csv", Wanted(("review",), kept={"number": "id"}))
    assert texts(found) == wanted
    assert [record.kept for record in found] == [{"number": str(i)} for i in range(5)]
    assert [record.line for record in found] == [2, 3, 4, 6, 8]


def test_tsv_is_csv_with_tabs() -> None:
    found = read('text\tpair\n"a\tb"\tc\n\nd\te\n', "tsv", Wanted(("text", "pair")))
    assert [record.texts for record in found] == [("a\tb", "c"), ("d", "e")]


def test_json_lines_keep_what_was_asked_for_as_it_was() -> None:
    rows = [{"text": "a", "id": 3, "tags": ["x"]}, {"text": "\u00e9", "id": None}]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    found = read(lines, "jsonl", Wanted(kept={"id": "id", "t": "tags"}))
    assert texts(found) == ["a", "\u00e9"]
    assert [record.kept for record in found] == [{"id": 3, "t": ["x"]}, {"id": None, "t": None}]
    assert [record.line for record in found] == [1, 3]


def test_the_tasks_own_columns_are_found_unless_others_are_named() -> None:
    usual = (("sentence1", "sentence2"), ("text", "pair"))
    wanted = Wanted(usual=usual, width=2)
    assert read("text,pair\na,b\n", "csv", wanted)[0].texts == ("a", "b")
    assert read("sentence2,text,sentence1,pair\na,b,c,d\n", "csv", wanted)[0].texts == ("c", "a")
    named = Wanted(("pair", "text"), usual, width=2)
    assert read("text,pair\na,b\n", "csv", named)[0].texts == ("b", "a")


WRONG = {
    "no column": (b"a,b\n1,2\n", "csv", r"in:1: no column text; name .* --text COL; .* a, b"),
    "no named column": (b'{"a": "1"}\n', "jsonl", r"in:1: no column text; .* found: a"),
    "fields": (b"text,b\n1,2\n3\n", "csv", r"in:3: 1 fields found, 2 expected"),
    "open quote": (b'text\na\n"b\nc\n', "csv", r"in:3: malformed row .*close the quotes"),
    "twice": (b"text,text\na,b\n", "csv", r"in:1: two columns are called 'text'"),
    "no header": (b"", "csv", r"in: empty; a CSV file begins"),
    "not json": (b'{"text": "a"}\n{"text": \n', "jsonl", r"in:2: .*JSON \(.* at character 10\)"),
    "nan": (b'{"text": "a", "x": NaN}\n', "jsonl", r"in:1: not valid JSON \(NaN is no finite"),
    "huge": (b'{"text": "a", "x": [-1e999]}\n', "jsonl", r"in:1: .*\(-1e999 is no finite number\)"),
    "deep": (b'{"text": ' * 100_000 + b"\n", "jsonl", r"in:1: not valid JSON"),
    "a list": (b'[{"text": "a"}]\n', "jsonl", r"in:1: a JSON list; write one object"),
    "no object": (b'"text"\n', "jsonl", r"in:1: found str, must be an object"),
    "no text": (b'{"text": "a"}\n{"text": 3}\n', "jsonl", r"in:2: text is 3, must be text"),
    "missing": (b'{"text": "a"}\n{"b": "a"}\n', "jsonl", r"in:2: text is missing, must be text"),
    "surrogate": (b'{"text": "\\ud800"}\n', "jsonl", r"in:1: has lone surrogates"),
    "latin": (b"one\ntw\xe9\n", "lines", r"in:2: not UTF-8 \(byte 3 of the line is 0xe9\)"),
    "latin csv": (b'text\n"a\n\xff"\n', "csv", r"in:3: not UTF-8 \(byte 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_that_names_its_line(name: str) -> None:
    content, kind, message = WRONG[name]
    with pytest.raises(InputError, match=message) as caught:
        read(content, kind)
    assert str(caught.value).isprintable()


def test_a_surrogate_pair_is_a_character() -> None:
    assert texts(read(b'{"text": "\\ud83d\\ude00"}\n', "jsonl")) == ["\U0001f600"]


def test_a_kept_column_must_be_there() -> None:
    with pytest.raises(InputError, match="in:1: no column 'id'; columns found: text"):
        read("text\na\n", "csv", Wanted(kept={"id": "id"}))


def test_what_comes_before_a_mistake_is_handed_out_first() -> None:
    records = read_records(io.BytesIO(b"one\ntwo\n\xff\nfour\n"), "in", "lines", Wanted())
    assert [next(records).texts[0], next(records).texts[0]] == ["one", "two"]
    with pytest.raises(InputError, match="in:3: not UTF-8"):
        next(records)


def test_the_first_record_is_checked_at_once() -> None:
    with pytest.raises(InputError, match="no column text"):
        read_records(io.BytesIO(b"a\n1\n"), "in", "csv", Wanted())


@pytest.mark.parametrize(
    ("kind", "line"), [("lines", b"x\n"), ("jsonl", b'{"text": "x"}\n'), ("csv", b"text\n")]
)
def test_no_line_is_asked_for_before_it_is_needed(kind: str, line: bytes) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield line

    source = Source(endless())
    records = read_records(cast(BinaryIO, source), "in", kind, Wanted())
    header = 1 if kind == "csv" else 0
    assert source.asked == header + 1
    for _ in range(10):
        next(records)
    assert source.asked == header + 10


def test_what_has_no_line_ends_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_streams, "LONGEST_LINE", 2**20)
    with pytest.raises(InputError, match="in:1: longer than 1 MiB, so hardly a line"):
        read(b"x" * (2**20 + 1), "lines")
    assert len(texts(read(b"x" * (2**20 - 1) + b"\n", "lines"))[0]) == 2**20 - 1


def test_an_unclosed_quote_does_not_take_in_the_whole_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_streams, "LONGEST_LINE", 2**20)
    source = Source(iter([b"text\n", b'"open\n', *[b"x" * 1000 + b"\n"] * 10_000]))
    with pytest.raises(InputError, match=r"in:2: a field of more than 1 MiB, .*: close its quotes"):
        list(read_records(cast(BinaryIO, source), "in", "csv", Wanted()))
    assert source.asked < 2_000


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_field_may_be_as_long_as_a_line(kind: str) -> None:
    limit = csv.field_size_limit()
    long = "a " * limit
    records = read_records(io.BytesIO(f'text\nb\n"{long}"\n'.encode()), "in", kind, Wanted())
    assert next(records).texts == ("b",)
    assert csv.field_size_limit() == limit, "other readers of the process keep theirs"
    assert next(records).texts == (long,)
    assert csv.field_size_limit() == limit
