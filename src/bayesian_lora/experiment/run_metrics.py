"""A run's `metrics.csv`, under the names of Lightning's loggers: epochs, then the evaluation.

Shapes: M chains.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bayesian_lora.config import MAP
from bayesian_lora.experiment.setup import Setup
from bayesian_lora.utils.metrics_log import MetricsLog, Value
from bayesian_lora.warm_start import EpochReport

EPOCH = ("epoch", "trainer/global_step", "lr-Adam", "train/loss", "train/acc")
OWN = ("mcc", "f1", "pearson", "spearman")
"""Metrics of single tasks that are logged beside loss and accuracy."""


def split_names(splits: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What stands before and behind a figure's name, by split: ``val/loss`` of a task's only one,
    ``val_matched/loss/dataloader_idx_0`` of the first of several.
    """
    if len(splits) == 1:
        return {splits[0]: ("val/", "")}
    return {split: (f"val_{split}/", f"/dataloader_idx_{i}") for i, split in enumerate(splits)}


class RunMetrics:
    """Epochs of the warm start and the final evaluation → `metrics.csv` and the tracker.

    ``val/…`` of an epoch is on what is held out of train (``set`` says ``held out``): a row for the
    mean of the chains, and where there are several one for each. The last row has the figures of
    the evaluated splits.

    Args:
        setup: of the run; its config names the tracker.
        folder: of the run.
        position: of an earlier `metrics.csv` to go on with; 0 begins anew.
    """

    def __init__(self, setup: Setup, folder: Path, position: int = 0) -> None:
        task = setup.task
        own = [name for name in OWN if name in task.metrics]
        self.splits = evaluated_splits(setup)
        self.own, self.step = ("loss", "acc", *own), 0
        last = [
            f"{before}{name}{behind}"
            for before, behind in split_names(self.splits).values()
            for name in self.own
        ]
        columns = ["set", "chain", *EPOCH, "val/loss", "val/acc", *last]
        self.log = MetricsLog(
            folder,
            list(dict.fromkeys(columns)),
            setup.config.track,
            folder.name,
            dataclasses.asdict(setup.config),  # type: ignore[call-overload]
            position,
        )

    def epoch(self, report: EpochReport, alive: Sequence[int]) -> None:
        """An epoch has ended; `alive` are the numbers of the chains (M,)."""
        figures = {
            "lr-Adam": report.lr,
            "train/loss": report.train_loss,
            "train/acc": report.train_accuracy,
            "val/loss": report.validation_loss,
            "val/acc": report.validation_accuracy,
        }
        known: dict[str, Tensor] = {name: x for name, x in figures.items() if x is not None}
        chains = len(report.train_loss)
        head: dict[str, Value] = {
            "set": "" if report.validation_loss is None else "held out",
            "epoch": report.epoch,
            "trainer/global_step": report.step,
        }
        means = {name: float(x.double().mean()) for name, x in known.items()}
        self.log.log({**head, "chain": "mean", **means})
        for m in range(chains) if chains > 1 else ():
            one = {name: float(x[m]) for name, x in known.items()}
            self.log.log({**head, "chain": alive[m], **one}, tracked=False)

    def evaluated(self, by_split: Mapping[str, dict[str, Any]]) -> None:
        """The run has been evaluated: `metrics.json` of each split."""
        row: dict[str, Value] = {"set": ", ".join(by_split), "chain": "ensemble"}
        for split, (before, behind) in split_names(self.splits).items():
            figures = by_split[split]["ensemble"]
            values = {"loss": figures["nll"], "acc": figures.get("accuracy"), **figures}
            row |= {f"{before}{name}{behind}": values.get(name) for name in self.own}
        self.log.log(row)

    @property
    def position(self) -> int:
        """Bytes of `metrics.csv`, for a checkpoint."""
        return self.log.position

    def close(self) -> None:
        """Let the tracker send what it has."""
        self.log.close()


def evaluated_splits(setup: Setup) -> list[str]:
    """What a run is evaluated on at its end: the default split, and where there are few members,
    because nothing was sampled, the task's other validation splits too (MNLI's mismatched).
    """
    usual = setup.task.default_split
    if setup.config.sampler.name != MAP:
        return [usual]
    splits = setup.task.splits.items()
    return [usual, *(n for n, hub in splits if hub.startswith("validation") and n != usual)]
