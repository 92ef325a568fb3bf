"""Predictions → the figures of `metrics.json`. A figure that cannot be computed is null, with a
reason beside it.

Shapes: K members, M chains, N examples, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bayesian_lora import metrics
from bayesian_lora.predict import Predictions
from bayesian_lora.scores import resampled_figures

Figures = dict[str, Any]
FiguresOf = Callable[[Sequence[str], bool, Predictions], Figures]


def evaluate(own: Sequence[str], regression: bool, p: Predictions) -> Figures:
    """The figures of an ensemble: its mixture is evaluated, probabilities are averaged.

    Args:
        own: the task's own metrics, such as ``("accuracy", "f1")``.
        regression: whether the outputs are means of Gaussians.
        p: logits (K, N, C).
    """
    extra = tuple(name for name in own if name != "accuracy")
    if regression:
        assert p.noise_std is not None
        return metrics.regression_metrics(p.logits[..., 0], p.noise_std, p.weights, p.labels, extra)
    log_probs = metrics.ensemble_log_probs(p.logits, p.weights)
    return metrics.classification_metrics(log_probs, p.labels, extra)


def evaluate_in_full(own: Sequence[str], regression: bool, p: Predictions) -> Figures:
    """The figures of `evaluate` and those that stand beside them in a run's `metrics.json`.

    Classification: adaptive_ece (15 bins of equal mass), classwise_ece, the parts of the Brier
    score (`calibration`), and aurc: the area under risk–coverage where what has the most
    predictive entropy is left unanswered first. Regression: crps in the label's unit, and the
    share of labels in central intervals, coverage_0.5, coverage_0.9, coverage_0.95.
    """
    extra = tuple(name for name in own if name != "accuracy")
    if regression:
        assert p.noise_std is not None
        means = p.logits[..., 0]
        return resampled_figures.regression_figures(means, p.noise_std, p.weights, p.labels, extra)
    log_probs = metrics.ensemble_log_probs(p.logits, p.weights)
    return resampled_figures.classification_figures(log_probs, p.labels, extra)


def evaluate_members(
    own: Sequence[str], regression: bool, p: Predictions, of: FiguresOf = evaluate
) -> list[Figures]:
    """The figures of each member alone."""
    return [of(own, regression, one) for one in alone(p)]


def alone(p: Predictions) -> list[Predictions]:
    """Each member as an ensemble of one."""
    return [member(p, k) for k in range(p.num_members)]


LEFT_OUT = (
    "members were left out of inputs that had settled (tolerance), and the mean stands in their "
    "place: evaluate without a tolerance"
)


def left_out(p: Predictions) -> bool:
    """Whether adaptive prediction left members out, so that no member is known on every input."""
    return p.members_used is not None and bool((p.members_used < p.num_members).any())


def single_members(own: Sequence[str], regression: bool, p: Predictions) -> Figures:
    """{figure: {"mean", "sd"}} over the members alone; null with the reason if some are unknown."""
    if not left_out(p):
        return mean_and_sd(evaluate_members(own, regression, p))
    names = [n for n in evaluate(own, regression, p) if not n.endswith("_reason")]
    return {name: {"mean": None, "sd": None, "reason": LEFT_OUT} for name in names}


def single_draws(
    own: Sequence[str], regression: bool, p: Predictions, chains: np.ndarray
) -> Figures:
    """As `single_members` of `evaluate_in_full`, with ``mcse``: the Monte Carlo standard error of
    the mean over draws (`diagnostics.mcse_mean`), which knows that draws of a chain are alike.

    Args:
        chains: the number of each member's chain (K,), the members in the order of their draws.
            Where chains have unequal numbers of draws the first of each are used.
    """
    if left_out(p):
        names = [n for n in evaluate_in_full(own, regression, p) if not n.endswith("_reason")]
        missing = dict.fromkeys(("mean", "sd", "mcse"))
        return {name: {**missing, "reason": LEFT_OUT} for name in names}
    from bayesian_lora import diagnostics  # with SciPy's statistics, which are felt

    rows = evaluate_members(own, regression, p, evaluate_in_full)
    figures = mean_and_sd(rows)
    by_chain = [np.flatnonzero(chains == chain) for chain in np.unique(chains)]
    draws = min(map(len, by_chain))
    order = np.array([members[:draws] for members in by_chain])
    for name, spread in figures.items():
        if spread["mean"] is None:
            spread["mcse"] = None
            continue
        trace = np.array([row[name] for row in rows], dtype=np.float64)[order]
        spread |= diagnostics.mcse_mean(trace).figures("mcse")
    return figures


def member(p: Predictions, k: int) -> Predictions:
    """Member k as an ensemble of one."""
    noise = None if p.noise_std is None else p.noise_std[k : k + 1]
    return Predictions(p.logits[k : k + 1], p.labels, np.ones(1), p.example_id, noise, p.true_probs)


def pooled(p: Predictions) -> Predictions:
    """The mixture of classifiers as one member: its logits (1, N, C) are log-probabilities."""
    logits = metrics.ensemble_log_probs(p.logits, p.weights)[None]
    return replace(p, logits=logits, weights=np.ones(1))


def mean_and_sd(rows: Sequence[Figures]) -> Figures:
    """{figure: {"mean", "sd"}} over rows (ddof 1); one row has no sd, and says so."""
    names = [n for n in rows[0] if not n.endswith("_reason")]
    return {name: _spread([row[name] for row in rows], _reason(rows, name)) for name in names}


def _reason(rows: Sequence[Figures], name: str) -> str | None:
    return next((r for row in rows if (r := row.get(f"{name}_reason"))), None)


def _spread(values: Sequence[float | None], reason: str | None) -> Figures:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        missing = f"missing in {len(values) - len(known)} of {len(values)}"
        return {"mean": None, "sd": None, "reason": f"{missing}: {reason}" if reason else missing}
    if len(known) == 1:
        return {"mean": known[0], "sd": None, "sd_reason": "one value has no spread"}
    return {"mean": float(np.mean(known)), "sd": float(np.std(known, ddof=1))}


NO_CLASSES = "a Gaussian likelihood has no softmax temperature; its noise scale is fitted"
FITTED_ON = "temperature_fitted_on"
NOT_HELD_OUT = "no data held out of train to fit it on: set data.validation_share"


def scale(
    regression: bool, p: Predictions, held_out: Predictions | None
) -> tuple[Predictions, list[float]] | str:
    """Every member with the temperature that fits it best on held-out data (Guo et al. 2017).

    Early-stopped fits were chosen by their loss on these very data, which therefore look a little
    better to them than others do: their temperature errs on the low side, by little where the
    held-out share is large. The last epoch's fits were not chosen by them.

    Returns:
        The members with their logits divided by their temperatures, and these (K,); or why not:
        a regression, or no held-out data.
    """
    if regression:
        return NO_CLASSES
    if held_out is None:
        return NOT_HELD_OUT
    found = [metrics.temperature_scale(logits, held_out.labels) for logits in held_out.logits]
    return replace(p, logits=p.logits / np.array(found)[:, None, None]), found


def no_temperature(reason: str) -> Figures:
    """The figures of fits that could not be scaled: null."""
    names = ("accuracy", "nll", "ece", "brier", "temperature", FITTED_ON)
    return {**dict.fromkeys(names), "reason": reason}


def scaled_means(rows: Sequence[Figures], temperatures: Sequence[float], fitted_on: int) -> Figures:
    """Means of the figures of members that `scale` has made, and of their temperatures.

    ``temperature_fitted_on`` is the number of held-out examples. ``temperature_note`` stands beside
    where some stopped at a bound: no temperature fits best then (every held-out answer right, or
    none better than chance), and the row is no fair comparison.
    """
    figures: Figures = {FITTED_ON: fitted_on}
    each = [{**row, "temperature": t} for row, t in zip(rows, temperatures, strict=True)]
    for name, spread in mean_and_sd(each).items():
        figures[name] = spread["mean"]
        if "reason" in spread:
            figures[f"{name}_reason"] = spread["reason"]
    low, high = metrics.TEMPERATURE_BOUNDS
    if stuck := sum(not 1.001 * low < t < high / 1.001 for t in temperatures):
        figures["temperature_note"] = (
            f"{stuck} of {len(temperatures)} temperatures stopped at a bound ({low:g} or "
            f"{high:g}): the held-out examples do not settle them, so it is no fair comparison"
        )
    return figures


def uncertainty(regression: bool, p: Predictions) -> Figures:
    """Mean predictive entropy, expected entropy, mutual information (nats), and ``<name>_se``, the
    standard error over examples of each.

    The last two need every member on every input: null with the reason where some were left out.
    """
    if regression:
        names = ("predictive_entropy", "expected_entropy", "mutual_information")
        return {**dict.fromkeys(names), "reason": "defined here for classification only"}
    figures: Figures = dict(metrics.uncertainty(p.logits, p.weights))
    if left_out(p):
        for name in ("expected_entropy", "mutual_information"):
            figures |= {name: None, f"{name}_reason": LEFT_OUT}
    for name, values in metrics.uncertainty_per_example(p.logits, p.weights).items():
        if figures[name] is not None:
            figures |= _error(f"{name}_se", values)
    return figures


def _error(name: str, values: np.ndarray) -> Figures:
    """The standard error of the mean of `values` (N,), as the bootstrap would give it: σ/√N."""
    if len(values) < 2:
        return {name: None, f"{name}_reason": "one example has no spread: evaluate on more"}
    return {name: float(values.std() / np.sqrt(len(values)))}


def against_truth(p: Predictions) -> Figures:
    """Where p(y | x) is known, ``truth``: the Bayes-optimal NLL on these labels, and the distance
    to truth; else nothing.

    ``expected_nll`` is the mean over x of −Σ_y p(y|x) log q(y|x), free of the labels' noise;
    ``excess`` is it minus the entropy of p: the mean KL(p ‖ q), zero for the truth alone;
    ``excess_se`` is its standard error over examples.
    """
    if p.true_probs is None:
        return {}
    truth = p.true_probs
    log_q = metrics.ensemble_log_probs(p.logits, p.weights)
    # What cannot happen adds nothing: 0 log 0 = 0.
    entropy = -(truth * np.log(np.where(truth > 0, truth, 1.0))).sum(1)
    drawn = truth[np.arange(len(p)), p.labels]
    expected = -(truth * log_q).sum(1)
    figures = {
        "bayes_nll": float(-np.log(drawn).mean()),
        "bayes_accuracy": float((truth.argmax(1) == p.labels).mean()),
        "expected_nll": float(expected.mean()),
        "excess": float(expected.mean() - entropy.mean()),
        **_error("excess_se", expected - entropy),
    }
    return {"truth": figures}


def parameter_statistics(norms: np.ndarray) -> Figures:
    """Norms (K,) of the members' parameters: mean, sd (ddof 0, as the seed prints it), CV.

    They depend on LoRA's gauge, so no verdict rests on them.
    """
    mean, std = float(norms.mean()), float(norms.std())
    figures = {"num_samples": len(norms), "norm_mean": mean, "norm_std": std}
    if mean == 0:
        return {**figures, "norm_cv": None, "norm_cv_reason": "every norm is 0"}
    return {**figures, "norm_cv": std / mean}
