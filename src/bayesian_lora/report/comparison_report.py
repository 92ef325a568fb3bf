"""The report of a comparison: its table, each cell beside its baselines, and what it cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayesian_lora.report.charts import Panel, Series, chart
from bayesian_lora.report.page import (
    Block,
    Chart,
    Missing,
    Page,
    Section,
    Table,
    Text,
    cell,
    with_error,
)
from bayesian_lora.report.record import listed
from bayesian_lora.report.run_files import AGAIN, RunFiles, difference_error, figure, standard_error
from bayesian_lora.report.verdicts import CLEAR, NAMES, strongest, verdict, way_of

Row = Mapping[str, Any]

LED_BY = ("ensemble", "nll")
PLOTTED = ("nll", "ece", "accuracy", "pearson")
HOW = (
    *("step_size", "targets", "tempering", "rhat_max", "ess_per_1000", "t_eff", "verdict"),
    *("seconds", "status"),
)
"""Columns of the table that are no figures of an evaluation."""
HEADS = {
    **NAMES,
    **{"map_nll": "NLL of MAP", "map_ensemble_nll": "NLL of deep ensemble"},
    **{"nll_se": "its standard error", "rhat_max": "largest R-hat"},
    **{"ess_per_1000": "bulk ESS per 1,000 gradients", "t_eff": "T_eff", "step_size": "step size"},
}
"""Heads of the table's columns; others are their own."""
APART = 0.16
"""Of the distance between cells."""
KINDS = {
    "ensemble": "posterior ensemble",
    "map": "MAP",
    "map_temperature_scaled": "MAP, temperature-scaled",
    "map_ensemble": "deep ensemble",
}


@dataclass(frozen=True)
class Compared:
    """A comparison: `table`, a row a cell; the finished `cells`' files by name; `notes`.

    missing: why a cell's files cannot be read, by name.
    """

    axes: Mapping[str, Sequence[str]]
    table: Sequence[Row]
    notes: Sequence[str]
    cells: Mapping[str, RunFiles]
    missing: Mapping[str, str]


def comparison_page(found: Compared, name: str) -> Page:
    """The page of a comparison."""
    varied = listed(f"{key} ({len(values)} values)" for key, values in found.axes.items())
    return Page(
        f"{name}: comparison",
        f"{len(found.table)} cells over {varied or 'nothing'}, {len(found.cells)} of them "
        "finished and evaluated.",
        [_short(found), _table(found), _forest(found), _words(found)],
        "Made by bayesian-lora from the files of the comparison's folder alone.",
    )


def _short(found: Compared) -> Section:
    """The best cell, and how many are told from their strongest baselines."""
    title = "In short"
    order = [c for c in figure_order(found.cells, "nll") if found.cells[c].sampled]
    if not order:
        why = "no cell that sampled is finished and evaluated"
        return Section(title, "short", [Missing("Summary", why)])
    blocks: list[Block] = []
    if len(order) > 1 and _same_examples(found.cells[c] for c in order):
        best = found.cells[order[0]]
        lead, error = figure(best.metrics["ensemble"], "nll"), standard_error(best, *LED_BY)
        shown = with_error(lead, error, AGAIN).text
        words = f"The lowest NLL of a posterior ensemble is that of {order[0]}, {shown}"
        words += ". Chosen among several on the examples that it is judged by, it is flattered."
        blocks.append(Text(words, "answer"))
    bests = {c: strongest(found.cells[c].metrics) for c in order}
    errors = {c: difference_error(found.cells[c], b, "nll") for c, b in bests.items() if b}
    known = {c: b for c, b in bests.items() if b and errors[c] is not None}
    ways = [way_of(found.cells[c], b, "nll") for c, b in known.items()]
    words = (
        f"Of {len(order)} posterior ensembles {ways.count(1)} have a lower NLL than the strongest "
        f"simple baseline of their cell by more than {CLEAR:g} standard errors, {ways.count(-1)} a "
        f"higher one, and {ways.count(0)} cannot be told from it"
    )
    if len(known) < len(order):
        words += f"; of {len(order) - len(known)} no standard error is known: see 'Cell by cell'"
    return Section(title, "short", [*blocks, Text(f"{words}.", "answer")])


def _table(found: Compared) -> Section:
    columns = list(found.table[0]) if found.table else []
    blocks: list[Block] = [Missing("Table", "the comparison has no cells")]
    if columns:
        why = "this cell has no such figure, or is not finished"
        figures = [c for c in columns if c not in HOW]
        ways = [c for c in columns if c in found.axes or c in HOW]
        # Side by side they would be wider than a page of paper.
        parts = [("Figures of the cells", figures)]
        if set(ways) - set(found.axes):
            parts.append(("Samplers, chains and cost of the cells", ways))
        blocks = [
            Table(
                title,
                [HEADS.get(c, c) for c in names],
                [[cell(row[c], reason=why) for c in names] for row in found.table],
            )
            for title, names in parts
        ]
    return Section("Table", "table", [*blocks, *(Text(note) for note in found.notes)])


def _forest(found: Compared) -> Section:
    """NLL, ECE and accuracy of every cell and its baselines, with standard errors."""
    title = "Cells beside their baselines"
    names = [
        n
        for n in PLOTTED
        if any(figure(f.metrics.get("ensemble"), n) is not None for f in found.cells.values())
    ]
    if not names:
        return Section(title, "forest", [Missing("Chart", "no cell is finished and evaluated")])
    blocks: list[Block] = [forest_chart(found.cells, n) for n in names]
    blocks.append(_errors(found.cells, names))
    return Section(title, "forest", blocks)


def forest_chart(cells: Mapping[str, RunFiles], name: str) -> Chart:
    """A row a cell, a mark a kind of model, bars of one standard error."""
    series = []
    for place, (kind, title) in enumerate(KINDS.items()):
        known = {
            c: x for c, f in cells.items() if (x := figure(f.metrics.get(kind), name)) is not None
        }
        if known:
            errors = [standard_error(cells[c], kind, name) for c in known]
            # Kinds stand a little apart, or their bars would hide one another.
            rung = (place - (len(KINDS) - 1) / 2) * APART
            points = list(known.values()), [list(cells).index(c) + rung for c in known]
            series.append(Series(title, *points, "points", place, place, errors, "x"))
    order, said = figure_order(cells, name), f"{NAMES[name]} of {len(cells)} cells"
    if _same_examples(cells[c] for c in order):
        lead = figure(cells[order[0]].metrics["ensemble"], name)
        said += f"; the best posterior ensemble is {order[0]}'s, {lead:.4f}"
    rows = []
    for c, files in cells.items():
        found = [
            (figure(files.metrics.get(k), name), standard_error(files, k, name)) for k in KINDS
        ]
        reason = f"no {NAMES[name]} of this kind: {AGAIN}"
        rows.append([cell(c), *(with_error(x, error, reason) for x, error in found)])
    way = "lower is better" if name in ("nll", "ece") else "higher is better"
    return chart(
        series,
        [Panel(f"{NAMES[name]} ({way})", "", y_names=list(cells))],
        text=f"{said}.",
        caption=f"{NAMES[name]} of each cell; bars are one standard error over examples.",
        numbers=Table(f"{NAMES[name]} by cell", ["Cell", *KINDS.values()], rows),
        panel_height=max(130, 56 * len(cells)),
    )


def figure_order(cells: Mapping[str, RunFiles], name: str) -> list[str]:
    """Cells from the best posterior ensemble to the worst."""
    known = {
        c: x for c, f in cells.items() if (x := figure(f.metrics.get("ensemble"), name)) is not None
    }
    return sorted(known, key=lambda c: known[c], reverse=name not in ("nll", "ece"))


def _same_examples(cells: Iterable[RunFiles]) -> bool:
    """Whether figures of the cells compare: of one task, split and number of examples."""
    return len({tuple(f.metrics.get(n) for n in ("task", "split", "n")) for f in cells}) == 1


def _errors(cells: Mapping[str, RunFiles], names: Sequence[str]) -> Block:
    """Cells without standard errors, said once; else what the bars say of differences."""
    bare = [c for c, f in cells.items() if standard_error(f, "ensemble", names[0]) is None]
    if bare:
        return Missing(f"Standard errors of {listed(bare)}", AGAIN)
    if not _same_examples(cells.values()):
        return Text(
            "The cells did not answer the same examples: compare each with its own baselines alone."
        )
    return Text(
        "The cells answered the same examples, so differences between them are surer than the "
        "bars alone show."
    )


def _words(found: Compared) -> Section:
    """Each cell's verdict in words."""
    blocks: list[Block] = []
    for name, files in found.cells.items():
        blocks.append(Text(f"{name}: {' '.join(verdict(files))}"))
    blocks += [Missing(name, why) for name, why in found.missing.items()]
    return Section("Cell by cell", "cells", blocks or [Missing("Cells", "none is finished yet")])
