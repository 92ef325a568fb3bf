"""Sections of a run's report: other data than the task's, and single inputs with their texts.

Shapes: K members, N examples, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayesian_lora import metrics
from bayesian_lora.predict import Predictions
from bayesian_lora.report.charts import Panel, Series, chart
from bayesian_lora.report.page import Block, Cell, Chart, Missing, Section, Table, Text, cell
from bayesian_lora.report.run_files import AGAIN, RunFiles, figure
from bayesian_lora.report.verdicts import CLEAR, NAMES

Figures = Mapping[str, Any]

LISTED = 10
LONGEST = 360
"""Characters of a text that are shown."""
BINS = 30
MEASURES = {"auroc": "AUROC", "aupr": "AUPR"}
KINDS = {"scores": "posterior", "map": "MAP", "map_ensemble": "deep ensemble"}
SIDES = ("inside", "outside")
FEW = 30
"""Inputs of a set below which its figures are not put in words."""
OTHER = "evaluate one with 'bayesian-lora eval RUN --ood NAME_OR_PATH'"


@dataclass(frozen=True)
class Texts:
    """The inputs' texts by example_id, one or two each; none, and why, where there are no data."""

    by_id: Mapping[int, Sequence[str]]
    missing: str = ""


def shifted(files: RunFiles) -> Section:
    """Other sets and splits: can the uncertainty tell them from the task's own?"""
    title = "In and out of distribution"
    # Figures whose predictions are not the run's may be those of members it has no longer.
    others = {n: f for n, f in files.others.items() if f"predictions of {n}" not in files.missing}
    blocks: list[Block] = []
    for name, found in files.others.items():
        if name not in others:
            blocks.append(Missing(name, files.missing[f"predictions of {name}"]))
        elif isinstance(found.get("ood"), Mapping):
            blocks += _scores(name, found["ood"], files.sampled)
            if found["ood"].get("labelled") is False:
                why = (found.get("ensemble") or {}).get("accuracy_reason")
                blocks.append(Missing(f"Accuracy on {name}", str(why or "other labels")))
    sets = {n: f for n, f in others.items() if n in files.predictions}
    own = files.predictions.get(files.split)
    if own is not None and sets and not files.regression:
        blocks.append(entropy_chart(files.split, own, {n: files.predictions[n] for n in sets}))
    labelled = {n: f for n, f in others.items() if figure(f.get("ensemble"), "nll") is not None}
    if labelled:
        blocks.append(_splits(files, labelled))
    if not blocks:
        blocks = [Missing("Sets of another distribution", f"none was evaluated: {OTHER}")]
    return Section(title, "shift", blocks)


def _scores(name: str, found: Figures, sampled: bool) -> list[Block]:
    """AUROC and AUPR of each score, of posterior and MAP, and by how much they differ."""
    kinds = {k: t for k, t in KINDS.items() if isinstance(found.get(k), Mapping)}
    if not sampled:  # the members are the warm starts
        kinds = {"scores": KINDS["map_ensemble"], "map": KINDS["map"]}
    whose = kinds.get("scores", KINDS["scores"])
    gaps = (found.get("differences") or {}).get("ensemble-map") or {}
    base = found.get("base_rate")
    chance = {"auroc": "0.5", "aupr": "the base rate" if base is None else f"{base:.3f}"}
    heads = ["Score", *kinds.values(), f"{whose} less MAP"]
    blocks: list[Block] = [Text(words, "answer") for words in _told(name, whose, found)]
    for measure, title in MEASURES.items():
        rows = [
            [
                cell(score.replace("_", " ")),
                *(_with_error(found[k].get(score) or {}, measure) for k in kinds),
                _with_error(gaps.get(score) or {}, measure, "+"),
            ]
            for score in found.get("scores") or {}
        ]
        caption = (
            f"{title}: telling {name} ({found.get('outside_n', '?')} inputs) from "
            f"{found.get('against', '?')} ({found.get('inside_n', '?')})"
        )
        note = f"± is one standard error (bootstrap). By chance the {title} is {chance[measure]}."
        blocks.append(Table(caption, heads, rows, note=note))
    return blocks


def _told(name: str, whose: str, found: Figures) -> list[str]:
    """The AUROC of the predictive entropy in words, none where it is not known."""
    score, error = (
        ((found.get("scores") or {}).get("predictive_entropy") or {}).get(key)
        for key in ("auroc", "auroc_se")
    )
    if score is None or error is None:
        return []
    against, least = found.get("against", "?"), min(found.get(f"{n}_n", 0) for n in SIDES)
    if least < FEW:
        return [f"Telling {name} from {against} rests on {least} inputs of one of them: a hint."]
    shown = f"AUROC {score:.3f} ± {error:.3f}, where 0.5 is chance"
    if abs(score - 0.5) <= CLEAR * error:
        return [
            f"The {whose}'s predictive entropy is not shown to tell {name} from {against}: {shown}."
        ]
    way = "higher" if score > 0.5 else "lower"
    return [f"The {whose}'s predictive entropy is {way} on {name} than on {against}: {shown}."]


def _with_error(row: Figures, key: str, sign: str = "") -> Cell:
    value, error = row.get(key), row.get(f"{key}_se")
    if value is None:
        return cell(None, reason=str(row.get(f"{key}_reason") or "not recorded"))
    shown = f"{value:{sign}.4f}"
    return Cell(shown if error is None else f"{shown} ± {error:.4f}")


def _splits(files: RunFiles, labelled: Mapping[str, Figures]) -> Table:
    every = {files.split: files.metrics, **labelled}
    names = [
        n for n in NAMES if any(figure(f.get("ensemble"), n) is not None for f in every.values())
    ]
    rows = [
        [
            cell(split),
            cell(found.get("n")),
            *(cell(figure(found.get("ensemble"), n)) for n in names),
        ]
        for split, found in every.items()
    ]
    return Table(
        "The ensemble on every labelled set", ["Set", "n", *(NAMES[n] for n in names)], rows
    )


def entropy_chart(split: str, own: Predictions, others: Mapping[str, Predictions]) -> Chart:
    """Histograms of the predictive entropy, as shares of each set's inputs."""
    sets = {split: own, **others}
    entropies = {
        name: metrics.uncertainty_per_example(p.logits, p.weights)["predictive_entropy"]
        for name, p in sets.items()
    }
    top = max(float(np.log(p.logits.shape[2])) for p in sets.values())
    edges = np.linspace(0.0, top * (1 + 1e-9), BINS + 1)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    shares = {n: np.histogram(x, edges)[0] / len(x) for n, x in entropies.items()}
    series = [
        Series(name, middles, share.tolist(), "both", i, i)
        for i, (name, share) in enumerate(shares.items())
    ]
    means = ", ".join(f"{name} {x.mean():.3f}" for name, x in entropies.items())
    rows = [
        [
            cell(f"{edges[i]:.3f}–{edges[i + 1]:.3f}"),
            *(cell(float(s[i]), 3) for s in shares.values()),
        ]
        for i in range(BINS)
    ]
    return chart(
        series,
        [Panel("predictive entropy, nats", "share of inputs", x_range=(0, top))],
        text=f"Histograms of the predictive entropy; means: {means} nats.",
        caption="Predictive entropy of the ensemble inside and outside the task's distribution; "
        f"the largest possible is {top:.3f} nats.",
        numbers=Table("shares by entropy", ["Entropy", *shares], rows),
    )


def inputs(files: RunFiles, texts: Texts) -> Section:
    """The most uncertain inputs, and those the ensemble is most confidently wrong on."""
    found = files.predictions.get(files.split)
    title = "Inputs worth reading"
    if found is None:
        why = files.missing.get(f"predictions of {files.split}", "no predictions are stored")
        return Section(title, "inputs", [Missing("Inputs", why)])
    make = _regression_tables if files.regression else _class_tables
    blocks: list[Block] = list(make(files, found, texts))
    if not texts.by_id:
        blocks.append(Missing("Texts of the inputs", texts.missing or "the data are not there"))
    return Section(title, "inputs", blocks)


def _class_tables(files: RunFiles, found: Predictions, texts: Texts) -> list[Table]:
    names = files.manifest.get("task", {}).get("label_names") or []
    p, labels = found.probs, found.labels
    parts = metrics.uncertainty_per_example(found.logits, found.weights)
    entropy, mutual = parts["predictive_entropy"], parts["mutual_information"]
    alone = np.count_nonzero(found.weights) == 1
    predicted = p.argmax(1)

    def row(i: int) -> list[Cell]:
        figures = [cell(float(p[i].max()), 3), cell(float(entropy[i]), 3)]
        figures.append(
            cell(None if alone else float(mutual[i]), 4, reason="one member cannot disagree")
        )
        said = [cell(_label(names, k)) for k in (labels[i], predicted[i])]
        return [*_text_cells(texts, int(found.example_id[i])), *said, *figures]

    heads = ["Input", *_heads(texts), "Label", "Predicted", "Probability", "Entropy", "Mutual inf."]
    uncertain = np.argsort(-entropy, kind="stable")[:LISTED]
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-p.max(1)[wrong], kind="stable")][:LISTED]
    count = f"of {len(wrong)} that are wrong"
    return [
        Table(f"The {len(uncertain)} most uncertain inputs", heads, [row(i) for i in uncertain]),
        Table(
            f"The {len(surest)} most confidently wrong inputs, {count}",
            heads,
            [row(i) for i in surest],
        ),
    ]


def _regression_tables(_: RunFiles, found: Predictions, texts: Texts) -> list[Table]:
    assert found.noise_std is not None
    means, w = found.logits[..., 0], found.weights
    mean = w @ means
    sd = np.sqrt(w @ (found.noise_std[:, None] ** 2 + (means - mean) ** 2))
    off = np.abs(found.labels - mean) / sd

    def row(i: int) -> list[Cell]:
        figures = [float(values[i]) for values in (found.labels, mean, sd, off)]
        return [*_text_cells(texts, int(found.example_id[i])), *(cell(x, 3) for x in figures)]

    heads = ["Input", *_heads(texts), "Label", "Mean", "Sd", "Error in sd"]
    return [
        Table(f"The {LISTED} {what}", heads, [row(i) for i in np.argsort(-by)[:LISTED]])
        for what, by in (("most uncertain inputs", sd), ("most confidently wrong inputs", off))
    ]


def _label(names: Sequence[str], k: Any) -> str:
    return names[int(k)] if 0 <= int(k) < len(names) else str(int(k))


def _heads(texts: Texts) -> list[str]:
    count = max((len(found) for found in texts.by_id.values()), default=0)
    return ["Text", "Second text"][:count]


def _text_cells(texts: Texts, example: int) -> list[Cell]:
    """The example's number, then its texts, cut where they are long."""
    found = list(texts.by_id.get(example, ()))
    count = len(_heads(texts))
    shown = [Cell(_cut(text), number=False, long=True) for text in found[:count]]
    reason = f"no example of this number in the data: {AGAIN}"
    return [cell(str(example)), *shown, *[cell(None, reason=reason)] * (count - len(shown))]


def _cut(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 1].rstrip()}…"
