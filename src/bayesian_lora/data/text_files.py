"""A user's own file of texts whose columns are found, not told.

Shapes: N rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bayesian_lora.data.examples import Table
from bayesian_lora.data.local_files import read_file, read_glue_tsv
from bayesian_lora.data.text_streams import long_fields
from bayesian_lora.errors import InputError

EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
USUAL = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
"""What text columns are often called."""
NO_TEXT = ("label", "labels", "id", "ids", "idx", "index", "example_id")
"""What columns that hold no text are often called."""


class TextFile(NamedTuple):
    """A table, which of its columns are the texts, and which the label (None: there is none)."""

    table: Table
    texts: tuple[str, ...]
    label: str | None

    @property
    def size(self) -> int:
        """N."""
        return _rows(self.table)


def read_texts(
    path: Path, wanted: Sequence[tuple[str, ...]], labels: Sequence[str], *, reader: str
) -> TextFile:
    """The text columns of a file, and its label column where there is one.

    Args:
        path: a .csv, .tsv (quoted as a CSV, or GLUE's without quotes), .json, .jsonl or .parquet.
        wanted: names that the texts may have, all of one length (1 or 2), the likeliest first;
            after them come usual names, then whatever is left beside label and id, if it is as
            many columns.
        labels: names that the label may have, the likeliest first.
        reader: who reads as many texts, for messages.

    Raises:
        InputError: another extension, a damaged file, no such columns, or another number of texts.
    """
    if path.suffix.lower() not in EXTENSIONS:
        raise InputError(f"ood {str(path)!r}: the extension must be one of {', '.join(EXTENSIONS)}")
    found = _columns(path)
    if not found:  # damaged: whoever reads it says how
        return TextFile(_read(path, wanted[0]), wanted[0], None)
    label = next((name for name in labels if name in found), None)
    texts = _texts(path, found, wanted, {*labels, *NO_TEXT}, reader)
    if label in texts:
        raise InputError(f"ood {str(path)!r}: column {label!r} would be text and label; rename one")
    return TextFile(_read(path, texts if label is None else (*texts, label)), texts, label)


def _texts(
    path: Path,
    found: Sequence[str],
    wanted: Sequence[tuple[str, ...]],
    no_text: set[str],
    reader: str,
) -> tuple[str, ...]:
    number = len(wanted[0])
    # A pair's second text is not dropped unsaid, unless the reader asks for the first by its name.
    usual = [names for names in USUAL if set(names) <= set(found)]
    alike = [names for names in usual if len(names) == number]
    named = [names for names in wanted if set(names) <= set(found)]
    if candidates := [*named, *(alike if len(alike) == len(usual) else ())]:
        return candidates[0]
    left = tuple(name for name in found if name.lower() not in no_text)
    if len(left) == number:
        return left
    raise InputError(
        f"ood {str(path)!r}: columns found: {', '.join(found)}, which is {len(left)} "
        f"beside label and id; {reader} reads {number} text{'s'[: number - 1]} an example: name "
        f"the column{'s'[: number - 1]} {' and '.join(wanted[0])}"
    )


def _columns(path: Path) -> tuple[str, ...]:
    """Of the header, the schema or the first object; none where that cannot be read."""
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            from pyarrow import parquet

            return tuple(parquet.read_schema(path).names)
        with path.open(encoding="utf-8-sig", newline="") as file:
            if kind in (".csv", ".tsv"):
                rows = csv.reader(file, delimiter="\t" if kind == ".tsv" else ",")
                with long_fields():
                    return tuple(next((row for row in rows if row), ()))
            first = next((line for line in file if line.strip()), "")
            row = json.loads(first + file.read())[0] if _is_list(first) else json.loads(first)
            return tuple(row) if isinstance(row, dict) else ()
    except (ValueError, LookupError, RecursionError, csv.Error):
        return ()


def _is_list(line: str) -> bool:
    return line.lstrip().startswith("[")


def _read(path: Path, wanted: Sequence[str]) -> Table:
    """As `read_file`, but a .tsv may be GLUE's, where quotes are ordinary characters.

    A lone quote makes a quoted reader fail, or swallow the rows up to the next one: the quoted
    reading holds only if it finds as many rows.
    """
    if path.suffix.lower() != ".tsv":
        return read_file(path, wanted)
    try:
        plain = read_glue_tsv(path, wanted)
    except InputError:  # a tab or a line end between quotes, or damaged: then this says how
        return read_file(path, wanted)
    try:
        quoted = read_file(path, wanted)
    except InputError:
        return plain
    return quoted if _rows(quoted) == _rows(plain) else plain


def _rows(table: Table) -> int:
    return len(next(iter(table.columns.values())))
