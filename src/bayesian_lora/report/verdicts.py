"""Is a run's posterior worth it: its ensemble beside its baselines, in words."""

from collections.abc import Mapping
from typing import Any

from bayesian_lora.assessment.evaluation import FITTED_ON
from bayesian_lora.assessment.run_rows import ENSEMBLE_SCALED
from bayesian_lora.report.page import number
from bayesian_lora.report.record import listed, signed
from bayesian_lora.report.run_files import AGAIN, RunFiles, difference_error, figure

Figures = Mapping[str, Any]

ROWS = {
    "map": "MAP, mean of the warm starts",
    "map_last": "MAP of the last epoch",
    "map_early_stopped": "MAP, early-stopped",
    "map_temperature_scaled": "MAP, temperature-scaled",
    "map_last_temperature_scaled": "MAP of the last epoch, temperature-scaled",
    "map_early_stopped_temperature_scaled": "MAP, early-stopped, temperature-scaled",
    "map_ensemble": "deep ensemble of the warm starts",
    "map_last_ensemble": "deep ensemble of the last epoch",
    "map_early_stopped_ensemble": "deep ensemble, early-stopped",
    "map_ensemble_temperature_scaled": "deep ensemble, temperature-scaled",
    "map_last_ensemble_temperature_scaled": "deep ensemble of the last epoch, temperature-scaled",
    "map_early_stopped_ensemble_temperature_scaled": "deep ensemble, early-stopped, "
    "temperature-scaled",
    "single": "single draw, mean of all",
    "ensemble": "posterior ensemble",
    ENSEMBLE_SCALED: "posterior ensemble, temperature-scaled",
}
KINDS = {"map_last": "last epoch", "map_early_stopped": "early-stopped"}
FORMS = ("map", "map_temperature_scaled", "map_ensemble", "map_ensemble_temperature_scaled")
ALIKE = {
    form: {kind + form.removeprefix("map"): words for kind, words in KINDS.items()}
    for form in FORMS
}
"""Rows of which one is always the very same as the row before it: whichever fits the starts are."""
SAMPLED = ("single", "ensemble", ENSEMBLE_SCALED)
BASELINES = tuple(name for name in ROWS if name not in SAMPLED)
NAMES = {
    **{"accuracy": "Accuracy", "f1": "F1", "mcc": "MCC", "pearson": "Pearson"},
    **{"spearman": "Spearman", "rmse": "RMSE", "nll": "NLL", "crps": "CRPS", "ece": "ECE"},
    **{"expected_ece": "ECE if calibrated", "brier": "Brier"},
}
MORE_IS_BETTER = ("accuracy", "f1", "mcc", "pearson", "spearman")
COMPARED = ("nll", "ece", "accuracy", "f1", "mcc", "brier", "crps", "pearson", "spearman")
CLEAR = 2.0
"""Standard errors from which a difference is called one."""


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


def verdict(files: RunFiles) -> list[str]:
    """Posterior against the strongest simple baseline by NLL; then what the chains say."""
    m = files.metrics
    if not files.sampled:
        return ["Nothing was sampled: the members are MAP fits, a deep ensemble of warm starts."]
    best, own = strongest(m), figure(m.get("ensemble"), "nll")
    theirs = None if best is None else figure(m[best], "nll")
    if own is None or best is None or theirs is None:
        return [f"Whether the posterior is worth it cannot be said: no NLL to compare; {AGAIN}."]
    gap, error = own - theirs, difference_error(files, best, "nll")
    shown, share = signed(gap, 4), signed(100 * gap / theirs, 1) if theirs > 0 else "0.0"
    shown += "" if share == "0.0" else f" ({share} %)"
    against = f"the strongest simple baseline, {titles_of(m)[best]} (NLL {theirs:.4f})"
    words = f"The posterior ensemble's NLL is {own:.4f}, {shown} against {against}"
    if error is None:
        return [f"{words}; its standard error {_unknown(m, best)}.", _chains(m)]
    words += f", with a standard error of {number(error)}"
    if abs(gap) <= CLEAR * error:
        answer = "Not shown to be worth it"
        words += f": a difference within {CLEAR:g} standard errors may be chance"
    else:
        answer = "Worth it by NLL" if gap < 0 else "Not worth it by NLL"
    more = _otherwise(files, best) + _recalibrated(files, best, theirs)
    return [f"{answer}. {words}.{more}", _chains(m)]


def strongest(m: Figures) -> str | None:
    """The baseline of the lowest NLL; one that is no fair baseline only where there is no other."""
    known = {b: x for b in BASELINES if (x := figure(m.get(b), "nll")) is not None}
    fair = [b for b in known if not m[b].get("temperature_note")]
    return min(fair or known, key=lambda name: known[name], default=None)


def _unknown(m: Figures, baseline: str) -> str:
    """Why the difference from a baseline has no standard error, as far as it is recorded."""
    found = (m.get("standard_errors") or {}).get("differences") or {}
    reason = (found.get(f"ensemble-{baseline}") or {}).get("nll_reason")
    return f"is not known – {reason}" if reason else f"was not computed, so {AGAIN}"


def _recalibrated(files: RunFiles, baseline: str, theirs: float) -> str:
    """The same difference where the posterior ensemble has a temperature of its own."""
    row = files.metrics.get(ENSEMBLE_SCALED) or {}
    own, fitted_on = figure(row, "nll"), row.get(FITTED_ON)
    error = difference_error(files, baseline, "nll", ENSEMBLE_SCALED)
    if own is None or error is None or row.get("temperature_note"):
        return ""
    return (
        f" With one temperature of its own, fitted on {fitted_on} held-out examples, its NLL is "
        f"{own:.4f}, {signed(own - theirs, 4)} ± {number(error)} against the same baseline."
    )


def _otherwise(files: RunFiles, baseline: str) -> str:
    """What differs clearly from the same baseline besides the NLL, which need not agree with it."""
    ways = {n: way_of(files, baseline, n) for n in COMPARED if n != "nll"}
    found = [
        f"{word} by {listed(NAMES[n] for n in ways if ways[n] == way)}"
        for way, word in ((1, "better"), (-1, "worse"))
        if way in ways.values()
    ]
    return f" Beside that it is clearly {listed(found)}." if found else ""


def way_of(files: RunFiles, baseline: str, name: str) -> int:
    """1 where the ensemble is better than a baseline by more than `CLEAR` errors, −1 worse."""
    old, new = (figure(files.metrics.get(row), name) for row in (baseline, "ensemble"))
    error = difference_error(files, baseline, name)
    if old is None or new is None or error is None or abs(new - old) <= CLEAR * error:
        return 0
    return 1 if (new > old) == (name in MORE_IS_BETTER) else -1


def _chains(m: Figures) -> str:
    found = m.get("diagnostics") or {}
    reason = found.get("reason")
    said = f"Chains: {found.get('verdict', 'not available')}"
    return f"{said} – {reason}." if reason else f"{said}."


def asides(files: RunFiles) -> list[str]:
    """Whether it has finished, what is not fair, the truth where it is known, what
    uncertainty consists of, cold.
    """
    m, said = files.metrics, []
    if (status := files.run.get("status")) != "finished":
        said.append(f"The run has not finished: its status is {status or 'unknown'}.")
    titles = titles_of(m)
    if not files.sampled:
        titles = {row: title for row, title in titles.items() if row not in SAMPLED}
    said += [
        f"{titles[row]}: {note}." for row in titles if (note := m[row].get("temperature_note"))
    ]
    if truth := m.get("truth"):
        error = truth.get("excess_se")
        sure = "" if error is None else f" ± {number(error)}"
        said.append(
            f"The law of the labels is known: the best possible NLL on them is "
            f"{truth['bayes_nll']:.4f}, the mean KL from it to the ensemble {truth['excess']:.4f}"
            f"{sure} nats."
        )
    found = m.get("uncertainty") or {}
    if found.get("predictive_entropy") is not None:
        mutual = found.get("mutual_information")
        what = "not available" if mutual is None else f"{mutual:.4f}"
        said.append(
            f"Predictive entropy {found['predictive_entropy']:.4f} nats on average, of which the "
            f"members' disagreement (mutual information) {what}."
        )
    if files.sampled and (k := figure(m.get("ensemble"), "k") or 1) > 1:
        said.append(f"An answer takes {k:g} forward passes, one a member; that of a MAP takes one.")
    if m.get("tempering") == "cold":
        said.append(f"A cold posterior: its temperature is {m.get('temperature')}, below 1.")
    return said
