"""SAM-SGLD: its rule, where its prior and its norms are, and that it puts θ back."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import SAMSGLD

from .toys import (
    LAMBD,
    RHO,
    SAM,
    SETTINGS,
    H,
    Hand,
    N,
    Toy,
    assert_follows,
    closure_of,
    generator,
    make,
    perturbed,
)


def rule(c: Hand, per_tensor: bool = False, prior_moves: bool = False) -> None:
    """θ ← θ − h(∇L_B(θ + e) + θ/(Nσ²)) + s z."""
    there = perturbed(c, per_tensor)
    g, z = c.drift(there), c.z()
    for i, p in enumerate(c.theta):
        extra = (there[i] - p) / (N * c.sigma[i] ** 2) if prior_moves else 0.0
        c.theta[i] = p - c.h[i] * (g[i] + extra) + c.s[i] * z[i]


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_follows_its_rule(setting: str):
    assert_follows("sam_sgld", rule, setting)


@pytest.mark.parametrize("wrong", [{"per_tensor": True}, {"prior_moves": True}])
def test_a_wrong_norm_or_prior_is_seen(wrong: dict[str, bool]):
    with pytest.raises(AssertionError, match="step 0"):
        assert_follows("sam_sgld", lambda c: rule(c, **wrong), "chains")


@pytest.mark.parametrize("name", SAM)
def test_two_calls_of_the_same_batch_and_the_loss_is_that_at_theta(name: str):
    toy = Toy()
    sampler = make(name, toy, prior_std=math.inf)
    places, losses = [], []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        places.append(torch.cat([p.detach().flatten(1) for p in toy.params], dim=1))
        losses.append(toy.closure())
        return losses[-1]

    with torch.no_grad():
        value = sampler.step(closure)
    assert len(places) == 2
    assert torch.equal(value, losses[0])
    away = torch.linalg.vector_norm(places[1] - places[0], dim=1)
    torch.testing.assert_close(away, torch.full((3,), RHO, dtype=torch.float64))
    torch.testing.assert_close(sampler.stats["perturbation_norm"], away)


class Broken(Exception):
    """Raised by a closure."""


@pytest.mark.parametrize("fails", [1, 2])
@pytest.mark.parametrize("name", SAM)
def test_theta_is_restored_to_the_last_bit_even_if_a_call_raises(name: str, fails: int):
    """float32, where θ + e − e is not θ; noise and memory are untouched as well."""
    toy = Toy(dtype=torch.float32)
    sampler = make(name, toy)
    before = [p.detach().clone() for p in toy.params]
    states = sampler.state_dict()["generators"]

    def closure() -> Tensor:
        loss = toy.closure()
        if toy.calls == fails:
            raise Broken
        return loss

    with pytest.raises(Broken):
        sampler.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(toy.params, before, strict=True))
    now = sampler.state_dict()
    assert now["memory"] == {"step": 0}
    assert all(torch.equal(a, b) for a, b in zip(now["generators"], states, strict=True))


@pytest.mark.parametrize("prior_std", [0.7, math.inf])
def test_at_zero_temperature_it_is_sharpness_aware_descent(prior_std: float):
    """To the last bit: the gradient at θ + e, torch's SGD from θ; with ρ = 0 it is SGD's own."""
    for rho in (RHO, 0.0):
        toy, twin = Toy(), Toy()
        sampler = make("sam_sgld", toy, rho=rho, temperature=0.0, prior_std=prior_std)
        sgd = torch.optim.SGD(twin.params, lr=H, weight_decay=1 / (N * prior_std**2))
        for _ in range(10):
            toy.advance(sampler, 1)
            twin.closure()
            if rho:
                _second_gradient(twin)
            sgd.step()
            twin.batch += 1
            assert all(torch.equal(p, q) for p, q in zip(toy.params, twin.params, strict=True))


def _second_gradient(toy: Toy) -> None:
    here = [p.detach().clone() for p in toy.params]
    g = torch.cat([p.grad.flatten(1) for p in toy.params if p.grad is not None], dim=1)
    e = RHO * g / (torch.linalg.vector_norm(g, dim=1, keepdim=True) + LAMBD)
    with torch.no_grad():
        for p, piece in zip(toy.params, e.split([12, 5, 6], dim=1), strict=True):
            p.add_(piece.reshape(p.shape))
    toy.closure()
    with torch.no_grad():
        for p, value in zip(toy.params, here, strict=True):
            p.copy_(value)


def test_a_zero_gradient_is_no_division_by_zero():
    theta = torch.ones(2, 3, requires_grad=True)
    sampler = SAMSGLD(
        [theta], step_size=0.1, num_examples=10, temperature=0.0, prior_std=1.0, chain_dim=0
    )
    sampler.step(closure_of(theta, lambda x: 0.0 * x.sum(1)))
    torch.testing.assert_close(theta.detach(), torch.full((2, 3), 1 - 0.1 / 10))
    assert sampler.stats["perturbation_norm"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("share", "bounded"), [(0.99, True), (1.01, False)])
def test_its_stability_limit(share: float, bounded: bool):
    """Full batch, T = 0, curvature 1, ρ small: about θ = 0 the perturbation leaves ±hρ."""
    theta = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"temperature": 0.0, "rho": 1e-3, "chain_dim": 0}
    sampler = SAMSGLD([theta], step_size=1.0, num_examples=10, **options)
    assert sampler.stability == 2.0
    sampler.param_groups[0]["lr"] = share * sampler.stability
    for _ in range(2000):
        sampler.step(closure_of(theta, lambda x: 0.5 * x.square().sum(1)))
    assert (theta.abs().max() <= 1) == bounded


def test_effective_temperature_is_that_of_its_own_gradients():
    """ρ = 0 and no curvature: T + N h v/2 (Monte Carlo error .7 % of the heat)."""
    chains, v, rng = 4000, 0.49, generator(0)
    theta = torch.zeros(chains, 1, requires_grad=True)
    sampler = SAMSGLD([theta], step_size=0.2, num_examples=10, rho=0.0, generators=rng, chain_dim=0)

    def closure() -> Tensor:
        theta.grad = math.sqrt(v) * torch.randn(chains, 1, generator=rng)
        return torch.zeros(chains)

    sampler.watch(torch.ones(chains, 1))
    for _ in range(13):
        sampler.step(closure)
    assert sampler.stats["t_eff"].mean().item() == pytest.approx(1 + 0.2 * 10 * v / 2, rel=0.01)


def test_what_it_says_of_its_target():
    assert make("sam_sgld", Toy()).exactness == "m-sharpness posterior"
    assert "E_B" in make("sam_sgld", Toy()).law
    full = make("sam_sgld", Toy(), full_batch=True)
    assert full.exactness == "flat posterior"
    assert full.law.startswith("potential N(L + ρ‖∇L‖) + prior")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, r"rho=-0.1: must be .*≥ 0"),
        ({"rho": math.nan}, "rho=nan"),
        ({"rho": math.inf}, "rho=inf"),
        ({"lambd": 0.0}, "lambd=0.0: must be > 0"),
        ({"lambd": math.nan}, "lambd=nan"),
    ],
)
@pytest.mark.parametrize("name", SAM)
def test_bad_arguments(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(name, Toy(), **options)
