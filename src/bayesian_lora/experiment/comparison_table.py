"""The one table of a comparison: rows, aligned lines, CSV, and notes on what is not alike."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bayesian_lora.assessment.run_rows import ENSEMBLE_SCALED, MAP_ROWS
from bayesian_lora.assessment.summary import SHOWN
from bayesian_lora.errors import InputError
from bayesian_lora.utils.files import read_json

Figures = dict[str, Any]

RECORD = "comparison.json"

AFTER = (
    "step_size",
    "targets",
    "tempering",
    "rhat_max",
    "ess_per_1000",
    "t_eff",
    "verdict",
    "seconds",
    "status",
)
ROWS = ("map", "map_ensemble", "single", "ensemble")
MORE = (
    *(row for row in (*MAP_ROWS, ENSEMBLE_SCALED) if row not in ROWS),
    *("standard_errors", "calibration"),
)
NLL_SE = "nll_se"
DIAGNOSTICS = ("rhat_max", "ess_bulk_min", "t_eff", "verdict", "reason")
ALIKE = {
    "task": "the task",
    "split": "the split",
    "n": "the number of examples evaluated on",
    "k": "the number of samples",
    "tempering": "the temperature",
}


def is_entry(entry: Any) -> bool:
    """Whether this can be a cell of a record; its folder lies inside the comparison's."""
    if not isinstance(entry, dict) or not {"error", "warm_start", "starts_from"} <= entry.keys():
        return False
    texts = [entry.get(name) for name in ("name", "folder", "status")]
    return are_texts(texts) and entry["folder"] == Path(entry["folder"]).name != ".."


def are_texts(values: Any) -> bool:
    """Whether this is a list of strings."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def read_record(root: Path) -> Figures:
    """`comparison.json` of a comparison's folder.

    Raises:
        InputError: none there, or no comparison's.
    """
    record = read_json(root / RECORD, "comparison")
    kinds = {"axes": dict, "config": dict, "cells": list}
    if not (
        all(isinstance(record.get(name), kind) for name, kind in kinds.items())
        and all(are_texts(values) for values in record["axes"].values())
        and all(is_entry(entry) for entry in record["cells"])
    ):
        raise InputError(
            f"{root / RECORD}: damaged, it is no comparison's record; restore it, or name "
            "another folder"
        )
    return record


def figures_of(metrics: Figures, run: Figures) -> Figures:
    """What a comparison keeps of a run's `metrics.json` and `run.json`.

    ``ess_per_1000`` is the smallest bulk ESS for 1,000 gradient evaluations of the sampling
    phase (of a chain's batch); burn-in and the warm start, which cells may share, do not count.
    """
    cost, diagnostics = metrics["cost"], metrics["diagnostics"]
    rows = {name: metrics[name] for name in ROWS}
    # Of an evaluation by an older version there is no more than that.
    rows |= {name: metrics[name] for name in MORE if metrics.get(name) is not None}
    ess, evaluations = diagnostics["ess_bulk_min"], cost.get("sampling_gradient_evaluations")
    figures = {
        "task": metrics["task"],
        "split": metrics["split"],
        "n": metrics["n"],
        "k": metrics["ensemble"]["k"],
        "tempering": f"{metrics['tempering']}, T = {metrics['temperature']:g}",
        "step_size": metrics["sampler"]["step_size"],
        "targets": metrics["sampler"]["exactness"],
        "metrics": {**rows, "diagnostics": {name: diagnostics[name] for name in DIAGNOSTICS}},
        "gradient_evaluations": cost["gradient_evaluations"],
        "sampling_gradient_evaluations": evaluations,
        "ess_per_1000": None if ess is None or not evaluations else 1000.0 * ess / evaluations,
        "seconds": {name: cost[name] for name in ("train_s", "sample_s", "eval_s")},
    }
    figures["seconds"]["wall_s"] = run["wall_s"]
    if figures["ess_per_1000"] is None:
        known = diagnostics.get("ess_bulk_min_reason")
        figures["ess_per_1000_reason"] = known or "its gradient evaluations were not recorded"
    return figures


def table(keys: Sequence[str], entries: Sequence[Figures]) -> list[dict[str, Any]]:
    """One row a cell: the varied keys, the figures, None for what there is not.

    Of the metrics those are shown that some cell has: accuracy or pearson, the task's own, NLL,
    ECE, Brier score; of the warm starts the mean NLL and that of their ensemble. ``nll_se`` is the
    standard error of the ensemble's NLL over examples; a difference between two cells, which were
    evaluated on the same examples, is known better than that.
    """
    ensembles = [entry["metrics"]["ensemble"] for entry in entries if "metrics" in entry]
    names = [n for n in SHOWN if any(e.get(n) is not None for e in ensembles)]
    if any(_nll_se(entry) is not None for entry in entries):
        names.insert(names.index("nll") + 1, NLL_SE)
    return [_row(keys, names, entry) for entry in entries]


def _row(keys: Sequence[str], names: Sequence[str], entry: Figures) -> dict[str, Any]:
    values = dict(item.split("=", 1) for item in entry["overrides"])
    row: dict[str, Any] = {key: values[key] for key in keys}
    row |= dict.fromkeys(("map_nll", "map_ensemble_nll", *names, *AFTER))
    row["status"] = entry["status"]
    if "metrics" not in entry:
        return row
    metrics = entry["metrics"]
    row["map_nll"] = metrics["map"]["nll"]["mean"]
    row["map_ensemble_nll"] = metrics["map_ensemble"]["nll"]
    row |= {name: metrics["ensemble"].get(name) for name in names}
    if NLL_SE in names:
        row[NLL_SE] = _nll_se(entry)
    row |= {name: metrics["diagnostics"][name] for name in ("rhat_max", "t_eff", "verdict")}
    row |= {name: entry[name] for name in ("step_size", "targets", "tempering", "ess_per_1000")}
    row["seconds"] = entry["seconds"]["wall_s"]
    return row


def _nll_se(entry: Figures) -> float | None:
    """None of cells evaluated by an older version."""
    part: Any = entry.get("metrics")
    for key in ("standard_errors", "ensemble", "nll"):
        part = part.get(key) if isinstance(part, dict) else None
    return part if isinstance(part, float) else None


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Aligned plain text: words to the left, numbers to the right, ``n/a`` for None."""
    columns = list(rows[0])
    cells = [[name, *(_shown(name, row[name]) for row in rows)] for name in columns]
    widths = [max(map(len, column)) for column in cells]
    words = [any(isinstance(row[name], str) for row in rows) for name in columns]
    return [
        "  ".join(
            text.ljust(width) if is_text else text.rjust(width)
            for text, width, is_text in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in zip(*cells, strict=True)
    ]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same table with every digit; empty for None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def notes(entries: Sequence[Figures]) -> list[str]:
    """Where finished cells were not evaluated alike, and what failed."""
    found = []
    done = [entry for entry in entries if "metrics" in entry]
    for name, title in ALIKE.items():
        values = {entry["name"]: entry[name] for entry in done}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{value} ({cell})" for cell, value in values.items())
            found.append(f"Note: cells differ in {title}, so compare with care: {each}")
    for entry in done:
        if entry["tempering"].startswith("cold"):
            found.append(f"Note: {entry['name']} is a cold posterior ({entry['tempering']})")
    if any(e["metrics"]["diagnostics"]["verdict"] == "not mixed" for e in done):
        found.append(
            "Note: of chains that are not mixed the ESS counts little more than the chains; it is "
            "no rate at which draws become independent"
        )
    for name in dict.fromkeys(e["warm_start"] for e in done):
        if others := [e["name"] for e in done if e["warm_start"] == name != e["name"]]:
            found.append(
                f"Warm starts of {name} were taken by {', '.join(others)}: their seconds and "
                "gradient evaluations are without them"
            )
    return found + [f"{e['name']} {e['status']}: {e['error']}" for e in entries if e["error"]]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return value
    if name == "step_size":
        return f"{value:.3g}"
    return f"{value:.1f}" if name in ("seconds", "ess_per_1000") else f"{value:.4f}"
