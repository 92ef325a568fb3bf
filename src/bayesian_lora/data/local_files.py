"""Reading data files: GLUE's unquoted TSV, CSV, JSON, JSON lines and Parquet.

Every reader keeps only the wanted columns and the texts exactly as they stand in the file.
Lines end at "\\n" (or "\\r\\n") alone: IMDB holds U+0085, at which str.splitlines would cut.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayesian_lora.data.examples import Table, check_columns
from bayesian_lora.data.text_streams import long_fields
from bayesian_lora.errors import InputError


@dataclass(frozen=True)
class LocalLayout:
    """How a task lies in a data folder, where that differs from the hub.

    files: split -> paths in the folder, of which the first that exists is read;
    columns: the task's column -> the file's columns, joined by one space (default: same name);
    header: the column names of files that have no header row;
    label_names: the classes as written in the files (default: the task's own names).
    """

    files: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    header: tuple[str, ...] | None = None
    label_names: tuple[str, ...] | None = None


def read_layout(
    layout: LocalLayout,
    data_dir: Path,
    split: str,
    wanted: Sequence[str],
    notify: Callable[[str], None],
) -> Table:
    """The wanted columns of a split from a data folder; a stand-in file is announced by `notify`.

    Raises InputError when no file of the split exists, and as the readers below do.
    """
    names = layout.files[split]
    present = [name for name in names if (data_dir / name).is_file()]
    if not present:
        state = "has" if data_dir.is_dir() else "does not exist, so there is"
        raise InputError(
            f"data.dir {data_dir} {state} no {' or '.join(names)}: add the file, or leave data.dir "
            "and BAYESIAN_LORA_DATA empty to read from the hub"
        )
    if present[0] != names[0]:
        notify(f"{names[0]} is not in {data_dir}: {split} is read from {present[0]} instead")
    parts = {name: layout.columns.get(name, (name,)) for name in wanted}
    flat = [part for group in parts.values() for part in group]
    path = data_dir / present[0]
    read = read_glue_tsv if path.suffix == ".tsv" else read_csv
    table = read(path, flat, header=layout.header)
    joined = {
        name: [" ".join(values) for values in zip(*(table.columns[p] for p in group), strict=True)]
        for name, group in parts.items()
    }
    return Table(table.source, joined, table.lines)


def read_file(path: Path, wanted: Sequence[str]) -> Table:
    """The wanted columns of a .csv, .tsv (a CSV with tabs), .json, .jsonl or .parquet file.

    JSON is a list of objects; JSON lines, one object a line, may be named .json or .jsonl.
    Raises InputError for a missing, empty or malformed file, another extension, a missing column.
    """
    readers: dict[str, Callable[[Path, Sequence[str]], Table]] = {
        ".csv": read_csv,
        ".tsv": lambda path, wanted: read_csv(path, wanted, delimiter="\t"),
        ".json": _read_json,
        ".jsonl": _read_json,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"data.files {path}: the extension must be one of {', '.join(readers)}")
    if not path.is_file():
        raise InputError(f"data.files {path}: no such file, the path counts from {Path.cwd()}")
    return readers[path.suffix.lower()](path, wanted)


def read_glue_tsv(
    path: Path, wanted: Sequence[str], *, header: Sequence[str] | None = None
) -> Table:
    """GLUE's TSV: no quoting at all, so that a sentence may begin with a lone double quote.

    Raises InputError for an empty file, a missing column, a row of another number of fields
    than the header, text that is not UTF-8.
    """
    lines = _decode(path).replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, start=1)]
    return _from_rows(path, rows, wanted, header)


def read_csv(
    path: Path, wanted: Sequence[str], *, header: Sequence[str] | None = None, delimiter: str = ","
) -> Table:
    """CSV with double quotes, blank lines skipped. Raises as read_glue_tsv, and for bad quotes."""
    # newline="" keeps the line ends inside quoted texts as they are.
    reader = csv.reader(io.StringIO(_decode(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    start = 1
    try:
        with long_fields():
            for row in reader:
                if row:
                    rows.append((start, row))
                start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}:{start}: malformed row ({error}): write a quote inside a quoted field twice"
        ) from error
    return _from_rows(path, rows, wanted, header)


def _from_rows(
    path: Path,
    rows: list[tuple[int, list[str]]],
    wanted: Sequence[str],
    header: Sequence[str] | None,
) -> Table:
    if header is None:
        if not rows:
            raise _empty(path)
        header, rows = rows[0][1], rows[1:]
    check_columns(str(path), header, wanted)
    for number, fields in rows:
        if len(fields) != len(header):
            raise InputError(
                f"{path}:{number}: {len(fields)} fields found, {len(header)} expected: mend the row"
            )
    positions = {name: header.index(name) for name in wanted}
    columns = {name: [fields[at] for _, fields in rows] for name, at in positions.items()}
    return Table(str(path), columns, [number for number, _ in rows])


def _read_json(path: Path, wanted: Sequence[str]) -> Table:
    text = _decode(path)
    if text.lstrip().startswith("["):
        rows = _parse_json(text, str(path))
        lines = None
        places = [f"{path}, row {row}" for row in range(len(rows))]
    else:
        numbered = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        lines = [number for number, _ in numbered]
        places = [f"{path}:{number}" for number in lines]
        rows = [_parse_json(line, at) for (_, line), at in zip(numbered, places, strict=True)]
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, dict):
            raise InputError(f"{place}: found {type(row).__name__}, must be an object {{…}}")
        check_columns(place, list(row), wanted)
    return Table(str(path), {name: [row[name] for row in rows] for name in wanted}, lines)


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: not valid JSON ({error}): must be a list of objects, or one a line"
        ) from error


def _read_parquet(path: Path, wanted: Sequence[str]) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        found = parquet.read_schema(path).names
        check_columns(str(path), found, wanted)
        table = parquet.read_table(path, columns=list(wanted))
    except pyarrow.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a Parquet file ({reason}): write it anew") from error
    return Table(str(path), {name: table.column(name).to_pylist() for name in wanted})


def _decode(path: Path) -> str:
    data = path.read_bytes()
    if not data.strip():
        raise _empty(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8: convert the file to UTF-8") from error


def _empty(path: Path) -> InputError:
    return InputError(f"{path}: the file is empty: write it anew")
