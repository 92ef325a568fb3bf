"""`bayesian-lora predict`: texts in; labels, probabilities and uncertainties out, as they come."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from bayesian_lora.cli.options import Device, in_options, refuse
from bayesian_lora.errors import InputError

if TYPE_CHECKING:
    from bayesian_lora.abstention import Abstention
    from bayesian_lora.data.text_streams import Record, Wanted
    from bayesian_lora.experiment.predicting import Found
    from bayesian_lora.serving import Predictor, Service
    from bayesian_lora.utils.record_streams import RecordWriter

EPILOG = (
    "Examples:\n\n"
    'bayesian-lora predict runs/demo "the food was good" "the room was loud"\n\n'
    "zcat reviews.gz | bayesian-lora predict runs/demo --out answers.jsonl\n\n"
    "bayesian-lora predict runs/demo --input reviews.csv --text review --keep id "
    "--out answers.csv\n\n"
    "bayesian-lora predict runs/demo --input reviews.txt --target-risk 0.05\n\n"
    "bayesian-lora predict runs/mrpc --input pairs.jsonl --text sentence1 --pair sentence2 "
    "--abstain-above 0.4"
)
SHAPE_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Environment variables of torch's CPU library; see `_bound_caches`."""
CACHED_SHAPES = "64"
BROKEN_PIPE = 141
"""The status of a program whose reader has gone, as a shell shows it."""

TextsHelp = (
    "Texts, each an argument; of a task on two texts, one pair after the other. Without any, "
    "or with - alone, --input is read. A text that begins with - comes after --."
)
InputHelp = "A file: .txt, .jsonl, .csv or .tsv; - or nothing is standard input."
InputFormatHelp = "lines, jsonl, csv or tsv, where the file's name does not tell; lines by default."
TextHelp = "The texts' column of CSV and JSONL; by default as the task's data call it, or text."
PairHelp = "The second texts' column, of a task on two texts."
KeepHelp = "A column that goes into the output; may be given again. NEW=COL gives it another name."
OutHelp = "A file: FILE.part until the last answer is written; by default standard output."
FormatHelp = "jsonl or csv; by default as the name of --out ends, or else jsonl."
AboveHelp = "Abstain where the score lies above X."
RiskHelp = (
    "Abstain so that at most this share of the labels given is wrong: the threshold is found on "
    "the run's own evaluation."
)
ConfidenceHelp = (
    "With which --target-risk holds for such texts; 0: on the evaluated examples alone."
)
ScoreHelp = "predictive_entropy, mutual_information (both in nats) or max_probability (1 minus it)."
ToleranceHelp = "Stop adding samples to texts whose probabilities have settled to within this."
BatchHelp = "Texts read, predicted and written at a time; 256, or 1 when typed at a terminal."


@in_options
def predict(
    context: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The folder of a run, or a saved ensemble.")
    ],
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help=TextsHelp)] = None,
    source: Annotated[str | None, typer.Option("--input", metavar="FILE", help=InputHelp)] = None,
    input_format: Annotated[str | None, typer.Option(metavar="KIND", help=InputFormatHelp)] = None,
    text: Annotated[str | None, typer.Option(metavar="COL", help=TextHelp)] = None,
    pair: Annotated[str | None, typer.Option(metavar="COL", help=PairHelp)] = None,
    keep: Annotated[list[str] | None, typer.Option(metavar="COL", help=KeepHelp)] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help=OutHelp)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    output: Annotated[str | None, typer.Option("--format", metavar="KIND", help=FormatHelp)] = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Leave the texts out of the output.")
    ] = False,
    abstain_above: Annotated[float | None, typer.Option(metavar="X", help=AboveHelp)] = None,
    target_risk: Annotated[float | None, typer.Option(metavar="R", help=RiskHelp)] = None,
    confidence: Annotated[float, typer.Option(metavar="P", help=ConfidenceHelp)] = 0.95,
    score: Annotated[str, typer.Option(metavar="NAME", help=ScoreHelp)] = "predictive_entropy",
    k: Annotated[int | None, typer.Option("--k", min=1, help="The first K samples alone.")] = None,
    tolerance: Annotated[float | None, typer.Option(metavar="P", help=ToleranceHelp)] = None,
    batch: Annotated[int | None, typer.Option(min=1, metavar="N", help=BatchHelp)] = None,
    device: Device = "auto",
) -> None:
    """Label, probability, entropy and mutual information of texts, as they come.

    One answer a text, in the order of the input, which may be of any length. An empty line gets
    an answer without label, so that the lines still match. A damaged line ends the command and is
    named; the answers before it stay.
    """
    if texts == ["-"] and source is None:
        texts = context.params["texts"] = None
    _refuse_idle(context)
    _bound_caches()
    if source is not None and texts:
        raise InputError(f"--input {source}: texts are given as arguments; leave one of both out")
    _check(abstain_above, target_risk, confidence, tolerance, score)
    form = _output_format(output, out)
    from bayesian_lora.cli.text_input import open_texts
    from bayesian_lora.experiment.predicting import find, open_service, wanted
    from bayesian_lora.utils.record_streams import check_out

    if out is not None:
        check_out(Path(out), overwrite)
    found = find(run)
    columns = wanted(found, text, pair, keep or ())
    with open_texts(texts or (), source, input_format, columns) as (records, typed):
        limit = _abstention(found, abstain_above, target_risk, confidence, score, k)
        service, predictor = open_service(found, limit, k=k, tolerance=tolerance, device=device)
        job = _Job(service, predictor, columns, not no_text, batch or (1 if typed else None))
        job.run(records, None if out is None else Path(out), form)


def _bound_caches() -> None:
    """Before torch is loaded: it keeps what it prepared for the last 1,024 shapes of a batch, and
    in a stream every batch has another, so that memory would go on growing for a long time.
    """
    for name in SHAPE_CACHES:
        os.environ.setdefault(name, CACHED_SHAPES)


def _refuse_idle(context: typer.Context) -> None:
    """Options that would act on nothing."""
    given = context.params
    if given["target_risk"] is None:
        refuse(context, ["confidence"], "it acts with --target-risk alone")
        if given["abstain_above"] is None:
            refuse(context, ["score"], "it acts with --abstain-above and --target-risk alone")
    if given["out"] is None:
        refuse(context, ["overwrite"], "it acts with --out alone")
    if given["texts"]:
        columns = ["input_format", "text", "pair", "keep"]
        refuse(context, columns, "it acts on an input, not on texts given as arguments")


def _check(
    above: float | None, risk: float | None, confidence: float, tolerance: float | None, score: str
) -> None:
    """Mistakes that need no file."""
    from bayesian_lora.abstention import Abstention, check_score, check_target

    if above is not None and risk is not None:
        raise InputError("--abstain-above and --target-risk exclude each other: the second finds "
                         "the threshold; drop one")  # fmt: skip
    if risk is not None and tolerance is not None:
        raise InputError(
            "--target-risk and --tolerance exclude each other: the threshold holds for the whole "
            "ensemble's probabilities, not for those nearby; drop one"
        )
    if risk is not None:
        check_target(risk, confidence)
    check_score(score, left_out=tolerance is not None)
    if above is not None:
        try:
            Abstention(above, score)
        except InputError as error:
            raise InputError(str(error).replace("above=", "abstain_above=")) from error


def _output_format(given: str | None, out: str | None) -> str:
    if given is None:
        return "csv" if out is not None and out.lower().endswith(".csv") else "jsonl"
    if given not in ("jsonl", "csv"):
        raise InputError(f"--format {given}: choose jsonl or csv")
    return given


def _abstention(
    found: "Found",
    above: float | None,
    target: float | None,
    confidence: float,
    score: str,
    k: int | None,
) -> "Abstention | None":
    from bayesian_lora.abstention import Abstention
    from bayesian_lora.experiment.predicting import found_threshold

    if found.regression and score != "predictive_entropy":
        raise InputError(
            f"--score {score}: a regression has no classes; --abstain-above acts on its sd"
        )
    if found.regression and target is not None:
        raise InputError(
            f"--target-risk {target:g}: a regression has no wrong labels; use --abstain-above, "
            "which acts on its sd"
        )
    if target is None:
        return None if above is None else Abstention(above, score)
    limit, split = found_threshold(found, target, confidence, score, k)
    typer.echo(limit.said(split), err=True)
    return Abstention(limit.above, limit.score)


class _Job:
    """Records in, answers out, block by block; what there is to say goes to standard error."""

    def __init__(
        self,
        service: "Service",
        predictor: "Predictor",
        wanted: "Wanted",
        with_text: bool,
        block: int | None,
    ) -> None:
        from bayesian_lora.serving import BLOCK

        self.service, self.predictor = service, predictor
        self.block = block or BLOCK
        self.kept = tuple(wanted.kept)
        self.texts = ("text", "pair") if with_text else ()
        if with_text and wanted.width != 2 and len(wanted.texts) != 2:
            self.texts = ("text",)
        self.empty = 0

    def run(self, records: Iterator["Record"], out: Path | None, form: str) -> None:
        from bayesian_lora.utils.record_streams import RecordWriter, part_of, streamed

        nested = {"probabilities": [str(label) for label in self.service.labels]}
        nested = {} if self.service.regression else nested
        names = [*self.kept, *self.texts, *self.service.names]
        try:
            with _standard_output() if out is None else streamed(out) as file:
                writer = RecordWriter(file, form, names, nested)
                self._serve(records, writer, shown=out is not None or not sys.stdout.isatty())
        except BrokenPipeError:
            if out is not None:
                raise
            _let_go_of_output()
            raise typer.Exit(BROKEN_PIPE) from None
        except BaseException:
            if out is not None and part_of(out).is_file():
                typer.echo(f"Stopped; the answers before it are in {part_of(out)}", err=True)
            raise
        for note in self._notes(writer.written, out):
            typer.echo(note, err=True)

    def _serve(self, records: Iterator["Record"], writer: "RecordWriter", shown: bool) -> None:
        from bayesian_lora.serving import in_blocks

        began = last = time.monotonic()
        shown = shown and sys.stderr.isatty()
        for part in in_blocks(records, self.block):
            texts = [r.texts[0] if len(r.texts) == 1 else r.texts for r in part]
            answers = self.service.answer(texts)
            self.empty += sum("reason" in answer for answer in answers)
            writer.write([self._row(r, a) for r, a in zip(part, answers, strict=True)])
            now = time.monotonic()
            if shown and now - last > 0.2:
                last, rate = now, writer.written / (now - began)
                print(f"\r{writer.written:,} texts, {rate:,.0f} a second ", end="", file=sys.stderr)
                sys.stderr.flush()
        writer.close()
        if shown and last > began:
            print(file=sys.stderr)

    def _row(self, record: "Record", answer: dict[str, Any]) -> dict[str, Any]:
        # Without the texts' names there is nothing to pair them with.
        return {**record.kept, **dict(zip(self.texts, record.texts, strict=False)), **answer}

    def _notes(self, written: int, out: Path | None) -> list[str]:
        notes = []
        if self.predictor.cut:
            notes.append(
                f"{self.predictor.cut} of {written} texts reached {self.predictor.max_length} "
                "tokens, after which the model reads nothing."
            )
        if not written:
            notes.append("The input holds no text, so there is no answer.")
        if self.empty:
            notes.append(f"Empty, so without a label: {self.empty} of {written} texts.")
        if written and self.service.members == 1:
            what = "members_sd" if self.service.regression else "mutual_information"
            notes.append(f"{what} is null: one member alone cannot disagree with itself.")
        if written and self.service.regression and self.predictor.ensemble.noise_std is None:
            notes.append("sd, lower and upper are null: the members carry no noise_std.")
        if out is not None:
            notes.append(f"{written} answers in {out}")
        return notes


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    sys.stdout.flush()
    yield sys.stdout.buffer


def _let_go_of_output() -> None:
    """The reader has gone: what Python still flushes at its end must not complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
