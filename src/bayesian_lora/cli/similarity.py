"""`bayesian-lora similarity`: what adapters have in common, as tables, JSON and heat maps."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayesian_lora.cli.options import Seed, in_options, refuse
from bayesian_lora.errors import InputError
from bayesian_lora.utils.text_table import aligned

if TYPE_CHECKING:
    from bayesian_lora.composition.pair_figures import Adapter

EPILOG = (
    "Examples:\n\n"
    "bayesian-lora similarity runs/sst2/map/chain_0 runs/cola/map/chain_0\n\n"
    "bayesian-lora similarity sst2=runs/sst2 cola=runs/cola mnli=runs/mnli --members all "
    "--out runs/similarity\n\n"
    "bayesian-lora similarity a.safetensors b.pt --ranks 4 --seed 1\n\n"
    "bayesian-lora similarity runs/stack runs/stack-trained --drift --out runs/drift"
)
FILE = "similarity.json"
NOTHING = "n/a"
AdaptersHelp = (
    "Two or more: PEFT folders, runs, ensembles, stacks, or state dicts (.safetensors, .pt) in "
    "PEFT's naming."
)
Adapters = Annotated[list[str], typer.Argument(metavar="[NAME=]ADAPTER", help=AdaptersHelp)]
OutHelp = f"A new folder for {FILE} and heat maps (PNG)."
Out = Annotated[Path | None, typer.Option(metavar="DIR", help=OutHelp)]


@in_options
def similarity(
    context: typer.Context,
    adapters: Adapters,
    out: Out = None,
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(metavar="N", min=2, help="Random LoRAs drawn.")] = 10,
    ranks: Annotated[
        int | None, typer.Option(metavar="R", min=1, help="Largest i and j of φ(i, j) kept.")
    ] = None,
    members: Annotated[
        str,
        typer.Option(metavar="first|all", help="Of ensembles: the first member, or all pairs."),
    ] = "first",
    drift: Annotated[
        bool, typer.Option("--drift", help="Of two stacks: how far the first one moved.")
    ] = False,
) -> None:
    """Compare adapters by what they do, ΔW = s·BA: cosine and subspaces, layer by layer.

    Beside every figure stands that of a random LoRA of the same rank and norm in place of the
    second adapter, and for φ also max(i, j)/n, its mean for random subspaces. φ, angles and
    distances come from the singular vectors of ΔW on its left (output) and right (input) side.
    """
    _check(adapters, members, drift)
    if drift:
        refuse(context, ["members"], "it acts on nothing with --drift")
    if out is not None:
        from bayesian_lora.composition.stack_files import check_free

        check_free(out, beside=())
    options: dict[str, Any] = {"seed": seed, "repeats": repeats, "ranks": ranks}
    if drift:
        result = _drift(adapters, options)
        pairs = drift_pairs(result)
        drawn = {"pairs": [result["whole"], *result["parts"].values()], "adapters": ()}
    else:
        from bayesian_lora.composition.similarity import compare

        result = compare(_adapters(adapters), members=members, **options)  # type: ignore[arg-type]
        pairs = {f"{pair['first']} and {pair['second']}": pair for pair in result["pairs"]}
        drawn = result
        typer.echo("\n".join(adapter_lines(result["adapters"])))
    for title, pair in pairs.items():
        typer.echo("\n" + "\n".join(pair_lines(title, pair)))
    typer.echo("\n" + legend(repeats))
    if out is not None:
        _write(out, result, drawn)


def _check(adapters: Sequence[str], members: str, drift: bool) -> None:
    """Mistakes that no adapter need be read for."""
    if members not in ("first", "all"):
        raise InputError(f"--members {members}: give first or all")
    if drift and len(adapters) != 2:
        raise InputError(
            f"--drift with {len(adapters)} arguments: give two stacks, before and after training"
        )
    if len(adapters) < 2:
        raise InputError(
            f"{adapters[0]} alone: a comparison needs at least two adapters; name another one"
        )


def _adapters(arguments: Sequence[str]) -> "list[Adapter]":
    """Stacks as they are, everything else by `read_sources`, in the order given."""
    from bayesian_lora.composition.similarity import adapter_of, adapter_of_stack
    from bayesian_lora.composition.sources import name_and_path, read_sources
    from bayesian_lora.composition.stack_files import is_stack, read_stack

    named = [name_and_path(text) for text in arguments]
    others = [text for text, (_, path) in zip(arguments, named, strict=True) if not is_stack(path)]
    found = iter(read_sources(others)) if others else iter(())
    adapters: list[Adapter] = []
    for name, path in named:
        if is_stack(path):
            adapter = adapter_of_stack(name or path.resolve().name, read_stack(path))
        else:
            adapter = adapter_of(next(found))
        taken = {other.name for other in adapters}
        names = (adapter.name if n == 1 else f"{adapter.name}-{n}" for n in itertools.count(1))
        free = next(name for name in names if name not in taken)
        adapters.append(dataclasses.replace(adapter, name=free))
    return adapters


def _drift(arguments: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    from bayesian_lora.composition.similarity import drift
    from bayesian_lora.composition.stack_files import read_stack

    before, after = (read_stack(path) for path in arguments)
    return drift(before, after, **options)


def drift_pairs(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The comparisons in a drift by title."""
    pairs = {"the whole stack, before and after": result["whole"]}
    pairs |= {f"{name}, its columns before and after": p for name, p in result["parts"].items()}
    for name, both in result["against"].items():
        pairs |= {f"{name} and the stack {when}": pair for when, pair in both.items()}
    return pairs


def adapter_lines(adapters: Sequence[Mapping[str, Any]]) -> list[str]:
    """The adapters that are compared."""
    rows: list[Sequence[str]] = [("adapter", "rank", "modules", "members", "‖ΔW‖", "")]
    for facts in adapters:
        norm = NOTHING if facts["norm"] is None else f"{facts['norm']:.4g}"
        counts = (str(facts[key]) for key in ("rank", "modules", "members"))
        rows.append((facts["name"], *counts, norm, facts.get("reason", "")))
    return aligned(rows)


def pair_lines(title: str, pair: Mapping[str, Any]) -> list[str]:
    """One table: all modules together, each kind of module, each layer, and what is left out."""
    from bayesian_lora.report.heatmaps import short_names

    whole = pair["whole"]
    kinds = short_names([group["kind"] for group in pair["kinds"]])
    groups = [("all modules", whole)]
    groups += [(kinds[group["kind"]], group) for group in pair["kinds"]]
    groups += [
        ("no layer" if group["layer"] is None else f"layer {group['layer']}", group)
        for group in pair["layers"]
    ]
    columns = ["", "modules", "cosine", "random LoRA", "φ left", "random LoRA", "max/n"]
    columns += ["φ right", "random LoRA", "max/n", "geodesic", "projection"]
    change = "relative_change" in whole
    rows = [(*columns, "change", "random LoRA") if change else tuple(columns)]
    rows += [_row(name, group, change) for name, group in groups]
    lines = [title, *(f"  {line}" for line in aligned(rows))]
    lines += [f"  over members, {text}" for text in _members(whole)]
    lines.append(f"  factor-wise cosines: {_factors(pair)}")
    if "reason" in whole:
        lines.append(f"  {whole['reason']}")
    for side in ("first", "second"):
        if left_out := pair["left_out"][side]:
            shown = ", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else "")
            lines.append(f"  left out, only in {pair[side]}: {len(left_out)} modules ({shown})")
    return lines


def _row(name: str, group: Mapping[str, Any], change: bool) -> tuple[str, ...]:
    control = group["control"]
    cells = [name, str(group["modules"]), _number(group["cosine"]), _spread(control["cosine"])]
    for side in ("left", "right"):
        key = f"phi_{side}"
        cells += [_number(group[key]), _spread(control[key]), _number(group[f"baseline_{side}"])]
    for kind in ("geodesic", "projection"):
        both = [_number(group[f"{kind}_{side}"], 3) for side in ("left", "right")]
        cells.append(", ".join(both))
    if change:
        cells += [_number(group["relative_change"]), _spread(control["relative_change"])]
    return tuple(cells)


def _members(whole: Mapping[str, Any]) -> list[str]:
    """Mean and deviation over the pairs of members, where there are several."""
    names = {"cosine": "cosine", "phi_left": "φ left", "phi_right": "φ right"}
    over = whole.get("members")
    return [f"{words}: {_spread(over[name])}" for name, words in names.items()] if over else []


def _factors(pair: Mapping[str, Any]) -> str:
    """Their mean over the modules, and what not to read from it."""
    texts = []
    for factor in ("A", "B"):
        known = [m["factor_cosines"][factor] for m in pair["modules"]]
        values = [value for value in known if value is not None]
        texts.append(f"{factor} {_number(sum(values) / len(values) if values else None)}")
    return f"{', '.join(texts)} (depends on the gauge and on a shared initialisation)"


def legend(repeats: int) -> str:
    """What the columns are."""
    return (
        f"random LoRA: mean ± deviation over {repeats} random adapters of the second one's rank "
        "and norm\nφ left, φ right: share of the smaller subspace that lies in the larger, output "
        "and input side; max/n: max(r1, r2)/n, its mean by chance\ngeodesic: √(Σθ²) in radians, "
        "projection: √(Σsin²θ), of the principal angles θ, left and right, mean over the modules"
    )


def _number(value: float | None, digits: int = 4) -> str:
    # Adding zero takes the sign from what is rounded to it.
    return NOTHING if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _spread(value: Mapping[str, float] | None) -> str:
    return NOTHING if value is None else f"{_number(value['mean'])} ± {value['sd']:.1g}"


def _write(out: Path, result: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
    """The pictures first: a folder with the JSON file is whole."""
    from bayesian_lora.report.heatmaps import pictures
    from bayesian_lora.utils.files import write_atomic, write_json

    found = pictures(drawn)
    for name, png in found.items():
        write_atomic(out / name, png)
    write_json(out / FILE, dict(result))
    typer.echo(f"\nWritten: {out / FILE} and {len(found)} heat maps")
