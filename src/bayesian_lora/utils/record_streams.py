"""Records written as they come, as JSON lines or CSV, and files that stand under their name whole.

A nested mapping is one object in JSON and one column for each of its keys in CSV.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bayesian_lora.errors import InputError
from bayesian_lora.utils.files import sync_folder

FORMATS = ("jsonl", "csv")
PART = ".part"


class RecordWriter:
    """Writes records (mappings by name) and flushes after every block.

    Args:
        file: takes bytes; UTF-8 is written.
        kind: one of `FORMATS`.
        names: of the columns, in their order; in JSON a name that a record lacks is left out.
        nested: of the names whose values are mappings, their keys: in CSV ``name.key``.
    """

    def __init__(
        self,
        file: BinaryIO,
        kind: str,
        names: Sequence[str],
        nested: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.file, self.kind, self.names = file, kind, list(names)
        self.nested = dict(nested or {})
        self.written = 0
        self._headed = kind != "csv"

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records, and see them through to the file."""
        text = io.StringIO(newline="")
        if self.kind == "csv":
            out = csv.writer(text, lineterminator="\n")
            if not self._headed:
                out.writerow(self._header())
                self._headed = True
            out.writerows(self._row(record) for record in records)
        else:
            for record in records:
                own = {name: record[name] for name in self.names if name in record}
                text.write(json.dumps(own, ensure_ascii=False, allow_nan=False) + "\n")
        self.file.write(text.getvalue().encode())
        self.file.flush()
        self.written += len(records)

    def close(self) -> None:
        """Nothing more comes: the header is there even where no record is."""
        self.write([])

    def _header(self) -> list[str]:
        return [cell for name in self.names for cell in self._cells(name)]

    def _cells(self, name: str) -> list[str]:
        return [f"{name}.{key}" for key in self.nested[name]] if name in self.nested else [name]

    def _row(self, record: Mapping[str, Any]) -> list[Any]:
        row: list[Any] = []
        for name in self.names:
            value = record.get(name)
            if name in self.nested:
                row += [_cell((value or {}).get(key)) for key in self.nested[name]]
            else:
                row.append(_cell(value))
        return row


def _cell(value: Any) -> Any:
    """As JSON writes it, but for text, which stands as it is, and null, which is empty."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def check_out(path: Path, overwrite: bool) -> None:
    """Whether records can be written to a file.

    Raises:
        InputError: the file, or what a stopped call left of it, is there and may not be replaced;
            or no file can be written there.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"--out {path}: not a file; name another, or leave it out")
    for there in (path, part_of(path)):
        if there.exists() and not overwrite:
            left = "exists already" if there == path else f"{there} was left by a call that stopped"
            raise InputError(
                f"--out {path}: {left}; name another file, or replace it with --overwrite"
            )
    nearest = next(p for p in path.absolute().parents if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--out {path}: {nearest} cannot be written into; name another file")


def part_of(path: Path) -> Path:
    """Where the records stand until the last one is written."""
    return path.with_name(path.name + PART)


@contextmanager
def streamed(path: Path) -> Iterator[BinaryIO]:
    """A file written as it comes under `part_of(path)`, and renamed once the block has ended well.

    What a block that failed had written stays there; if that is nothing, no file does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    with part.open("wb") as file:
        try:
            yield file
        except BaseException:
            if file.tell() == 0:
                part.unlink(missing_ok=True)
            raise
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)
