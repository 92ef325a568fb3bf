"""The MAP fit: its gradient, its schedule, early stopping, chains alone; in float64.

Shapes: M chains, N training examples.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.objective import Objective
from bayesian_lora.posterior import PriorGroup, energy
from bayesian_lora.samplers.failures import Diverged

from .fits import PER_EPOCH, N, SetUp, assert_close, script_scores, set_up_in


@pytest.fixture
def set_up(tiny_models: dict[str, Path]) -> SetUp:
    return set_up_in(tiny_models["bert"])


@pytest.mark.parametrize("regression", [False, True])
def test_adamw_gets_the_gradient_of_the_energy_over_n(regression: bool, set_up: SetUp):
    """One batch of all N, dropout off: ∇(U/N), U from `posterior.energy`."""
    fit = set_up([0, 1], regression=regression, dropout=None, batch_size=N, epochs=1)
    warm, model = fit.warm, fit.warm.objective.model
    with torch.no_grad():
        for p in model.chain_parameters().values():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    parameters = [t for group in warm.groups for t in group.tensors]
    log_noise = warm.objective.log_noise
    if log_noise is not None:
        parameters.append(log_noise)

    def whole_loss() -> Tensor:
        values = []
        for i in range(N):
            batch = warm.objective.data.batch(np.array([i]))
            outputs = model(**batch.inputs)[:, 0]
            if log_noise is None:
                law: Any = torch.distributions.Categorical(logits=outputs)
            else:
                law = torch.distributions.Normal(outputs[:, 0], log_noise.exp())
            values.append(-law.log_prob(batch.labels))
        return torch.stack(values).mean(0)

    expected = torch.autograd.grad((energy(whole_loss(), N, warm.groups) / N).sum(), parameters)
    given: list[Tensor | None] = []
    warm.optimizer.register_step_pre_hook(
        lambda *_: given.extend(None if p.grad is None else p.grad.clone() for p in parameters)
    )
    fit.run()
    for gradient, direct in zip(given, expected, strict=True):
        torch.testing.assert_close(gradient, direct, rtol=0, atol=1e-10)
    assert all(group["weight_decay"] == 0 for group in warm.optimizer.param_groups)


def test_the_energy_falls(set_up: SetUp):
    fit = set_up([0, 1, 2], epochs=8)
    objective, groups = fit.warm.objective, fit.warm.groups

    def now() -> Tensor:
        detached = [PriorGroup(tuple(t.detach() for t in g.tensors), g.std) for g in groups]
        return energy(objective.mean_nll(objective.data), N, detached)

    before = now()
    fit.run()
    assert bool((now() < before - 1).all())
    assert [r.epoch for r in fit.epochs] == list(range(8))


@pytest.mark.parametrize(
    "options", [{}, {"early_stopping": True, "patience": 1}, {"regression": True}]
)
def test_a_chain_is_fitted_as_if_alone(options: dict[str, Any], set_up: SetUp):
    """With dropout on: starts, batches, masks, decisions are all the chain's own."""
    together = set_up([0, 1, 2], epochs=5, **options).run().tensors
    for m in range(3):
        alone = set_up([m], epochs=5, **options).run().tensors
        assert_close(alone, {name: t[m : m + 1] for name, t in together.items()}, 1e-10)


def test_dropout_acts_while_fitting_and_only_then(set_up: SetUp):
    with_dropout, without = set_up([0], epochs=1), set_up([0], epochs=1, dropout=None)
    # Of the first step the loss is the same: B = 0 at the start, so what A sees has no effect.
    losses = [[r.loss.item() for r in fit.run().steps] for fit in (with_dropout, without)]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-12)
    assert abs(losses[0][2] - losses[1][2]) > 1e-6
    layers = with_dropout.warm.objective.model.lora_layers().values()
    assert all(layer.dropout.generators is None for layer in layers)


def test_dropout_is_off_after_a_failure(set_up: SetUp):
    fit = set_up([0, 1])
    model = fit.warm.objective.model
    with torch.no_grad():
        model.chain_parameters()["classifier.bias"][1] = float("inf")
    before = fit.tensors
    with pytest.raises(Diverged, match="chain 1"):
        fit.run()
    assert all(layer.dropout.generators is None for layer in model.lora_layers().values())
    assert_close(fit.tensors, before, 0)


def test_learning_rate_rises_then_falls_linearly(set_up: SetUp):
    fit = set_up([0], epochs=3, lr=0.01, warmup_share=0.3).run()  # 9 steps, 3 of them warm-up
    rising, falling = [1 / 4, 2 / 4, 3 / 4], [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [r.lr for r in fit.steps] == pytest.approx([0.01 * f for f in rising + falling])
    assert fit.warm.optimizer.param_groups[0]["lr"] == fit.steps[-1].lr


def test_reports(set_up: SetUp):
    """Step by step and epoch by epoch; the last, smaller batch weighs less in the mean."""
    fit = set_up([0, 1], epochs=2).run()
    assert [(r.phase, r.step, r.total) for r in fit.steps] == [("map", i + 1, 6) for i in range(6)]
    assert [r.examples for r in fit.steps] == [20, 20, 8] * 2
    for epoch, report in enumerate(fit.epochs):
        parts = fit.steps[epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH]
        weighted = [r.loss * size / N for r, size in zip(parts, (10, 10, 4), strict=True)]
        expected = torch.stack(weighted).sum(0).float()
        torch.testing.assert_close(report.train_loss, expected)
    assert fit.warm.validation is not None
    loss, accuracy = fit.warm.objective.score(fit.warm.validation)
    assert fit.epochs[-1].validation_loss is not None
    assert torch.equal(fit.epochs[-1].validation_loss, loss)
    assert accuracy is not None
    assert fit.epochs[-1].validation_accuracy is not None
    assert torch.equal(fit.epochs[-1].validation_accuracy, accuracy)
    assert set_up([0], epochs=1, validate=False).run().epochs[0].validation_loss is None


def test_every_chain_keeps_its_own_best_epoch(set_up: SetUp, monkeypatch: pytest.MonkeyPatch):
    fit = set_up([0, 1, 2], epochs=4, early_stopping=True)
    losses = [[0.9, 0.5, 0.7], [0.8, 0.6, 0.7], [0.7, 0.6, 0.6], [0.7, 0.4, 0.8]]
    script_scores(fit, losses, monkeypatch)
    ends: list[dict[str, Tensor]] = []
    fit.run(lambda report: ends.append(fit.tensors) if report.step % PER_EPOCH == 0 else None)
    best = [2, 3, 2]  # a tie keeps the earlier
    assert fit.warm.best_epoch.tolist() == best
    for name, tensor in fit.tensors.items():
        for m, epoch in enumerate(best):
            assert torch.equal(tensor[m], ends[epoch][name][m])
            assert not torch.equal(tensor[m], ends[epoch - 1][name][m])


def test_without_early_stopping_the_last_epoch_counts(set_up: SetUp):
    last: list[dict[str, Tensor]] = []
    fit = set_up([0], epochs=2)
    fit.run(lambda _: last.append(fit.tensors))
    assert_close(fit.tensors, last[-1], 0)


@pytest.mark.parametrize("early_stopping", [True, False])
def test_the_other_epochs_fits_are_held_too(
    early_stopping: bool, set_up: SetUp, monkeypatch: pytest.MonkeyPatch
):
    """The last epoch's and each chain's best: the same two, whichever of them counts."""
    fit = set_up([0, 1], epochs=4, early_stopping=early_stopping, both=True)
    script_scores(fit, [[0.9, 0.5], [0.4, 0.6], [0.7, 0.6], [0.7, 0.6]], monkeypatch)
    ends: list[dict[str, Tensor]] = []
    fit.run(lambda report: ends.append(fit.tensors) if report.step % PER_EPOCH == 0 else None)
    best = {n: torch.stack([ends[1][n][0], ends[0][n][1]]) for n in ends[0]}
    other = fit.warm.other
    assert other is not None
    own, held = (best, ends[3]) if early_stopping else (ends[3], best)
    assert_close(fit.tensors, own, 0)
    assert_close(other.tensors, held, 0)
    steps = {"early_stopped": [2 * PER_EPOCH, PER_EPOCH], "last": [4 * PER_EPOCH] * 2}
    assert {other.kind, fit.warm.kind} == set(steps)
    assert other.steps == steps[other.kind]
    assert fit.warm.steps == steps[fit.warm.kind]


def test_there_is_no_other_fit_without_a_held_out_set_or_without_being_asked(set_up: SetUp):
    for options in ({"both": True, "validate": False}, {"early_stopping": True}):
        fit = set_up([0, 1], epochs=2, **options).run()
        assert fit.warm.other is None
        assert not fit.warm.kept.last, "no copy is held that nobody asked for"
    assert fit.warm.steps == ((fit.warm.best_epoch + 1) * PER_EPOCH).tolist()


@pytest.mark.parametrize("options", [{"early_stopping": True, "patience": 1}, {}])
@pytest.mark.parametrize("regression", [False, True])
def test_the_other_fit_of_a_chain_is_that_of_the_chain_alone(
    options: dict[str, Any], regression: bool, set_up: SetUp
):
    """Also the last epoch of a chain that is out of patience while others go on."""
    options = {"both": True, "epochs": 5, "lr": 0.05, "regression": regression, **options}
    together = set_up([0, 1, 2], **options).run().warm.other
    assert together is not None
    for m in range(3):
        alone = set_up([m], **options).run().warm.other
        assert alone is not None
        assert alone.steps == together.steps[m : m + 1]
        assert_close(alone.tensors, {n: t[m : m + 1] for n, t in together.tensors.items()}, 1e-10)


def test_every_fit_has_noise_scales_of_its_own_residuals(set_up: SetUp):
    fit = set_up([0, 1], regression=True, both=True, epochs=4).run()
    objective, validation, other = fit.warm.objective, fit.warm.validation, fit.warm.other
    assert validation is not None
    assert other is not None
    objective.model.load_chains({n: t for n, t in other.tensors.items() if n != "log_noise"})
    expected = rms_residual(objective, validation)
    assert other.tensors["log_noise"].exp().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("early_stopping", [True, False])
def test_a_state_saved_when_all_is_over_has_both_fits(early_stopping: bool, set_up: SetUp):
    """The model's tensors may be the best ones by then: finishing again changes nothing."""
    options: dict[str, Any] = {"both": True, "early_stopping": early_stopping, "lr": 0.05}
    fit = set_up([0, 1], **options).run()
    again = set_up([0, 1], **options)
    with torch.no_grad():
        for name, tensor in again.warm.objective.model.chain_parameters().items():
            tensor.copy_(fit.tensors[name])
    again.warm.load_state_dict(fit.warm.state_dict())
    again.run()
    assert_close(again.tensors, fit.tensors, 0)
    assert again.warm.other is not None
    assert fit.warm.other is not None
    assert_close(again.warm.other.tensors, fit.warm.other.tensors, 0)
    assert again.warm.other.steps == fit.warm.other.steps


def test_patience_ends_the_run_when_no_chain_improves(
    set_up: SetUp, monkeypatch: pytest.MonkeyPatch
):
    fit = set_up([0, 1], epochs=9, early_stopping=True, patience=2)
    losses = [[0.5, 0.9], [0.6, 0.8], [0.7, 0.9], [0.7, 0.9], [0.1, 0.1]]
    script_scores(fit, losses, monkeypatch)
    fit.run()
    assert len(fit.epochs) == 4
    assert fit.warm.best_epoch.tolist() == [0, 1]


def test_a_chain_out_of_patience_is_not_revived_by_others(
    set_up: SetUp, monkeypatch: pytest.MonkeyPatch
):
    """Alone, chain 0 would have stopped after epoch 1."""
    fit = set_up([0, 1], epochs=9, early_stopping=True, patience=1)
    script_scores(fit, [[0.5, 0.9], [0.6, 0.8], [0.1, 0.7], [0.1, 0.8]], monkeypatch)
    fit.run()
    assert len(fit.epochs) == 4
    assert fit.warm.best_epoch.tolist() == [0, 2]


def test_options_that_cannot_act_are_refused(set_up: SetUp):
    with pytest.raises(ValueError, match="validation set"):
        set_up([0], validate=False, early_stopping=True)
    with pytest.raises(ValueError, match="patience=2"):
        set_up([0], patience=2)


def rms_residual(objective: Objective, data: TokenisedSet) -> list[float]:
    with torch.no_grad():
        means = [objective.model(**data.batch(np.array([i])).inputs) for i in range(len(data))]
    residual = torch.cat(means, dim=1)[..., 0] - data.labels
    return residual.square().mean(1).sqrt().tolist()


def test_the_noise_scale_is_fitted_by_gradient(set_up: SetUp):
    """Long enough, it comes to the residuals' root mean square on the training set."""
    fit = set_up([0, 1], regression=True, validate=False, dropout=None, epochs=60, lr=0.05)
    objective = fit.warm.objective
    assert objective.log_noise is not None
    objective.log_noise.data.fill_(2.0)
    fit.run()
    assert objective.noise_std is not None
    assert not objective.log_noise.requires_grad
    assert objective.noise_std.tolist() == pytest.approx(
        rms_residual(objective, objective.data), rel=0.1
    )


def test_the_noise_scale_is_refitted_on_the_held_out_set(set_up: SetUp):
    fit = set_up([0, 1], regression=True).run()
    objective, validation = fit.warm.objective, fit.warm.validation
    assert objective.noise_std is not None
    assert validation is not None
    expected = rms_residual(objective, validation)
    assert objective.noise_std.tolist() == pytest.approx(expected, rel=1e-6)
