"""`bayesian-lora report`: a run or a comparison as one offline HTML file."""

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Examples:\n\n"
    "bayesian-lora report runs/demo\n\n"
    "bayesian-lora report runs/demo --out demo.html\n\n"
    "bayesian-lora report runs/comparison_mrpc_minilm"
)


def report(
    folder: Annotated[
        str, typer.Argument(metavar="RUN|COMPARISON", help="The folder of a run or comparison.")
    ],
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where it goes; report.html in the folder by default."),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The data folder of the texts; the run's own by default."),
    ] = None,
) -> None:
    """One offline HTML file: is the posterior worth it, with charts, diagnostics and provenance.

    It is made from the folder's files alone, without the model; the texts of single inputs come
    from the data where they are there. The file asks the network for nothing.
    """
    if not Path(folder).is_dir():
        from bayesian_lora.errors import InputError

        raise InputError(f"{folder}: not a folder; name the folder of a run or a comparison")
    from bayesian_lora.experiment.report import write_report

    write_report(folder, out=out, data_dir=data_dir)
