"""`bayesian-lora retrain`: a stack trained further, measured on every task before and after."""

from typing import Annotated

import typer

from bayesian_lora.cli.options import (
    BatchSize,
    DataDir,
    Device,
    Epochs,
    Examples,
    OutBeside,
    PriorStd,
    Rate,
    Seed,
    in_options,
)

EPILOG = (
    "Examples:\n\n"
    "bayesian-lora retrain runs/stack-sst2-cola --on sst2\n\n"
    "bayesian-lora retrain runs/stack-sst2-cola --on sst2,cola --mixing sum --out runs/both\n\n"
    "bayesian-lora retrain runs/stack-sst2-cola --on cola --part cola --distillation 1"
)


@in_options
def retrain(
    stack: Annotated[str, typer.Argument(metavar="STACK", help="A stack's folder.")],
    on: Annotated[str, typer.Option("--on", metavar="TASK,…", help="Tasks to train on.")],
    out: OutBeside = None,
    part: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this part's columns (and heads) move.")
    ] = None,
    mixing: Annotated[
        str, typer.Option(help="Several tasks: alternate (batch by batch) or sum (in each batch).")
    ] = "alternate",
    orthogonality: Annotated[
        float, typer.Option(metavar="X", help="Weight of the overlap of the parts' directions.")
    ] = 0.0,
    distillation: Annotated[
        float, typer.Option(metavar="X", help="Weight of KL(single adapter || stack), all heads.")
    ] = 0.0,
    examples: Examples = None,
    epochs: Epochs = 3,
    lr: Rate = 1e-3,
    batch_size: BatchSize = 32,
    prior_std: PriorStd = 1.0,
    data_dir: DataDir = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a stack further on one or several of its tasks; both ends are measured on all tasks.

    A tenth of each task's training examples is held out: it decides on the learning rate and on
    the epoch that is kept. With the --examples and --seed of the adapters' own runs
    (data.train_examples, seed; a tenth held out there too) these are examples that the adapters
    have not seen. Heads of tasks that are not trained on stay as they are.
    """
    from bayesian_lora.experiment.compose import Training, retrain_folder

    retrain_folder(
        stack,
        out,
        tasks=tuple(name.strip() for name in on.split(",") if name.strip()),
        part=part,
        mixing=mixing,
        orthogonality=orthogonality,
        distillation=distillation,
        training=Training(examples, epochs, lr, batch_size, prior_std, data_dir, device, seed),
    )
