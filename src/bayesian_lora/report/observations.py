"""The report of a study: every table of the original's README filled in, and what it left open."""

from bayesian_lora.report import anchors
from bayesian_lora.report.page import Block, Cell, Code, Page, Section, Table, Text, cell
from bayesian_lora.report.record import Record, data_sets, finished, listed, naming, title
from bayesian_lora.report.study_baselines import baselines
from bayesian_lora.report.study_gates import ensembles, gates, shares
from bayesian_lora.report.study_growth import sequential
from bayesian_lora.report.study_ranks import ranks
from bayesian_lora.report.study_subspaces import drift, similarity
from bayesian_lora.report.study_tables import further, lost, stacks

PARTS = (baselines, stacks, further, similarity, drift, sequential, gates, ensembles, ranks)


MADE = (
    ("baseline", "trained one by one"),
    ("stack", "stacked"),
    ("further", "trained further"),
    ("similarity", "compared"),
    ("sequential", "grown task by task"),
    ("gate", "gated"),
    ("experts", "sampled"),
    ("rank", "fitted at several ranks"),
)
"""Kinds of steps, and what the page says was done with the adapters where one is finished."""


def observations(record: Record) -> Page:
    """The page of a study's record, as `experiment.study` gives it."""
    with naming(record):
        return _page(record)


def _page(record: Record) -> Page:
    tasks = [title(task) for task in record["config"]["tasks"]]
    models = {step["model"] for step in finished(record, "baseline").values()}
    base = f" on {listed(sorted(models))}" if models else ""
    done = [words for kind, words in MADE if finished(record, kind)]
    return Page(
        "LoRA ensembling: observations",
        f"Adapters of {listed(tasks)}{base}: {listed(done) or 'none made yet'}. Every figure "
        "beside that of the original, where it has one.",
        [_targets(record), *(part(record) for part in PARTS), _made(record)],
        "Made by bayesian-lora from the files of the study's folder alone.",
    )


def _targets(record: Record) -> Section:
    """What was to be reached, and whether it was."""
    rows = [*_stacking_rows(record), *_gate_rows(record), *_growth_rows(record)]
    blocks: list[Block] = []
    if rows:
        columns = ["Aim", "Where", "Asked for", "Measured", "Reached"]
        blocks.append(Table("Aims of the study", columns, rows))
    else:
        blocks.append(Text("No step that an aim is set for has been made yet."))
    return Section("In short", "short", blocks)


def _verdict(reached: bool) -> Cell:
    return cell(reached, tone="good" if reached else "bad")


def _stacking_rows(record: Record) -> list[list[Cell]]:
    rows, data = [], data_sets(record)
    for name, step in finished(record, "stack").items():
        for task in step["alone"]:
            original = anchors.lost_by_stacking(data.get(task, ""))
            own = lost(step, "exact", task)
            if original is None or own is None:
                continue
            allowed = anchors.SHARE_OF_LOSS * original
            rows.append(
                [
                    cell("Accuracy lost by exact stacking"),
                    cell(f"stack {name}, {title(task)}"),
                    cell(f"at most {allowed:.3f}"),
                    cell(own, 3),
                    _verdict(own <= allowed),
                ]
            )
    return rows


def _gate_rows(record: Record) -> list[list[Cell]]:
    rows = []
    steps = [(f"gate {n}", s, "alone") for n, s in finished(record, "gate").items()]
    over = finished(record, "ensemblegate").items()
    steps += [(f"gate over {n}", s, "ensembles") for n, s in over]
    for name, step, reference in steps:
        found = shares(step, reference)
        if found:
            least = min(found, key=lambda task: found[task])
            rows.append(
                [
                    cell("Accuracy recovered without task labels, worst task"),
                    cell(f"{name.replace('_', ', ')}: {title(least)}"),
                    cell(f"at least {anchors.RECOVERED:.0%}"),
                    cell(f"{found[least]:.1%}"),
                    _verdict(found[least] >= anchors.RECOVERED),
                ]
            )
    return rows


def _growth_rows(record: Record) -> list[list[Cell]]:
    rows = []
    for step in finished(record, "sequential").values():
        for task in step["order"]:
            later = step["tasks"][task]["later"]
            if later:
                largest = max(row["largest_difference"] for row in later.values())
                rows.append(
                    [
                        cell("Predictions unchanged by later tasks, largest difference of a logit"),
                        cell(f"{title(task)} after {listed(map(title, later))}"),
                        cell("0"),
                        cell(f"{largest:.2g}"),
                        _verdict(all(row["identical"] for row in later.values())),
                    ]
                )
    return rows


def _made(record: Record) -> Section:
    """The command, versions, and how long each step took."""
    rows = [
        [
            cell(entry["title"]),
            cell(entry["status"]),
            cell(entry["seconds"], 1, reason="the step is not finished"),
        ]
        for entry in record["steps"].values()
    ]
    whole = sum(entry["seconds"] or 0.0 for entry in record["steps"].values())
    versions = [[cell(name), cell(text)] for name, text in record["versions"].items()]
    commit = record["git_commit"] or "not in a git working tree"
    return Section(
        "How it was made",
        "made",
        [
            Code(record["command"], "Command"),
            Text(f"Seed {record['config']['seed']}; git commit {commit}."),
            Table(
                "Steps and their wall time",
                ["Step", "Status", "Seconds"],
                rows,
                note=f"All finished steps together: {whole / 60:.1f} minutes.",
            ),
            Table("Versions", ["Package", "Version"], versions),
        ],
    )
