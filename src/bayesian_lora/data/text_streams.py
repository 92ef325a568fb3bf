"""Texts from a stream of any length, one record after the other: lines, JSON lines, CSV, TSV.

What is held at a time is one record, so an input may be larger than memory or never end. The first
record is read, and its columns are checked, before anything is handed out.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, BinaryIO

from bayesian_lora.errors import InputError

SUFFIXES = {".txt": "lines", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}
KINDS = ("lines", "jsonl", "csv", "tsv")
LONGEST_LINE = 16 * 2**20
"""Bytes: what has no line ends must not fill the memory. Of a quoted field, which may have some,
characters.
"""


@dataclass(frozen=True)
class Record:
    """One or two texts, the columns kept beside them by their names in the output, and the line of
    the input (from 1) at which it begins.
    """

    texts: tuple[str, ...]
    line: int
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """Which texts of an input: of its columns, or of a line.

    texts: the columns named by the user, () for the first of `usual` that are all there;
    kept: name in the output → column; width: texts a record has (1 or 2), None where nothing tells;
    task: what to call the rule.
    """

    texts: tuple[str, ...] = ()
    usual: tuple[tuple[str, ...], ...] = (("text",),)
    kept: dict[str, str] = field(default_factory=dict)
    width: int | None = None
    task: str = "the model"


def read_records(file: BinaryIO, name: str, kind: str, wanted: Wanted) -> Iterator[Record]:
    """The records of a stream, in its order.

    Lines: every line is a text, an empty one too; of a task on two texts FIRST<TAB>SECOND. JSON
    lines and CSV: blank lines are none. Only what has been asked for is read of a stream.

    Args:
        file: bytes in UTF-8, lines ending with \\n or \\r\\n.
        name: of the stream, for messages.
        kind: one of `KINDS`.

    Raises:
        InputError: at once for the first record, or in its turn: what is wrong, with its line.
    """
    lines = _lines(file, name)
    if kind == "lines":
        found = _of_lines(lines, name, wanted)
    elif kind == "jsonl":
        found = _of_json(lines, name, wanted)
    else:
        found = _of_csv(lines, name, "\t" if kind == "tsv" else ",", wanted)
    first = list(islice(found, 1))
    return chain(first, found)


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """(number, line with its end), decoded."""
    number = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            raise InputError(
                f"{name}:{number}: longer than {LONGEST_LINE >> 20} MiB, so hardly a line of text: "
                "give a text file with line ends"
            )
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}:{number}: not UTF-8 (byte {error.start + 1} of the line is "
                f"0x{raw[error.start]:02x}): convert the input to UTF-8"
            ) from error
        yield number, text


def _of_lines(lines: Iterator[tuple[int, str]], name: str, wanted: Wanted) -> Iterator[Record]:
    for number, line in lines:
        text = line.removesuffix("\n").removesuffix("\r")
        texts = tuple(text.split("\t")) if wanted.width == 2 else (text,)
        if wanted.width == 2 and not text.strip():
            texts = ("", "")
        if wanted.width == 2 and len(texts) != 2:
            raise InputError(
                f"{name}:{number}: {len(texts)} texts between tabs found, {wanted.task} reads 2: "
                "write FIRST<TAB>SECOND, or give a CSV or JSONL file with --text and --pair"
            )
        yield Record(texts, number)


def _of_json(lines: Iterator[tuple[int, str]], name: str, wanted: Wanted) -> Iterator[Record]:
    columns: tuple[str, ...] | None = None
    for number, line in lines:
        if not line.strip():
            continue
        place = f"{name}:{number}"
        value = _parsed(line, place)
        if columns is None:
            columns = text_columns(list(value), place, wanted)
        texts = [_text(value, column, place) for column in columns]
        yield Record(
            tuple(texts), number, {new: value.get(old) for new, old in wanted.kept.items()}
        )


def _text(value: dict[str, Any], column: str, place: str) -> str:
    text = value.get(column)
    if not isinstance(text, str):
        what = f"is {text!r}" if column in value else "is missing"
        raise InputError(f"{place}: {column} {what}, must be text: mend the line")
    return text


def _parsed(line: str, place: str) -> dict[str, Any]:
    if line.lstrip().startswith("["):
        raise InputError(f"{place}: a JSON list; write one object {{…}} a line (JSON lines)")
    try:
        value = json.loads(line.rstrip("\r\n"), parse_constant=_finite, parse_float=_finite)
        if "\\u" in line:  # half of a surrogate pair, which JSON can write and no text can hold
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: has lone surrogates, which are no Unicode characters: mend the line"
        ) from error
    except json.JSONDecodeError as error:  # whose own words count lines from this one
        found = f"{error.msg} at character {error.pos + 1}"
        raise InputError(f"{place}: not valid JSON ({found}): one object {{…}} a line") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({error}): one object {{…}} a line") from error
    if not isinstance(value, dict):
        raise InputError(f"{place}: found {type(value).__name__}, must be an object {{…}}")
    return value


def _finite(text: str) -> float:
    """What cannot be written again, NaN, infinity or too large for a float, is not read."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _of_csv(
    lines: Iterator[tuple[int, str]], name: str, delimiter: str, wanted: Wanted
) -> Iterator[Record]:
    rows = _rows(lines, name, delimiter)
    at, header = next(rows, (1, None))
    if header is None:
        raise InputError(f"{name}: empty; a CSV file begins with the names of its columns")
    place = f"{name}:{at}"
    if twice := [column for column in header if header.count(column) > 1]:
        raise InputError(f"{place}: two columns are called {twice[0]!r}: rename one")
    columns = text_columns(header, place, wanted)
    positions = [header.index(column) for column in columns]
    kept = {new: header.index(old) for new, old in wanted.kept.items()}
    for number, row in rows:
        if len(row) != len(header):
            raise InputError(
                f"{name}:{number}: {len(row)} fields found, {len(header)} expected: mend the row, "
                "or quote a field that holds the delimiter"
            )
        texts = tuple(row[position] for position in positions)
        yield Record(texts, number, {new: row[position] for new, position in kept.items()})


def _rows(
    lines: Iterator[tuple[int, str]], name: str, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """(line at which it begins, fields) of each row that is not blank."""
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    start = 1
    while True:
        try:
            with long_fields():
                row = next(reader, None)
        except csv.Error as error:
            if "field larger" in str(error):
                raise InputError(
                    f"{name}:{start}: a field of more than {LONGEST_LINE >> 20} MiB, so hardly a "
                    "text: close its quotes, or shorten it"
                ) from error
            raise InputError(
                f"{name}:{start}: malformed row ({error}): close the quotes of a field, and write "
                "a quote inside it twice"
            ) from error
        if row is None:
            return
        if row:
            yield start, row
        start = reader.line_num + 1


@contextmanager
def long_fields() -> Iterator[None]:
    """Inside, csv takes fields of `LONGEST_LINE`. The limit, 128 KiB by default, is the whole
    process's, so this is for a row, or a file that is read in one go.
    """
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def text_columns(found: Sequence[str], place: str, wanted: Wanted) -> tuple[str, ...]:
    """The columns of the texts among those found.

    Raises:
        InputError: one that was named is not there, or none was and the usual ones are not.
    """
    listed = ", ".join(found)
    for column in (*wanted.texts, *wanted.kept.values()):
        if column not in found:
            raise InputError(f"{place}: no column {column!r}; columns found: {listed}")
    if wanted.texts:
        return wanted.texts
    for columns in wanted.usual:
        if set(columns) <= set(found):
            return columns
    usual = " or ".join(", ".join(columns) for columns in wanted.usual)
    options = "--text COL --pair COL" if wanted.width == 2 else "--text COL"
    raise InputError(
        f"{place}: no column {usual}; name the texts' with {options}; columns found: {listed}"
    )
