"""The section on a run's chains: verdict, traces, ranks, growth of the sample size, diagnostics.

Shapes: M chains, T rows of a trace. Shown are the worst quantities and the log-posterior alone, so
that the file stays small; every quantity is in `metrics.json`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bayesian_lora.report.charts import Panel, Series, chart
from bayesian_lora.report.page import Block, Cell, Chart, Missing, Section, Table, Text, cell
from bayesian_lora.report.run_files import Arrays, RunFiles
from bayesian_lora.traces import RAW

Figures = Mapping[str, Any]

WORST = 3
MOST_POINTS = 400
"""Of a chain's trace that are drawn."""
MOST_BINS, ROWS_PER_BIN = 20, 5
PREFIXES = 12
TABLE_ROWS = 15
COLUMNS = {
    **{"rhat": "R-hat", "ess_bulk": "Bulk ESS", "ess_tail": "Tail ESS", "mcse": "MCSE"},
    **{"mean": "Mean", "sd": "Sd", "start_dispersion": "Dispersion of the starts"},
}

MILESTONE = {
    **{"ess_min": "Least ESS", "ess_median": "Median ESS", "ess_per_step": "ESS per chain-step"},
    "mcse": "MCSE of the least",
}


def chains(files: RunFiles) -> Section:
    """Whether the chains have mixed, and what shows it."""
    title, found = "Chains", files.metrics.get("diagnostics") or {}
    if not files.sampled:
        reason = str(found.get("reason") or "nothing was sampled")
        return Section(title, "chains", [Missing("Diagnostics", reason)])
    verdict, reason = found.get("verdict", "not available"), found.get("reason")
    blocks: list[Block] = [
        Text(f"Verdict: {verdict}{f' – {reason}' if reason else ''}.", "answer"),
        _key_figures(found),
    ]
    if dropped := found.get("dropped_chains"):
        gone = ", ".join(str(drop["chain"]) for drop in dropped)
        blocks.append(Text(f"Chains left out because they failed: {gone}."))
    if not files.traces:
        blocks.append(Missing("Traces", files.missing.get("traces", "none were recorded")))
    else:
        names = shown_quantities(found.get("quantities") or {}, files.traces)
        traces = {name: files.traces[name] for name in names}
        blocks += [trace_chart(traces, files.chains), growth_chart(traces)]
        if len(files.chains) > 1:
            blocks += [rank_chart(name, x, files.chains) for name, x in traces.items()]
        else:
            blocks.append(Missing("Rank plots", "one chain has no others to be ranked among"))
    blocks += milestones(files.milestones)
    blocks.append(_quantities(found.get("quantities") or {}))
    return Section(title, "chains", blocks)


def shown_quantities(quantities: Figures, traces: Arrays) -> list[str]:
    """The log-posterior, the quantities of highest R-hat, and the one of least bulk ESS."""
    judged = [n for n in traces if not n.startswith(RAW)]

    def by(key: str, unknown: float) -> list[str]:
        values = {n: (quantities.get(n) or {}).get(key) for n in judged}
        return sorted(judged, key=lambda n: unknown if (x := values[n]) is None else float(x))

    highest = by("rhat", -np.inf)[::-1][:WORST]
    chosen = ["log_posterior", *highest, *by("ess_bulk", np.inf)[:1]]
    return [name for name in dict.fromkeys(chosen) if name in traces]


def short(name: str) -> str:
    """A quantity's name without what stands before its layer's number."""
    return re.sub(r"\[.*?(layers?\.\d)", r"[\1", name)


def trace_chart(traces: Arrays, numbers: Sequence[int]) -> Chart:
    """A panel a quantity, a line a chain."""
    series, panels, rows = [], [], []
    for place, (name, x) in enumerate(traces.items()):
        step = -(-x.shape[1] // MOST_POINTS)
        at = list(range(0, x.shape[1], step))
        panels.append(Panel("row of the trace", "", short(name)))
        for i, chain in enumerate(numbers):
            points = at, x[i, at].tolist()
            shown = {"panel": place, "legend": place == 0}
            series.append(Series(f"chain {chain}", *points, "line", i, i // 7, **shown))
            with np.errstate(invalid="ignore"):  # of a chain that is not finite
                found = [float(f(x[i])) for f in (np.mean, np.std)]
            found += [float(x[i, 0]), float(x[i, -1])]
            cells = [_plain(v, "the trace is not finite") for v in found]
            rows.append([cell(f"{name}, chain {chain}"), *cells])
    return chart(
        series,
        panels,
        text=f"Traces of {len(numbers)} chains for {len(traces)} quantities: "
        f"{', '.join(traces)}. Chains that overlap have found the same values.",
        caption="Traces of the log-posterior and of the quantities of highest R-hat and least ESS, "
        f"a line a chain{_thinned(traces)}.",
        numbers=Table("traces by chain", ["Quantity", "Mean", "Sd", "First", "Last"], rows),
        panel_height=150,
    )


def _thinned(traces: Arrays) -> str:
    length = max(x.shape[1] for x in traces.values())
    step = -(-length // MOST_POINTS)
    return f", every {step}th of {length:,} rows" if step > 1 else ""


def _plain(value: float | None, reason: str = "") -> Cell:
    """Quantities are of any size: four significant digits."""
    if value is None or not np.isfinite(value):
        return cell(None, reason=reason)
    return Cell(f"{value:.4g}")


def rank_counts(x: np.ndarray) -> np.ndarray:
    """Draws of each chain in bins of their rank among all draws, (M, bins), for a trace (M, T).

    Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), section 5: of chains that have mixed,
    every chain's ranks are uniform.
    """
    from scipy.stats import rankdata

    chains, rows = x.shape
    bins = int(np.clip(rows // ROWS_PER_BIN, 2, MOST_BINS))
    ranks = rankdata(x, method="ordinal").reshape(x.shape) - 1
    place = (ranks * bins // (chains * rows)).astype(int)
    return np.stack([np.bincount(row, minlength=bins) for row in place])


def rank_chart(name: str, x: np.ndarray, numbers: Sequence[int]) -> Block:
    """A histogram a chain of its ranks among all draws."""
    if bad := int((~np.isfinite(x)).sum()):
        why = f"{bad} of {x.size} values are not finite, and have no rank"
        return Missing(f"Rank plot of {name}", why)
    counts = rank_counts(x)
    chains, bins = counts.shape
    even = x.shape[1] / bins
    middles = [(i + 0.5) / bins for i in range(bins)]
    series, panels = [], []
    top = float(counts.max()) * 1.08
    for i, chain in enumerate(numbers):
        panels.append(Panel("rank, as a share", "", f"chain {chain}", (0, 1), (0, top)))
        series.append(
            Series(f"chain {chain}", middles, counts[i].tolist(), "bars", i, panel=i, legend=False)
        )
        series.append(
            Series("even", [0, 1], [even, even], colour=None, style=1, panel=i, legend=False)
        )
    far = np.abs(counts / even - 1).max(axis=1)
    worst = int(far.argmax())
    heads = [f"{i / bins:.2f}–{(i + 1) / bins:.2f}" for i in range(bins)]
    rows = [[cell(head), *(cell(int(n)) for n in counts[:, i])] for i, head in enumerate(heads)]
    return chart(
        series,
        panels,
        text=f"Rank plots of {name} for {chains} chains in {bins} bins. The furthest from even is "
        f"chain {numbers[worst]}, with a bin {far[worst]:.0%} off the {even:.1f} draws expected.",
        caption=f"{short(name)}: ranks of each chain's draws among all. The dashed line is what "
        "chains that have mixed show.",
        numbers=Table(f"ranks of {short(name)}", ["Rank", *(f"chain {n}" for n in numbers)], rows),
        columns=2,
        panel_height=110,
    )


def growth_chart(traces: Arrays) -> Block:
    """Bulk ESS of the first t rows, for growing t."""
    from bayesian_lora import diagnostics

    length = max(x.shape[1] for x in traces.values())
    least = 2 * diagnostics.MIN_DRAWS
    if length < least:
        return Missing("Growth of the ESS", f"the traces have {length} rows, {least} are needed")
    ends = sorted({int(t) for t in np.linspace(max(least, length // PREFIXES), length, PREFIXES)})
    found = {
        name: [diagnostics.ess_bulk(x[:, :t]).value for t in ends] for name, x in traces.items()
    }
    series = [Series(short(n), ends, y, "both", i, i) for i, (n, y) in enumerate(found.items())]
    limit = diagnostics.ESS_BULK_LIMIT
    ask = Series(f"asked for: {limit:g}", [ends[0], ends[-1]], [limit] * 2, colour=None, style=1)
    series.append(ask)
    why = "the trace has no ESS yet, being constant or not finite"
    rows = [[cell(t), *(_plain(y[i], why) for y in found.values())] for i, t in enumerate(ends)]
    last = ", ".join(f"{n} {y[-1]:.0f}" for n, y in found.items() if y[-1] is not None)
    return chart(
        series,
        [Panel("rows of the trace, a chain", "bulk ESS")],
        text=f"Bulk effective sample size of the first rows of the traces; of all {length} rows: "
        f"{last or 'not available'}; {limit:g} are asked for.",
        caption="Growth of the bulk ESS, all chains together. Of chains that mix it grows in "
        "proportion; where it stays flat, more steps of the same kind bring nothing.",
        numbers=Table("ESS by rows", ["Rows", *found], rows),
    )


def milestones(rows: Sequence[Figures]) -> list[Block]:
    """What the run noted at 1,000, 10,000, … steps."""
    if not rows:
        return [Missing("Milestones", "the run noted none (1,000 sampling steps are the first)")]
    if all(row.get("ess_min") is None for row in rows):
        reasons = dict.fromkeys(_why(row, "ess_min") for row in rows)
        return [Missing("Milestones of the sampling", "; ".join(reasons))]
    body = []
    for row in rows:
        cells = [cell(row.get("step")), cell(row.get("rows"))]
        cells += [_plain(row.get(n), _why(row, n)) for n in MILESTONE]
        body.append([*cells, cell(row.get("quantity"), reason=_why(row, "quantity"))])
    notes = dict.fromkeys(str(row["note"]) for row in rows if row.get("note"))
    table = Table(
        "Milestones of the sampling, noted as they came",
        ["Step", "Rows", *MILESTONE.values(), "Quantity of least ESS"],
        body,
        note=". ".join(["ESS from overlapping batch means in constant memory", *notes]) + ".",
    )
    return [table] if len(rows) < 2 else [_milestone_chart(rows, table), table]


def _milestone_chart(rows: Sequence[Figures], table: Table) -> Chart:
    steps = [row.get("step") for row in rows]
    series = [
        Series(MILESTONE[n], steps, [row.get(n) for row in rows], "both", i, i)
        for i, n in enumerate(("ess_min", "ess_median"))
    ]
    return chart(
        series,
        [Panel("sampling steps of a chain", "ESS, all chains", x_log=True)],
        text=f"Effective sample size at {len(rows)} milestones, up to {steps[-1]:,} steps.",
        caption="Growth of the ESS over the whole run, steps on a logarithmic axis.",
        numbers=table,
    )


def _key_figures(found: Figures) -> Table:
    from bayesian_lora import diagnostics

    names = {
        **{"rhat_max": "Largest R-hat", "ess_bulk_min": "Least bulk ESS"},
        **{"ess_tail_min": "Least tail ESS", "t_eff": "Effective temperature"},
        "start_dispersion": "Dispersion of the starts, median",
    }
    aims = {
        "rhat_max": f"at most {diagnostics.RHAT_LIMIT:g}",
        "ess_bulk_min": f"at least {diagnostics.ESS_BULK_LIMIT:g}",
        "t_eff": "the one asked for",
    }
    spread = f"at least {diagnostics.DISPERSION_LIMIT:g} within-chain sd"
    aims |= {"start_dispersion": spread, "ess_tail_min": "–"}
    rows = [
        [cell(title), _plain(found.get(n), str(found.get(f"{n}_reason") or "")), cell(aims[n])]
        for n, title in names.items()
    ]
    return Table("Diagnostics over all judged quantities", ["Figure", "Value", "Asked for"], rows)


def _quantities(quantities: Figures) -> Block:
    from bayesian_lora import diagnostics

    if not quantities:
        return Missing("Diagnostics by quantity", "none are in metrics.json")

    def badness(name: str) -> float:
        value = quantities[name].get("rhat")
        return -np.inf if value is None else float(value)

    names = sorted(quantities, key=badness, reverse=True)
    rows = [
        [cell(n), *(_plain(quantities[n].get(k), _why(quantities[n], k)) for k in COLUMNS)]
        for n in names[:TABLE_ROWS]
    ]
    return Table(
        f"The {min(TABLE_ROWS, len(names))} quantities of highest R-hat, of {len(names)}",
        ["Quantity", *COLUMNS.values()],
        rows,
        note="Rank-normalised split R-hat and effective sample sizes of all chains together "
        "(Vehtari et al. 2021). probe_…: on single fixed examples; log_posterior: "
        "on a fixed part of the training set; delta_w_…: size and fixed random projections of the "
        f"adapters' ΔW. Raw parameters ({RAW}…]) are shown without being judged. Dispersion of the "
        "starts: their sd in within-chain sd; where it is below "
        f"{diagnostics.DISPERSION_LIMIT:g}, R-hat says less.",
    )


def _why(row: Figures, key: str) -> str:
    return str(row.get(f"{key}_reason") or "not recorded")
