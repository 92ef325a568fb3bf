"""The warm start: Adam on U/N, all chains at once, each from its own start and batch order.

Shapes: M chains, N training examples.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.kept_fits import FitKind, Fits, KeptFits
from bayesian_lora.learning_rates import LearningRates, ScheduleName
from bayesian_lora.objective import Objective
from bayesian_lora.posterior import PriorGroup
from bayesian_lora.predict import predict_logits
from bayesian_lora.samplers.failures import Diverged, Lose, refuse
from bayesian_lora.utils.rng import restore_states, save_states


@dataclass(frozen=True)
class EpochReport:
    """One epoch's end: means over the epoch's batches, and of the held-out set, each (M,).

    `train_accuracy` is that of the batches before each step, None for regression; `lr` (M,) the
    learning rates of the epoch's last step; `step` the steps so far.
    """

    epoch: int
    train_loss: Tensor
    validation_loss: Tensor | None
    validation_accuracy: Tensor | None = None
    train_accuracy: Tensor | None = None
    lr: Tensor | None = None
    step: int = 0


@dataclass(frozen=True)
class StepReport:
    """One optimiser step of any phase: `loss` and `accuracy` (M,), `lr` the step size.

    Where chains have learning rates of their own (`WarmStart`'s plateau), `lr` is their mean.
    """

    phase: str
    step: int
    total: int
    loss: Tensor
    accuracy: Tensor | None
    lr: float
    examples: int
    t_eff: Tensor | None = None


OnStep = Callable[[StepReport], None]


class WarmStart:
    """Maximum a posteriori by Adam (AdamW without weight decay: the prior does that).

    Args:
        objective: of the model to be fitted.
        groups: the model's tensors under their priors.
        order: each chain's batches.
        epochs, lr, warmup_share: the schedule.
        schedule: after the warm-up, ``linear`` decay to 0, or ``plateau``: each chain's learning
            rate is multiplied by `plateau_factor` after more than `plateau_patience` epochs in a
            row without improvement of its held-out loss, as torch's `ReduceLROnPlateau`.
        validation: held-out set for `EpochReport`, early stopping and the plateau.
        early_stopping: end with each chain's epoch of lowest validation loss, not with the last.
        both: hold the others too (`other`), if there is a validation set.
        patience: end when no chain has improved for so many epochs.
        dropout: generators of the LoRA dropout, one per chain.
        lose: what becomes of chains whose loss or gradient is not finite; it calls `keep`.

    Raises:
        ValueError: early stopping or plateau without a validation set, patience without early
            stopping.
    """

    def __init__(
        self,
        objective: Objective,
        groups: list[PriorGroup],
        order: BatchOrder,
        *,
        epochs: int,
        lr: float,
        warmup_share: float = 0.06,
        schedule: ScheduleName = "linear",
        plateau_factor: float = 0.5,
        plateau_patience: int = 1,
        validation: TokenisedSet | None = None,
        early_stopping: bool = False,
        both: bool = False,
        patience: int | None = None,
        dropout: list[torch.Generator] | None = None,
        lose: Lose = refuse,
    ) -> None:
        if early_stopping and validation is None:
            raise ValueError("early_stopping=True needs a validation set")
        if schedule == "plateau" and validation is None:
            raise ValueError("schedule='plateau' needs a validation set")
        if patience is not None and not early_stopping:
            raise ValueError(f"patience={patience} acts only with early_stopping=True")
        self.objective, self.groups, self.order = objective, groups, order
        self.epochs, self.validation = epochs, validation
        self.early_stopping, self.both = early_stopping, both
        self.dropout, self.lose = dropout, lose
        self.total = epochs * order.batches_per_epoch
        chains = len(order.generators)
        self.rates = LearningRates(
            chains,
            lr=lr,
            total=self.total,
            warmup_share=warmup_share,
            schedule=schedule,
            factor=plateau_factor,
            patience=plateau_patience,
        )
        parameters = [tensor for group in groups for tensor in group.tensors]
        if objective.log_noise is not None:
            parameters.append(objective.log_noise.requires_grad_())
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        self.step = 0
        self.rows: np.ndarray | None = None
        self.losses, self.accuracies = torch.zeros(chains), torch.zeros(chains)
        self.kept = KeptFits(chains, patience, last=both)
        self.other: Fits | None = None
        """Of the other kind than `kind`, once run; None without `both`, or without epochs."""

    @property
    def kind(self) -> FitKind:
        """Of which epoch the fits are that the model ends with."""
        return "early_stopped" if self.early_stopping else "last"

    @property
    def best_loss(self) -> Tensor:
        """(M,) lowest held-out loss so far, float64."""
        return self.kept.best_loss

    @property
    def best_epoch(self) -> Tensor:
        """(M,) the epoch, from 0, that had it; −1 if none has."""
        return self.kept.best_epoch

    @property
    def steps(self) -> list[int]:
        """(M,) the steps after which the chains were where the model has them at the end."""
        fits = self.kept.fits(self.kind, self.order.batches_per_epoch)
        return [self.step] * len(self.losses) if fits is None else fits.steps

    def run(self, on_step: OnStep, on_epoch: Callable[[EpochReport], None]) -> None:
        """Go on from where the state is to the end of the last epoch."""
        per_epoch = self.order.batches_per_epoch
        while self.step < self.total and not self._out_of_patience():
            epoch, number = divmod(self.step, per_epoch)
            if number == 0:
                self.rows = self.order.epoch()
                self.losses.zero_()
                self.accuracies.zero_()
            assert self.rows is not None
            report = self._one_step(self.order.epoch_batch(self.rows, number))
            ended = self._end_epoch(epoch) if number == per_epoch - 1 else None
            # Called last, so that a state saved by `on_step` lacks nothing of this step, nor
            # of what was told of its epoch.
            if ended is not None:
                on_epoch(ended)
            on_step(report)
        self.finish()

    def _one_step(self, rows: np.ndarray) -> StepReport:
        loss = self._gradient(rows)
        add_prior_gradient(self.groups, len(self.objective.data))
        self.rates.update(self.optimizer, self.step)
        lr = float(self.rates.at(self.step).mean())
        self.step += 1
        share = rows.shape[1] / len(self.objective.data)
        self.losses += loss.cpu() * share
        accuracy = self.objective.accuracy
        if accuracy is not None:
            self.accuracies += accuracy.cpu() * share
        examples = loss.numel() * rows.shape[1]
        return StepReport("map", self.step, self.total, loss, accuracy, lr, examples)

    def _gradient(self, rows: np.ndarray) -> Tensor:
        """The loss (M,) of a batch, its gradient left in place.

        Where a chain is lost on it, the others see it again, with the same dropout.
        """
        model = self.objective.model
        while True:
            states = save_states(self.dropout or ())
            model.lora_dropout(self.dropout)
            try:
                return self.objective.closure(rows)()
            except Diverged as error:
                restore_states(self.dropout or (), states)
                rows = rows[self.lose(error)]
            finally:
                model.lora_dropout(None)

    def keep(self, kept: list[int]) -> None:
        """Go on with these chains alone; the model has been cut to them already."""
        for state in self.optimizer.state.values():
            state |= {k: v[kept] for k, v in state.items() if v.ndim}
        self.order.keep(kept)
        self.rows = None if self.rows is None else self.rows[kept]
        self.losses, self.accuracies = self.losses[kept], self.accuracies[kept]
        self.rates.keep(kept)
        self.kept.keep(kept)
        if self.dropout is not None:
            self.dropout = [self.dropout[m] for m in kept]

    def _end_epoch(self, epoch: int) -> EpochReport:
        loss, accuracy = None, None
        trained = None if self.objective.accuracy is None else self.accuracies.clone()
        lr = self.rates.at(self.step - 1)
        if self.validation is not None:
            loss, accuracy = self.objective.score(self.validation)
            if self.early_stopping or self.both:
                self.kept.epoch_ended(epoch, loss, self._tensors())
            self.rates.epoch_ended(loss.tolist())
        return EpochReport(epoch, self.losses.clone(), loss, accuracy, trained, lr, self.step)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self.objective.model.chain_parameters())
        if self.objective.log_noise is not None:
            tensors["log_noise"] = self.objective.log_noise
        return tensors

    def _out_of_patience(self) -> bool:
        epochs, steps_into = divmod(self.step, self.order.batches_per_epoch)
        return steps_into == 0 and self.kept.out_of_patience(epochs)

    @torch.no_grad()
    def finish(self) -> None:
        """Put every chain's fit that counts into the model; refit the noise scales held out."""
        self.objective.model.zero_grad(set_to_none=True)
        if (log_noise := self.objective.log_noise) is not None:
            log_noise.requires_grad_(False).grad = None
        self.kept.close(self._tensors())
        per_epoch = self.order.batches_per_epoch
        kind: FitKind = "last" if self.early_stopping else "early_stopped"
        if self.both and (other := self.kept.fits(kind, per_epoch)) is not None:
            self._place(other)
            tensors = {name: t.detach().clone() for name, t in self._tensors().items()}
            self.other = Fits(kind, tensors, other.steps)
        self._place(self.kept.fits(self.kind, per_epoch))

    def _place(self, fits: Fits | None) -> None:
        """Fits into the model (None: what it has) with noise scales of the held-out residuals."""
        for name, tensor in self._tensors().items():
            if fits is not None:
                tensor.copy_(fits.tensors[name])
        log_noise = self.objective.log_noise
        if log_noise is not None and self.validation is not None:
            means = torch.from_numpy(predict_logits(self.objective.model, self.validation))[..., 0]
            residual = (means - self.validation.labels).double()
            log_noise.copy_(residual.square().mean(1).sqrt().log())

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on but the model's own tensors."""
        return {
            "step": self.step,
            "rows": None if self.rows is None else torch.from_numpy(self.rows),
            "losses": self.losses.clone(),
            "accuracies": self.accuracies.clone(),
            "rates": self.rates.state_dict(),
            "kept": self.kept.state_dict(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.step = state["step"]
        self.rows = None if state["rows"] is None else state["rows"].numpy()
        self.losses = state["losses"].clone()
        self.accuracies = state["accuracies"].clone()
        self.rates.load_state_dict(state["rates"])
        self.kept.load_state_dict(state["kept"], self.objective.model.device)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


@torch.no_grad()
def add_prior_gradient(groups: list[PriorGroup], num_examples: int) -> None:
    """∇L → ∇(U/N) = ∇L + θ/(Nσ²), in place."""
    for group in groups:
        for tensor in group.tensors:
            if tensor.grad is not None:
                precision = 1.0 / (num_examples * group.std**2)
                if isinstance(precision, Tensor):
                    own = precision.view(-1, *[1] * (tensor.ndim - 1))
                    tensor.grad.addcmul_(tensor, own.to(tensor.dtype))
                else:
                    tensor.grad.add_(tensor, alpha=precision)
