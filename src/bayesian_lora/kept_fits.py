"""The two fits that a warm start ends with: the last epoch's, and the best epoch's of each chain.

Shapes: M chains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

FitKind = Literal["last", "early_stopped"]
KINDS: tuple[FitKind, ...] = ("last", "early_stopped")


@dataclass(frozen=True)
class Fits:
    """One fit a chain: tensors (M, …), the noise scales' logarithms among them, and the optimiser
    step (M,) that each is of.
    """

    kind: FitKind
    tensors: dict[str, Tensor]
    steps: list[int]


class KeptFits:
    """Copies of the fits that a later epoch may overwrite, and the epochs they are of.

    Args:
        chains: M.
        patience: epochs in a row without a lower held-out loss after which a chain has ended,
            whoever goes on beside it; None is never.
        last: keep the last fits too, not the best alone.
    """

    def __init__(self, chains: int, patience: int | None, last: bool) -> None:
        self.patience, self.keeps_last = patience, last
        self.best_loss = torch.full((chains,), float("inf"), dtype=torch.float64)
        self.best_epoch = torch.full((chains,), -1)
        self.last_epoch = torch.full((chains,), -1)
        self.best: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        """Empty while all chains go on: their last fit is then what the model holds."""

    def epoch_ended(self, epoch: int, loss: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Take in the held-out losses (M,) of an epoch (from 0) and its tensors (M, …).

        What becomes of a chain does not depend on the others: one that is out of patience keeps
        its fits, though others make the run go on.
        """
        going = torch.ones(len(loss), dtype=torch.bool)
        if self.patience is not None:
            going = epoch - 1 - self.best_epoch < self.patience
            if self.keeps_last:
                self.last = _where(going, tensors, self.last)
        better = (loss < self.best_loss) & going
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_epoch = torch.where(better, torch.tensor(epoch), self.best_epoch)
        self.last_epoch = torch.where(going, torch.tensor(epoch), self.last_epoch)
        self.best = _where(better, tensors, self.best)

    def out_of_patience(self, epochs: int) -> bool:
        """Whether no chain goes on after so many epochs."""
        if self.patience is None or epochs == 0:
            return False
        return bool((epochs - 1 - self.best_epoch >= self.patience).all())

    def close(self, tensors: Mapping[str, Tensor]) -> None:
        """The fit is over: hold the last one, before the best takes its place in the model.

        Again it does nothing: the model's tensors may be the best ones by then.
        """
        if self.keeps_last and self.best and not self.last:
            self.last = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def fits(self, kind: FitKind, steps_per_epoch: int) -> Fits | None:
        """Of one kind, once closed; None if no epoch has ended."""
        epochs, tensors = {
            "last": (self.last_epoch, self.last),
            "early_stopped": (self.best_epoch, self.best),
        }[kind]
        # A chain whose losses were never finite has no best epoch; its first one stands for it.
        steps = ((epochs.clamp_min(0) + 1) * steps_per_epoch).tolist()
        return Fits(kind, tensors, steps) if tensors else None

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these chains alone."""
        rows = list(kept)
        for name in ("best_loss", "best_epoch", "last_epoch"):
            setattr(self, name, getattr(self, name)[rows])
        self.best = {name: tensor[rows] for name, tensor in self.best.items()}
        self.last = {name: tensor[rows] for name, tensor in self.last.items()}

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything."""
        return {
            "best_loss": self.best_loss.clone(),
            "best_epoch": self.best_epoch.clone(),
            "last_epoch": self.last_epoch.clone(),
            "best": {name: tensor.clone() for name, tensor in self.best.items()},
            "last": {name: tensor.clone() for name, tensor in self.last.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Undo `state_dict`; the fits' tensors go to the device."""
        for name in ("best_loss", "best_epoch", "last_epoch"):
            setattr(self, name, state[name].clone())
        for name in ("best", "last"):
            setattr(self, name, {n: t.to(device, copy=True) for n, t in state[name].items()})


def _where(
    mask: Tensor, now: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`now` of the chains in the mask (M,), `before` of the others (at first: `now` of all)."""
    found = {}
    for name, tensor in now.items():
        rows = mask.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))
        old = before.get(name, tensor)
        found[name] = torch.where(rows, tensor.detach(), old.detach()).clone()
    return found
