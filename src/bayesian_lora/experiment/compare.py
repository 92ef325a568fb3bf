"""One run for each combination of values, and one table: `comparison.json`, `comparison.csv`.

Cells that differ only in their sampler share one warm start. A comparison that ends early goes on
where it ended: a finished cell is not run again.
"""

import copy
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayesian_lora.config import Config, load_run_config
from bayesian_lora.errors import InputError
from bayesian_lora.experiment import comparison_table
from bayesian_lora.experiment.cells import (
    Axes,
    Cell,
    Plan,
    Settings,
    differences,
    make_plan,
    settings_of,
    start_of,
)
from bayesian_lora.experiment.setup import data_folder, resolve_device, task_of
from bayesian_lora.experiment.train import train
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import RunFolder
from bayesian_lora.utils.files import read_json, write_atomic, write_json
from bayesian_lora.utils.lock import locked

TABLE = "comparison.csv"
Entry = dict[str, Any]


def compare(
    config_path: str | Path, arguments: Sequence[str] = (), progress: Progress | None = None
) -> Path:
    """Run all cells that are not done, print one table, return the comparison's folder.

    A cell that fails with `InputError` is recorded with its error and the others go on
    (`failed_cells`); whatever else ends a cell is recorded as well and ends the comparison.

    Args:
        config_path, arguments: see `make_plan`.
        progress: where lines go.

    Raises:
        InputError: wrong input in any cell, which is named, or a folder that holds something else
            (nothing is written).
    """
    progress = progress or Progress()
    plan = make_plan(config_path, arguments)
    for cell in plan.cells:
        _check_inputs(cell)
    comparison = Comparison(plan, progress)
    varied = ", ".join(f"{key} ({len(values)})" for key, values in plan.axes.items())
    with locked(plan.root), _resumable(comparison, config_path, arguments):
        comparison.open()
        progress.say(f"{len(plan.cells)} cells over {varied}, in {plan.root}")
        for number, cell in enumerate(plan.cells, start=1):
            comparison.run(cell, f"[{number}/{len(plan.cells)}] {cell.name}")
    for line in comparison.closing_lines():
        progress.say(line)
    return plan.root


def failed_cells(root: Path) -> list[str]:
    """Names of the cells of a comparison's folder that failed."""
    cells = comparison_table.read_record(root)["cells"]
    return [entry["name"] for entry in cells if entry["status"] == "failed"]


@contextmanager
def _resumable(
    comparison: "Comparison", config_path: str | Path, arguments: Sequence[str]
) -> Iterator[None]:
    """An interrupt leaves everything as it is and says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError):
        done = [e for e in comparison.entries.values() if e["status"] == "finished"]
        same = [item for item in arguments if not item.startswith("output.overwrite=")]
        command = shlex.join(["bayesian-lora", "compare", str(config_path), *same])
        comparison.progress.say(
            f"\n{len(done)} of {len(comparison.entries)} cells are done and stay in "
            f"{comparison.root}; go on with: {command}"
        )
        raise


def _check_inputs(cell: Cell) -> None:
    """What can be known of a cell's task, device and data folder without loading anything."""
    try:
        task_of(cell.config)
        resolve_device(cell.config.device)
        data_folder(cell.config)
    except InputError as error:
        raise InputError(f"cell {','.join(cell.overrides)}: {error}") from error


class Comparison:
    """The folder of a comparison and what stands in it, cell by cell.

    Statuses of a cell: ``pending``, ``running``, ``finished``, ``failed`` (its error is kept),
    ``interrupted``.
    """

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.root, self.progress = plan, plan.root, progress
        self.entries: dict[str, Entry] = {cell.name: _pending(cell) for cell in plan.cells}

    def open(self) -> None:
        """Take over the folder: an empty one, this comparison's, or one that may be replaced.

        Raises:
            InputError: it holds something else.
        """
        if (self.root / "run.json").is_file():
            raise InputError(
                f"output.dir={str(self.root)!r} holds a single run; name another folder with "
                "output.dir=…"
            )
        if not (self.root / comparison_table.RECORD).is_file():
            RunFolder(self.root).check_free(overwrite=False)
        else:
            old = comparison_table.read_record(self.root)
            if self.plan.overwrite:
                self._clear(old)
            else:
                self._take_over(old)
        for cell in self.plan.cells:
            self._find(cell)
        self.write()

    def _take_over(self, old: Entry) -> None:
        there, here = _terms(old["axes"], old["config"]), _terms(self.plan.axes, self.plan.common())
        if found := differences(there, here):
            found = [*found[:4], f"and {len(found) - 4} more"] if len(found) > 5 else found
            raise InputError(
                f"output.dir={str(self.root)!r} holds another comparison ({'; '.join(found)}): "
                "keep both with output.dir=<new folder>, or replace it with output.overwrite=true"
            )
        for entry in old["cells"]:
            if entry["name"] in self.entries:
                self.entries[entry["name"]] |= entry

    def _clear(self, old: Entry) -> None:
        """Remove an old comparison's own folders and files, nothing else."""
        for entry in old["cells"]:
            folder = self.root / Path(entry["folder"]).name
            if (folder / "run.json").is_file():
                shutil.rmtree(folder)
        for name in (TABLE, comparison_table.RECORD):
            (self.root / name).unlink(missing_ok=True)

    def _find(self, cell: Cell) -> None:
        """Set a cell's entry by what its folder holds: it is finished, or is to be run."""
        entry = self.entries[cell.name]
        if (figures := _finished(self.root / cell.name, cell.config)) is not None:
            entry |= {"status": "finished", "error": None, **figures}
            return
        self.entries[cell.name] = new = _pending(cell)
        if entry["status"] != "finished":  # else its folder has been changed since
            new |= {key: entry[key] for key in ("status", "error", "warm_start", "starts_from")}

    def run(self, cell: Cell, title: str) -> None:
        """Run a cell that is not done and record how it ended."""
        if self.entries[cell.name]["status"] == "finished":
            self.progress.say(f"{title}: already done")
            return
        self.progress.say(f"\n{title}")
        update = self.entries[cell.name].update
        try:
            config = self._begin(cell)
            update({"status": "finished", **_figures(train(config, self.progress))})
        except InputError as error:
            update({"status": "failed", "error": str(error)})
            self.progress.say(f"{title} failed: {error}")
        except BaseException as error:
            update({"status": "interrupted", "error": f"{type(error).__name__} {error}".strip()})
            raise
        finally:
            self.progress.end()
            self.write()

    def _begin(self, cell: Cell) -> Config:
        """The config of a cell's run, with its warm start chosen; `train` goes on in its folder."""
        config = copy.deepcopy(cell.config)
        folder = self.root / cell.name
        config.output.dir, config.output.overwrite = str(folder), False
        entry = self.entries[cell.name]
        entry |= _pending(cell) | {"status": "running"}
        given, donor = config.train.starts_from, self._donor(cell)
        if given is not None:
            entry |= {"warm_start": given, "starts_from": given}
        elif donor is not None:
            config.train.starts_from = str(self.root / donor)
            entry |= {"warm_start": self.entries[donor]["warm_start"], "starts_from": donor}
        else:
            entry["warm_start"] = cell.name
        self.write()
        return config

    def _donor(self, cell: Cell) -> str | None:
        """Another cell whose folder has this one's warm start, whole; finished ones first."""
        wanted, train_config = start_of(cell.config), cell.config.train
        fits = 1 if train_config.starts == "shared" else cell.config.sampler.chains
        others = [c for c in self.plan.cells if c is not cell and start_of(c.config) == wanted]
        others.sort(key=lambda other: self.entries[other.name]["status"] != "finished")
        for other in others:
            folder = self.root / other.name
            stored = list(folder.glob("map/chain_*/adapter_model.safetensors"))
            whole = len(stored) == fits and (folder / "ensemble.json").is_file()
            if whole and self.entries[other.name]["warm_start"] and _is_of(folder, other.config):
                return other.name
        return None

    def write(self) -> None:
        """`comparison.json` and `comparison.csv` as things stand, each whole or as it was."""
        entries = list(self.entries.values())
        record = {
            "axes": self.plan.axes,
            "config": self.plan.common(),
            "cells": entries,
            "notes": comparison_table.notes(entries),
        }
        write_json(self.root / comparison_table.RECORD, record)
        rows = comparison_table.table(list(self.plan.axes), entries)
        write_atomic(self.root / TABLE, comparison_table.to_csv(rows))

    def closing_lines(self) -> list[str]:
        """The table and its notes."""
        entries = list(self.entries.values())
        rows = comparison_table.table(list(self.plan.axes), entries)
        table = comparison_table.lines(rows)
        notes = comparison_table.notes(entries)
        return ["", *table, "", *notes, f"Comparison: {self.root / TABLE}"]


def _pending(cell: Cell) -> Entry:
    return {
        "name": cell.name,
        "overrides": list(cell.overrides),
        "folder": cell.name,
        "status": "pending",
        "error": None,
        "warm_start": None,
        "starts_from": None,
    }


def _figures(folder: Path) -> Entry:
    run, metrics = (read_json(folder / f"{name}.json", name) for name in ("run", "metrics"))
    return comparison_table.figures_of(metrics, run)


def _finished(folder: Path, config: Config) -> Entry | None:
    """The figures of this very run, None unless the folder holds it, finished and evaluated."""
    try:
        finished = read_json(folder / "run.json", "run").get("status") == "finished"
        return _figures(folder) if finished and _is_of(folder, config) else None
    # A file is missing, damaged or of another version.
    except (InputError, LookupError, TypeError, ValueError, AttributeError):
        return None


def _is_of(folder: Path, config: Config) -> bool:
    try:
        return settings_of(load_run_config(folder)) == settings_of(config)
    except InputError:
        return False


def _terms(axes: Axes, common: Settings) -> Settings:
    """What two comparisons must agree in, by name."""
    values = {f"axis {key}": ",".join(texts) for key, texts in axes.items()}
    return {"axes": ", ".join(axes), **values, **common}
