"""pSGLD: its rule, the freezing of its preconditioner, its limits and its laws."""

import math
from itertools import pairwise

import pytest
import torch

from bayesian_lora.samplers import PSGLD

from .toys import SETTINGS, SWITCH, H, Hand, Toy, assert_follows, closure_of, generator, make

BETA, LAMBD = 0.9, 1e-2


def rule(c: Hand, noise: float = 1.0) -> None:
    """V ← βV + (1−β)g² in burn-in, θ ← θ − hGg + s√G z, with V/(1−βᵗ) in G."""
    g, z, V = c.drift(), c.z(), c.kept("V")
    if c.step < SWITCH:
        V[:] = [BETA * v + (1 - BETA) * x**2 for v, x in zip(V, g, strict=True)]
    weight = 1 - BETA ** min(c.step + 1, SWITCH)
    for i, p in enumerate(c.theta):
        G = 1 / (LAMBD + torch.sqrt(V[i] / weight))
        c.theta[i] = p - c.h[i] * G * g[i] + noise * c.s[i] * torch.sqrt(G) * z[i]


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_follows_its_rule(setting: str):
    assert_follows("psgld", rule, setting)


def test_the_noise_is_preconditioned_too():
    with pytest.raises(AssertionError):
        assert_follows("psgld", lambda c: rule(c, noise=1.001), "chains")


def test_the_preconditioner_is_frozen_after_burn_in():
    toy = Toy()
    sampler = make("psgld", toy)
    seen = []
    for _ in range(SWITCH + 4):
        toy.advance(sampler, 1)
        seen.append(sampler.memory["V"].clone())
    assert all(not torch.equal(a, b) for a, b in pairwise(seen[:SWITCH]))
    assert all(torch.equal(v, seen[SWITCH - 1]) for v in seen[SWITCH:])
    assert sampler.memory["adapted"] == SWITCH


def test_at_zero_temperature_it_is_preconditioned_descent():
    """To the last bit, in burn-in and after it."""
    toy = Toy()
    sampler = make("psgld", toy, temperature=0.0, prior_std=math.inf)
    twin = Toy()
    for _ in range(SWITCH + 3):
        toy.advance(sampler, 1)
        twin.closure()
        twin.batch += 1
        G = sampler.metric(torch.zeros(3, 23, dtype=torch.float64))
        assert G is not None
        pieces = G.split([12, 5, 6], dim=1)
        with torch.no_grad():
            for p, piece in zip(twin.params, pieces, strict=True):
                assert p.grad is not None
                p.add_(piece.reshape(p.shape) * p.grad, alpha=-H)
        assert all(torch.equal(a, b) for a, b in zip(toy.params, twin.params, strict=True))


def test_curvatures_are_those_of_the_preconditioned_hessian():
    """Full batch, T = 0, V frozen: bounded just below h·λmax(GK) = 2, divergent just above."""
    K = torch.tensor([[0.5, 4.0, 30.0]], dtype=torch.float64)
    for share, stable in ((0.98, True), (1.02, False)):
        theta = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
        sampler = PSGLD(
            [theta], step_size=1e-9, num_examples=10, temperature=0.0, burn_in=1, chain_dim=0
        )
        closure = closure_of(theta, lambda x: 0.5 * (x * K * x).sum(1))
        sampler.step(closure)
        G = sampler.metric(theta)
        assert G is not None
        torch.testing.assert_close(G, 1 / (sampler.lambd + K))  # |g| = k at θ = 1, so that GK ≈ 1
        sampler.param_groups[0]["lr"] = share * sampler.stability / float((G * K).max())
        for _ in range(1000):
            sampler.step(closure)
        assert (theta.abs().max() < 1.1) == stable


def test_effective_temperature_of_known_noise():
    """T + N h v/2 with v the variance of √G g along w: gradient standard deviation .3 and 3."""
    chains, sd = 4000, torch.tensor([0.3, 3.0])
    theta, rng = torch.zeros(chains, 2, requires_grad=True), generator(0)
    sampler = PSGLD(
        [theta], step_size=0.1, num_examples=10, beta2=0.0, burn_in=1, generators=rng, chain_dim=0
    )

    def closure() -> torch.Tensor:
        noise = sd if not sampler.memory["step"] else sd * torch.randn(chains, 2, generator=rng)
        theta.grad = noise.expand(chains, 2).clone()
        return torch.zeros(chains)

    sampler.step(closure)  # G = 1/(λ + sd)
    for i in range(2):
        sampler.watch(torch.eye(2)[i].expand(chains, 2))
        for _ in range(11):
            sampler.step(closure)
        expected = 1 + 10 * 0.1 * float(sd[i]) / 2  # G sd² = sd; Monte Carlo error .7 % of heat
        assert sampler.stats["t_eff"].mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta2": 1.0}, r"beta2=1.0: must be in \[0, 1\)"),
        ({"beta2": -0.1}, "beta2=-0.1"),
        ({"beta2": math.nan}, "beta2=nan"),
        ({"lambd": 0.0}, r"lambd=0.0: must be .*> 0 \(it bounds"),
        ({"lambd": math.nan}, "lambd=nan"),
        ({"lambd": math.inf}, "lambd=inf"),
        ({"burn_in": 0}, "burn_in=0: must be ≥ 1: V is estimated"),
    ],
)
def test_bad_arguments(options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        make("psgld", Toy(), **options)
