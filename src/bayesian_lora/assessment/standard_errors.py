"""Standard errors over examples of the rows of `metrics.json`, and of their differences.

All rows are resampled with the same examples (`bootstrap`), so a difference between two rows is
paired: what makes an example hard for both cancels. The members themselves are held fixed; what
other draws would have given is the ``mcse`` of single members.

Shapes: K members, N examples, C classes, R replicates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bayesian_lora import metrics
from bayesian_lora.predict import Predictions
from bayesian_lora.scores import bootstrap, resampled_figures
from bayesian_lora.scores.bootstrap import REPLICATES, Replicates, Statistic

Figures = dict[str, Any]

SEED = 0
"""Of the replicates: the same predictions have the same standard errors."""
AT_ONCE = 500_000
"""Examples of all predictors that are prepared at a time, some hundred bytes each."""


def statistic(own: Sequence[str], regression: bool, p: Predictions) -> Statistic:
    """The figures of `evaluation.evaluate_in_full` as a function of resampled examples."""
    extra = tuple(name for name in own if name != "accuracy")
    if regression:
        assert p.noise_std is not None
        means = p.logits[..., 0]
        return resampled_figures.regression_statistic(
            means, p.noise_std, p.weights, p.labels, extra
        )
    log_probs = metrics.ensemble_log_probs(p.logits, p.weights)
    return resampled_figures.classification_statistic(log_probs, p.labels, extra)


def standard_errors(
    own: Sequence[str],
    regression: bool,
    rows: Mapping[str, Sequence[Predictions] | str],
    pairs: Sequence[tuple[str, str]] = (),
    replicates: int = REPLICATES,
) -> Figures:
    """{row: {figure: standard error over examples}}, and of differences between rows.

    Args:
        own: the task's own metrics.
        rows: of each the predictors (each a `Predictions`, taken as a mixture) the mean of whose
            figures the row shows, or the reason why there is no such row. One that stands in
            several rows is resampled once.
        pairs: rows (a, b) whose difference a − b is wanted.

    Returns:
        ``replicates``, ``over``, every row, and ``differences`` with ``a-b`` of each pair. A figure
        without a standard error is null with the reason beside it, and ``<figure>_left_out`` counts
        the replicates in which it was undefined (`bootstrap.standard_errors`).
    """
    there = {name: row for name, row in rows.items() if not isinstance(row, str)}
    missing = {name: row for name, row in rows.items() if isinstance(row, str)}
    predictors = {str(id(p)): p for row in there.values() for p in row}
    n = len(next(iter(predictors.values())))
    drawn = _replicate(own, regression, predictors, n, replicates)
    means = {name: drawn.mean([str(id(p)) for p in row]) for name, row in there.items()}
    found: Figures = {"replicates": replicates, "over": "examples"}
    for name in rows:
        if name in missing:
            found |= {name: None, f"{name}_reason": missing[name]}
        else:
            found[name] = bootstrap.standard_errors(means[name], n)
    differences: Figures = {}
    for a, b in pairs:
        key = f"{a}-{b}"
        if (reason := missing.get(a) or missing.get(b)) is not None:
            differences |= {key: None, f"{key}_reason": reason}
            continue
        first, second = means[a], means[b]
        gap = {name: first[name] - second[name] for name in first if name in second}
        differences[key] = bootstrap.standard_errors(gap, n)
    return {**found, "differences": differences}


def _replicate(
    own: Sequence[str],
    regression: bool,
    predictors: Mapping[str, Predictions],
    n: int,
    replicates: int,
) -> Replicates:
    """All predictors on the same replicates, in groups that bound the memory."""
    names, size = list(predictors), max(1, AT_ONCE // n)
    values: dict[str, dict[str, metrics.Array]] = {}
    for i in range(0, len(names), size):
        group = {x: statistic(own, regression, predictors[x]) for x in names[i : i + size]}
        # The same seed draws the same examples for every group.
        rng = np.random.default_rng(SEED)
        values |= bootstrap.replicate(group, n, rng, replicates).values
    return Replicates(n, values)
