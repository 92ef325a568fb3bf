"""Sections of a run's report: is the posterior worth it, and the rows it is measured by."""

from collections.abc import Iterable, Mapping
from typing import Any

from bayesian_lora.report.page import Block, Cell, Missing, Section, Table, Text, cell, number
from bayesian_lora.report.record import listed, signed
from bayesian_lora.report.run_files import AGAIN, RunFiles

Figures = Mapping[str, Any]

ROWS = {
    "map": "MAP, mean of the warm starts",
    "map_last": "MAP of the last epoch",
    "map_early_stopped": "MAP, early-stopped",
    "map_temperature_scaled": "MAP, temperature-scaled",
    "map_last_temperature_scaled": "MAP of the last epoch, temperature-scaled",
    "map_early_stopped_temperature_scaled": "MAP, early-stopped, temperature-scaled",
    "map_ensemble": "deep ensemble of the warm starts",
    "single": "single draw, mean of all",
    "ensemble": "posterior ensemble",
}
ALIKE = {
    "map": {"map_last": "last epoch", "map_early_stopped": "early-stopped"},
    "map_temperature_scaled": {
        **{"map_last_temperature_scaled": "last epoch"},
        **{"map_early_stopped_temperature_scaled": "early-stopped"},
    },
}
"""Rows of which one is always the very same as the row before it: whichever fits the starts are."""
BASELINES = tuple(name for name in ROWS if name not in ("single", "ensemble"))
NAMES = {
    **{"accuracy": "Accuracy", "f1": "F1", "mcc": "MCC", "pearson": "Pearson"},
    **{"spearman": "Spearman", "rmse": "RMSE", "nll": "NLL", "crps": "CRPS", "ece": "ECE"},
    **{"expected_ece": "ECE if calibrated", "brier": "Brier"},
}
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
    "Figures": "NLL in nats; ECE with 15 equal-width bins, and what a model with these "
    "probabilities would score if they were right.",
    "Further figures": "AURC: area under the risk–coverage curve.",
}
NO_PARTS = "this row has no such part"
MORE_IS_BETTER = ("accuracy", "f1", "mcc", "pearson", "spearman")
COMPARED = ("nll", "ece", "accuracy", "f1", "mcc", "brier", "crps", "pearson", "spearman")
CLEAR = 2.0
"""Standard errors from which a difference is called one."""


def figure(row: Any, name: str) -> float | None:
    """A figure of a row: its mean where the row is one over warm starts or draws."""
    found = row.get(name) if isinstance(row, Mapping) else None
    found = found.get("mean") if isinstance(found, Mapping) else found
    return float(found) if isinstance(found, int | float) else None


def titles_of(m: Figures) -> dict[str, str]:
    """Title of each row there is; rows that are one and the same stand once."""
    found = {row: title for row, title in ROWS.items() if isinstance(m.get(row), Mapping)}
    for row, others in ALIKE.items():
        same = {o: words for o, words in others.items() if row in found and m.get(o) == m[row]}
        if same:
            found[row] += f" ({' and '.join(same.values())})"
        found = {name: title for name, title in found.items() if name not in same}
    if isinstance(m.get("ensemble"), Mapping):
        found["ensemble"] = f"posterior ensemble of {m['ensemble'].get('k', '?')}"
    return found


def standard_error(files: RunFiles, row: str, name: str) -> float | None:
    """Over examples, None where it was not computed."""
    return figure((files.metrics.get("standard_errors") or {}).get(row), name)


def with_error(value: float | None, error: float | None, reason: str, digits: int = 4) -> Cell:
    """``0.8480 ± 0.0120``."""
    if value is None:
        return cell(None, reason=reason)
    shown = number(value, digits)
    return Cell(shown if error is None else f"{shown} ± {number(error, digits)}")


def summary(files: RunFiles) -> Section:
    """Whether the posterior is worth it, in words, and against what."""
    blocks: list[Block] = [Text(words, "answer") for words in verdict(files)]
    if files.sampled:
        blocks.append(_against(files))
    blocks += [Text(words) for words in _asides(files)]
    return Section("In short", "short", blocks)


def verdict(files: RunFiles) -> list[str]:
    """Posterior against the strongest simple baseline by NLL; then what the chains say."""
    m = files.metrics
    if not files.sampled:
        return ["Nothing was sampled: the members are MAP fits, a deep ensemble of warm starts."]
    known = {b: x for b in BASELINES if (x := figure(m.get(b), "nll")) is not None}
    own = figure(m.get("ensemble"), "nll")
    if own is None or not known:
        return [f"Whether the posterior is worth it cannot be said: no NLL to compare; {AGAIN}."]
    best = min(known, key=lambda name: known[name])
    gap, error = own - known[best], _error_of_difference(files, best, "nll")
    against = f"the strongest simple baseline, {ROWS[best]} (NLL {known[best]:.4f})"
    words = f"The posterior ensemble's NLL is {own:.4f}, {signed(gap, 4)} against {against}"
    if error is None:
        return [f"{words}; its standard error was not computed, so {AGAIN}.", _chains(m)]
    words += f", with a standard error of {number(error)}"
    if abs(gap) <= CLEAR * error:
        answer = "Not shown to be worth it"
        words += f": a difference within {CLEAR:g} standard errors is none"
    else:
        answer = "Worth it by NLL" if gap < 0 else "Not worth it by NLL"
    return [f"{answer}. {words}.", _chains(m)]


def _chains(m: Figures) -> str:
    found = m.get("diagnostics") or {}
    reason = found.get("reason")
    said = f"Chains: {found.get('verdict', 'not available')}"
    return f"{said} – {reason}." if reason else f"{said}."


def _error_of_difference(files: RunFiles, baseline: str, name: str) -> float | None:
    found = (files.metrics.get("standard_errors") or {}).get("differences") or {}
    return figure(found.get(f"ensemble-{baseline}"), name)


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
        f"(bootstrap); a difference beyond {CLEAR:g} of them is called better or worse.",
    )


def _difference(files: RunFiles, baseline: str, name: str) -> Cell:
    old, new = (figure(files.metrics.get(row), name) for row in (baseline, "ensemble"))
    if old is None or new is None:
        return cell(None, reason=f"{NAMES[name]} of {ROWS[baseline]} is not known")
    change, error = new - old, _error_of_difference(files, baseline, name)
    shown = signed(change, 4)
    if error is None:
        return Cell(shown)
    shown = f"{shown} ± {number(error)}"
    if abs(change) <= CLEAR * error:
        return Cell(shown)
    better = (change > 0) == (name in MORE_IS_BETTER)
    return Cell(f"{shown} {'better' if better else 'worse'}", tone="good" if better else "bad")


def _asides(files: RunFiles) -> list[str]:
    """Whether it has finished, the truth where it is known, what uncertainty consists of, cold."""
    m, said = files.metrics, []
    if (status := files.run.get("status")) != "finished":
        said.append(f"The run has not finished: its status is {status or 'unknown'}.")
    if truth := m.get("truth"):
        said.append(
            f"The law of the labels is known: the best possible NLL on them is "
            f"{truth['bayes_nll']:.4f}, the mean KL from it to the ensemble {truth['excess']:.4f} "
            "nats."
        )
    found = m.get("uncertainty") or {}
    if found.get("predictive_entropy") is not None:
        mutual = found.get("mutual_information")
        what = "not available" if mutual is None else f"{mutual:.4f}"
        said.append(
            f"Predictive entropy {found['predictive_entropy']:.4f} nats on average, of which the "
            f"members' disagreement (mutual information) {what}."
        )
    if m.get("tempering") == "cold":
        said.append(f"A cold posterior: its temperature is {m.get('temperature')}, below 1.")
    return said


def rows(files: RunFiles) -> Section:
    """Every row of figures with standard errors, and the parts of the Brier score."""
    m = files.metrics
    given = titles_of(m)
    if not files.sampled:
        given = {r: title for r, title in given.items() if r not in ("single", "ensemble")}
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
            blocks.append(Table(f"{what} {where}", heads, body, note=f"{note} {NOTES[what]}"))
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
    title = {**NAMES, **FURTHER}[name]
    known = bool(files.metrics.get("standard_errors"))  # so nothing newer would come
    why = found.get(f"{name}_reason") or found.get("reason") or inner
    why = why or f"{title}: {'not computed for this row' if known else AGAIN}"
    return with_error(figure(found, name), standard_error(files, row, name), str(why))


def _brier(files: RunFiles, given: Mapping[str, str], parts: list[str]) -> Table:
    m = files.metrics
    body = [
        [cell(title), *(cell(figure(m[r], n), reason=NO_PARTS) for n in ("brier", *parts))]
        for r, title in given.items()
        if any(figure(m[r], n) is not None for n in parts)
    ]
    return Table(
        "Brier score and its parts",
        ["", "Brier", *(PARTS[n] for n in parts)],
        body,
        note="Brier = reliability − resolution + uncertainty + what lies within the bins (Murphy "
        "1973; Stephenson et al. 2008). Reliability 0 is perfect calibration.",
    )


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
            cells = [cell(x.get(key), reason=_why(x, key)) for x in values]
            found.append([cell(what), *cells])
    if not found:
        return Missing("Spread over warm starts and draws", f"not in metrics.json: {AGAIN}")
    return Table("Spread over warm starts and draws", ["", *(NAMES[n] for n in names)], found)


def _why(spread: Figures, key: str) -> str:
    return str(spread.get(f"{key}_reason") or spread.get("reason") or f"not recorded: {AGAIN}")


def _absent(files: RunFiles) -> list[Block]:
    """Rows that metrics.json names without figures, and why."""
    m = files.metrics
    reasons: dict[str, list[str]] = {}
    for row in ROWS:
        if not isinstance(m.get(row), Mapping) and m.get(f"{row}_reason"):
            reasons.setdefault(str(m[f"{row}_reason"]), []).append(ROWS[row])
    return [Missing(listed(names), why) for why, names in reasons.items()]
