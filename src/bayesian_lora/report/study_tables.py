"""The observations' sections on stacks: without training, and trained further."""

from collections.abc import Mapping

from bayesian_lora.report import anchors
from bayesian_lora.report.page import Block, Cell, Section, Table, Text, cell
from bayesian_lora.report.record import (
    NO_MCC,
    Figures,
    Record,
    data_sets,
    difference,
    drawn,
    finished,
    first_split,
    listed,
    measured,
    places,
    signed,
    standard_error,
    title,
    unfinished,
    value,
)
from bayesian_lora.report.study_baselines import curves

LOGGED = (
    "epoch",
    "lr-Adam",
    "train/acc",
    "train/loss",
    "trainer/global_step",
    "val/acc",
    "val/loss",
)

CHANGES = (
    "Changes are against the adapter alone; of an accuracy those beyond two standard errors "
    "√(p(1 − p)/n) are marked. NLL in nats"
)
MEASURED = ("n", "Accuracy", "change", "MCC", "NLL", "change")
WHOLE = ("epoch", "trainer/global_step")


def stacks(record: Record) -> Section:
    """What stacking without any further training costs, way by way."""
    steps, data = finished(record, "stack"), data_sets(record)
    blocks: list[Block] = []
    for name, step in steps.items():
        blocks += [Text(sentence, "answer") for sentence in stacking_answers(name, step, data)]
        blocks.append(_stack_table(name, step, measured(record)))
    if steps:
        blocks.append(_original_stacks())
    blocks += unfinished(record, "stack", "Stacks")
    return Section("Stacked without further training", "stacked", blocks)


def stacking_answers(name: str, step: Figures, data: Mapping[str, str]) -> list[str]:
    """What exact stacking loses on each task, against what the original lost on its data set."""
    found = []
    for task, alone in step["alone"].items():
        gone, own = lost(step, "exact", task), first_split(alone)
        original = anchors.lost_by_stacking(data.get(task, ""))
        if gone is None:
            continue
        words = (
            f"{name}: exact stacking changes {title(task)}'s accuracy from "
            f"{own['accuracy']:.3f} by {signed(-gone)} (standard error {standard_error(own):.3f})"
        )
        if (halved := lost(step, "original", task)) is not None:
            words += f", at the original's scaling by {signed(-halved)}"
        if original is None:
            words += "; the original gives no stacked figure of its data set"
        else:
            allowed = anchors.SHARE_OF_LOSS * original
            met = "met" if gone <= allowed else "not met"
            words += (
                f"; the original's stacking lost {original:.3f}, and the target, to lose at most "
                f"{anchors.SHARE_OF_LOSS:.0%} of that ({allowed:.3f}), is {met}"
            )
        found.append(words + ".")
    return found


def lost(step: Figures, way: str, task: str) -> float | None:
    """Accuracy lost on a task's default split against the adapter alone."""
    figures = step["ways"].get(way, {}).get("figures", {}).get(task)
    if figures is None:
        return None
    return first_split(step["alone"][task])["accuracy"] - first_split(figures)["accuracy"]


def _stack_table(name: str, step: Figures, seen: str) -> Table:
    rows = []
    for (task, split), place in places(step["alone"]).items():
        own, rank = step["alone"][task][split], step["ranks"][task]
        rows.append([cell(place), cell("the adapter alone"), cell(rank), *_against(own, None)])
        for way in step["ways"].values():
            if (row := way["figures"][task].get(split)) is not None:
                rows.append(
                    [cell(place), cell(way["title"]), cell(way["rank"]), *_against(row, own)]
                )
    notes = [f"{way['title']}: {way['note']}" for way in step["ways"].values() if way["note"]]
    return Table(
        f"Stack {name} of {listed(map(title, step['alone']))}",
        ["Task", "How", "Rank", *MEASURED],
        rows,
        note=". ".join([*notes, CHANGES, seen]) + ".",
    )


def _against(row: Figures, own: Figures | None) -> list[Cell]:
    """The columns `MEASURED` of a row, changes against `own`."""
    if own is None:
        changes = [cell("–"), cell("–")]
    else:
        changes = [
            difference(row["accuracy"], own["accuracy"], least=2 * standard_error(own)),
            difference(row["nll"], own["nll"], better=-1),
        ]
    mcc = value(row, "mcc", reason=NO_MCC)
    accuracy = [cell(row["n"]), value(row, "accuracy"), changes[0], mcc]
    return [*accuracy, value(row, "nll"), changes[1]]


def _original_stacks() -> Table:
    rows = []
    for task, stacked in anchors.STACKED.items():
        base, trained = anchors.BASELINE[task], anchors.TRAINED[task]
        for name in ("val/acc", "val/loss"):
            figures = [base[name], stacked[name], trained[name]]
            rows.append([cell(f"{title(task)} {name}"), *(cell(x, 3) for x in figures)])
    return Table(
        f"The original's figures ({anchors.MODEL})",
        ["Quantity", "Baseline", "Stacked without training", "Stacked and trained on it"],
        rows,
        note="It stacked at a changed alpha/rank, which halved both adapters.",
    )


def further(record: Record) -> Section:
    """What training a stack further changes, on the task it was trained on and on the others."""
    steps = finished(record, "further")
    blocks: list[Block] = []
    for name, step in steps.items():
        blocks += [Text(words, "answer") for words in generalisation(step)]
        blocks.append(_variants_table(name, step, measured(record)))
        blocks += [_summaries(step), *_original_summaries()]
        blocks += curves(
            {v: row["history"] for v, row in step["variants"].items()}, f"stack {name}"
        )
    blocks += unfinished(record, "further", "Further training")
    return Section("Stacks trained further", "further", blocks)


def generalisation(step: Figures) -> list[str]:
    """Whether further training is better on all the stack's tasks, with the accuracies' errors."""
    where = listed(places(step["alone"]).values())
    return [
        f"Better than {what} on {where}? {_gains(step, reference)}"
        for reference, what in (
            ("alone", "the single adapters"),
            ("before", "the untrained exact stack"),
        )
    ]


def _gains(step: Figures, reference: str) -> str:
    """Of the variants those better on every task, those within one standard error, the best."""
    own = {place: step[reference][place[0]][place[1]] for place in places(step["alone"])}
    errors = {place: standard_error(row) for place, row in own.items()}
    gains = {
        name: {
            (task, split): row["figures"][task][split]["accuracy"] - base["accuracy"]
            for (task, split), base in own.items()
        }
        for name, row in step["variants"].items()
    }
    better, level = [], []
    for name, found in gains.items():
        if all(gain > errors[place] for place, gain in found.items()):
            better.append(name)
        elif all(gain >= -errors[place] for place, gain in found.items()):
            level.append(name)
    least = max(gains, key=lambda name: min(gains[name].values()))
    worst = min(gains[least], key=lambda place: gains[least][place])
    return (
        f"By more than one standard error on every one: {listed(better) or 'none'}. Nowhere worse "
        f"by more than one, though not better by more than one on all: {listed(level) or 'none'}. "
        f"The variant whose worst change is best is {least}: {signed(gains[least][worst])} on "
        f"{places(step['alone'])[worst]}, where the standard error is {errors[worst]:.3f}."
    )


def _variants_table(name: str, step: Figures, seen: str) -> Table:
    rows = []
    for (task, split), place in places(step["alone"]).items():
        own, before = (step[which][task][split] for which in ("alone", "before"))
        rows += [
            [cell(place), cell("the adapter alone"), cell("–"), *_against(own, None)],
            [cell(place), cell("exact stack, untrained"), cell("–"), *_against(before, own)],
        ]
        for variant, row in step["variants"].items():
            found = _against(row["figures"][task][split], own)
            rows.append([cell(place), cell(variant), cell(row["what"]), *found])
    recipe = step["recipe"]
    fit = f"{drawn(step['sizes'], recipe)}, learning rate {recipe['lr']:g}"
    return Table(
        f"Stack {name} after further training, on every task it carries",
        ["Task", "Variant", "What is trained", *MEASURED],
        rows,
        note=f"{CHANGES}. {fit}. {seen}.",
    )


def _summaries(step: Figures) -> Table:
    """The last epoch of every variant under the names of the original's run summaries."""
    variants = step["variants"]
    last = {name: dict(row["history"][-1]) for name, row in variants.items()}
    for row in last.values():
        row |= {name: int(row[name]) for name in WHOLE}
    rows = [[cell(q), *(value(row, q, 5) for row in last.values())] for q in LOGGED]
    return Table(
        "Run summaries, as the original lists them",
        ["Quantity", *variants],
        rows,
        note="Of the last epoch; val/… here is the share held out of train of the tasks trained "
        "on, by which the epoch that is kept was chosen.",
    )


def _original_summaries() -> list[Block]:
    rows = [
        [cell(q), *(cell(figures[q], 5) for figures in anchors.TRAINED.values())] for q in LOGGED
    ]
    heads = [f"trained on {title(task)}" for task in anchors.TRAINED]
    caption = f"The original's run summaries ({anchors.MODEL}, one epoch)"
    return [Table(caption, ["Quantity", *heads], rows)]
