"""What a report reads: the files of a run's folder, and why where one cannot be read.

Shapes: M chains, T rows of a trace.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bayesian_lora.assessment.stored import load_predictions
from bayesian_lora.errors import InputError
from bayesian_lora.predict import Predictions
from bayesian_lora.run_folder import read_traces
from bayesian_lora.utils.files import read_json

Figures = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
Read = TypeVar("Read")

AGAIN = "evaluate it again with 'bayesian-lora eval RUN'"


@dataclass(frozen=True)
class RunFiles:
    """A finished run's files.

    metrics: of the default split; others: `metrics.<split>.json` by split; predictions: by split;
    traces: (M, T) by quantity, without the chains that were dropped; chains: their numbers (M,);
    milestones: lines of `run.json` or `log.jsonl`; missing: why something is not there, by name.
    """

    root: Path
    metrics: Figures
    run: Figures
    manifest: Figures
    others: Mapping[str, Figures] = field(default_factory=dict)
    predictions: Mapping[str, Predictions] = field(default_factory=dict)
    traces: Arrays = field(default_factory=dict)
    chains: tuple[int, ...] = ()
    milestones: tuple[Figures, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """The default split, whose figures `metrics` are."""
        return str(self.metrics.get("split", ""))

    @property
    def regression(self) -> bool:
        """Whether the task has no classes."""
        return self.manifest.get("task", {}).get("likelihood") == "gaussian"

    @property
    def sampled(self) -> bool:
        """Whether there was any sampling: else the members are MAP fits."""
        return self.manifest.get("sampler", {}).get("name") != "map"

    def part(self, name: str) -> tuple[Figures | None, str]:
        """A part of `metrics`, or None and why it is not there."""
        found = self.metrics.get(name)
        if isinstance(found, Mapping):
            return found, ""
        return None, str(self.metrics.get(f"{name}_reason") or f"not in metrics.json: {AGAIN}")


def read_run(root: Path) -> RunFiles:
    """The files of a run that has been evaluated; what else is missing is said in `missing`.

    Raises:
        InputError: no run there, or one without `metrics.json`.
    """
    if not (root / "metrics.json").is_file():
        raise InputError(
            f"{root}: no metrics.json there, so there is nothing to report yet; finish the run "
            f"with 'bayesian-lora train', or evaluate it with 'bayesian-lora eval {root}'"
        )
    metrics, run, manifest = (
        read_json(root / f"{file}.json", what)
        for file, what in (("metrics", "metrics"), ("run", "run"), ("ensemble", "ensemble"))
    )
    missing: dict[str, str] = {}
    others = {
        path.name.removeprefix("metrics.").removesuffix(".json"): read_json(path, "metrics")
        for path in sorted(root.glob("metrics.*.json"))
    }
    predictions: dict[str, Predictions] = {}
    for split in [str(metrics.get("split")), *others]:
        what = f"predictions of {split}"
        found = _or_why(missing, what, lambda split=split: load_predictions(root, split))
        if found is not None:
            predictions[split] = found
    traces = _or_why(missing, "traces", lambda: read_traces(root)) or {}
    if not traces and "traces" not in missing:
        missing["traces"] = "no traces were recorded"
    dropped = metrics.get("diagnostics", {}).get("dropped_chains") or []
    gone = {drop["chain"] for drop in dropped}
    total = len(next(iter(traces.values()))) if traces else 0
    kept = [chain for chain in range(total) if chain not in gone]
    return RunFiles(
        root,
        metrics,
        run,
        manifest,
        others,
        predictions,
        {name: x[kept] for name, x in traces.items()},
        tuple(kept),
        tuple(_milestones(root, run)),
        missing,
    )


def figure(row: Any, name: str) -> float | None:
    """A figure of a row: its mean where the row is one over warm starts or draws."""
    found = row.get(name) if isinstance(row, Mapping) else None
    found = found.get("mean") if isinstance(found, Mapping) else found
    return float(found) if isinstance(found, int | float) else None


def standard_error(files: RunFiles, row: str, name: str) -> float | None:
    """Over examples, None where it was not computed."""
    return figure((files.metrics.get("standard_errors") or {}).get(row), name)


def difference_error(
    files: RunFiles, baseline: str, name: str, own: str = "ensemble"
) -> float | None:
    """Of the ensemble's less a baseline's figure, the examples in pairs; None as above."""
    found = (files.metrics.get("standard_errors") or {}).get("differences") or {}
    return figure(found.get(f"{own}-{baseline}"), name)


def _or_why(missing: dict[str, str], name: str, read: Callable[[], Read]) -> Read | None:
    try:
        return read()
    except InputError as error:
        missing[name] = str(error)
        return None


def _milestones(root: Path, run: Figures) -> list[Figures]:
    """Of `run.json`; of a run that is still under way those of `log.jsonl`."""
    if found := run.get("milestones"):
        return [row for row in found if isinstance(row, Mapping)]
    log, rows = root / "log.jsonl", []
    if not log.is_file():
        return []
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if '"milestone"' in line and (row := _parsed(line)) is not None:
                rows.append(row)
    return rows


def _parsed(line: str) -> Figures | None:
    """A line of the log; the last one may be half written."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, Mapping) and row.get("phase") == "milestone" else None
