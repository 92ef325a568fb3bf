"""What a stack is trained on: each example by its own task's head, and what it should not forget.

Shapes: M chains, b examples of a pass, N examples, C_t classes of task t.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bayesian_lora.data.batching import Batch, TokenisedSet
from bayesian_lora.data.joined import JoinedSet
from bayesian_lora.models.task_heads import TaskModel
from bayesian_lora.objective import Objective
from bayesian_lora.posterior import negative_log_likelihood
from bayesian_lora.predict import predict_logits


class Plan(Protocol):
    """What the objective reads of a chain's plan."""

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def distillation(self) -> float: ...


class StackObjective(Objective):
    """−log p(y | x, task), the softmax being over the task's own classes.

    Args:
        model: its logits are those of all tasks' heads side by side.
        data: of all tasks that are trained on.
        plans: of the chains.
        teacher: (N, Σ C) log-probabilities within each task's classes, to be distilled by the
            plans' weights (Hinton et al. 2015; of other tasks' heads: Li & Hoiem 2017).

    `joint` says that the outputs are log p(task, y | x) already: then −log p(task, y | x) counts.
    """

    joint = False

    def __init__(
        self,
        model: TaskModel,
        data: JoinedSet,
        plans: Sequence[Plan],
        teacher: Tensor | None = None,
    ) -> None:
        super().__init__(model, data, "categorical")
        self.slices, self.joined, self.plans = model.slices, data, plans
        self.teacher = teacher
        self.distillation = torch.tensor([plan.distillation for plan in plans])
        self.foreign = foreign_classes(data, model.slices)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        own = self.own(outputs, batch.rows, self.joined)
        nll = negative_log_likelihood("categorical", own, batch.labels)
        if self.teacher is None:
            return nll
        known = self.teacher[batch.rows].to(outputs)
        terms = [
            F.kl_div(
                outputs[..., part].log_softmax(-1),
                known[..., part],
                log_target=True,
                reduction="none",
            ).sum(-1)
            for part in self.slices.values()
        ]
        return nll + self.distillation.to(outputs)[:, None] * torch.stack(terms).sum(0)

    def right(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.own(outputs, batch.rows, self.joined).argmax(-1) == batch.labels

    def own(self, outputs: Tensor, rows: Tensor, data: JoinedSet) -> Tensor:
        """Logits (M, b, Σ C), those of other tasks' classes −∞ (unless `joint`); rows (M, b)."""
        if self.joint:
            return outputs
        tasks = torch.from_numpy(data.task_of)[rows].to(outputs.device)
        return outputs.masked_fill(self.foreign.to(outputs.device)[tasks], -torch.inf)

    def score(self, data: TokenisedSet) -> tuple[Tensor, Tensor]:
        """Held-out NLL and accuracy, (M,): the mean over a chain's tasks of each task's mean."""
        assert isinstance(data, JoinedSet)
        assert data.names == self.joined.names
        outputs = torch.from_numpy(predict_logits(self.model, data)).double()
        chains = outputs.shape[0]
        rows = torch.arange(len(data)).expand(chains, -1)
        own, labels = self.own(outputs, rows, data), data.labels.expand(chains, -1)
        nll = negative_log_likelihood("categorical", own, labels)
        right = (own.argmax(-1) == labels).double()
        weights = torch.from_numpy(self._weights(data))
        return (nll * weights).sum(1), (right * weights).sum(1)

    def _weights(self, data: JoinedSet) -> np.ndarray:
        """(M, N) summing to 1: every task of a chain alike, whatever its size."""
        weights = np.zeros((len(self.plans), len(data)))
        for m, plan in enumerate(self.plans):
            for task in plan.tasks:
                rows = data.rows[task]
                weights[m, rows] = 1 / (len(plan.tasks) * len(rows))
        return weights


def foreign_classes(data: JoinedSet, slices: dict[str, slice]) -> Tensor:
    """(T, Σ C), true where a class is not of the joined set's task."""
    total = max(part.stop for part in slices.values())
    foreign = torch.ones(len(data.names), total, dtype=torch.bool)
    for i, name in enumerate(data.names):
        foreign[i, slices[name]] = False
    return foreign
