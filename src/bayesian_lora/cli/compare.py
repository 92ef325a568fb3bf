"""`bayesian-lora compare`: one run for each combination of values, and one table."""

from typing import Annotated

import typer

EPILOG = (
    "Examples:\n\n"
    "bayesian-lora compare configs/experiment_comparison_sst2_bert.yaml\n\n"
    "bayesian-lora compare configs/demo.yaml sampler.name=sgld,psgld prior.std=0.1,0.3 "
    "output.dir=runs/priors"
)


def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=V1,V2",
            help="Keys to vary; with one value, keys to change in every cell. "
            "Without keys to vary, the config's compare: section says what is compared.",
        ),
    ] = None,
) -> None:
    """One run for each combination of values, and one table.

    Cells that differ only in their sampler share one warm start. Given again, the command goes on
    where it ended: cells that are done are not run again. Exit status 1 if a cell failed.
    """
    from bayesian_lora.experiment.cells import make_plan

    make_plan(config, arguments or ())  # answers mistakes before torch is loaded
    from bayesian_lora.experiment.compare import compare as run
    from bayesian_lora.experiment.compare import failed_cells

    if failed_cells(run(config, arguments or ())):
        raise typer.Exit(1)
