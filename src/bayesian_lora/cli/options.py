"""Options that several commands have, called and described alike, and mistakes in their terms."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Annotated, ParamSpec

import typer

from bayesian_lora.errors import InputError

P = ParamSpec("P")
IN_CONFIGS = {"data.dir": "data_dir", "data.max_length": "max_length", "model.name": "model"}
"""What errors name as configs do → the parameter of a command."""

Examples = Annotated[
    int | None,
    typer.Option(metavar="N", min=2, help="Training examples a task; all of them by default."),
]
Epochs = Annotated[int, typer.Option(metavar="N", min=1, help="At most.")]
Rate = Annotated[
    float, typer.Option(metavar="X", help="Adam's, halved where the held-out loss stalls.")
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Examples in a batch.")]
PriorStd = Annotated[
    float, typer.Option(metavar="X", help="Standard deviation of the Gaussian prior.")
]
DataDir = Annotated[
    str | None, typer.Option(metavar="DIR", help="Local data; else BAYESIAN_LORA_DATA, or the hub.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:<number> or mps.")]
Seed = Annotated[
    int, typer.Option(min=0, help="Of all that is drawn: examples, their order, starts, noise.")
]
OutBeside = Annotated[
    str | None, typer.Option(metavar="DIR", help="A new folder; by default beside STACK.")
]


def option(name: str) -> str:
    """A parameter as a user writes it."""
    return "--" + name.replace("_", "-")


def in_options(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose mistakes name its options, where Python's or a config's names stand."""
    names = list(inspect.signature(command).parameters)

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            raise InputError(_translated(str(error), names)) from error

    return run


def _translated(message: str, names: Iterable[str]) -> str:
    for config, name in IN_CONFIGS.items():
        if name in names:
            message = message.replace(config, option(name))
    wanted = "|".join(names)
    return re.sub(rf"(?<![\w./-])({wanted})=", lambda found: f"{option(found[1])}=", message)


def refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raises InputError for the first of these parameters on the command line: they would act on
    nothing, for this reason.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{option(name)}: {why}; leave it out")
