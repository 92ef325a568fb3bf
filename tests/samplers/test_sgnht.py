"""SGNHT: its rule, its thermostat, its refusal of steps that are too large."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import SGNHT
from bayesian_lora.samplers.failures import Diverged

from .toys import SETTINGS, Hand, N, Toy, assert_follows, generator, make

F, RATE = 0.3, 0.05


def rule(c: Hand, factor: Callable[[float], float] = lambda xi: (2 - xi) / 2) -> None:
    """v ← (1−ξ)v − hg + √(2fhT/N) z, θ ← θ + v, ξ ← ξ + γ[mean(v²/(hT/N))·(2−ξ)/2 − 1]."""
    g, z, v = c.drift(), c.z(), c.kept("v")
    xi = c.memory.setdefault("xi", [torch.tensor(F, dtype=torch.float64)])[0].item()
    energy = 0.0
    for i, p in enumerate(c.theta):
        noise = math.sqrt(2 * F * c.h[i] * c.t[i] / N) * z[i]
        v[i] = (1 - xi) * v[i] - c.h[i] * g[i] + noise
        c.theta[i] = p + v[i]
        energy += float(v[i].square().sum()) / (c.h[i] * c.t[i] / N)
    d = sum(p.numel() for p in c.theta)
    c.memory["xi"][0] += RATE * (energy / d * factor(xi) - 1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_follows_its_rule(setting: str):
    assert_follows("sgnht", rule, setting)


def test_the_finite_step_factor_is_in_the_thermostat():
    with pytest.raises(AssertionError):
        assert_follows("sgnht", lambda c: rule(c, factor=lambda xi: 1.0), "chains")


def test_every_chain_has_its_own_friction():
    toy = Toy()
    sampler = make("sgnht", toy)
    toy.advance(sampler, 4)
    xi = sampler.stats["friction"]
    assert xi.shape == (3,)
    assert torch.equal(xi, sampler.memory["xi"][:, 0])
    assert len(set(xi.tolist())) == 3


def heated(sd: float, steps: int, rate: float = 0.01, **options: Any) -> tuple[SGNHT, Tensor]:
    """Chains of 50 coordinates on curvature 1 with gradient noise of known standard deviation."""
    rng = generator(2)
    theta = torch.zeros(400, 50, dtype=torch.float64, requires_grad=True)
    common = {"step_size": 0.02, "num_examples": 10, "friction": 0.2, "thermostat_rate": rate}
    sampler = SGNHT([theta], **{**common, **options}, generators=rng, chain_dim=0)

    def closure() -> Tensor:
        noise = sd * torch.randn(theta.shape, generator=rng, dtype=torch.float64)
        theta.grad = theta.detach() + noise
        return torch.zeros(400)

    for step in range(steps):
        if step == steps - 12:
            sampler.watch(torch.nn.functional.normalize(torch.ones_like(theta), dim=1).detach())
        sampler.step(closure)
    return sampler, theta.detach()


def test_the_friction_rises_by_the_heat_and_t_eff_is_one():
    """Isotropic v = sd²: ξ → f + N h v/(2T) at leading order, T_eff = (fT + N h v/2)/ξ → T."""
    sampler, theta = heated(1.0, 1500)
    heat = 0.5 * 10 * 0.02 * 1.0
    assert sampler.stats["friction"].mean().item() == pytest.approx(0.2 + heat, rel=0.03)
    assert sampler.stats["t_eff"].mean().item() == pytest.approx(1.0, rel=0.03)
    assert theta.var().item() == pytest.approx(1 / 10, rel=0.04)  # error of 20,000 values 1 %


def test_it_refuses_gradients_that_are_too_noisy():
    with pytest.raises(Diverged, match=r"friction reached .* \(limit 1.9\): gradients are too noi"):
        heated(10.0, 3000)


def test_it_refuses_gradients_that_are_not_numbers():
    theta = torch.zeros(2, 3, requires_grad=True)
    sampler = SGNHT([theta], step_size=0.1, num_examples=10, chain_dim=0, generators=generator(0))

    def closure() -> Tensor:
        theta.grad = torch.tensor([[0.0] * 3, [math.nan] * 3])
        return torch.zeros(2)

    with pytest.raises(Diverged):
        sampler.step(closure)


def isotropic(share: float, steps: int = 4000) -> Tensor:
    """θ after a run on curvature 1 in 2,000 coordinates, at a share of the stability limit."""
    theta = torch.zeros(1, 2000, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"friction": 0.1, "generators": generator(3), "chain_dim": 0}
    sampler = SGNHT([theta], step_size=1.0, num_examples=10, **options)
    assert sampler.stability == pytest.approx(2 * (math.sqrt(2) - math.sqrt(0.1)) ** 2)
    sampler.param_groups[0]["lr"] = share * sampler.stability

    def closure() -> Tensor:
        theta.grad = theta.detach().clone()
        return torch.zeros(1)

    for _ in range(steps):
        sampler.step(closure)
    return theta.detach()


def test_its_stability_limit():
    """The thermostat finds a friction that makes T just below it, and none just above."""
    assert isotropic(0.95).var().item() == pytest.approx(1 / 10, rel=0.15)  # sampling error 3 %
    with pytest.raises(Diverged):
        isotropic(1.05)


def test_its_laws_as_functions():
    sampler = make("sgnht", Toy())
    assert sampler.variance_factor(0.5, 1.0) == 1.0
    same = make("sghmc", Toy()).relaxation_steps(0.01, 1.0)
    assert sampler.relaxation_steps(0.01, 1.0) == same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"friction": 0.0}, r"friction=0.0: must be in \(0, 1\]"),
        ({"friction": 1.5}, "friction=1.5"),
        ({"thermostat_rate": 0.0}, r"thermostat_rate=0.0: must be .*> 0"),
        ({"thermostat_rate": math.nan}, "thermostat_rate=nan"),
        ({"thermostat_rate": math.inf}, "thermostat_rate=inf"),
        ({"temperature": 0.0}, r"temperature=0.0: must be > 0: a thermostat .* \(or use sghmc\)"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make("sgnht", Toy(), **options)


def test_a_later_group_needs_a_temperature_too():
    toy = Toy()
    sampler = make("sgnht", toy, toy.params[:2])
    with pytest.raises(ValueError, match="a thermostat holds a temperature"):
        sampler.add_param_group({"params": toy.params[2:], "temperature": 0.0})
