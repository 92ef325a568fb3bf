"""The observations' section on rank against performance."""

import math
from typing import Any

from bayesian_lora.report.page import Block, Cell, Picture, Section, Table, Text, cell, number, plot
from bayesian_lora.report.record import (
    Figures,
    Record,
    finished,
    signed,
    title,
    unfinished,
    value,
)


def ranks(record: Record) -> Section:
    """One task at several ranks: accuracy and NLL with their spread over fits."""
    steps = sorted(finished(record, "rank").values(), key=lambda step: step["rank"])
    blocks: list[Block] = []
    if steps:
        blocks += [Text(words, "answer") for words in answers(steps)]
        blocks += [_table(steps), _plot(steps)]
    blocks += unfinished(record, "rank", "Rank study")
    return Section("Rank against performance", "ranks", blocks)


def answers(steps: list[Figures]) -> list[str]:
    """Of accuracy and NLL whether a rank is better than the smallest beyond the fits' spread."""
    return [_answer(steps, name, sign) for name, sign in (("accuracy", 1), ("nll", -1))]


def _answer(steps: list[Figures], name: str, sign: int) -> str:
    """`sign` 1 of a figure of which more is better, −1 where less is."""
    first, task = steps[0], title(steps[0]["task"])
    best = max(steps, key=lambda step: sign * step["single"][name]["mean"])
    low, high = (step["single"][name]["mean"] for step in (first, best))
    what, unit = ("NLL", " nats") if name == "nll" else (name, "")
    if best is first:
        return f"{task}, {what}: no rank is better than rank {first['rank']} ({low:.3f}{unit})."
    words = (
        f"{task}, {what}: the best mean is {high:.3f}{unit} at rank {best['rank']}, "
        f"{signed(high - low)} against rank {first['rank']}"
    )
    error = _error(first, best, name)
    if error is None:
        return f"{words}; the spread over fits is not known."
    verdict = "more than" if abs(high - low) > 2 * error else "within"
    return f"{words}: {verdict} two standard errors over the fits ({2 * error:.3f})."


def _error(one: Figures, other: Figures, name: str) -> float | None:
    """Standard error of the difference of two means over fits."""
    spreads = [step["single"][name]["sd"] for step in (one, other)]
    if None in spreads:
        return None
    return math.sqrt(sum(sd**2 / s["fits"] for sd, s in zip(spreads, (one, other), strict=True)))


def _table(steps: list[Figures]) -> Table:
    names = [n for n in ("accuracy", "mcc", "f1", "nll", "ece") if n in steps[0]["single"]]
    rows = [
        [
            cell(step["rank"]),
            cell(step["parameters"]),
            cell(step["fits"]),
            cell(step["n"]),
            *(_spread(step["single"][name]) for name in names),
            value(step["ensemble"], "nll"),
            cell(step["seconds"], 0),
        ]
        for step in steps
    ]
    first = steps[0]
    heads = [{"mcc": "MCC", "f1": "F1"}.get(n, n.upper() if len(n) == 3 else n) for n in names]
    sizes = first["sizes"]
    return Table(
        f"{title(first['task'])} at several ranks, mean ± deviation over independent fits",
        ["Rank", "Parameters trained", "Fits", "n", *heads, "NLL of the fits' ensemble", "Seconds"],
        rows,
        note=f"Trained on {sizes['train']:,} examples, measured on {first['n']:,} of "
        f"{first['split']}; alpha grows with the rank, so that the scale alpha/rank stays. NLL in "
        "nats.",
    )


def _spread(figure: Figures) -> Cell:
    if figure["mean"] is None:
        return cell(None, reason=figure.get("reason", ""))
    if figure["sd"] is None:
        return cell(figure["mean"])
    return Cell(f"{number(figure['mean'])} ± {number(figure['sd'])}")


def _plot(steps: list[Figures]) -> Picture:
    at = [step["rank"] for step in steps]

    def draw(panels: Any) -> None:
        for axes, name in zip(panels, ("accuracy", "nll"), strict=True):
            means = [step["single"][name]["mean"] for step in steps]
            deviations = [step["single"][name]["sd"] or 0.0 for step in steps]
            axes.errorbar(at, means, yerr=deviations, marker="o", capsize=3)
            axes.set_xscale("log", base=2)
            axes.set_xticks(at, [str(rank) for rank in at])
            axes.minorticks_off()
            axes.set_xlabel("rank")
            axes.set_ylabel("NLL (nats)" if name == "nll" else name)

    words = "; ".join(
        f"rank {s['rank']}: accuracy {s['single']['accuracy']['mean']:.3f}, NLL "
        f"{s['single']['nll']['mean']:.3f}"
        for s in steps
    )
    caption = "Accuracy and NLL against rank; bars are one deviation over the fits"
    return plot(draw, text=words, caption=caption, size=(8.4, 3.4), panels=2)
