"""`bayesian-lora sequential`: tasks grown one after the other, each on columns of its own."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from bayesian_lora.cli.options import (
    BatchSize,
    DataDir,
    Device,
    Epochs,
    Examples,
    PriorStd,
    Rate,
    Seed,
    in_options,
)

if TYPE_CHECKING:
    from bayesian_lora.data.tasks import TaskSpec

EPILOG = (
    "Examples:\n\n"
    "bayesian-lora sequential sst2 cola mnli --examples 8000\n\n"
    "bayesian-lora sequential sst2 cola --seeds 4 --out runs/grown\n\n"
    "bayesian-lora sequential sst2 cola mnli --seeds 4 --out runs/grown\n\n"
    "bayesian-lora sequential first=synthetic second=synthetic --model minilm"
)
Tasks = Annotated[
    list[str],
    typer.Argument(metavar="TASK…", help="In the order of growth; NAME=TASK renames one."),
]
Model = Annotated[str, typer.Option(help="A hub id, a folder, or minilm.")]
Target = Annotated[str, typer.Option(metavar="NAME,…", help="Layers that get columns.")]
Rank = Annotated[int, typer.Option(metavar="R", min=1, help="Columns a task.")]
AlphaHelp = "Of a task's columns, whose scale is alpha/R; 8 R by default."
Alpha = Annotated[float | None, typer.Option(metavar="X", help=AlphaHelp)]
LengthHelp = "Tokens of a text; by default 128, or what the model reads."
Length = Annotated[int | None, typer.Option(metavar="N", min=4, help=LengthHelp)]
Seeds = Annotated[int, typer.Option(min=1, help="Growths side by side.")]
TransferHelp = "Train each task alone as well, to measure what earlier ones give it."
Transfer = Annotated[bool, typer.Option("--transfer/--no-transfer", help=TransferHelp)]
OutHelp = "Where to write, or to go on; runs/sequential-TASKS by default."
Out = Annotated[str | None, typer.Option(metavar="DIR", help=OutHelp)]


@in_options
def sequential(
    tasks: Tasks,
    model: Model = "minilm",
    target: Target = "query,key,value",
    rank_per_task: Rank = 1,
    alpha: Alpha = None,
    examples: Examples = None,
    epochs: Epochs = 8,
    lr: Rate = 1e-3,
    batch_size: BatchSize = 32,
    prior_std: PriorStd = 1.0,
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
    the command goes on from those it has. New columns and heads begin at nothing, so they take
    more epochs than a stack that is trained further.
    """
    named = named_tasks(tasks)  # answers mistakes before torch is loaded
    from bayesian_lora.composition.fit import Recipe
    from bayesian_lora.composition.sequential import Growth
    from bayesian_lora.experiment.growing import grow_folder

    growth = Growth(
        model,
        Recipe(epochs=epochs, batch_size=batch_size, lr=lr, prior_std=prior_std),
        rank=rank_per_task,
        alpha=alpha,
        target_modules=tuple(dict.fromkeys(re.findall(r"[^\s,]+", target))),
        members=seeds,
        seed=seed,
    )
    grow_folder(
        growth,
        named,
        out,
        max_length=max_length,
        examples=examples,
        transfer=transfer,
        data_dir=data_dir,
        device=device,
    )


def named_tasks(arguments: Sequence[str]) -> "list[tuple[str, TaskSpec]]":
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
