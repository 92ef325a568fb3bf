"""The observations' sections on subspaces: similarity and drift."""

import math
from collections.abc import Sequence

from bayesian_lora.report import heatmaps
from bayesian_lora.report.page import (
    Block,
    Cell,
    Section,
    Table,
    Text,
    cell,
    number,
    png_picture,
)
from bayesian_lora.report.record import (
    Figures,
    Record,
    finished,
    listed,
    title,
    unfinished,
    value,
)

CHANCE = 2.0
"""Deviations of a random LoRA's figure beyond which it is not called chance."""
NO_DIRECTION = "an update is zero, so it has no direction"


def similarity(record: Record) -> Section:
    """The single adapters pair by pair, each figure beside what chance gives; heat maps."""
    steps = finished(record, "similarity")
    blocks: list[Block] = []
    for step in steps.values():
        found = step["comparison"]
        blocks += [Text(_alike(pair), "answer") for pair in found["pairs"]]
        blocks += [_cosines(found), _subspaces(found), _layers(found), *_pictures(found)]
    blocks += unfinished(record, "similarity", "Similarity")
    return Section("Similarity of the single adapters", "similarity", blocks)


def _alike(pair: Figures) -> str:
    """Whether two adapters are more alike than a random LoRA of equal norm is."""
    names = f"{title(pair['first'])} and {title(pair['second'])}"
    own, chance = pair["whole"]["cosine"], pair["whole"]["control"]["cosine"]
    if own is None or chance is None:
        return f"{names}: the cosine of the updates is not defined, {NO_DIRECTION}."
    away = own - chance["mean"]
    off = abs(away) / chance["sd"] if chance["sd"] else math.inf
    verdict = "no more alike and no further apart than chance"
    if off > CHANCE:
        verdict = "more alike than chance" if away > 0 else "further apart than chance"
    return (
        f"{names}: the cosine of the updates is {own:+.4f}, {off:.1f} standard deviations from "
        f"that of a random LoRA of equal norm ({chance['mean']:+.4f} ± {chance['sd']:.4f}): "
        f"{verdict}."
    )


def _spread(figure: Figures | None, digits: int = 4) -> Cell:
    if figure is None:
        return cell(None, reason=NO_DIRECTION)
    return Cell(f"{number(figure['mean'], digits)} ± {number(figure['sd'], digits)}")


def _names(pair: Figures) -> Cell:
    return cell(f"{title(pair['first'])} – {title(pair['second'])}")


def _cosines(found: Figures) -> Table:
    rows = []
    for pair in found["pairs"]:
        whole, modules = pair["whole"], pair["modules"]
        known = [m["factor_cosines"] for m in modules]
        rows.append(
            [
                _names(pair),
                value(whole, "cosine", reason=NO_DIRECTION),
                _spread(whole["control"]["cosine"]),
                value(whole, "cosine_mean", reason=NO_DIRECTION),
                *(_mean([row[factor] for row in known]) for factor in ("A", "B")),
            ]
        )
    labels = found["labels"]
    return Table(
        "Cosine of the updates ΔW",
        [
            "Adapters",
            "Cosine of ΔW",
            "Random LoRA",
            "Mean over modules",
            "Cosine of A (gauge-dependent)",
            "Cosine of B (gauge-dependent)",
        ],
        rows,
        note=f"Cosine {labels['cosine']}. Random LoRA: {labels['control']}, mean ± deviation of "
        f"{found['settings']['repeats']}. The cosine of factors {labels['factor_cosines']}.",
    )


def _mean(values: list[float | None]) -> Cell:
    known = [x for x in values if x is not None]
    return cell(sum(known) / len(known) if known else None, reason=NO_DIRECTION)


def _subspaces(found: Figures) -> Table:
    rows = []
    for pair in found["pairs"]:
        whole = pair["whole"]
        for side, name in (("left", "left (output)"), ("right", "right (input)")):
            rows.append(
                [
                    _names(pair),
                    cell(name),
                    value(whole, f"phi_{side}", reason=NO_DIRECTION),
                    value(whole, f"baseline_{side}", reason=NO_DIRECTION),
                    _spread(whole["control"][f"phi_{side}"]),
                    degrees(whole[f"angle_{side}"]),
                    value(whole, f"geodesic_{side}", reason=NO_DIRECTION),
                    _spread(whole["control"][f"geodesic_{side}"], 3),
                    value(whole, f"projection_{side}", reason=NO_DIRECTION),
                ]
            )
    labels = found["labels"]
    columns = ["Adapters", "Singular vectors", "φ", "φ of random subspaces", "φ of a random LoRA"]
    columns += ["Mean principal angle", "Grassmann geodesic", "of a random LoRA", "Projection"]
    return Table(
        "Subspaces of ΔW, means over the modules",
        columns,
        rows,
        note=f"{labels['phi']}. Random subspaces: {labels['baseline']}. Geodesic "
        f"{labels['geodesic']}.",
    )


def _layers(found: Figures) -> Table:
    """The figures of the maps by layer."""
    names = ("cosine", "phi_left", "phi_right")
    rows = []
    for pair in found["pairs"]:
        for layer in pair["layers"]:
            where = "none" if layer["layer"] is None else str(layer["layer"])
            rows.append([_names(pair), cell(where), *_beside_chance(layer, names)])
    columns = ["Adapters", "Layer", "Cosine of ΔW", "random LoRA", "φ left", "random LoRA"]
    caption = "Cosine of ΔW and φ by layer, over its modules"
    return Table(caption, [*columns, "φ right", "random LoRA"], rows)


def _beside_chance(row: Figures, names: Sequence[str]) -> list[Cell]:
    """Each figure, and beside it that of a random LoRA."""
    return [
        shown
        for name in names
        for shown in (value(row, name, reason=NO_DIRECTION), _spread(row["control"].get(name)))
    ]


def degrees(angle: float | None) -> Cell:
    """An angle in radians as a person reads it."""
    if angle is None:
        return cell(None, reason=NO_DIRECTION)
    return Cell(f"{math.degrees(angle):.1f}°")


def _pictures(found: Figures) -> list[Block]:
    blocks: list[Block] = []
    for name, png in heatmaps.pictures(found).items():
        what = name.removesuffix(".png").replace("-", " ")
        text = f"Heat map of {what}, beside that of a random LoRA"
        if name.endswith("layers.png"):
            text += "; the table by layer has the figures, means over a layer's modules"
        elif name == "pairs.png":
            text += "; the tables of cosines and subspaces have its figures"
        else:
            text += "; φ of all directions together is in the table of subspaces"
        caption = f"{what}: each map beside that of a random LoRA on the same colours"
        blocks.append(png_picture(png, text, caption))
    return blocks


def drift(record: Record) -> Section:
    """How far further training took each variant from the stack it began as, and from its parts."""
    steps = finished(record, "drift")
    blocks: list[Block] = []
    for name, step in steps.items():
        blocks += [Text(_farthest(step), "answer"), _drift_table(name, step)]
        blocks += [_against_table(name, step), *_drift_picture(step)]
    blocks += unfinished(record, "drift", "Drift")
    return Section("Drift of the trained stacks from their parts", "drift", blocks)


def _changes(step: Figures) -> dict[str, float]:
    """Variant → ‖ΔW after − ΔW before‖/‖ΔW before‖, of those that have one."""
    changes = {name: row["whole"].get("relative_change") for name, row in step["variants"].items()}
    return {name: change for name, change in changes.items() if change is not None}


def _drift_picture(step: Figures) -> list[Block]:
    """φ(i, j) of the variant that moved most, before against after."""
    known = _changes(step)
    if not known:
        return []
    most = max(known, key=lambda name: known[name])
    row = step["variants"][most]
    pair = dict(zip(("first", "second"), row["names"], strict=True)) | {"whole": row["whole"]}
    text = f"Heat map of φ(i, j) between the stack before and after training, variant {most}"
    caption = f"Subspace similarity of the stack before and after training, variant {most}"
    return [png_picture(heatmaps.phi_map(pair), text, caption)]


def _farthest(step: Figures) -> str:
    known = _changes(step)
    if not known:
        return "No variant's drift is known."
    least, most = min(known, key=lambda n: known[n]), max(known, key=lambda n: known[n])
    words = (
        f"Further training changed the stack's update by {known[least]:.0%} ({least}) to "
        f"{known[most]:.0%} ({most}) of its norm"
    )
    chance = step["variants"][most]["whole"]["control"].get("relative_change")
    if chance is None:
        return f"{words}."
    return f"{words}; a random LoRA of {most}'s norm in its place is {chance['mean']:.0%} away."


def _drift_table(name: str, step: Figures) -> Table:
    names = ("relative_change", "cosine", "phi_left", "phi_right")
    rows = []
    for variant, row in step["variants"].items():
        own = {f"{title(part)}'s": found["own"] for part, found in row["parts"].items()}
        for where, found in ({"all": row["whole"]} | own).items():
            rows.append([cell(variant), cell(where), *_beside_chance(found, names)])
    first = next(iter(step["variants"].values()))["whole"]
    chance = {side: first[f"baseline_{side}"] for side in ("left", "right")}
    words = listed(f"{n} {number(x)}" for n, x in chance.items() if x is not None)
    heads = ("Relative change", "Cosine with before", "φ left", "φ right")
    return Table(
        f"Stack {name}: before against after",
        ["Variant", "Columns", *(head for what in heads for head in (what, "random LoRA"))],
        rows,
        note="Relative change: ‖ΔW after − ΔW before‖/‖ΔW before‖. Random LoRA: of equal rank and "
        f"norm in the place of what stands after. φ of random subspaces, all columns: {words}.",
    )


def _against_table(name: str, step: Figures) -> Table:
    names = ("cosine", "phi_left", "phi_right")
    rows = []
    for variant, row in step["variants"].items():
        for part, when in row["parts"].items():
            found: list[Cell] = []
            for figure in names:
                found.append(value(when["before"], figure, reason=NO_DIRECTION))
                found += _beside_chance(when["after"], [figure])
            rows.append([cell(variant), cell(title(part)), *found])
    heads = ("Cosine", "φ left", "φ right")
    return Table(
        f"Stack {name}: each single adapter against the whole stack, before and after training",
        [
            "Variant",
            "Single adapter",
            *(f"{x}{when}" for x in heads for when in (" before", " after", " of a random LoRA")),
        ],
        rows,
    )
