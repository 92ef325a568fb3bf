"""The texts that `bayesian-lora predict` is given: arguments, standard input, or a file."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from bayesian_lora.data.text_streams import KINDS, SUFFIXES, Record, Wanted, read_records
from bayesian_lora.errors import InputError

STDIN = "standard input"


@contextmanager
def open_texts(
    texts: Sequence[str], source: str | None, kind: str | None, wanted: Wanted
) -> Iterator[tuple[Iterator[Record], bool]]:
    """The records of the input, the first one checked; and whether they are typed by hand."""
    if texts:
        yield _given(texts, wanted), False
        return
    if source not in (None, "-"):
        assert source is not None
        path = Path(source)
        if not path.exists():
            raise InputError(f"--input {source}: no such file, the path counts from {Path.cwd()}")
        if path.is_dir():
            raise InputError(f"--input {source}: a folder; name a file in it")
        kind = _kind(kind, source, path.suffix.lower(), wanted)
        with path.open("rb") as file:
            yield read_records(file, source, kind, wanted), False
        return
    kind = _kind(kind, STDIN, "", wanted)
    typed = sys.stdin.isatty()
    if typed:
        typer.echo("Type texts, one a line; Ctrl-D ends.", err=True)
    yield read_records(sys.stdin.buffer, STDIN, kind, wanted), typed


def _given(texts: Sequence[str], wanted: Wanted) -> Iterator[Record]:
    if files := [x for x in texts if Path(x).suffix.lower() in SUFFIXES and Path(x).is_file()]:
        raise InputError(f"{files[0]} is a file, not a text: read it with --input {files[0]}")
    width = wanted.width or 1
    if len(texts) % width:
        raise InputError(
            f"{len(texts)} texts given, {wanted.task} reads pairs of them; give FIRST SECOND for "
            "each pair"
        )
    parts = [tuple(texts[i : i + width]) for i in range(0, len(texts), width)]
    return iter([Record(part, number) for number, part in enumerate(parts, start=1)])


def _kind(given: str | None, name: str, suffix: str, wanted: Wanted) -> str:
    """What an input is, as said, or as its name tells."""
    if given is not None and given not in KINDS:
        raise InputError(f"--input-format {given}: choose {', '.join(KINDS)}")
    columns = bool(wanted.texts or wanted.kept)
    if given is None and suffix in (".json", ".parquet", ".gz", ".zip"):
        raise InputError(
            f"--input {name}: {suffix} is not read piece by piece; give .jsonl (one object a line) "
            "or .csv, or say with --input-format what it is"
        )
    kind = given or SUFFIXES.get(suffix) or ("" if columns else "lines")
    if not kind:
        raise InputError(
            f"{name}: has it columns, for --text, --pair and --keep? Say so with --input-format "
            "csv, tsv or jsonl"
        )
    if columns and kind == "lines":
        raise InputError(
            f"{name}: lines of text have no columns for --text, --pair and --keep; leave them out, "
            "or say with --input-format what it is"
        )
    return kind
