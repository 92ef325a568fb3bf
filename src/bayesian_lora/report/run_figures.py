"""Sections of a run's report: is the posterior worth it, and the rows it is measured by."""

from collections.abc import Iterable, Mapping
from typing import Any

from bayesian_lora.report.page import (
    Block,
    Cell,
    Missing,
    Section,
    Table,
    Text,
    cell,
    number,
    with_error,
)
from bayesian_lora.report.record import listed, signed
from bayesian_lora.report.run_files import AGAIN, RunFiles, difference_error, figure, standard_error
from bayesian_lora.report.verdicts import (
    BASELINES,
    CLEAR,
    COMPARED,
    NAMES,
    ROWS,
    SAMPLED,
    asides,
    titles_of,
    verdict,
    way_of,
)

Figures = Mapping[str, Any]

FURTHER = {
    **{"adaptive_ece": "Adaptive ECE", "classwise_ece": "Classwise ECE"},
    **{"aurc": "AURC", "coverage_0.5": "Cover. 50 %", "coverage_0.9": "Cover. 90 %"},
    **{"coverage_0.95": "Cover. 95 %"},
}
PARTS = {
    **{"brier_reliability": "Reliability", "brier_resolution": "Resolution"},
    **{"brier_uncertainty": "Uncertainty", "brier_within_bin": "Within bins"},
}
NOTES = {
    "nll": "NLL in nats.",
    "ece": "ECE with 15 equal-width bins.",
    "expected_ece": "ECE if calibrated: what a model with these very probabilities would score if "
    "they were right.",
    "aurc": "AURC: area under the risk–coverage curve.",
}
NO_PARTS = "this row has no such part"


def summary(files: RunFiles) -> Section:
    """Whether the posterior is worth it, in words, and against what."""
    blocks: list[Block] = [Text(words, "answer") for words in verdict(files)]
    if files.sampled:
        blocks.append(_against(files))
    blocks += [Text(words) for words in asides(files)]
    return Section("In short", "short", blocks)


def _against(files: RunFiles) -> Block:
    """Differences of the ensemble from every baseline, with their standard errors."""
    m = files.metrics
    ensemble = m.get("ensemble") or {}
    names = [n for n in COMPARED if figure(ensemble, n) is not None]
    rows = []
    for baseline, title in titles_of(m).items():
        known = baseline in BASELINES and any(figure(m[baseline], n) is not None for n in names)
        if known:
            rows.append([cell(title), *(_difference(files, baseline, n) for n in names)])
    if not rows or not names:
        return Missing("Differences from the baselines", f"no row to compare with; {AGAIN}")
    return Table(
        "Posterior ensemble less each baseline",
        ["Baseline", *(NAMES[n] for n in names)],
        rows,
        note="± is one standard error of the difference, the examples being drawn again in pairs "
        f"(bootstrap); a difference beyond {CLEAR:g} of them is called better or worse. It "
        "speaks of other examples, not of another seed, training set or temperature: compare runs "
        "for that.",
    )


def _difference(files: RunFiles, baseline: str, name: str) -> Cell:
    old, new = (figure(files.metrics.get(row), name) for row in (baseline, "ensemble"))
    if old is None or new is None:
        return cell(None, reason=f"{NAMES[name]} of {ROWS[baseline]} is not known")
    change, error = new - old, difference_error(files, baseline, name)
    shown = signed(change, 4)
    if error is None:
        return Cell(shown)
    shown = f"{shown} ± {number(error)}"
    way = way_of(files, baseline, name)
    word, tone = {1: (" better", "good"), -1: (" worse", "bad")}.get(way, ("", ""))
    return Cell(f"{shown}{word}", tone=tone)


def rows(files: RunFiles) -> Section:
    """Every row of figures with standard errors, and the parts of the Brier score."""
    m = files.metrics
    given = titles_of(m)
    if not files.sampled:
        given = {r: title for r, title in given.items() if r not in SAMPLED}
    errors = m.get("standard_errors")
    note = (
        f"± is one standard error over examples (bootstrap, {errors.get('replicates', '?')} "
        "replicates)."
        if errors
        else f"Standard errors are not in metrics.json: {AGAIN}."
    )
    where = f"on {files.split}, {m.get('n', '?')} examples"
    blocks: list[Block] = []
    for what, titles in (("Figures", NAMES), ("Further figures", FURTHER)):
        if names := _known(files, given, titles):
            body = [
                [cell(title), *(_shown(files, r, n) for n in names)] for r, title in given.items()
            ]
            heads = ["", *(titles[n] for n in names)]
            notes = " ".join([note, *(NOTES[n] for n in names if n in NOTES)])
            blocks.append(Table(f"{what} {where}", heads, body, note=notes))
    if parts := _known(files, given, PARTS):
        blocks.append(_brier(files, given, parts))
    blocks += [_spreads(files, _known(files, given, NAMES)), *_absent(files)]
    return Section("Figures", "figures", blocks)


def _known(files: RunFiles, given: Iterable[str], titles: Mapping[str, str]) -> list[str]:
    """Those of the titles' figures that some row has."""
    return [n for n in titles if any(figure(files.metrics[r], n) is not None for r in given)]


def _shown(files: RunFiles, row: str, name: str) -> Cell:
    found = files.metrics[row]
    spread = found.get(name)
    inner = spread.get("reason") if isinstance(spread, Mapping) else None
    why = found.get(f"{name}_reason") or found.get("reason") or inner or _unknown(files, name)
    return with_error(figure(found, name), standard_error(files, row, name), str(why))


def _unknown(files: RunFiles, name: str) -> str:
    """Why a row lacks a figure without saying so."""
    known = bool(files.metrics.get("standard_errors"))  # so nothing newer would come
    return f"{({**NAMES, **FURTHER})[name]}: {'not computed for this row' if known else AGAIN}"


def _brier(files: RunFiles, given: Mapping[str, str], parts: list[str]) -> Table:
    m = files.metrics
    body = [
        [cell(title), *(_part(files, r, n) for n in ("brier", *parts))]
        for r, title in given.items()
        if any(figure(m[r], n) is not None for n in parts)
    ]
    return Table(
        "Brier score and its parts",
        ["", "Brier", *(PARTS[n] for n in parts)],
        body,
        note="Brier = reliability − resolution + uncertainty + what lies within the bins (Murphy "
        "1973; Stephenson et al. 2008). Reliability 0 is perfect calibration; near that its ± is "
        "too large, by two thirds on 400 examples of a calibrated model.",
    )


def _part(files: RunFiles, row: str, name: str) -> Cell:
    return with_error(figure(files.metrics[row], name), standard_error(files, row, name), NO_PARTS)


def _spreads(files: RunFiles, names: list[str]) -> Block:
    """Over warm starts and over draws, with the Monte Carlo error of the draws' mean."""
    m = files.metrics
    found = []
    for row, key, what in (
        ("map", "sd", "sd over warm starts"),
        ("single", "sd", "sd over draws"),
        ("single", "mcse", "Monte Carlo error of the mean over draws"),
    ):
        found_row = m.get(row) or {}
        values = [x if isinstance(x := found_row.get(n), Mapping) else {} for n in names]
        if (row != "single" or files.sampled) and any(x.get(key) is not None for x in values):
            reasons = [
                _why(x, key) or _unknown(files, n) for n, x in zip(names, values, strict=True)
            ]
            cells = [cell(x.get(key), reason=why) for x, why in zip(values, reasons, strict=True)]
            found.append([cell(what), *cells])
    if not found:
        return Missing("Spread over warm starts and draws", f"not in metrics.json: {AGAIN}")
    return Table("Spread over warm starts and draws", ["", *(NAMES[n] for n in names)], found)


def _why(spread: Figures, key: str) -> str:
    return str(spread.get(f"{key}_reason") or spread.get("reason") or "")


def _absent(files: RunFiles) -> list[Block]:
    """Rows that metrics.json names without figures, and why."""
    m = files.metrics
    reasons: dict[str, list[str]] = {}
    for row in ROWS:
        if not isinstance(m.get(row), Mapping) and m.get(f"{row}_reason"):
            reasons.setdefault(str(m[f"{row}_reason"]), []).append(ROWS[row])
    return [Missing(listed(names), why) for why, names in reasons.items()]
