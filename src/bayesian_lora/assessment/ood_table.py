"""The figures of a shifted or foreign set as lines for a person."""

from typing import Any

from bayesian_lora.scores.ood_scores import SCORES
from bayesian_lora.utils.text_table import aligned

Figures = dict[str, Any]
KINDS = {"scores": "posterior ensemble", "map": "MAP (mean)", "map_ensemble": "deep ensemble"}
"""Of the models whose scores are compared: their key under ``ood``, and in words."""


def ood_lines(m: Figures, *, sampled: bool) -> list[str]:
    """The figures of a set as lines for a person.

    Without sampling the members are the fits: there is no posterior but their deep ensemble.
    """
    ood, ensemble = m["ood"], m["ensemble"]
    name, against = m["split"], ood["against"]
    lines = []
    if ood["labelled"]:
        lines.append(f"On {name}: accuracy {ensemble['accuracy']:.1%}, NLL {ensemble['nll']:.4f}")
    else:
        lines.append(f"Accuracy on {name} is not available: {ensemble['accuracy_reason']}")
    if ood["shared"]:
        lines.append(f"{ood['shared']} of the {ood['outside_n']} texts of {name} are in {against}")
    kinds = KINDS if sampled else {key: KINDS[key] for key in ("map_ensemble", "map")}
    columns = {title: ood[key] for key, title in kinds.items()}
    columns["ensemble − MAP"] = ood["differences"]["ensemble-map"]
    for measure, words in (
        ("auroc", "AUROC (0.5 tells nothing)"),
        ("aupr", f"AUPR ({ood['base_rate']:.3f} tells nothing)"),
    ):
        rows = [[f"{words}, {name} against {against}", *columns]]
        for score in SCORES:
            cells = [_cell(rows_of[score], measure) for rows_of in columns.values()]
            rows.append([f"  {score.replace('_', ' ')}", *cells])
        lines += ["", *aligned(rows)]
    return lines


def _cell(row: Figures, measure: str) -> str:
    value, error = row[measure], row[f"{measure}_se"]
    if value is None:
        return "n/a"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}".replace(" 0.", " .")
