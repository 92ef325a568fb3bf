"""What a gate does on a mixture of tasks: who is sent where, how sure, and how right.

Shapes: K members, N examples, E experts, T tasks, C_t classes of task t.

Accuracies without the task ask for task and label; those given the task pick among its own classes.
Entropies are in nats. The gate's information about the prediction is, for experts i that share
labels, I(i; y | x) = H(Σ g_i p_i) − Σ g_i H(p_i). Tasks have no class in common, so over all of
them the label tells the task, and the chain rule leaves

    I(i; task, y | x) = H(gate(task | x)) + Σ_t gate(t | x)·I_t(i; y | x),

I_t among the experts of task t alone, which is 0 where there is one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bayesian_lora import metrics
from bayesian_lora.assessment.evaluation import Figures, evaluate
from bayesian_lora.composition.gated_model import GatedModel, GatedOutputs
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.joined import JoinedSet
from bayesian_lora.errors import InputError
from bayesian_lora.metrics import Array
from bayesian_lora.predict import Predictions
from bayesian_lora.scores import selective
from bayesian_lora.utils.text_table import aligned

COVERAGES = tuple(i / 10 for i in range(1, 11))


def evaluate_gate(
    model: GatedModel,
    weights: np.ndarray,
    sets: Mapping[str, TokenisedSet],
    own: Mapping[str, Sequence[str]] | None = None,
) -> Figures:
    """The figures of a gated model on the mixture of these sets, whose texts come without task.

    Args:
        weights: of the members, (K,).
        sets: by task; all of the model's, so that every task can be right.
        own: metrics of a task's own, such as ``("mcc",)``.

    Returns:
        ``tasks`` {task: figures}, ``mixture`` (every example counts alike), ``mean_over_tasks``
        (every task does), ``experts``, ``gate``, ``uncertainty``, ``abstention``; JSON-able.
    Raises:
        InputError: a task without a set.
    """
    if missing := [task for task in model.slices if task not in sets]:
        raise InputError(f"task {missing[0]!r}: a gate is judged on all its tasks; give its set")
    data = JoinedSet({task: sets[task] for task in model.slices}, model.slices)
    found = model.outputs(data)
    labels = data.examples.labels
    by_task = gate_of_tasks(found.joint, model.slices)
    uncertain = metrics.uncertainty_per_example(found.joint, weights)
    log_probs = metrics.ensemble_log_probs(found.joint, weights)
    right = log_probs.argmax(1) == labels
    names = [part.name for part in model.parts]
    figures: Figures = {
        "examples": len(data),
        "members": len(weights),
        "tasks": {
            task: _task_figures(model, found, by_task, weights, data, t, (own or {}).get(task, ()))
            for t, task in enumerate(model.slices)
        },
        "mixture": {
            **metrics.classification_metrics(log_probs, labels),
            "gate_accuracy": float((_mean(by_task, weights).argmax(1) == data.task_of).mean()),
        },
        "experts": {"load": _load(found, weights, names, slice(None))},
        "gate": _gate_figures(found, by_task, weights),
        "uncertainty": metrics.uncertainty(found.joint, weights),
        "abstention": abstention(uncertain["predictive_entropy"], right),
    }
    within = within_tasks(model, data)
    told = entropy(by_task) + sum(by_task[..., t] * own_i for t, own_i in within.items())
    figures["mean_over_tasks"] = _mean_over_tasks(figures["tasks"])
    figures["experts"]["mutual_information"] = float((weights @ told).mean())
    for t, task in enumerate(model.slices):
        if t in within:
            mine = (weights @ within[t])[data.task_of == t]
            figures["tasks"][task]["experts_mutual_information"] = float(mine.mean())
    return figures


def gate_of_tasks(joint: np.ndarray, slices: Mapping[str, slice]) -> Array:
    """gate(task | x) (K, N, T) of log p(task, y | x) (K, N, ΣC)."""
    joint = joint.astype(np.float64)
    found = [np.logaddexp.reduce(joint[..., part], axis=-1) for part in slices.values()]
    return metrics.softmax(np.stack(found, -1))


def _task_figures(
    model: GatedModel,
    found: GatedOutputs,
    by_task: Array,
    weights: np.ndarray,
    data: JoinedSet,
    number: int,
    own: Sequence[str],
) -> Figures:
    """Of one task's examples: of the gate, of task and label, and of the label given the task."""
    task = data.names[number]
    rows, part = data.rows[task], model.slices[task]
    labels = data.examples.labels[rows]
    joint = found.joint[:, rows]
    log_probs = metrics.ensemble_log_probs(joint, weights)
    guessed, known = log_probs.argmax(1), labels - part.start
    gate = _mean(by_task[:, rows], weights)
    given = Predictions(joint[..., part], known, weights, rows)
    names = [p.name for p in model.parts]
    return {
        "examples": len(rows),
        "gate_accuracy": float((gate.argmax(1) == number).mean()),
        "gate_nll": float(-np.log(np.maximum(gate[:, number], np.finfo(np.float64).tiny)).mean()),
        "joint_accuracy": float((guessed == labels).mean()),
        "joint_nll": float(-log_probs[np.arange(len(rows)), labels].mean()),
        **_own_of_joint(guessed - part.start, known, tuple(n for n in own if n != "accuracy")),
        "given_task": evaluate(own, False, given),
        "load": _load(found, weights, names, rows),
    }


def _mean_over_tasks(tasks: Mapping[str, Figures]) -> Figures:
    names = {"accuracy": "joint_accuracy", "nll": "joint_nll", "gate_accuracy": "gate_accuracy"}
    return {n: float(np.mean([own[of] for own in tasks.values()])) for n, of in names.items()}


def _own_of_joint(guessed: np.ndarray, labels: np.ndarray, own: tuple[str, ...]) -> Figures:
    """A two-class task's own metrics where a text sent to another task counts as misread."""
    if not own:
        return {}
    misread = (guessed < 0) | (guessed > 1)
    read = np.where(misread, 1 - labels, guessed)
    sure = np.log(np.where(read[:, None] == np.arange(2), 1 - 1e-9, 1e-9))
    figures = metrics.classification_metrics(sure, labels, own)
    return {f"joint_{key}": v for key, v in figures.items() if key.startswith(own)}


def _load(found: GatedOutputs, weights: np.ndarray, names: Sequence[str], rows: Any) -> Figures:
    """Per expert its mean share of what acts, and how often its share is the largest."""
    used = _mean(found.used[:, rows], weights)
    top = np.stack([(one[rows].argmax(1)[:, None] == np.arange(len(names))) for one in found.used])
    often = _mean(top, weights).mean(0)
    return {
        name: {"weight": float(used[:, i].mean()), "top": float(often[i])}
        for i, name in enumerate(names)
    }


def _gate_figures(found: GatedOutputs, by_task: Array, weights: np.ndarray) -> Figures:
    """Entropies of the weights on experts and of gate(task | x), and what members disagree on.

    ``gate_entropy``: of the weights, mean over layers and tokens; ``entropy_of_mean_weights`` (also
    under its older name ``expert_entropy``): of each text's mean weights, which is no less.
    """
    of_mean = float((weights @ entropy(found.full)).mean())
    total = entropy(_mean(by_task, weights))
    expected = weights @ entropy(by_task)
    figures: Figures = {
        "expert_entropy": of_mean,
        "gate_entropy": float((weights @ found.entropy.astype(np.float64)).mean()),
        "entropy_of_mean_weights": of_mean,
        "task_entropy": float(total.mean()),
        "task_expected_entropy": float(expected.mean()),
        "task_mutual_information": float(np.maximum(total - expected, 0).mean()),
    }
    if np.count_nonzero(weights) == 1:
        reason = "one member alone cannot disagree with itself: gate an ensemble"
        figures |= {"task_mutual_information": None, "task_mutual_information_reason": reason}
    return figures


def within_tasks(model: GatedModel, data: TokenisedSet) -> dict[int, Array]:
    """I_t(i; y | x) (K, N) of each task of several experts, from each one's prediction alone."""
    experts = {
        t: [i for i, part in enumerate(model.parts) if part.task == task]
        for t, task in enumerate(model.slices)
    }
    several = {t: own for t, own in experts.items() if len(own) > 1}
    if not several:
        return {}
    full = model.outputs(data).full.astype(np.float64)
    found: dict[int, Array] = {}
    for t, own in several.items():
        part = list(model.slices.values())[t]
        alone = []
        for i in own:
            with model.expert(i):
                alone.append(metrics.softmax(model.outputs(data).joint[..., part]))
        mass = full[..., own].sum(-1, keepdims=True)
        # Where a text's weights on all of them underflowed, none is more likely than another.
        equal = np.full(full[..., own].shape, 1 / len(own))
        shares = np.divide(full[..., own], mass, out=equal, where=mass > 0)
        found[t] = mixture_information(shares, np.stack(alone, 2))
    return found


def mixture_information(shares: np.ndarray, probs: np.ndarray) -> Array:
    """H(Σ_i g_i p_i) − Σ_i g_i H(p_i) of g (…, E) and p (…, E, C): nats, never negative."""
    mixed = (shares[..., None] * probs).sum(-2)
    return np.maximum(entropy(mixed) - (shares * entropy(probs)).sum(-1), 0.0)


def entropy(probs: np.ndarray) -> Array:
    """−Σ p log p over the last axis, nats."""
    p = np.asarray(probs, dtype=np.float64)
    return -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(-1)


def abstention(doubt: np.ndarray, right: np.ndarray) -> Figures:
    """Accuracy where only the least doubtful share is answered, and the area under risk–coverage.

    Examples of equal doubt are answered or left together on average, whatever their order. The
    area is the mean over n of the error rate of the n least doubtful (Geifman & El-Yaniv 2017):
    ``area_of_oracle`` at best, where all wrong answers are doubted more than all right ones, and
    the error rate itself where doubt says nothing.

    Args:
        doubt: (N,), such as the predictive entropy.
        right: (N,), whether the answer is right.
    """
    wrong = ~right.astype(bool)
    risk = selective.risk_coverage(doubt, wrong)[1]
    at = [max(1, round(c * len(risk))) - 1 for c in COVERAGES]
    return {
        "coverage": list(COVERAGES),
        "accuracy": [float(1 - risk[i]) for i in at],
        "area": float(risk.mean()),
        "area_of_oracle": selective.aurc(wrong, wrong),
    }


def _mean(values: np.ndarray, weights: np.ndarray) -> Array:
    """Weighted mean over members (the first axis)."""
    return np.asarray(np.tensordot(weights / weights.sum(), values, axes=1), dtype=np.float64)


def table(figures: Figures) -> list[str]:
    """Lines for a person: a row per task, the mixture, experts' load, doubt."""
    rows = [["", "gate", "joint acc", "acc | task", "joint NLL", "NLL | task"]]
    for task, own in figures["tasks"].items():
        given = own["given_task"]
        row = (own["gate_accuracy"], own["joint_accuracy"], given["accuracy"])
        rows.append([task, *map(_digits, (*row, own["joint_nll"], given["nll"]))])
    for title, name in (("mixture", "mixture"), ("mean of tasks", "mean_over_tasks")):
        of = figures[name]
        row = (of["gate_accuracy"], of["accuracy"], None, of["nll"])
        rows.append([title, *map(_digits, row)])
    lines = [*aligned(rows), "", "Experts' mean weight (share of texts it leads):"]
    for task, own in figures["tasks"].items():
        cells = [f"{n} {x['weight']:.2f} ({x['top']:.0%})" for n, x in own["load"].items()]
        lines.append(f"  on {task}: {', '.join(cells)}")
    gate, doubt = figures["gate"], figures["uncertainty"]
    lines.append(
        f"Entropy of the gate: {gate['gate_entropy']:.4f}, of its mean over experts "
        f"{gate['expert_entropy']:.4f}, over tasks {gate['task_entropy']:.4f} nats"
    )
    if doubt["mutual_information"] is not None:
        lines.append(
            f"Entropy of task and label: {doubt['predictive_entropy']:.4f}, of which mutual "
            f"information with the member {doubt['mutual_information']:.4f} nats"
        )
    curve = figures["abstention"]
    half = curve["accuracy"][len(curve["coverage"]) // 2 - 1]
    lines.append(
        f"Answering the surer half: accuracy {half:.4f}; area under risk–coverage "
        f"{curve['area']:.4f} (an oracle's {curve['area_of_oracle']:.4f})"
    )
    return lines


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
