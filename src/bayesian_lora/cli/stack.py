"""`bayesian-lora stack`: adapters joined in one set of factors, with each one's head."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayesian_lora.cli.options import DataDir, Device, Seed, in_options, refuse
from bayesian_lora.errors import InputError
from bayesian_lora.utils.text_table import span

if TYPE_CHECKING:
    from bayesian_lora.composition.sources import Source
    from bayesian_lora.composition.stack import Stack

EPILOG = (
    "Examples:\n\n"
    "bayesian-lora stack runs/sst2/map/chain_0 runs/cola/map/chain_0\n\n"
    "bayesian-lora stack sentiment=runs/sst2/map/chain_0 cola=adapters/cola --weights 0.7,0.3 "
    "--out runs/both\n\n"
    "bayesian-lora stack runs/sst2 runs/cola --members crossed\n\n"
    "bayesian-lora stack runs/sst2/map/chain_0 runs/cola/map/chain_0 --fit 64 --data-dir data\n\n"
    "bayesian-lora stack runs/sst2/map/chain_0 runs/cola/map/chain_0 --merge ties --density 0.5 "
    "--rank 2"
)

Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER",
        help="PEFT folders, runs, saved ensembles, or state dicts; called after their tasks, or "
        "as named by NAME=ADAPTER.",
    ),
]
WeightsHelp = "Factors of the adapters' updates, in their order; 1 each by default."
ScalingHelp = (
    "exact: the sum of the adapters' updates; original: factors side by side at the first "
    "adapter's alpha over the whole rank, which shrinks every adapter."
)
MembersHelp = (
    "Of ensembles: paired (the k-th with the k-th) or crossed (every combination); paired by "
    "default."
)
RankHelp = "Cut the result to this rank by SVD; the error made is shown."
FitHelp = "Fit the weights on this many training examples a task, which the adapters may have seen."


@in_options
def stack(
    context: typer.Context,
    adapters: Adapters,
    weights: Annotated[str | None, typer.Option(metavar="W1,W2,…", help=WeightsHelp)] = None,
    scaling: Annotated[str, typer.Option(metavar="HOW", help=ScalingHelp)] = "exact",
    members: Annotated[str, typer.Option(metavar="HOW", help=MembersHelp)] = "paired",
    rank: Annotated[int | None, typer.Option(min=1, metavar="R", help=RankHelp)] = None,
    merge: Annotated[
        str | None, typer.Option(metavar="METHOD", help="ties, dare_linear or dare_ties.")
    ] = None,
    density: Annotated[
        float, typer.Option(metavar="X", help="Share of numbers that --merge keeps.")
    ] = 0.5,
    fit: Annotated[int | None, typer.Option(min=1, metavar="N", help=FitHelp)] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    seed: Seed = 0,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="A new folder; runs/stack-NAMES by default.")
    ] = None,
) -> None:
    """Join adapters of one base model: ΔW is the weighted sum of theirs, each head is kept.

    Writes stack.json and, for each task, a folder that PEFT loads (an ensemble's folder if the
    adapters are ensembles). Nothing is written if they do not go together.
    """
    numbers = _numbers(weights)
    _check_options(numbers, scaling, merge, fit)
    if merge is None:
        refuse(context, ["density"], "it acts with --merge alone")
    if fit is None:
        refuse(context, ["data_dir", "device"], "it acts with --fit alone")
    from bayesian_lora.composition.sources import read_sources
    from bayesian_lora.composition.stack_files import write_stack
    from bayesian_lora.experiment.compose import fitted_on, free_folder
    from bayesian_lora.progress import Progress

    if out is not None:
        free_folder(out, out)
    sources = read_sources(adapters)
    folder = free_folder(out, "runs/stack-" + "-".join(source.name for source in sources))
    if merge is not None:
        options = {"members": members, "rank": rank, "seed": seed}
        made = _merged(sources, numbers, merge, density, **options)
    else:
        made = _stacked(sources, numbers, scaling, members, over_width=rank is not None)
        if fit is not None:
            where = {"data_dir": data_dir, "device": device}
            made = fitted_on(made, fit, seed=seed, progress=Progress(), **where)
        made = made if rank is None else _cut(made, rank)
    write_stack(folder, made)
    for line in describe(made, folder):
        typer.echo(line)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"--weights {text}: numbers with commas between them are needed, as in 0.5,0.5"
        ) from error


def _check_options(
    numbers: list[float] | None, scaling: str, merge: str | None, fit: int | None
) -> None:
    """Mistakes that no adapter need be read for."""
    if numbers is not None and fit is not None:
        raise InputError("--weights and --fit exclude each other: --fit finds the weights")
    if merge is not None and fit is not None:
        raise InputError(f"--fit finds the weights of a stack, not of --merge {merge}; drop one")
    if scaling == "original" and (merge or fit):
        option = "--merge" if merge else "--fit"
        raise InputError(f"--scaling original and {option} exclude each other: drop one")


def _stacked(
    sources: Sequence["Source"],
    weights: Sequence[float] | None,
    scaling: Any,
    members: Any,
    *,
    over_width: bool,
) -> "Stack":
    from bayesian_lora.composition.stacking import stack_sources

    return stack_sources(
        sources, weights=weights, scaling=scaling, members=members, over_width=over_width
    )


def _cut(found: "Stack", rank: int) -> "Stack":
    from bayesian_lora.composition.merging import compress

    return compress(found, rank)


def _merged(
    sources: Sequence["Source"],
    weights: Sequence[float] | None,
    method: str,
    density: float,
    **options: Any,
) -> "Stack":
    from bayesian_lora.composition.merging import merge
    from bayesian_lora.progress import Progress

    return merge(sources, method, density, weights, progress=Progress(), **options)


def describe(found: "Stack", folder: Path) -> list[str]:
    """The lines that say what was made, where, and what can be done with it."""
    spec, facts = found.spec, found.facts
    lines = [
        f"Stack of {len(found.parts)} adapters in {folder} ({facts['kind']}): rank {spec.rank}, "
        f"scale {spec.scaling:g}, on {', '.join(spec.target_modules[:6])}"
        + (f" and {len(spec.target_modules) - 6} more" if len(spec.target_modules) > 6 else ""),
    ]
    if len(found) > 1:
        lines.append(f"  {len(found)} members")
    width = max(len(part.name) for part in found.parts)
    for part in found.parts:
        place = _place(*part.columns)
        lines.append(f"  {part.name:{width}}  {place}, weight {part.weight:g}, from {part.source}")
    for task in found.tasks.values():
        where = folder / "tasks" / task.name
        lines.append(f"  task {task.name}: {task.num_labels} classes of {task.data}, in {where}")
    if "error" in facts:
        lost = facts["error"]["overall"]
        lines.append(f"  cut to rank {spec.rank}: relative error of the update {lost:.2%}")
    return [*lines, f"Evaluate it: bayesian-lora eval {folder}"]


def _place(start: int, stop: int) -> str:
    if stop <= start:
        return "in all columns"
    return f"column{'s' if stop - start > 1 else ''} {span(start, stop)}"
