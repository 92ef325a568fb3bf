"""Learning rates that each chain's plateaus lower: against torch itself, and chain by chain.

Shapes: M chains.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora.learning_rates import LearningRates

from .fits import PER_EPOCH, SetUp, assert_close, script_scores, set_up_in

STEPS, LR = 5, 0.03
# Falls and stands still for one, two and three epochs; a gain below a ten-thousandth is none.
LOSSES = [
    [1.0, 0.9, 0.9, 0.8, 0.9, 0.79999, 0.79999, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.6],
    [1.0, 1.1, 1.2, 1.3, 1.4, 0.5, 0.6, 0.7, 0.4, 0.3, 0.2, 0.1, 0.1, math.nan],
    [0.5, 0.4, 0.3, 0.2, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01],
]


@pytest.fixture
def set_up(tiny_models: dict[str, Path]) -> SetUp:
    return set_up_in(tiny_models["bert"])


def starts(chains: Sequence[int]) -> list[Tensor]:
    """Two tensors (M, …), of each chain its own values whoever is beside it."""
    made = []
    for shape in ((3, 2), (4,)):
        rows = [
            torch.randn(shape, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
            for m in chains
        ]
        made.append(torch.stack(rows).requires_grad_())
    return made


def gradients(tensors: Sequence[Tensor], step: int) -> None:
    """Of a bowl that moves with the step."""
    for tensor in tensors:
        tensor.grad = (tensor.detach() - math.sin(step)) * 3


def descend(chains: Sequence[int], patience: int, warmup_share: float = 0.0) -> list[Tensor]:
    tensors = starts(chains)
    epochs = len(LOSSES[0])
    optimizer = torch.optim.AdamW(tensors, lr=LR, weight_decay=0.0)
    rates = LearningRates(
        len(chains),
        lr=LR,
        total=STEPS * epochs,
        warmup_share=warmup_share,
        schedule="plateau",
        patience=patience,
    )
    for epoch in range(epochs):
        for i in range(STEPS):
            gradients(tensors, epoch * STEPS + i)
            rates.update(optimizer, epoch * STEPS + i)
        rates.epoch_ended([LOSSES[m][epoch] for m in chains])
    return tensors


def descend_with_torch(chain: int, patience: int) -> tuple[list[Tensor], list[float]]:
    tensors = starts([chain])
    optimizer = torch.optim.Adam(tensors, lr=LR)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience)
    rates = []
    for epoch, loss in enumerate(LOSSES[chain]):
        for i in range(STEPS):
            gradients(tensors, epoch * STEPS + i)
            optimizer.step()
        scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    return tensors, rates


@pytest.mark.parametrize("patience", [0, 1, 2])
@pytest.mark.parametrize("chain", [0, 1, 2])
def test_one_chain_is_torchs_adam_with_its_plateau_scheduler(chain: int, patience: int) -> None:
    expected, lowered = descend_with_torch(chain, patience)
    for tensor, other in zip(descend([chain], patience), expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-13)
    rates = LearningRates(
        1, lr=LR, total=100, warmup_share=0, schedule="plateau", patience=patience
    )
    for loss, lr in zip(LOSSES[chain], lowered, strict=True):
        rates.epoch_ended([loss])
        assert rates.at(7).tolist() == [pytest.approx(lr, rel=1e-12)]
    assert (min(lowered) < LR) == (chain != 2)


@pytest.mark.parametrize("warmup_share", [0.0, 0.4])
def test_a_chain_moves_among_others_exactly_as_alone(warmup_share: float) -> None:
    together = descend([0, 1, 2], 1, warmup_share)
    for m in range(3):
        for tensor, alone in zip(together, descend([m], 1, warmup_share), strict=True):
            assert torch.equal(tensor[m], alone[0])


def test_warm_up_rises_and_then_the_plateaus_alone_count() -> None:
    rates = LearningRates(1, lr=1.0, total=10, warmup_share=0.3, schedule="plateau")
    assert [rates.common(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = LearningRates(1, lr=1.0, total=10, warmup_share=0.3)
    linear.epoch_ended([1.0])
    linear.epoch_ended([2.0])
    linear.epoch_ended([3.0])
    assert linear.at(3).item() == 1
    assert linear.at(9).item() == pytest.approx(1 / 7)


def test_dropped_chains_leave_the_others_rates_as_they_were() -> None:
    def fresh(chains: int) -> LearningRates:
        return LearningRates(chains, lr=1.0, total=10, warmup_share=0, schedule="plateau")

    rates, alone = fresh(3), fresh(1)
    for epoch in range(4):
        rates.epoch_ended([row[epoch] for row in LOSSES])
        alone.epoch_ended([LOSSES[1][epoch]])
    rates.keep([1])
    assert rates.state_dict() == alone.state_dict()
    other = fresh(1)
    other.load_state_dict(rates.state_dict())
    for _ in range(3):
        rates.epoch_ended([2.0])
        other.epoch_ended([2.0])
    assert rates.at(0).item() == other.at(0).item() < 1


PLATEAU: dict[str, Any] = {"schedule": "plateau", "plateau_patience": 0, "warmup_share": 0.0}


def test_the_fit_lowers_a_chains_rate_and_reports_it(
    set_up: SetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = set_up([0, 1], epochs=4, lr=0.02, **PLATEAU)
    script_scores(fit, [[0.5, 0.5], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]], monkeypatch)
    fit.run()
    assert [r.lr.tolist() for r in fit.epochs if r.lr is not None] == [
        [0.02, 0.02],
        [0.02, 0.02],
        [0.01, 0.02],
        [0.005, 0.02],
    ]
    assert [r.step for r in fit.epochs] == [PER_EPOCH * e for e in (1, 2, 3, 4)]
    means = [0.02, 0.02, 0.015, 0.0125]
    assert [r.lr for r in fit.steps[::PER_EPOCH]] == pytest.approx(means)


def test_a_fitted_chain_does_not_depend_on_the_others(set_up: SetUp) -> None:
    """At a rate so high that plateaus are certain, and at different times."""
    options = {**PLATEAU, "epochs": 6, "lr": 0.3, "early_stopping": True}
    fits = {numbers: set_up(list(numbers), **options).run() for numbers in ((0, 1), (0,), (1,))}
    scales = fits[0, 1].warm.rates.scales
    assert min(scales) < 1
    for m in (0, 1):
        alone, beside = fits[m,].tensors, fits[0, 1].tensors
        assert fits[m,].warm.rates.scales == [scales[m]]
        assert_close(alone, {name: t[m : m + 1] for name, t in beside.items()}, 1e-8)


def test_training_accuracy_is_the_batches_weighted_by_their_size(set_up: SetUp) -> None:
    fit = set_up([0, 1], epochs=2).run()
    for epoch, report in enumerate(fit.epochs):
        parts = fit.steps[epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH]
        known = [(r.accuracy, r.examples) for r in parts if r.accuracy is not None]
        expected = torch.stack([a * n for a, n in known]).sum(0) / sum(n for _, n in known)
        assert report.train_accuracy is not None
        torch.testing.assert_close(report.train_accuracy, expected.float())
    assert set_up([0], epochs=1, regression=True).run().epochs[0].train_accuracy is None


class Stopped(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("step", [1, PER_EPOCH, 2 * PER_EPOCH, 2 * PER_EPOCH + 2])
def test_a_fit_stopped_anywhere_goes_on_to_the_same_bits(step: int, set_up: SetUp) -> None:
    options = {**PLATEAU, "epochs": 4, "lr": 0.3, "early_stopping": True, "patience": 3}
    whole = set_up([0, 1], **options).run()
    first = set_up([0, 1], **options)

    def stop(report: Any) -> None:
        if report.step == step:
            raise Stopped

    with pytest.raises(Stopped):
        first.run(stop)
    second = set_up([0, 1], **options)
    own = second.warm.objective.model.chain_parameters()
    with torch.no_grad():
        for name, tensor in first.tensors.items():
            own[name].copy_(tensor)
    warm, other = second.warm, first.warm
    warm.load_state_dict(other.state_dict())
    pairs = zip(warm.order.generators, other.order.generators, strict=True)
    for mine, theirs in [*pairs, *zip(warm.dropout or (), other.dropout or (), strict=True)]:
        mine.set_state(theirs.get_state())
    second.run()
    assert_close(second.tensors, whole.tensors, 0)
    assert second.warm.rates.state_dict() == whole.warm.rates.state_dict()
    told = [*first.epochs, *second.epochs]
    for report, expected in zip(told, whole.epochs, strict=True):
        assert report.train_accuracy is not None
        assert expected.train_accuracy is not None
        assert torch.equal(report.train_accuracy, expected.train_accuracy)


def test_a_plateau_needs_held_out_data(set_up: SetUp) -> None:
    with pytest.raises(ValueError, match="schedule='plateau' needs a validation set"):
        set_up([0], validate=False, schedule="plateau")
