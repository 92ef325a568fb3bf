"""SGHMC: both integrators' rules, their limits, laws, stability and relaxation times."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import SGHMC

from .toys import SETTINGS, Hand, N, Toy, assert_follows, closure_of, generator, make

F = 0.3
INTEGRATORS = ("euler", "baoab")


def euler(c: Hand, noise: float = 1.0) -> None:
    """v ← (1−f)v − hg + √(2fhT/N) z, θ ← θ + v."""
    g, z, v = c.drift(), c.z(), c.kept("v")
    for i, p in enumerate(c.theta):
        v[i] = (1 - F) * v[i] - c.h[i] * g[i]
        v[i] = v[i] + noise * math.sqrt(2 * F * c.h[i] * c.t[i] / N) * z[i]
        c.theta[i] = p + v[i]


def baoab(c: Hand) -> None:
    """v ← v − hg, θ ← θ + v/2, v ← (1−f)v + √(f(2−f)hT/N) z, θ ← θ + v/2."""
    g, z, v = c.drift(), c.z(), c.kept("v")
    for i, p in enumerate(c.theta):
        kicked = v[i] - c.h[i] * g[i]
        v[i] = (1 - F) * kicked + math.sqrt(F * (2 - F) * c.h[i] * c.t[i] / N) * z[i]
        c.theta[i] = p + kicked / 2 + v[i] / 2


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_follows_its_rule(setting: str):
    assert_follows("sghmc", euler, setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_baoab_follows_its_rule(setting: str):
    assert_follows("sghmc baoab", baoab, setting)


def test_a_wrong_amount_of_noise_is_seen():
    with pytest.raises(AssertionError):
        assert_follows("sghmc", lambda c: euler(c, noise=1.001), "chains")


def test_full_friction_is_sgld():
    """f = 1, Euler: v = −hg + sz; the same draws, to rounding."""
    toy, twin = Toy(), Toy()
    toy.advance(make("sghmc", toy, friction=1.0), 10)
    twin.advance(make("sgld", twin), 10)
    for p, q in zip(toy.params, twin.params, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_at_zero_temperature_it_is_heavy_ball():
    """To the last bit, written tensor by tensor; and torch's SGD with momentum to rounding."""
    toy, twin, third = Toy(), Toy(), Toy()
    sampler = make("sghmc", toy, temperature=0.0, prior_std=math.inf)
    sgd = torch.optim.SGD(third.params, lr=0.02, momentum=1 - F)
    v = [torch.zeros_like(p) for p in twin.params]
    for _ in range(20):
        toy.advance(sampler, 1)
        twin.closure()
        third.closure()
        sgd.step()
        with torch.no_grad():
            for p, w in zip(twin.params, v, strict=True):
                assert p.grad is not None
                w.mul_(1 - F).sub_(0.02 * p.grad)
                p.add_(w)
        twin.batch = third.batch = toy.batch
        assert all(torch.equal(a, b) for a, b in zip(toy.params, twin.params, strict=True))
    for a, b in zip(toy.params, third.params, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def spectral_radius(integrator: str, f: float, hk: float) -> float:
    """Of the linear map (θ, v) → (θ, v) that a step at T = 0 makes on a quadratic of curvature 1.

    Its columns are the images of the unit vectors, which stand in two chains.
    """
    theta = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"friction": f, "integrator": integrator, "chain_dim": 0}
    sampler = SGHMC([theta], step_size=hk, num_examples=10, temperature=0.0, **options)
    sampler.memory["v"] = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    sampler.step(closure_of(theta, lambda x: 0.5 * x.square().sum(1)))
    columns = torch.cat([theta.detach(), sampler.memory["v"]], dim=1)
    return torch.linalg.eigvals(columns.T).abs().max().item()


@pytest.mark.parametrize("f", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_its_stability_limit(integrator: str, f: float):
    limit = make("sghmc", Toy(), friction=f, integrator=integrator).stability
    assert limit == pytest.approx(4.0 if integrator == "baoab" else 2 * (2 - f))
    assert spectral_radius(integrator, f, 0.999 * limit) < 1
    assert spectral_radius(integrator, f, 1.001 * limit) > 1


@pytest.mark.parametrize("hk", [0.001, 0.01, 0.3, 2.0])
@pytest.mark.parametrize("f", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_its_relaxation_time(integrator: str, f: float, hk: float):
    """−1/ln of the spectral radius; infinite where that is 1 or more."""
    sampler = make("sghmc", Toy(), friction=f, integrator=integrator)
    radius = spectral_radius(integrator, f, hk)
    if radius > 1e-6:
        exact = -1 / math.log(radius) if radius < 1 - 1e-12 else math.inf
        assert sampler.relaxation_steps(hk / 2.0, 2.0) == pytest.approx(exact, rel=1e-6)


def test_an_unstable_chain_never_relaxes():
    for integrator in INTEGRATORS:
        sampler = make("sghmc", Toy(), integrator=integrator)
        assert sampler.relaxation_steps(1.01 * sampler.stability, 1.0) == math.inf


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_its_derived_variance(integrator: str):
    """`variance_factor` against the fixed point of the exact covariance recursion."""
    h, k, f = 0.8, 1.0, 0.3
    sampler = make("sghmc", Toy(), friction=f, integrator=integrator)
    A = torch.tensor([[1 - h * k, 1 - f], [-h * k, 1 - f]], dtype=torch.float64)
    b = torch.full((2, 1), math.sqrt(2 * f * h), dtype=torch.float64)  # T/N = 1
    if integrator == "baoab":
        c = 1 - f
        rows = [[1 - h * k * (1 + c) / 2, (1 + c) / 2], [-c * h * k, c]]
        A = torch.tensor(rows, dtype=torch.float64)
        b = math.sqrt(f * (2 - f) * h) * torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    covariance = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(2000):
        covariance = A @ covariance @ A.T + b @ b.T
    assert sampler.variance_factor(h, k) == pytest.approx(covariance[0, 0].item() * k, rel=1e-9)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_effective_temperature_of_known_noise(integrator: str):
    """Gradient variance v along w on a quadratic: `t_eff` is the heat and is seen in θ."""
    chains, h, k, f, sd = 20_000, 0.05, 0.2, 0.3, 0.8
    rng = generator(1)
    theta = torch.zeros(chains, 1, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"friction": f, "integrator": integrator, "chain_dim": 0}
    sampler = SGHMC([theta], step_size=h, num_examples=10, generators=rng, **options)

    def closure() -> Tensor:
        noise = sd * torch.randn(chains, 1, generator=rng, dtype=torch.float64)
        theta.grad = k * theta.detach() + noise
        return torch.zeros(chains)

    for _ in range(600):
        sampler.step(closure)
    sampler.watch(torch.ones(chains, 1, dtype=torch.float64))
    for _ in range(21):
        sampler.step(closure)
    gain = (2 - f) / (4 * f) if integrator == "baoab" else 1 / (2 * f)
    derived = 1 + gain * 10 * h * sd**2
    assert sampler.stats["t_eff"].mean().item() == pytest.approx(derived, rel=0.02)
    law = derived / (10 * k) * sampler.variance_factor(h, k)
    # Error of 20,000 independent chains 1 %; the estimate of the heat is high by hk = 1 %.
    assert theta.detach().var().item() == pytest.approx(law, rel=0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"friction": 0.0}, r"friction=0.0: must be in \(0, 1\]"),
        ({"friction": 1.1}, "friction=1.1"),
        ({"friction": math.nan}, "friction=nan"),
        ({"integrator": "leapfrog"}, "integrator='leapfrog': choose euler or baoab"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make("sghmc", Toy(), **options)
