"""cSGLD: its rule, its schedule, the share of a cycle with noise, its laws."""

import math
from typing import Any

import pytest
import torch

from bayesian_lora.samplers import CSGLD

from .toys import CYCLE, SETTINGS, H, Hand, N, T, Toy, assert_follows, closure_of, make


def rule(c: Hand, noisy: bool = False) -> None:
    """θ ← θ − h_t g + [sampling] √(2h_tT/N) z, h_t = (h₀/2)(cos(π·mod(t, C)/C) + 1)."""
    g, z = c.drift(), c.z()
    t = c.step % CYCLE
    factor = (math.cos(math.pi * t / CYCLE) + 1) / 2
    sampling = noisy or t >= CYCLE // 2
    for i, p in enumerate(c.theta):
        noise = math.sqrt(factor) * c.s[i] * z[i] if sampling else 0.0
        c.theta[i] = p - factor * c.h[i] * g[i] + noise


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_follows_its_rule(setting: str):
    assert_follows("csgld", rule, setting, steps=2 * CYCLE + 1)


def test_exploration_has_no_noise():
    with pytest.raises(AssertionError, match="step 0"):
        assert_follows("csgld", lambda c: rule(c, noisy=True), "chains")


def test_the_schedule_in_its_statistics():
    toy = Toy()
    sampler = make("csgld", toy)
    sizes, noises = [], []
    for _ in range(2 * CYCLE):
        toy.advance(sampler, 1)
        sizes.append(sampler.stats["step_size"].tolist())
        noises.append(bool((sampler.stats["noise_norm"] > 0).all()))
    cosines = [1, (2 + math.sqrt(3)) / 4, 0.75, 0.5, 0.25, (2 - math.sqrt(3)) / 4] * 2
    for size, cosine in zip(sizes, cosines, strict=True):
        assert size == pytest.approx([H * cosine] * 3)
    assert noises == ([False] * 3 + [True] * 3) * 2


def test_at_zero_temperature_it_is_scheduled_gradient_descent():
    """To the last bit."""
    toy, twin = Toy(), Toy()
    sampler = make("csgld", toy, temperature=0.0)
    sgd = torch.optim.SGD(twin.params, lr=H, weight_decay=1 / (N * 0.7**2))
    for t in range(2 * CYCLE):
        toy.advance(sampler, 1)
        sgd.param_groups[0]["lr"] = (0.5 * (math.cos(math.pi * (t % CYCLE) / CYCLE) + 1)) * H
        twin.closure()
        sgd.step()
        twin.batch += 1
        assert all(torch.equal(p, q) for p, q in zip(toy.params, twin.params, strict=True))


@pytest.mark.parametrize(("share", "shrinks"), [(0.99, True), (1.01, False)])
def test_below_its_stability_limit_every_step_contracts(share: float, shrinks: bool):
    """h₀k < 2: above it the first steps of a cycle grow, though a whole cycle may contract."""
    theta = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    sampler = CSGLD(
        [theta], step_size=1.0, num_examples=10, temperature=0.0, cycle_steps=100, chain_dim=0
    )
    assert sampler.stability == 2.0
    sampler.param_groups[0]["lr"] = share * sampler.stability
    closure = closure_of(theta, lambda x: 0.5 * x.square().sum(1))
    largest, last = 0.0, 1.0
    for _ in range(3):
        sampler.step(closure)
        largest, last = max(largest, abs(theta.item()) / last), abs(theta.item())
    assert (largest < 1) == shrinks


@pytest.mark.parametrize(
    ("k", "cycle", "expected"), [(0.1, 100, 0.27), (1.0, 100, 0.86), (1.0, 1000, 1.00)]
)
def test_its_derived_variance_at_the_end_of_a_cycle(k: float, cycle: int, expected: float):
    """The figures of the theory, h₀ = .1 and share .5, which are rounded to .005."""
    sampler = make("csgld", Toy(), cycle_steps=cycle)
    assert sampler.variance_factor(0.1, k) == pytest.approx(expected, abs=0.0051)


def test_its_derived_variance_is_that_of_its_chains():
    """20,000 chains of curvature 1: the variance at a cycle's end; its sampling error is 1 %."""
    theta = torch.zeros(20_000, 1, dtype=torch.float64, requires_grad=True)
    rng = torch.Generator().manual_seed(0)
    sampler = CSGLD(
        [theta], step_size=0.4, num_examples=N, cycle_steps=20, temperature=T, generators=rng
    )
    closure = closure_of(theta, lambda x: 0.5 * x.square().sum())
    for _ in range(20 * 4):
        sampler.step(closure)
    law = T / N * sampler.variance_factor(0.4, 1.0)
    assert theta.detach().var().item() == pytest.approx(law, rel=0.03)
    assert abs(sampler.variance_factor(0.4, 1.0) - 1) > 0.1


def test_its_relaxation_time():
    """exp(−h₀k/2) a step on the mean over a cycle: hk = .02, within 2 % of the exact product."""
    sampler = make("csgld", Toy(), cycle_steps=100)
    product = math.prod(1 - 0.02 * sampler.cycle.factor(t) for t in range(100))  # type: ignore
    assert sampler.relaxation_steps(0.01, 2.0) == pytest.approx(-100 / math.log(product), rel=0.02)


def test_effective_temperature_is_that_of_the_sampling_share():
    """T + N h̄ v/2, h̄ the mean of h_t over the steps with noise."""
    chains, v = 4000, 0.49
    theta, rng = torch.zeros(chains, 1, requires_grad=True), torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"cycle_steps": 4, "explore_fraction": 0.5, "chain_dim": 0}
    sampler = CSGLD([theta], step_size=0.2, num_examples=10, generators=rng, **options)

    def closure() -> torch.Tensor:
        theta.grad = math.sqrt(v) * torch.randn(chains, 1, generator=rng)
        return torch.zeros(chains)

    sampler.watch(torch.ones(chains, 1))
    for _ in range(13):
        sampler.step(closure)
    mean = 0.2 * (0.5 + (2 - math.sqrt(2)) / 4) / 2
    derived = 1 + 10 * mean * v / 2  # Monte Carlo error .7 % of the heat
    assert sampler.stats["t_eff"].mean().item() == pytest.approx(derived, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycle_steps": 1}, "cycle_steps=1: must be ≥ 2"),
        ({"explore_fraction": 1.0}, r"explore_fraction=1.0: must be in \[0, 1\), and leave"),
        ({"explore_fraction": -0.1}, "explore_fraction=-0.1"),
        ({"explore_fraction": math.nan}, "explore_fraction=nan"),
        ({"explore_fraction": 0.95}, "explore_fraction=0.95: .* leave sampling steps in a cycle"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make("csgld", Toy(), **options)
