"""The figures of `metrics.json` as lines for a person."""

from typing import Any

Figures = dict[str, Any]

SHOWN = ("accuracy", "f1", "mcc", "pearson", "spearman", "rmse", "nll", "ece", "brier")


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
    """MAP, its temperature-scaled and ensembled forms, single members and the ensemble.

    Without sampling there is no more than the first three.
    """
    rows = {
        "MAP (mean of warm starts)": {k: v["mean"] for k, v in m["map"].items()},
        "MAP, temperature-scaled": m["map_temperature_scaled"],
        "MAP ensemble (deep ensemble)": m["map_ensemble"],
    }
    if _sampled(m):
        rows |= {
            "single sample (mean)": {k: v["mean"] for k, v in m["single"].items()},
            f"posterior ensemble of {m['ensemble']['k']}{_cold(m)}": m["ensemble"],
        }
    names = [n for n in SHOWN if m["ensemble"].get(n) is not None]
    lines = [f"{'':<30}" + "".join(f"{name:>10}" for name in names)]
    for title, row in rows.items():
        lines.append(f"{title:<30}" + "".join(f"{_number(row.get(n)):>10}" for n in names))
    return lines


def closing_lines(m: Figures) -> list[str]:
    """Truth (where known), uncertainty and the diagnostics' verdict."""
    lines = []
    if truth := m.get("truth"):
        lines += [
            f"Bayes-optimal NLL on these labels: {truth['bayes_nll']:.4f} "
            f"(ensemble {m['ensemble']['nll']:.4f}); Bayes-optimal accuracy "
            f"{truth['bayes_accuracy']:.1%}",
            f"Mean KL from the known p(y | x) to the ensemble: {truth['excess']:.4f} nats",
        ]
    uncertainty = m["uncertainty"]
    if uncertainty.get("predictive_entropy") is not None:
        lines.append(
            f"Predictive entropy {uncertainty['predictive_entropy']:.4f}, of which mutual "
            f"information {_number(uncertainty['mutual_information'])} nats"
        )
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
