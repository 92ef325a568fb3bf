"""A stack trained further: several variants at once, each measured on every task.

Shapes: V variants, K members, P parts, R rank, D widths, N examples, C_t classes of task t.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.composition.fit import ChainPlan, Factory, FitReport, Mixing, Recipe, fit
from bayesian_lora.composition.stack import Part, Stack
from bayesian_lora.composition.stack_model import build_stack_model, stack_state, updated
from bayesian_lora.composition.stack_objective import StackObjective
from bayesian_lora.composition.task_data import TaskData
from bayesian_lora.data.joined import JoinedSet
from bayesian_lora.errors import InputError
from bayesian_lora.models.task_heads import TaskModel
from bayesian_lora.predict import predict_logits
from bayesian_lora.progress import Progress


@dataclass(frozen=True)
class Variant:
    """One way to train a stack further.

    tasks: trained on, one after the other by batches (``alternate``) or in equal shares of every
    batch (``sum``). part: only the columns of this part of the stack move, None all.
    orthogonality: weight of `overlap` between the parts; distillation: weight of
    KL(single adapter ‖ stack) on every task's head, so that training on one task does not forget
    another (learning without forgetting: Li & Hoiem 2017).
    """

    name: str
    tasks: tuple[str, ...]
    part: str | None = None
    mixing: Mixing = "alternate"
    orthogonality: float = 0.0
    distillation: float = 0.0


@dataclass(frozen=True)
class Retrained:
    """A variant's stack, and how its chains were fitted: rows of `history` are this variant's."""

    stack: Stack
    report: FitReport


def retrain(
    stack: Stack,
    data: Mapping[str, TaskData],
    variants: Sequence[Variant],
    recipe: Recipe,
    *,
    seed: int,
    progress: Progress,
    device: torch.device | str = "cpu",
) -> dict[str, Retrained]:
    """Every variant of the stack's further training, V·K chains of one model.

    Raises:
        InputError: no variants or two of a name, an unknown task or part, a weight below zero,
            columns that no longer belong to parts, or as `fit`.
    """
    check_variants(stack, variants)
    members = len(stack)
    model = build_stack_model(stack, device=device)
    teacher = _teacher_maker(model, stack) if any(v.distillation for v in variants) else None
    state = {n: t.repeat(len(variants), *[1] * (t.ndim - 1)) for n, t in stack_state(stack).items()}
    model.load_chains(state)
    plans = [_plan(stack, v) for v in variants for _ in range(members)]
    weights = torch.tensor([plan.orthogonality for plan in plans], device=model.device)
    penalty = None
    if any(v.orthogonality for v in variants):
        penalty = lambda: weights * overlap(model, stack.parts)  # noqa: E731
    report = fit(
        model,
        data,
        plans,
        recipe,
        seed=seed,
        progress=progress,
        objective=teacher,
        penalty=penalty,
    )
    fitted = {n: p.detach() for n, p in model.chain_parameters().items()}
    found = {}
    for i, variant in enumerate(variants):
        chains = range(i * members, (i + 1) * members)
        own = {n: t[chains.start : chains.stop] for n, t in fitted.items()}
        facts = {**stack.facts, "retrained": _facts(variant, recipe, report, chains)}
        after = updated(stack, own, weights=stack.weights, facts=facts)
        found[variant.name] = Retrained(after, _of_chains(report, chains))
    return found


def check_variants(stack: Stack, variants: Sequence[Variant]) -> None:
    """Raises InputError as `retrain` says."""
    names = [v.name for v in variants]
    if not names or len(set(names)) < len(names):
        raise InputError(f"variants {names}: give at least one, each a name of its own")
    parts = {part.name: part for part in stack.parts}
    for v in variants:
        whose = f"variant {v.name!r}: " if len(variants) > 1 else ""
        carried = f"the stack carries {', '.join(stack.tasks)}"
        if not v.tasks:
            raise InputError(f"{whose}no task to train on: {carried}, name one or several")
        if unknown := [task for task in v.tasks if task not in stack.tasks]:
            raise InputError(f"{whose}no task {unknown[0]!r}: {carried}, choose of them")
        if twice := [task for task in v.tasks if v.tasks.count(task) > 1]:
            raise InputError(f"{whose}task {twice[0]!r} is named twice; name it once")
        if v.part is not None and v.part not in parts:
            raise InputError(f"{whose}no part {v.part!r}; there are {', '.join(parts)}")
        if v.mixing not in ("alternate", "sum"):
            raise InputError(f"{whose}mixing={v.mixing!r}: choose alternate or sum")
        for name in ("orthogonality", "distillation"):
            if not 0 <= (weight := getattr(v, name)) < np.inf:
                raise InputError(f"{whose}{name}={weight}: must be a number from 0")
        columns = v.part is not None or v.orthogonality or v.distillation
        if columns and any(p.columns[0] == p.columns[1] for p in stack.parts):
            raise InputError(
                f"{whose}the stack's columns belong to no part any more (compressed "
                "or merged); stack the adapters exactly"
            )


def _plan(stack: Stack, variant: Variant) -> ChainPlan:
    columns = {part.name: part.columns for part in stack.parts}
    return ChainPlan(
        tasks=variant.tasks,
        columns=None if variant.part is None else columns[variant.part],
        mixing=variant.mixing,
        orthogonality=variant.orthogonality,
        distillation=variant.distillation,
    )


def overlap(model: TaskModel, parts: Sequence[Part]) -> Tensor:
    """How far the parts' subspaces overlap, (M,) from 0 to 1: the mean over LoRA layers and pairs
    of parts of ‖A_i A_jᵀ‖²/(‖A_i‖²‖A_j‖²) and of the same for B.

    For rank 1 it is cos² of the angle between the directions; O-LoRA (Wang et al. 2023) penalises
    ‖A_i A_jᵀ‖ without the norms.
    """
    terms = []
    for layer in model.lora_layers().values():
        for factor in (layer.lora_A, layer.lora_B.mT):  # (M, R, D)
            own = [factor[:, part.columns[0] : part.columns[1]] for part in parts]
            for i, first in enumerate(own):
                for second in own[:i]:
                    cross = (first @ second.mT).square().sum((1, 2))
                    scale = first.square().sum((1, 2)) * second.square().sum((1, 2))
                    terms.append(cross / scale.clamp_min(torch.finfo(scale.dtype).tiny))
    if not terms:
        return torch.zeros(model.num_chains, device=model.device)
    return torch.stack(terms).mean(0)


def part_states(stack: Stack) -> dict[str, dict[str, Tensor]]:
    """Each part alone, as it was before it was weighted into the stack, with all heads.

    The other parts' columns of B are zero; tensors (K, …) as in `stack_state`.
    """
    found = {}
    for part in stack.parts:
        state = dict(stack_state(stack))
        start, stop = part.columns
        for name, tensor in stack.factors.items():
            if name.endswith(".lora_B"):
                alone = torch.zeros_like(tensor)
                alone[..., start:stop] = tensor[..., start:stop] / (part.weight or 1.0)
                state[name] = alone
        found[part.name] = state
    return found


def _teacher_maker(model: TaskModel, stack: Stack) -> Factory:
    """An objective's maker that first asks the single adapters for their predictions."""

    def make(model: TaskModel, data: JoinedSet, plans: Sequence[ChainPlan]) -> StackObjective:
        before = {n: p.detach().clone() for n, p in model.chain_parameters().items()}
        teacher = torch.from_numpy(teacher_log_probs(model, stack, data))
        model.load_chains(before)
        return StackObjective(model, data, plans, teacher)

    return make


def teacher_log_probs(model: TaskModel, stack: Stack, data: JoinedSet) -> np.ndarray:
    """(N, Σ C): within each task's classes the log of the single adapter's mean probabilities.

    The mean is over the members, and over the adapters of a task that has several. Tasks without
    a part of their own keep what the stack itself says. The model's chains are replaced.
    """
    states = part_states(stack)
    found = np.empty((len(data), max(part.stop for part in model.slices.values())))
    acting = np.flatnonzero(stack.weights)  # a weight of 0 has no logarithm
    log_weights = torch.from_numpy(np.log(stack.weights[acting]))[:, None, None]
    for task, part in model.slices.items():
        own = [states[p.name] for p in stack.parts if p.task == task] or [stack_state(stack)]
        each = []
        for state in own:
            model.load_chains(state)
            logits = torch.from_numpy(predict_logits(model, data)[acting][..., part]).double()
            each.append(torch.logsumexp(logits.log_softmax(-1) + log_weights, dim=0))
        found[:, part] = (torch.stack(each).logsumexp(0) - np.log(len(own))).numpy()
    return found


def _of_chains(report: FitReport, chains: range) -> FitReport:
    return FitReport(
        [report.best_epoch[m] for m in chains],
        [report.validation_loss[m] for m in chains],
        report.steps,
        report.seconds,
        [{**r, "chain": r["chain"] - chains.start} for r in report.history if r["chain"] in chains],
    )


def _facts(variant: Variant, recipe: Recipe, report: FitReport, chains: range) -> dict[str, Any]:
    return {
        "variant": {**vars(variant), "tasks": list(variant.tasks)},
        "recipe": dict(vars(recipe)),
        "best_epoch": [report.best_epoch[m] for m in chains],
        "steps": report.steps,
    }
