"""The control variate: unbiased, without variance at its anchor, and invisible elsewhere.

Shapes: M chains, N examples, batches of B.
"""

import io
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import ControlVariate
from bayesian_lora.samplers.base import Closure

from .toys import CROSS, SAM, SAMPLERS, Toy, generator, make

EXAMPLES, BATCH = 6, 2
BATCHES = list(combinations(range(EXAMPLES), BATCH))  # all, each as likely


class Regression(Toy):
    """Chains with a smooth non-linear loss over a fixed training set."""

    def loss_of(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Mean over the examples of the given rows, of one chain's tensors."""
        a, b, c = tensors
        x = torch.randn(EXAMPLES, 12, generator=generator(0), dtype=torch.float64)
        x = x.to(a.dtype)[list(rows)]
        return ((x @ a.flatten()).tanh() * c.sum() + x[:, :5] @ b).cos().mean()

    def batch_closure(self, rows: Sequence[int]) -> Closure:
        def closure() -> Tensor:
            self.calls += 1
            for p in self.params:
                p.grad = None
            places = range(len(self.chains))
            loss = torch.stack([self.loss_of([p[i] for p in self.params], rows) for i in places])
            loss.sum().backward()
            return loss.detach()

        return closure

    def gradient(self, closure: Closure) -> Tensor:
        """Flat (M, d)."""
        closure()
        return torch.cat([p.grad.flatten(1) for p in self.params if p.grad is not None], dim=1)

    def displace(self, size: float) -> None:
        rng = generator(1)
        with torch.no_grad():
            for p in self.params:
                p.add_(size * torch.randn(p.shape, generator=rng, dtype=p.dtype))

    @property
    def full(self) -> Closure:
        return self.batch_closure(range(EXAMPLES))


def made(
    chains: Sequence[int] = (0, 1, 2), kind: type[ControlVariate] = ControlVariate
) -> tuple[Regression, ControlVariate]:
    toy = Regression(chains)
    control = kind(toy.params, toy.full)
    toy.calls = 0
    return toy, control


class NoFullGradient(ControlVariate):
    """g_B(θ) − g_B(θ*): biased."""

    def _correct(self, batch: Closure) -> list[Tensor]:
        right = zip(super()._correct(batch), self.full_gradient, strict=True)
        return [correction - full for correction, full in right]


class NoCorrection(ControlVariate):
    """g_B(θ): unbiased, but all the variance is left."""

    def _correct(self, batch: Closure) -> list[Tensor]:
        return [torch.zeros_like(p) for p in self.params]


def gradients(toy: Regression, control: ControlVariate) -> Tensor:
    """Of all batches, (batches, M, d)."""
    closures = [control.closure(toy.batch_closure(rows)) for rows in BATCHES]
    return torch.stack([toy.gradient(closure) for closure in closures])


def bias(toy: Regression, control: ControlVariate) -> float:
    """Largest gap of the mean over all batches to the full gradient."""
    full = toy.gradient(toy.full)
    return (gradients(toy, control).mean(0) - full).abs().max().item()


def test_it_is_unbiased_at_the_anchor_and_away_from_it():
    toy, control = made()
    broken, wrong = made(kind=NoFullGradient)
    for size in (0.0, 0.3, 1.0):
        toy.displace(size)
        broken.displace(size)
        assert bias(toy, control) < 1e-14
        assert bias(broken, wrong) > 1e-2


def test_it_has_no_variance_at_the_anchor_and_little_near_it():
    """Zero to rounding at θ*, near it like the square of the distance; without it, always much."""
    toy, control = made()
    plain = gradients(*made(kind=NoCorrection)).var(0)
    assert plain.max() > 1e-3
    assert gradients(toy, control).var(0).max() < 1e-30
    variances = []
    for _ in range(2):
        toy.displace(1e-3)  # the same displacement twice: distances 1 and 2
        variances.append(gradients(toy, control).var(0).sum())
    assert variances[0] < 1e-4 * plain.sum()
    assert variances[1] / variances[0] == pytest.approx(4.0, rel=0.05)


def test_theta_and_value_are_as_before():
    """float32, where θ* + (θ − θ*) is not θ; the value is the batch's at θ."""
    toy = Regression(dtype=torch.float32)
    control = ControlVariate(toy.params, toy.full)
    toy.displace(0.7)
    before = [p.detach().clone() for p in toy.params]
    batch = toy.batch_closure(BATCHES[3])
    assert torch.equal(control.closure(batch)(), batch())
    assert all(torch.equal(p, b) for p, b in zip(toy.params, before, strict=True))
    assert all(p.requires_grad and p.is_leaf for p in toy.params)


class Broken(Exception):
    pass


def test_theta_and_gradients_are_restored_if_the_call_at_the_anchor_raises():
    toy, control = made()
    toy.displace(0.5)
    before = [p.detach().clone() for p in toy.params]
    batch = toy.batch_closure(BATCHES[0])
    batch()
    plain = [p.grad.clone() for p in toy.params if p.grad is not None]
    toy.calls = 0

    def closure() -> Tensor:
        if toy.calls:
            raise Broken
        return batch()

    with pytest.raises(Broken):
        control.closure(closure)()
    assert all(torch.equal(p, b) for p, b in zip(toy.params, before, strict=True))
    grads = [p.grad for p in toy.params if p.grad is not None]
    assert all(torch.equal(g, b) for g, b in zip(grads, plain, strict=True))


def step_through(
    name: str, toy: Regression, wrap: Callable[[Sequence[int]], Closure], steps: int = 8
) -> None:
    sampler = make(name, toy)
    for step in range(steps):
        sampler.step(wrap(BATCHES[5 * step % len(BATCHES)]))


def wrapped(toy: Regression, control: ControlVariate) -> Callable[[Sequence[int]], Closure]:
    return lambda rows: control.closure(toy.batch_closure(rows))


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_costs_one_more_call_a_batch(name: str):
    toy, control = made()
    step_through(name, toy, wrapped(toy, control), steps=1)
    assert toy.calls == (3 if name in SAM else 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_works_with_it(name: str):
    """As with a closure that writes g_B(θ) − g_B(θ*) + g(θ*) out, θ* in chains of its own."""
    toy, control = made()
    step_through(name, toy, wrapped(toy, control))

    twin, anchor = Regression(), Regression()
    full = anchor.gradient(anchor.full)

    def by_hand(rows: Sequence[int]) -> Closure:
        def closure() -> Tensor:
            there = anchor.gradient(anchor.batch_closure(rows))
            loss = twin.batch_closure(rows)()
            for p, piece in zip(twin.params, (full - there).split([12, 5, 6], 1), strict=True):
                assert p.grad is not None
                p.grad += piece.reshape(p.shape)
            return loss

        closure.plain = twin.batch_closure(rows)  # type: ignore[attr-defined]  # SAM's ascent
        return closure

    step_through(name, twin, by_hand)
    for ours, theirs in zip(toy.params, twin.params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != CROSS])
def test_chains_stay_independent(name: str):
    toy, control = made()
    step_through(name, toy, wrapped(toy, control), steps=50)
    alone, own = made([1])
    step_through(name, alone, wrapped(alone, own), steps=50)
    for ours, whole in zip(alone.params, toy.params, strict=True):
        torch.testing.assert_close(ours[0], whole[1], rtol=0, atol=1e-10)


def test_its_state_brings_the_anchor_back():
    """Made anew elsewhere and loaded, it gives the gradients of the first, to the last bit."""
    toy, control = made()
    file = io.BytesIO()
    torch.save(control.state_dict(), file)
    toy.displace(0.4)
    later = ControlVariate(toy.params, toy.full)
    file.seek(0)
    assert not torch.equal(gradients(toy, later), gradients(toy, control))
    later.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(gradients(toy, later), gradients(toy, control))
    saved = control.state_dict()
    saved["anchor"][0].zero_()
    assert control.anchor[0].abs().min() > 0  # a copy


def test_a_parameter_that_the_loss_ignores_is_an_error():
    used, ignored = torch.ones(1, 2, requires_grad=True), torch.ones(1, 3, requires_grad=True)

    def full() -> Tensor:
        loss = used.square().sum(1)
        loss.sum().backward()
        return loss.detach()

    with pytest.raises(ValueError, match="no gradient: sample only those that the loss uses"):
        ControlVariate([used, ignored], full)


def test_it_turns_gradients_on():
    """Made and used within ``torch.no_grad``, as a loop of predictions might."""
    toy = Regression()
    with torch.no_grad():
        control = ControlVariate(toy.params, toy.full)
        make("sgld", toy).step(control.closure(toy.batch_closure(BATCHES[0])))
