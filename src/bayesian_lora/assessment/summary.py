"""The figures of `metrics.json` as lines for a person."""

from typing import Any

from bayesian_lora.utils.text_table import aligned

Figures = dict[str, Any]

SHOWN = ("accuracy", "f1", "mcc", "pearson", "spearman", "rmse", "nll", "crps", "ece", "brier")
MAP_ROWS = {
    "map": "MAP (mean of warm starts)",
    "map_temperature_scaled": "MAP, temperature-scaled",
    "map_ensemble": "MAP ensemble (deep ensemble)",
    "map_ensemble_temperature_scaled": "MAP ensemble, scaled",
}
OTHER_FITS = {"map_last": "last epoch", "map_early_stopped": "early-stopped"}
"""The fits that sampling may have started from; what it did start from is the row itself."""
OTHER_TITLES = {
    "map": "MAP, {}",
    "map_temperature_scaled": "MAP, {}, scaled",
    "map_ensemble": "MAP ensemble, {}",
    "map_ensemble_temperature_scaled": "MAP ensemble, {}, scaled",
}
ENSEMBLE_SCALED = "ensemble_temperature_scaled"
COMPARED = ("accuracy", "pearson", "nll", "ece", "crps")
TITLES = {"nll": "NLL", "ece": "ECE", "crps": "CRPS"}
ERROR_WIDTH = len(" ± .0000")


def evaluation_lines(m: Figures) -> list[str]:
    """What `eval` prints: the ensemble's line, the task's own metrics, the analysis block."""
    ensemble, statistics = m["ensemble"], m["parameters"]
    k = ensemble["k"]
    cold = _cold(m)
    return [
        f"LoRA Ensemble@{k}{cold} — {_headline(ensemble)} | NLL: {ensemble['nll']:.4f}",
        f"Dataset metrics: {_own(m)}",
        "",
        "LoRA Analysis:",
        f"  - Number of samples: {statistics['num_samples']}",
        f"  - Ensemble {_headline(ensemble).replace('Acc:', 'accuracy:')}",
        f"  - Sample range: {m['sample_range'][0]} - {m['sample_range'][1]}",
        "",
        "LoRA Parameter Statistics:",
        f"  - Parameter norm mean: {statistics['norm_mean']:.4f}",
        f"  - Parameter norm std: {statistics['norm_std']:.4f}",
        f"  - Parameter norm CV: {_number(statistics['norm_cv'])}",
    ]


def table_lines(m: Figures) -> list[str]:
    """MAP in its several forms, single members and the ensemble, each figure ± its standard error
    over examples.

    Without sampling there are no members and no ensemble but the fits. Of the two kinds of fits
    the one that sampling did not start from has a row of its own.
    """
    names = [n for n in SHOWN if m["ensemble"].get(n) is not None]
    cells = [["", *names]]
    for key, title in _rows(m).items():
        cells.append([title, *(_with_error(m, key, name) for name in names)])
    return aligned(cells)


def _rows(m: Figures) -> dict[str, str]:
    """The rows that are shown, under their titles."""
    rows = {}
    for row, own in MAP_ROWS.items():
        if m.get(row) is None:  # of an evaluation by an older version
            continue
        rows[row] = own
        for fits, words in OTHER_FITS.items():
            key = fits + row.removeprefix("map")
            if m.get(key) is not None and m[key] != m[row]:
                rows[key] = OTHER_TITLES[row].format(words)
    if _sampled(m):
        rows |= {"single": "single sample (mean)"}
        rows |= {"ensemble": f"posterior ensemble of {m['ensemble']['k']}{_cold(m)}"}
        if (m.get(ENSEMBLE_SCALED) or {}).get("nll") is not None:
            rows[ENSEMBLE_SCALED] = f"posterior ensemble{_cold(m)}, scaled"
    return rows


def _with_error(m: Figures, row: str, name: str) -> str:
    """``0.8480 ± .0120``, of as many characters with an error as without."""
    value = _value(m, row, name)
    error = ((m.get("standard_errors") or {}).get(row) or {}).get(name)
    if value is None:
        return "n/a" + " " * ERROR_WIDTH
    if error is None:
        return _number(value) + " " * ERROR_WIDTH
    return f"{_number(value)} ± {_short(error)}"


def _value(m: Figures, row: str, name: str) -> float | None:
    value = m[row].get(name)
    return value["mean"] if isinstance(value, dict) else value


def _plus_minus(error: float | None, form: str) -> str:
    return "" if error is None else f" ± {error:{form}}"


def _short(error: float) -> str:
    """Five characters, without the nought before the point."""
    text = f"{error:.4f}"
    return text[1:] if text.startswith("0") else f"{error:.3g}"[:5].ljust(5)


def closing_lines(m: Figures) -> list[str]:
    """Truth (where known), uncertainty and the diagnostics' verdict."""
    lines = []
    if truth := m.get("truth"):
        lines += [
            f"Bayes-optimal NLL on these labels: {truth['bayes_nll']:.4f} "
            f"(ensemble {m['ensemble']['nll']:.4f}); Bayes-optimal accuracy "
            f"{truth['bayes_accuracy']:.1%}",
            f"Mean KL from the known p(y | x) to the ensemble: {truth['excess']:.4f}"
            f"{_plus_minus(truth.get('excess_se'), '.4f')} nats",
        ]
    uncertainty = m["uncertainty"]
    if uncertainty.get("predictive_entropy") is not None:
        lines.append(
            f"Predictive entropy {uncertainty['predictive_entropy']:.4f}, of which mutual "
            f"information {_number(uncertainty['mutual_information'])} nats"
        )
    lines += _trust_lines(m)
    if adaptive := m.get("adaptive"):
        lines += _adaptive_lines(adaptive, m["ensemble"]["k"], uncertainty)
    d = m["diagnostics"]
    if not _sampled(m):
        return [*lines, f"Chains: {d['reason']}", *_trouble(d)]
    lines += [
        f"Effective temperature along the stiffest direction: {_number(d['t_eff'])} with minibatch "
        f"noise, {m['temperature']:g}{_cold(m)} asked for",
        f"Chains: {d['verdict']}: {d['reason']}" if d.get("reason") else f"Chains: {d['verdict']}",
    ]
    return [*lines, *_trouble(d)]


def _trust_lines(m: Figures) -> list[str]:
    """What the ECE is worth, how well doubt finds mistakes, and how many samples are enough."""
    lines = []
    ensemble, errors = m["ensemble"], m.get("standard_errors") or {}
    own = errors.get("ensemble") or {}
    if any(own.get(name) is not None for name in SHOWN):
        lines.append(f"± one standard error over the {m['n']} examples, by bootstrap")
    elif reason := errors.get("ensemble_reason") or own.get("nll_reason"):
        lines.append(f"Standard errors are not available: {reason}")
    lines += [
        f"{title}: {m[row]['temperature_note']}"
        for row, title in _rows(m).items()
        if m[row].get("temperature_note")
    ]
    lines += _against_lines(m, errors)
    if expected := (m.get("calibration") or {}).get("expected_ece"):
        lines.append(
            f"A perfectly calibrated model would score ECE {expected['mean']:.4f} ± "
            f"{_short(expected['sd'])} on {m['n']} examples (ensemble {_number(ensemble['ece'])})"
        )
    if ensemble.get("aurc") is not None:
        at, error = m["selective"]["accuracy_at"]["0.8"], m["selective"].get("accuracy_at_se") or {}
        lines.append(
            f"Area under risk–coverage: {ensemble['aurc']:.4f}; accuracy on the surest 80 %: "
            f"{at:.1%}{_plus_minus(error.get('0.8'), '.1%')}"
        )
    if (inside := ensemble.get("coverage_0.9")) is not None:
        lines.append(f"Central 90 % intervals hold {inside:.1%} of the labels")
    enough = (m.get("cumulative") or {}).get("enough")
    if enough and _sampled(m):
        lines.append(f"Enough samples: {_enough(enough)}")
    return lines


def _against_lines(m: Figures, errors: Figures) -> list[str]:
    """What sampling has brought: the ensemble's figures less those of the starts' simple baselines,
    and of the strongest fair one by NLL where that is of other fits; from which the ensemble with a
    temperature of its own is told too, if that is fair.
    """
    if not _sampled(m):
        return []
    lines, shown = [], _rows(m)
    simple = {r: nll for r in shown if r[:3] == "map" and (nll := _value(m, r, "nll")) is not None}
    fair = [row for row in simple if not m[row].get("temperature_note")]
    strongest = min(fair or simple, key=simple.__getitem__, default=None)
    pairs = [("Ensemble", "ensemble", row) for row in shown if row in (*MAP_ROWS, strongest)]
    if strongest and ENSEMBLE_SCALED in shown and not m[ENSEMBLE_SCALED].get("temperature_note"):
        pairs.append(("Ensemble, scaled,", ENSEMBLE_SCALED, strongest))
    for title, own, row in pairs:
        paired = (errors.get("differences") or {}).get(f"{own}-{row}") or {}
        parts = []
        for name in COMPARED:
            mine, other = m[own].get(name), _value(m, row, name)
            if mine is None or other is None or paired.get(name) is None:
                continue
            gap, error = mine - other, _short(paired[name])
            parts.append(f"{TITLES.get(name, name)} {gap:+.4f} ± {error}")
        if parts:
            lines.append(f"{title} less {shown[row]}: {', '.join(parts)}")
    return lines


def _enough(enough: Figures) -> str:
    """By the paired difference from the whole's NLL, and by the standard error of that itself."""
    found, alone = enough["k"], enough["k_within_nll_se"]
    text = f"{'not known' if found is None else found}: {enough['reason']}"
    if alone is None:
        return text
    return f"{text} (from {alone} on it stays within NLL's own ± {_short(enough['nll_se'])})"


def _adaptive_lines(adaptive: Figures, k: int, uncertainty: Figures) -> list[str]:
    """What adaptive prediction saved, and why some figures are not there."""
    lines = [
        f"Members used: {adaptive['members_used']:.1f} of {k} an input on average (tolerance "
        f"{adaptive['tolerance']:g}); nothing is stored"
    ]
    if reason := uncertainty.get("mutual_information_reason"):
        lines.append(f"Single samples and mutual information are not available: {reason}")
    return lines


def _trouble(d: Figures) -> list[str]:
    """Chains that were dropped, and those whose energy left its range."""
    lines = [
        f"Chain {x['chain']} was dropped, with its samples, in {x['phase']} after step "
        f"{x['after_step']}: {x['reason']}"
        for x in d.get("dropped_chains") or []
    ]
    lines += [
        f"Chain {x['chain']} left its energies of burn-in at step {x['step']}: {x['energy']:.4g} "
        f"an example, {x['mean']:.4g} ± {x['sd']:.2g} before; it diverges, or burn-in was too short"
        for x in d.get("departures") or []
    ]
    return lines


def _sampled(m: Figures) -> bool:
    return m.get("sampler", {}).get("name") != "map"


def _cold(m: Figures) -> str:
    return " (cold)" if m.get("tempering") == "cold" else ""


def _headline(figures: Figures) -> str:
    if figures.get("accuracy") is not None:
        return f"Acc: {figures['accuracy']:.1%}"
    return f"Pearson: {_number(figures.get('pearson'))}"


def _own(m: Figures) -> dict[str, float | None]:
    return {name: _rounded(m["ensemble"].get(name)) for name in m["own_metrics"]}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
