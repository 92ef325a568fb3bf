"""The fits that a warm start keeps: the best and the last, and what each costs to hold.

Shapes: M chains.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora.kept_fits import KeptFits

LOSSES = [[0.9, 0.5], [0.8, 0.6], [0.7, 0.7], [0.9, 0.1]]
PER_EPOCH = 3


def tensors(epoch: int) -> dict[str, Tensor]:
    """(M, 2) and (M,), which say of which epoch they are."""
    return {"a": torch.full((2, 2), float(epoch)), "log_noise": torch.full((2,), float(epoch))}


def fed(patience: int | None, last: bool, epochs: int = len(LOSSES)) -> KeptFits:
    kept = KeptFits(2, patience, last)
    for epoch in range(epochs):
        kept.epoch_ended(epoch, torch.tensor(LOSSES[epoch]).double(), tensors(epoch))
    return kept


def epochs_of(kept: KeptFits, kind: Any) -> list[float]:
    fits = kept.fits(kind, PER_EPOCH)
    assert fits is not None
    assert fits.kind == kind
    assert fits.tensors["a"].tolist() == [[e, e] for e in fits.tensors["log_noise"].tolist()]
    assert fits.steps == [(e + 1) * PER_EPOCH for e in fits.tensors["log_noise"].tolist()]
    return fits.tensors["log_noise"].tolist()


def test_without_patience_every_chain_goes_to_the_end() -> None:
    kept = fed(None, last=True)
    assert kept.last == {}, "until the end the model has it"
    kept.close(tensors(3))
    assert epochs_of(kept, "early_stopped") == [2, 3]
    assert epochs_of(kept, "last") == [3, 3]
    kept.close(tensors(9))
    assert epochs_of(kept, "last") == [3, 3], "what is held stays"
    assert not kept.out_of_patience(4)


def test_a_chain_out_of_patience_has_ended_whoever_goes_on() -> None:
    """Chain 1 ends after epoch 2; its lower loss of epoch 3 comes too late."""
    kept = fed(2, last=True)
    kept.close(tensors(3))
    assert epochs_of(kept, "early_stopped") == [2, 0]
    assert epochs_of(kept, "last") == [3, 2]
    assert [fed(2, True, n).out_of_patience(n) for n in range(5)] == [False] * 5
    assert fed(1, True, 4).out_of_patience(4)


def test_the_last_fits_are_held_only_if_asked_for() -> None:
    for patience in (None, 1):
        kept = fed(patience, last=False)
        kept.close(tensors(3))
        assert kept.last == {}
        assert kept.fits("last", PER_EPOCH) is None


def test_no_epoch_leaves_no_fits() -> None:
    kept = KeptFits(2, None, True)
    kept.close(tensors(0))
    assert kept.fits("last", PER_EPOCH) is None
    assert kept.fits("early_stopped", PER_EPOCH) is None
    assert not kept.out_of_patience(0)


def test_what_is_held_is_not_what_the_model_goes_on_with() -> None:
    kept, now = KeptFits(2, 1, True), tensors(0)
    kept.epoch_ended(0, torch.zeros(2).double(), now)
    state = kept.state_dict()
    for tensor in now.values():
        tensor.fill_(7)
    assert epochs_of(kept, "last") == epochs_of(kept, "early_stopped") == [0, 0]
    kept.epoch_ended(1, -torch.ones(2).double(), tensors(1))
    again = KeptFits(2, 1, True)
    again.load_state_dict(state, "cpu")
    assert epochs_of(again, "last") == epochs_of(again, "early_stopped") == [0, 0]


def test_some_chains_go_on_alone() -> None:
    kept = fed(2, last=True)
    kept.keep([1])
    fits = kept.fits("last", PER_EPOCH)
    assert fits is not None
    assert (fits.steps, fits.tensors["a"].tolist()) == ([9], [[2, 2]])
    assert kept.best_loss.tolist() == pytest.approx([0.5])
    assert kept.best_epoch.tolist() == [0]
