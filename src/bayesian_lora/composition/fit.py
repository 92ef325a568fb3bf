"""Chains fitted to several tasks at once: each its own variant, all in one forward pass.

Shapes: M chains, B examples of a chain's batch, R rank, C_t classes of task t, N examples.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.composition.stack_objective import StackObjective
from bayesian_lora.composition.task_data import TaskData
from bayesian_lora.data.joined import JoinedSet, TaskOrder
from bayesian_lora.errors import InputError
from bayesian_lora.learning_rates import ScheduleName
from bayesian_lora.models.task_heads import TaskModel
from bayesian_lora.posterior import PriorGroup
from bayesian_lora.progress import Progress
from bayesian_lora.samplers.failures import Diverged
from bayesian_lora.utils.rng import chain_generators
from bayesian_lora.warm_start import EpochReport, StepReport, WarmStart

Mixing = Literal["alternate", "sum"]
Factory = Callable[[TaskModel, JoinedSet, "Sequence[ChainPlan]"], StackObjective]


@dataclass(frozen=True)
class Recipe:
    """How chains are fitted: Adam, the learning rate by `schedule`, early stopping.

    patience: epochs without a better held-out NLL after which a chain keeps its best epoch; None
    goes to the end (the best epoch counts all the same). steps_per_epoch: None is as many as the
    largest of the chains' training data fills, and one a task. prior_std: of the Gaussian prior on
    what is trained.
    """

    epochs: int = 5
    batch_size: int = 32
    lr: float = 2e-3
    schedule: ScheduleName = "plateau"
    patience: int | None = 3
    prior_std: float = 1.0
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "steps_per_epoch"):
            value = getattr(self, name)
            if value is None and name in ("patience", "steps_per_epoch"):
                continue
            if type(value) is not int or value < 1:
                raise InputError(f"{name}={value!r}: must be a whole number of at least 1")
        if self.schedule not in (known := get_args(ScheduleName)):
            raise InputError(f"schedule={self.schedule!r}: choose one of {', '.join(known)}")
        for name in ("lr", "prior_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)}: must be a positive number")


@dataclass(frozen=True)
class ChainPlan:
    """What one chain is fitted to, and what of it moves.

    tasks: trained on; their heads move, the others' stay. columns: of the factors, [start, stop);
    None is all. mixing: one task a batch in turn, or an equal share of each in every batch.
    orthogonality: weight of the parts' mean squared overlap; distillation: weight of
    KL(single adapter ‖ chain), summed over the tasks' heads.
    """

    tasks: tuple[str, ...]
    columns: tuple[int, int] | None = None
    mixing: Mixing = "alternate"
    orthogonality: float = 0.0
    distillation: float = 0.0


@dataclass
class FitReport:
    """best_epoch (M,), validation_loss (M,) at it; a row of `history` per epoch and chain."""

    best_epoch: list[int]
    validation_loss: list[float]
    steps: int
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    model: TaskModel,
    data: Mapping[str, TaskData],
    plans: Sequence[ChainPlan],
    recipe: Recipe,
    *,
    seed: int,
    progress: Progress,
    objective: Factory | None = None,
    trainable: Callable[[str], bool] = lambda _: True,
    penalty: Callable[[], Tensor] | None = None,
) -> FitReport:
    """Fit the model's chains in place, each by its plan; each ends at its best epoch.

    Args:
        model: with as many chains as plans.
        data: at least the plans' tasks.
        objective: makes what is descended on; None is `StackObjective`.
        trainable: which of the model's parameters move at all, by name.
        penalty: (M,), added to the loss once a step, such as an overlap of factors.

    Raises:
        InputError: a plan without tasks, of a task there is no data for, or of more tasks than
            its batches reach; a loss that is not finite.
    """
    _check(plans, data, model, recipe)
    began = time.monotonic()
    used = [t for t in model.slices if any(t in plan.tasks for plan in plans)]
    train = JoinedSet({t: data[t].train for t in used}, model.slices)
    held_out = JoinedSet({t: data[t].validation for t in used}, model.slices)
    goal = (objective or StackObjective)(model, train, plans)
    sizes = [sum(len(train.rows[t]) for t in plan.tasks) for plan in plans]
    order = _order(train, plans, recipe, max(sizes), seed)
    moving = {n: p for n, p in model.chain_parameters().items() if trainable(n)}
    # WarmStart divides by the examples of all tasks; a chain's N are those of its own.
    std = recipe.prior_std * torch.tensor(sizes, device=model.device).div(len(train)).sqrt()
    warm = WarmStart(
        goal,
        [PriorGroup(tuple(moving.values()), std)],
        order,  # type: ignore[arg-type]
        epochs=recipe.epochs,
        lr=recipe.lr,
        validation=held_out,
        early_stopping=True,
        patience=recipe.patience,
        schedule=recipe.schedule,
    )
    masks = gradient_masks(model, moving, plans)
    warm.optimizer.register_step_pre_hook(lambda *_: _finish_gradient(moving, masks, penalty))
    history = _History(order.batches_per_epoch * recipe.batch_size / len(train), progress)
    progress.start("Fitting", warm.total)
    _run(warm, history, recipe.lr)
    progress.end()
    return FitReport(
        warm.best_epoch.tolist(),
        warm.best_loss.tolist(),
        warm.step,
        time.monotonic() - began,
        history.rows,
    )


def _run(warm: WarmStart, history: "_History", lr: float) -> None:
    try:
        warm.run(history.step, history.epoch)
    except Diverged as error:
        raise InputError(f"lr={lr:g}: {error}; lower it, such as to {lr / 4:g}") from error


def _check(
    plans: Sequence[ChainPlan], data: Mapping[str, TaskData], model: TaskModel, recipe: Recipe
) -> None:
    for plan in plans:
        if not plan.tasks:
            raise InputError("a chain is fitted to no task: name at least one")
        for task in plan.tasks:
            if task not in model.slices:
                raise InputError(f"task {task!r}: not carried; there are {', '.join(model.slices)}")
            if task not in data:
                raise InputError(f"task {task!r}: no data given for it")
        if plan.mixing == "sum" and recipe.batch_size < len(plan.tasks):
            raise InputError(
                f"batch_size={recipe.batch_size}: a batch has examples of each of "
                f"{len(plan.tasks)} tasks; raise it to at least {len(plan.tasks)}"
            )
        steps = recipe.steps_per_epoch
        if plan.mixing == "alternate" and steps is not None and steps < len(plan.tasks):
            raise InputError(
                f"steps_per_epoch={steps}: {len(plan.tasks)} tasks in turn need a step each; raise "
                f"it to at least {len(plan.tasks)}, or mix the tasks by sum"
            )
    assert len(plans) == model.num_chains


def _order(
    train: JoinedSet, plans: Sequence[ChainPlan], recipe: Recipe, largest: int, seed: int
) -> TaskOrder:
    turns = max(len(plan.tasks) for plan in plans)
    steps = recipe.steps_per_epoch or max(-(-largest // recipe.batch_size), turns)
    return TaskOrder(
        train,
        [plan.tasks for plan in plans],
        [plan.mixing for plan in plans],
        recipe.batch_size,
        steps,
        chain_generators(seed, range(len(plans)), "order"),
    )


def gradient_masks(
    model: TaskModel, moving: Mapping[str, Tensor], plans: Sequence[ChainPlan]
) -> dict[str, Tensor]:
    """1 where a chain's entry moves, 0 where its plan keeps it; tensors that broadcast."""
    masks: dict[str, Tensor] = {}
    for name, tensor in moving.items():
        if name.endswith((".lora_A", ".lora_B")):
            axis = 1 if name.endswith(".lora_A") else 2
            rows = torch.stack([_columns_mask(plan, tensor.shape[axis]) for plan in plans])
            shape = [len(plans), 1, 1]
            shape[axis] = tensor.shape[axis]
            masks[name] = rows.view(shape).to(tensor)
        elif ".tasks." in name:
            own = [name.rpartition(".tasks.")[2].rpartition(".")[0] in p.tasks for p in plans]
            shape = [len(plans), *[1] * (tensor.ndim - 1)]
            masks[name] = torch.tensor(own).view(shape).to(tensor)
    return masks


def _columns_mask(plan: ChainPlan, rank: int) -> Tensor:
    mask = torch.zeros(rank)
    start, stop = (0, rank) if plan.columns is None else plan.columns
    mask[start:stop] = 1
    return mask


def _finish_gradient(
    moving: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    penalty: Callable[[], Tensor] | None,
) -> None:
    """Add the penalty's gradient; take away what a chain's plan keeps as it is."""
    if penalty is not None:
        with torch.enable_grad():
            penalty().sum().backward()
    for name, mask in masks.items():
        grad = moving[name].grad
        if grad is not None:
            grad.mul_(mask)


class _History:
    """Epochs under the seed's names, from the reports of steps and epochs."""

    def __init__(self, share: float, progress: Progress) -> None:
        # WarmStart weights each batch by its share of all examples; an epoch here may be less.
        self.share, self.progress = share, progress
        self.rows: list[dict[str, Any]] = []

    def step(self, report: StepReport) -> None:
        self.progress.update(report.step, lambda: f"loss {float(report.loss.mean()):.4f}")

    def epoch(self, report: EpochReport) -> None:
        assert report.validation_loss is not None
        assert report.validation_accuracy is not None
        assert report.train_accuracy is not None
        assert report.lr is not None
        loss, accuracy = report.validation_loss.tolist(), report.validation_accuracy.tolist()
        for m in range(len(loss)):
            self.rows.append(
                {
                    "epoch": report.epoch,
                    "chain": m,
                    "trainer/global_step": report.step,
                    "lr-Adam": float(report.lr[m]),
                    "train/loss": float(report.train_loss[m]) / self.share,
                    "train/acc": float(report.train_accuracy[m]) / self.share,
                    "val/loss": loss[m],
                    "val/acc": accuracy[m],
                }
            )
        words = f"Epoch {report.epoch + 1}: val/loss {np.mean(loss):.4f}, "
        self.progress.say(f"{words}val/acc {np.mean(accuracy):.4f} (mean of {len(loss)} fits)")
