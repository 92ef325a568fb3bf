"""`report.html` of a run or a comparison: the folder's files, and the inputs' texts from the data.

The report itself knows neither config nor data: both are read here and handed down as plain values.
"""

from pathlib import Path
from typing import Any

from bayesian_lora.errors import InputError
from bayesian_lora.experiment import comparison_table
from bayesian_lora.progress import Progress
from bayesian_lora.report.comparison_report import Compared, comparison_page
from bayesian_lora.report.page import Page, write
from bayesian_lora.report.run_files import RunFiles, read_run
from bayesian_lora.report.run_inputs import Texts
from bayesian_lora.report.run_report import run_page

REPORT = "report.html"
DOCTYPE = b"<!DOCTYPE HTML>"


def write_report(
    root: str | Path,
    *,
    out: str | Path | None = None,
    data_dir: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the report of a finished run or of a comparison, and return its path.

    Args:
        root: the folder.
        out: where the file goes; None is `report.html` in the folder.
        data_dir: of the texts, in place of the run's own.
        progress: where lines go.

    Raises:
        InputError: neither is there, or it has nothing to report yet; `out` is a folder, or a file
            that is no page.
    """
    progress = progress or Progress()
    folder = Path(root)
    path = folder / REPORT if out is None else Path(out)
    if path.is_dir():
        raise InputError(f"--out {path}: a folder; name a file, such as {path / REPORT}")
    if path.is_file() and not _is_page(path):
        raise InputError(
            f"--out {path}: there already, and no HTML page, so it is not replaced; name another "
            "file"
        )
    if (folder / comparison_table.RECORD).is_file():
        page = comparison_of(folder)
    elif (folder / "run.json").is_file():
        page = page_of(folder, data_dir)
    else:
        raise InputError(
            f"{folder}: neither a run nor a comparison, it has no run.json and no comparison.json; "
            "name the folder of one"
        )
    write(path, page)
    progress.say(f"Report: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    return path


def _is_page(path: Path) -> bool:
    """Whether a file may be replaced by a report: an HTML page, or empty."""
    with path.open("rb") as file:
        begun = file.read(len(DOCTYPE))
    return not begun or begun.upper() == DOCTYPE


def page_of(root: Path, data_dir: str | None = None) -> Page:
    """The page of a run's folder."""
    files = read_run(root)
    return run_page(files, read_texts(files, data_dir), root.resolve().name)


def read_texts(files: RunFiles, data_dir: str | None = None) -> Texts:
    """The texts of the default split, None and the reason where the data cannot be read.

    They must be those that the run was evaluated on: their fingerprint is compared.
    """
    try:
        found = _examples(files, data_dir)
    except InputError as error:
        return Texts({}, str(error))
    recorded = ((files.run.get("data") or {}).get("fingerprint") or {}).get("evaluation")
    if recorded is not None and recorded != found.fingerprint():
        return Texts({}, "the data have changed since the run: their fingerprint is another")
    columns = zip(*found.texts, strict=True)
    return Texts({int(i): texts for i, texts in zip(found.ids, columns, strict=True)})


def _examples(files: RunFiles, data_dir: str | None) -> Any:
    from bayesian_lora.data.glue_datasets import load_split
    from bayesian_lora.experiment.resume import load_own_config
    from bayesian_lora.experiment.setup import data_folder, task_of
    from bayesian_lora.utils.hub import offline_if_unreachable

    config = load_own_config(files.root)
    config.data.dir = data_dir or config.data.dir
    task, folder = task_of(config), data_folder(config)
    if task.hub_path is not None and not (folder is not None and task.local is not None):
        offline_if_unreachable()
    return load_split(task, files.split, data_dir=folder)


def comparison_of(root: Path) -> Page:
    """The page of a comparison's folder."""
    record = comparison_table.read_record(root)
    axes, entries = record["axes"], record["cells"]
    cells: dict[str, RunFiles] = {}
    missing: dict[str, str] = {}
    for entry in entries:
        if entry["status"] != "finished":
            missing[entry["name"]] = entry["error"] or f"it is {entry['status']}"
            continue
        try:
            cells[entry["name"]] = read_run(root / entry["folder"])
        except InputError as error:
            missing[entry["name"]] = str(error)
    table = comparison_table.table(list(axes), entries)
    notes = comparison_table.notes(entries)
    compared = Compared(axes, table, notes, cells, missing)
    return comparison_page(compared, root.resolve().name)
