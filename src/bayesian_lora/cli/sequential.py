"""`bayesian-lora sequential`: tasks grown one after the other, each on columns of its own."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bayesian_lora.composition.column_files import Grown
    from bayesian_lora.composition.sequential import Growth
    from bayesian_lora.composition.stack import StackTask
    from bayesian_lora.composition.task_data import TaskData
    from bayesian_lora.data.tasks import TaskSpec
    from bayesian_lora.models.sources import ModelSource

EPILOG = (
    "Examples:\n\n"
    "bayesian-lora sequential sst2 cola mnli --examples 10000\n\n"
    "bayesian-lora sequential sst2 cola --seeds 4 --out runs/grown\n\n"
    "bayesian-lora sequential sst2 cola mnli --seeds 4 --out runs/grown\n\n"
    "bayesian-lora sequential first=synthetic second=synthetic --model minilm"
)
HELD_OUT = 0.1
"""Of each task's training examples."""
MAX_LENGTH = 128
"""Tokens, unless the model reads fewer."""


Tasks = Annotated[
    list[str],
    typer.Argument(metavar="TASK…", help="In the order of growth; NAME=TASK renames one."),
]
Model = Annotated[str, typer.Option(help="A hub id, a folder, or minilm.")]
Target = Annotated[str, typer.Option(metavar="NAME,…", help="Layers that get columns.")]
Rank = Annotated[int, typer.Option(metavar="R", min=1, help="Columns a task.")]
AlphaHelp = "Of a task's columns, whose scale is alpha/R; 8 R by default."
Alpha = Annotated[float | None, typer.Option(metavar="X", help=AlphaHelp)]
Count = Annotated[int | None, typer.Option(metavar="N", min=2, help="Training examples a task.")]
Epochs = Annotated[int, typer.Option(min=1, help="At most.")]
Rate = Annotated[float, typer.Option(help="Adam's, halved where held-out loss stalls.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples in a batch.")]
Prior = Annotated[float, typer.Option(help="Standard deviation of the Gaussian prior.")]
LengthHelp = "Tokens of a text; by default 128, or what the model reads."
Length = Annotated[int | None, typer.Option(metavar="N", min=4, help=LengthHelp)]
Seeds = Annotated[int, typer.Option(min=1, help="Growths side by side.")]
TransferHelp = "Train each task alone as well, to measure what earlier ones give it."
Transfer = Annotated[bool, typer.Option("--transfer/--no-transfer", help=TransferHelp)]
OutHelp = "Where to write, or to go on; runs/sequential_TASKS by default."
Out = Annotated[str | None, typer.Option(metavar="DIR", help=OutHelp)]
DataDir = Annotated[
    str | None, typer.Option(metavar="DIR", help="Local data; else BAYESIAN_LORA_DATA.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Seed = Annotated[int, typer.Option(min=0)]


def sequential(
    tasks: Tasks,
    model: Model = "minilm",
    target: Target = "query,key,value",
    rank_per_task: Rank = 1,
    alpha: Alpha = None,
    examples: Count = None,
    epochs: Epochs = 8,
    lr: Rate = 3e-3,
    batch: Batch = 32,
    prior_std: Prior = 0.3,
    max_length: Length = None,
    seeds: Seeds = 1,
    transfer: Transfer = True,
    out: Out = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Grow tasks one after the other: each adds columns to the factors and a head, all else stays.

    A task's predictions never change again: a mask takes the columns that came later away. Its
    folder DIR/tasks/TASK is an adapter by itself. Given again with more tasks and the same DIR,
    the command goes on from those it has.
    """
    named = named_tasks(tasks)  # answers mistakes before torch is loaded
    from bayesian_lora.composition.fit import Recipe
    from bayesian_lora.composition.sequential import Growth

    growth = Growth(
        model,
        Recipe(epochs=epochs, batch_size=batch, lr=lr, prior_std=prior_std),
        rank=rank_per_task,
        alpha=alpha,
        target_modules=tuple(dict.fromkeys(re.findall(r"[^\s,]+", target))),
        members=seeds,
        seed=seed,
    )
    _grow(growth, named, _Options(max_length, examples, transfer, out, data_dir, device))


@dataclass(frozen=True)
class _Options:
    """What does not act on how a task is fitted."""

    max_length: int | None
    examples: int | None
    transfer: bool
    out: str | None
    data_dir: str | None
    device: str


def _grow(growth: "Growth", named: "Sequence[tuple[str, TaskSpec]]", options: _Options) -> None:
    from pathlib import Path

    from bayesian_lora.composition.sequential import grow
    from bayesian_lora.composition.stack import StackTask
    from bayesian_lora.data.preparation import data_folder
    from bayesian_lora.errors import InputError
    from bayesian_lora.experiment.building import resolve_device
    from bayesian_lora.experiment.setup import ask_hub_once
    from bayesian_lora.models.sources import resolve_model
    from bayesian_lora.progress import Progress
    from bayesian_lora.samplers.failures import Diverged

    device, progress = resolve_device(options.device), Progress()
    folder = Path(options.out or f"runs/sequential_{'_'.join(name for name, _ in named)}")
    source, sets = resolve_model(growth.model), data_folder(options.data_dir, "--data-dir")
    for _, spec in named:
        ask_hub_once(spec, source, sets)
    length = _length(source, options.max_length)
    tasks = [
        StackTask(name, spec.name, spec.label_names, spec.likelihood, length)
        for name, spec in named
    ]
    try:
        grown = grow(
            growth,
            tasks,
            lambda: _load(tasks, source, sets, options.examples, growth.seed),
            folder=folder,
            alone=options.transfer,
            device=device,
            progress=progress,
        )
    except Diverged as error:
        rate = growth.recipe.lr
        raise InputError(f"--lr {rate:g}: {error}; lower it, such as to {rate / 4:g}") from error
    for line in lines(grown):
        progress.say(line)
    progress.say(f"\nWritten: {folder}\nEvaluate it: bayesian-lora eval {folder}")


def named_tasks(arguments: "Sequence[str]") -> "list[tuple[str, TaskSpec]]":
    """TASK or NAME=TASK → (name, task).

    Raises:
        InputError: an unknown task (the nearest is named).
    """
    from bayesian_lora.data.glue_datasets import get_task

    parts = [argument.rpartition("=") for argument in arguments]
    specs = [get_task(task) for *_, task in parts]
    return [
        (name if equals else spec.name, spec)
        for (name, equals, _), spec in zip(parts, specs, strict=True)
    ]


def _length(source: "ModelSource", wanted: int | None) -> int:
    """Tokens of a text: as wanted, if the model reads so many; 128, or what it reads."""
    from transformers import AutoConfig, AutoTokenizer

    from bayesian_lora.data.preparation import check_max_length, length_limit
    from bayesian_lora.models.sources import load_pretrained

    tokenizer = load_pretrained(AutoTokenizer, source)
    limit = length_limit(tokenizer, load_pretrained(AutoConfig, source))
    check_max_length(wanted or 0, limit, source.name)
    return wanted or min(MAX_LENGTH, limit)


def _load(
    tasks: "Sequence[StackTask]",
    source: "ModelSource",
    folder: "Path | None",
    examples: int | None,
    seed: int,
) -> "Mapping[str, TaskData]":
    from transformers import AutoTokenizer

    from bayesian_lora.composition.task_data import load_task_data
    from bayesian_lora.models.sources import load_pretrained

    tokenizer = load_pretrained(AutoTokenizer, source)
    return {
        task.name: load_task_data(
            task,
            tokenizer,
            data_dir=folder,
            train_examples=examples,
            validation_share=HELD_OUT,
            seed=seed,
        )
        for task in tasks
    }


def lines(grown: "Grown") -> list[str]:
    """What a person sees of a growth: its figures, transfer, forgetting and angles."""
    report = grown.report
    found = ["", *_table(_own_rows(report))]
    if any(row["transfer"] for row in report.values()):
        found += ["", "Forward transfer: on top of earlier columns, less the task alone"]
        found += _table(_transfer_rows(report))
    if len(report) > 1:
        found += ["", "After later tasks: with the task's mask, and with all columns on"]
        found += _table(_later_rows(report))
        found += ["", "New columns to old (in brackets: in random position)"]
        found += _table(_angle_rows(report))
    return found


def _own_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for task, row in report.items():
        added = row["parameters"]
        for split, figures in row["after"].items():
            own = [f"{name} {_value(figures, name):.4f}" for name in _names(figures)]
            start, stop = row["columns"]
            columns = f"{start + 1}" if stop == start + 1 else f"{start + 1}–{stop}"
            rows.append([task, columns, f"{added['columns']:,} + {added['head']:,}", split, *own])
    return [["task", "columns", "added (columns + head)", "split", "right after training"], *rows]


def _transfer_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for task, row in report.items():
        gains = row["transfer"] or {}
        rows.append([task, *(f"{name} {_signed(gains[name])}" for name in _names(gains))])
    return [row for row in rows if len(row) > 1]


def _later_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for task, row in report.items():
        for after, entry in row["later"].items():
            lost = entry["forgetting_unmasked"]
            same = "identical" if entry["identical"] else f"{entry['largest_difference']:.2g} off"
            own = [f"{name} {_signed(lost[name], -1)}" for name in _names(lost)]
            rows.append([task, after, same, *own])
    return [["task", "after", "its mask", "no mask: change"], *rows]


def _angle_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = [["new", "old", "cosine of the updates", "overlap left", "overlap right"]]
    for task, row in report.items():
        for entry in row["angles"]:
            mean, random = entry["mean"], entry["mean"]["random"]
            cells = [
                f"{_digits(mean[name])} ({sign}{_digits(random[name])})"
                for name, sign in (("cosine", "±"), ("phi_left", ""), ("phi_right", ""))
            ]
            rows.append([task, entry["against"], *cells])
    return rows


def _names(figures: dict[str, Any]) -> list[str]:
    """The figures shown, of those that are known."""
    known = [name for name in ("accuracy", "f1", "mcc", "nll") if name in figures]
    return [name for name in known if _value(figures, name) is not None]


def _value(figures: dict[str, Any], name: str) -> Any:
    """A figure; of several members the mean of theirs."""
    value = figures.get("single", figures)[name]
    return value["mean"] if isinstance(value, dict) else value


def _signed(spread: dict[str, Any], sign: int = 1) -> str:
    sd = "" if spread["sd"] is None else f" (sd {spread['sd']:.4f})"
    return f"{sign * spread['mean'] + 0.0:+.4f}{sd}"


def _digits(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _table(rows: list[list[str]]) -> list[str]:
    """Columns of one width, two spaces apart; the last may be ragged."""
    count = max(map(len, rows))
    padded = [row + [""] * (count - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in padded
    ]
