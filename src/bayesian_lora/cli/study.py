"""`bayesian-lora study`: baselines, stacks, further training, gates and one report of them all."""

from typing import Annotated

import typer

EPILOG = (
    "Examples:\n\n"
    "bayesian-lora study configs/lora_ensembling/study.yaml\n\n"
    "bayesian-lora study configs/lora_ensembling/study_demo.yaml output.dir=runs/study_demo\n\n"
    "bayesian-lora study configs/lora_ensembling/study.yaml baselines.model.name=bert-base-uncased"
)


def study(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Keys of the study to change; baselines.KEY changes every baseline's config.",
        ),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Make no step, write the report of what is done.")
    ] = False,
) -> None:
    """A study of LoRA ensembling from config files: steps, then one HTML report of them.

    Given again, the command goes on where it ended: steps that are done are not made again, those
    whose settings have changed are, and what they made before is kept; without its folder a step
    is made anew. Exit status 1 if a step failed.
    """
    from bayesian_lora.experiment.study_config import load_study

    load_study(config, overrides or ())  # answers mistakes before torch is loaded
    from bayesian_lora.experiment.study import failed_steps, run_study

    if failed_steps(run_study(config, overrides or (), report_only=report_only)):
        raise typer.Exit(1)
