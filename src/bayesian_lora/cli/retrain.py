"""`bayesian-lora retrain`: a stack trained further, measured on every task before and after."""

from typing import Annotated

import typer

EPILOG = (
    "Examples:\n\n"
    "bayesian-lora retrain runs/stack-sst2-cola --on sst2\n\n"
    "bayesian-lora retrain runs/stack-sst2-cola --on sst2,cola --mixing sum --out runs/both\n\n"
    "bayesian-lora retrain runs/stack-sst2-cola --on cola --part cola --distillation 1"
)


def retrain(
    stack: Annotated[str, typer.Argument(metavar="STACK", help="A stack's folder.")],
    on: Annotated[str, typer.Option("--on", metavar="TASK,…", help="Tasks to train on.")],
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where to write; by default beside STACK.")
    ] = None,
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
    examples: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Training examples a task.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="At most.")] = 3,
    lr: Annotated[float, typer.Option(help="Adam's, halved where held-out loss stalls.")] = 2e-3,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    prior_std: Annotated[float, typer.Option(help="Of the Gaussian prior.")] = 1.0,
    data_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Local data; else BAYESIAN_LORA_DATA.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a stack further on one or several of its tasks; both ends are measured on all tasks.

    A tenth of each task's training examples is held out: it decides on the learning rate and on
    the epoch that is kept. Heads of tasks that are not trained on stay as they are.
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
