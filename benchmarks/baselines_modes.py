"""What each further mode brings: a posterior's NLL by the number of chains that it is made of.

Chains that do not mix sit in a mode each, so that their number is that of the modes; the draws of
one chain against its fit show what sampling brings within a mode. Shapes: K members, N examples,
C classes, M chains.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from bayesian_lora.assessment.stored import load_predictions
from bayesian_lora.manifest import read_manifest
from bayesian_lora.metrics import classification_metrics, ensemble_log_probs


def by_chains(logits: np.ndarray, labels: np.ndarray, chains: np.ndarray) -> list[float]:
    """NLL of 1, 2, …, M chains' members together, each the mean over all choices of the chains.

    Args:
        logits: (K, N, C); labels: (N,); chains: of the members, (K,).
    """
    numbers = np.unique(chains)
    found = []
    for count in range(1, len(numbers) + 1):
        each = []
        for chosen in combinations(numbers, count):
            members = logits[np.isin(chains, chosen)]
            alike = np.full(len(members), 1 / len(members))
            log_probs = ensemble_log_probs(members, alike)
            each.append(classification_metrics(log_probs, labels)["nll"])
        found.append(float(np.mean(each)))
    return found


def mode_lines(folders: Mapping[str, Sequence[Path]]) -> list[str]:
    """A line a sampler, the mean over its seeds' runs."""
    lines = []
    for sampler, roots in folders.items():
        found = []
        for root in roots:
            p, (_, records, _) = load_predictions(root), read_manifest(root)
            chains = np.array([record.chain for record in records])
            found.append(by_chains(p.logits, p.labels, chains))
        means = np.mean(found, axis=0)
        each = ", ".join(f"{value:.4f}" for value in means)
        line = f"- {sampler}: NLL of the draws of 1 to {len(means)} chains: {each}"
        lines.append(line if len(means) < 3 else f"{line}; of ever more, {limit(means):.4f}")
    return lines


def limit(nll: Sequence[float] | np.ndarray) -> float:
    """What NLL of 1, 2, … chains tends to: a of a + c/M, by least squares.

    Of independent chains the mean NLL falls by c/M to leading order, c half the mean squared
    relative spread of p(label) over chains.
    """
    return float(np.polyfit(1 / np.arange(1, len(nll) + 1), nll, 1)[1])
