"""`bayesian-lora`: commands, their help with examples, and mistakes as one line.

Heavy imports happen inside the commands, so that `--help` is quick.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bayesian_lora import __version__
from bayesian_lora.cli import (
    compare,
    gate,
    ood,
    predict,
    report,
    retrain,
    sequential,
    similarity,
    stack,
    study,
)
from bayesian_lora.errors import InputError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Posterior sampling, ensembling and composition of LoRA adapters.",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config keys to change.")
]
FREE_IN_EVAL = ("data.dir", "device", "output.dir", "output.overwrite")
STACK_FILES = ("stack.json", "columns.json", "gate.safetensors")
"""Of a stack, whole or not: what lacks is then named."""
KHelp = "Evaluate the first K samples (spread evenly over chains)."
ToleranceHelp = "Stop adding samples to inputs whose probabilities have settled to within this."


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(
    epilog="Examples:\n\n"
    "bayesian-lora train configs/demo.yaml\n\n"
    "bayesian-lora train configs/experiment_sst2_bert_sgld.yaml model.name=minilm "
    "data.train_examples=5000\n\n"
    "bayesian-lora train configs/demo.yaml sampler.name=sghmc sampler.step_size=auto "
    "output.dir=runs/sghmc"
)
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a run that was stopped.")
    ] = True,
) -> None:
    """Warm start, burn-in, sampling and evaluation, as a config file says.

    A run that was stopped goes on where it was, to the same samples; a finished one is extended
    by a larger sampler.num_samples. Another config in the same folder is refused.
    """
    from bayesian_lora.config import load_config

    resolved = load_config(config, overrides or ())
    if resolved.compare:
        typer.echo("The compare: section acts in 'bayesian-lora compare' only; this is one run.")
    from bayesian_lora.experiment.train import train as run

    try:
        run(resolved, resume=resume)
    except (KeyboardInterrupt, SystemExit, OSError):
        from bayesian_lora.experiment.resume import how_to_go_on

        if (words := how_to_go_on(Path(resolved.output.dir or ""))) is not None:
            typer.echo(f"Stopped; {words}", err=True)
        raise


@app.command(
    name="eval",
    epilog="Examples:\n\n"
    "bayesian-lora eval runs/demo\n\n"
    "bayesian-lora eval runs/demo --split shifted\n\n"
    "bayesian-lora eval configs/experiment_sst2_bert_sgld.yaml --k 10\n\n"
    "bayesian-lora eval runs/demo --tolerance 0.01\n\n"
    f"{ood.EXAMPLES}\n\n"
    "bayesian-lora eval runs/stack-sst2-cola",
)
def evaluate(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The folder of a run or stack, or a run's config.")
    ],
    overrides: Overrides = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help=KHelp)] = None,
    single: Annotated[bool, typer.Option("--single", help="The latest sample alone.")] = False,
    split: Annotated[str | None, typer.Option(help="A split of the task by name.")] = None,
    tolerance: Annotated[float | None, typer.Option(metavar="P", help=ToleranceHelp)] = None,
    foreign: Annotated[
        str | None, typer.Option("--ood", metavar="NAME_OR_PATH", help=ood.HELP)
    ] = None,
) -> None:
    """Evaluate a run's ensemble on a split, all samples by default; of a stack, all its tasks.

    What --k, --single or --tolerance show is stored nowhere. With --ood, whether the run's
    uncertainty tells another set from the split. A stack takes --split, data.dir=… and device=…
    alone, a gated one data.dir=… and device=….
    """
    if single and k is not None:
        raise InputError(f"--k {k} and --single exclude each other: give one of them")
    if any((Path(run) / name).is_file() for name in STACK_FILES):
        chosen = k is not None or single or tolerance is not None or foreign is not None
        _evaluate_stack(run, overrides or (), split, chosen)
        return
    root, data_dir, device = _locate(run, overrides or ())
    if foreign is not None:
        given: dict[str, object] = {"k": k, "single": single, "tolerance": tolerance}
        ood.evaluate_ood(root, foreign, split=split, chosen=given, data_dir=data_dir, device=device)
        return
    from bayesian_lora.experiment.evaluate import evaluate_run

    members = "latest" if single else (k if k is not None else "all")
    evaluate_run(
        root,
        split=split,
        members=members,
        tolerance=tolerance,
        data_dir=data_dir,
        device=device,
    )


@app.command(epilog="Example:\n\nbayesian-lora doctor")
def doctor() -> None:
    """What this machine offers: versions, device, precision, hub, local data, packaged weights."""
    from bayesian_lora.cli.doctor import report

    for line in report():
        typer.echo(line)


@app.command(epilog="Examples:\n\nbayesian-lora verify\n\nbayesian-lora verify sgld sghmc --seed 1")
def verify(
    samplers: Annotated[
        list[str] | None, typer.Argument(metavar="SAMPLER", help="Samplers; all by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the toy chains.")] = 0,
) -> None:
    """Measure the samplers against the laws they claim, on toy posteriors; status 1 if one fails.

    Each is checked for the unit of its noise (of four settings, the one furthest off is shown) and
    for its stationary law; broken versions of it must fail the same checks.
    """
    from bayesian_lora.cli.verify import verify as run

    if not run(samplers or (), seed, typer.echo):
        raise typer.Exit(1)


app.command(epilog=compare.EPILOG)(compare.compare)
app.command(epilog=predict.EPILOG)(predict.predict)
app.command(epilog=report.EPILOG)(report.report)
app.command(epilog=stack.EPILOG)(stack.stack)
app.command(epilog=retrain.EPILOG)(retrain.retrain)
app.command(epilog=gate.EPILOG)(gate.gate)
app.command(epilog=sequential.EPILOG)(sequential.sequential)
app.command(epilog=study.EPILOG)(study.study)
app.command(epilog=similarity.EPILOG)(similarity.similarity)


def _evaluate_stack(run: str, overrides: Sequence[str], split: str | None, chosen: bool) -> None:
    """Every task that a stack carries; `chosen`: whether members were."""
    if chosen:
        raise InputError(
            f"{run}: a stack; --k, --single, --tolerance and --ood are for runs, leave them out"
        )
    if bare := [item for item in overrides if "=" not in item]:
        raise InputError(f"{bare[0]!r}: an override is KEY=VALUE, such as device=cpu")
    given = {key: value for key, _, value in (item.partition("=") for item in overrides)}
    if odd := sorted(given.keys() - {"data.dir", "device"}):
        raise InputError(f"{odd[0]}: a stack takes data.dir=… and device=… alone; leave it out")
    where, device = given.get("data.dir"), given.get("device", "auto")
    from bayesian_lora.experiment.gating import evaluate_gated, has_gate

    if has_gate(run):
        if split is not None:
            raise InputError(
                f"--split {split}: a gate is measured on the mixture of its tasks' default splits; "
                "leave it out"
            )
        evaluate_gated(run, data_dir=where, device=device)
        return
    from bayesian_lora.experiment.stack_eval import evaluate_folder

    evaluate_folder(run, split=split, data_dir=where, device=device)


def _locate(run: str, overrides: Sequence[str]) -> tuple[Path, str | None, str | None]:
    """The run's folder, and data folder and device where the overrides name them.

    Other overrides cannot change a run that is made: they must agree with it.
    """
    from bayesian_lora.config import load_config, load_run_config, value_of

    path = Path(run)
    if path.is_dir() and not (path / "config.yaml").is_file():
        raise InputError(f"{path}: no run there, it has no config.yaml; name a run's folder")
    config = load_run_config(path, overrides) if path.is_dir() else load_config(path, overrides)
    assert config.output.dir is not None
    folder = path if path.is_dir() else Path(config.output.dir)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no run there yet; make it with 'bayesian-lora train {run}', or name a "
            "run's folder"
        )
    if (folder / "comparison.json").is_file():
        raise InputError(f"{folder}: a comparison; name the folder of one of its cells, in it")
    own = load_run_config(folder)
    given = {key: value_of(config, key) for key in (item.partition("=")[0] for item in overrides)}
    for key, value in given.items():
        if key not in FREE_IN_EVAL and value != value_of(own, key):
            raise InputError(
                f"{key}={value}: {folder} was made with {key}={value_of(own, key)}; leave it out, "
                "or name the run you mean with output.dir=…"
            )
    return folder, given.get("data.dir"), given.get("device")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as an interrupt does, in good order, with status 143.

    From the first moment on: a run has handlers of its own only while it is under way.
    """
    ignored = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake is one line and status 2, an interrupt status 130."""
    try:
        with _terminable():
            app(args=list(arguments) if arguments is not None else None)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as error:
        if error.code == 130:  # what typer makes of an interrupt
            print("Interrupted.", file=sys.stderr)
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"Error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
