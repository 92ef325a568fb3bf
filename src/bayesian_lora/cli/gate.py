"""`bayesian-lora gate`: which adapters of a stack act on a text, learnt from the text alone."""

from typing import Annotated, Any

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
    refuse,
)

EPILOG = (
    "Examples:\n\n"
    "bayesian-lora gate runs/stack-sst2-cola\n\n"
    "bayesian-lora gate runs/stack-sst2-cola --kind token --top-k 1 --balance 0.01 "
    "--out runs/mixture\n\n"
    "bayesian-lora gate runs/stack-sst2-cola --posterior-steps 500\n\n"
    "bayesian-lora gate runs/stack-sst2-cola-gated --eval"
)
KIND_HELP = (
    "What the weights depend on: adapter (nothing), layer, sequence (the whole text), token (each "
    "layer's input), arrow (the same, without parameters)."
)
UNFROZEN_HELP = "Adapters and heads are trained too."
POSTERIOR_HELP = "Steps of SGLD on the gate after the fit."


WITH_EVAL = ("context", "stack", "evaluate", "data_dir", "device")
"""What acts on a gate that is there."""


@in_options
def gate(
    context: typer.Context,
    stack: Annotated[str, typer.Argument(metavar="STACK", help="A stack's folder.")],
    kind: Annotated[str, typer.Option(help=KIND_HELP)] = "sequence",
    temperature: Annotated[float, typer.Option(help="The gate's scores are divided by it.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", help="Only the N largest weights act.")
    ] = None,
    balance: Annotated[float, typer.Option(metavar="X", help="Of the load-balance term.")] = 0.0,
    unfrozen: Annotated[bool, typer.Option("--unfrozen", help=UNFROZEN_HELP)] = False,
    examples: Examples = None,
    epochs: Epochs = 3,
    lr: Rate = 2e-2,
    batch_size: BatchSize = 32,
    prior_std: PriorStd = 1.0,
    posterior_steps: Annotated[int, typer.Option(metavar="N", min=0, help=POSTERIOR_HELP)] = 0,
    step_size: Annotated[float, typer.Option(help="Of those steps.")] = 1e-3,
    evaluate: Annotated[
        bool, typer.Option("--eval", help="Evaluate a gate that is there; train nothing.")
    ] = False,
    out: OutBeside = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a gate over a stack's adapters on a mixture of its tasks; no text comes with its task.

    Evaluated is the mixture of the tasks' default splits: accuracy of the task the gate names, of
    task and label, and, beside it, of the label given the true task. Stack and gate are written
    into one folder, each member of an ensemble with a gate of its own. Give --examples and --seed
    of the adapters' own runs, so that the tenth held out here is one the adapters have not seen.
    """
    if evaluate:
        others = (name for name in context.params if name not in WITH_EVAL)
        refuse(context, others, "--eval trains and writes nothing new")
    from bayesian_lora.composition.gates import GateOptions

    chosen: Any = kind
    options = GateOptions(
        chosen, temperature, top_k, balance, not unfrozen, posterior_steps, step_size
    )
    from bayesian_lora.experiment.compose import Training
    from bayesian_lora.experiment.gating import evaluate_gated, gate_folder

    if evaluate:
        evaluate_gated(stack, data_dir=data_dir, device=device)
        return
    training = Training(examples, epochs, lr, batch_size, prior_std, data_dir, device, seed)
    gate_folder(stack, out, options=options, training=training)
