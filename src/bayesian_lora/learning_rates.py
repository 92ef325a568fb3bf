"""The learning rates of chains that one optimiser moves: linear decay, or each chain's plateau.

Shapes: M chains.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bayesian_lora.samplers.schedules import warmup_constant, warmup_linear_decay

ScheduleName = Literal["linear", "plateau"]
THRESHOLD = 1e-4
"""What of its best loss a chain must gain for an improvement; torch's default."""


class LearningRates:
    """Warm-up, then linear decay to 0, or a constant rate that each chain's plateaus lower.

    ``plateau``: a chain's rate is multiplied by `factor` after more than `patience` epochs in a row
    without improvement, as by torch's `ReduceLROnPlateau` with its defaults; no other chain matters
    to it.

    Args:
        chains: M.
        lr: the highest rate.
        total, warmup_share: steps, and the share of them that is warm-up.
        schedule, factor, patience: after the warm-up.
    """

    def __init__(
        self,
        chains: int,
        *,
        lr: float,
        total: int,
        warmup_share: float,
        schedule: ScheduleName = "linear",
        factor: float = 0.5,
        patience: int = 1,
    ) -> None:
        self.lr, self.total = lr, total
        self.warmup = round(warmup_share * total)
        self.schedule: ScheduleName = schedule
        self.factor, self.patience = factor, patience
        self.scales, self.best, self.bad = [1.0] * chains, [math.inf] * chains, [0] * chains

    def common(self, step: int) -> float:
        """What all chains' rates have in common, of the 0-based `step`."""
        if self.schedule == "plateau":
            return self.lr * warmup_constant(step, warmup=self.warmup)
        return self.lr * warmup_linear_decay(step, warmup=self.warmup, total=self.total)

    def at(self, step: int) -> Tensor:
        """(M,) float64, of the 0-based `step`, as far as the plateaus are known by now."""
        return torch.tensor(self.scales, dtype=torch.float64) * self.common(step)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Adam's step, each chain with its own rate.

        The chains share tensors, and Adam's step is proportional to the rate: all are moved at the
        common one, then a chain with a rate of its own is put back to its share of the way.
        """
        for group in optimizer.param_groups:
            group["lr"] = self.common(step)
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        lowered = any(scale != 1 for scale in self.scales)
        old = [tensor.detach().clone() for tensor in tensors] if lowered else []
        optimizer.step()
        for before, tensor in zip(old, tensors, strict=False):
            share = torch.tensor(self.scales).to(tensor).view(-1, *[1] * (tensor.ndim - 1))
            tensor.copy_(before.lerp(tensor, share))

    def epoch_ended(self, losses: Sequence[float]) -> None:
        """An epoch has ended, with these held-out losses (M,)."""
        if self.schedule != "plateau":
            return
        for m, loss in enumerate(losses):
            if loss < self.best[m] * (1 - THRESHOLD):
                self.best[m], self.bad[m] = loss, 0
                continue
            self.bad[m] += 1
            if self.bad[m] > self.patience:
                self.scales[m] *= self.factor
                self.bad[m] = 0

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these chains alone."""
        self.load_state_dict({n: [x[m] for m in kept] for n, x in self.state_dict().items()})

    def state_dict(self) -> dict[str, list[Any]]:
        """One value a chain, by name."""
        return {"scales": [*self.scales], "best": [*self.best], "bad": [*self.bad]}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        """Undo `state_dict`."""
        self.scales, self.best, self.bad = ([*state[n]] for n in ("scales", "best", "bad"))
