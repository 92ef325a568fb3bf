"""Rank-1 noise: the three ways to choose its direction, and its limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import SAMSGLDRank1
from bayesian_lora.samplers.base import Closure

from .toys import (
    CROSS,
    SETTINGS,
    SWITCH,
    Hand,
    Toy,
    assert_follows,
    generator,
    inner,
    make,
    norm,
    perturbed,
)

SIGMA_DIR, BETA1 = 0.5, 0.9
C = (1 + SIGMA_DIR) ** 2 - 1


def scaled(x: list[Tensor]) -> list[Tensor]:
    """x/‖x‖ over all tensors; zeros stay."""
    length = norm(x)
    return [t / length if length else t for t in x]


def move(c: Hand, g: list[Tensor], u: list[Tensor], gain: float = C) -> None:
    """θ ← θ − h(g + gain·u uᵀg) + s(I + σ_dir u uᵀ)z."""
    z = c.z()
    along, noise = inner(u, g), inner(u, z)
    for i, p in enumerate(c.theta):
        kick = c.s[i] * (z[i] + SIGMA_DIR * noise * u[i])
        c.theta[i] = p - c.h[i] * (g[i] + gain * along * u[i]) + kick


def frozen(c: Hand) -> None:
    g, m = c.drift(perturbed(c)), c.kept("m")
    if c.step < SWITCH:
        m[:] = [BETA1 * x + (1 - BETA1) * y for x, y in zip(m, g, strict=True)]
        move(c, g, [torch.zeros_like(x) for x in g])
    else:
        move(c, g, scaled(m))


def current(c: Hand, gain: float = 0.0) -> None:
    g = c.drift(perturbed(c))
    move(c, g, scaled(g), gain)


@pytest.mark.parametrize("setting", SETTINGS)
def test_frozen_follows_its_rule(setting: str):
    assert_follows("rank1 frozen", frozen, setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_current_follows_its_rule(setting: str):
    """The drift is not preconditioned."""
    assert_follows("rank1 current", current, setting)


def test_a_preconditioned_drift_in_current_is_seen():
    with pytest.raises(AssertionError, match="step 0"):
        assert_follows("rank1 current", lambda c: current(c, C), "chains")


def test_cross_chain_takes_the_previous_chains_direction():
    """A ring: chain 0 takes u from the last one, all of the same step, before any has moved."""
    for shift, right in ((-1, True), (1, False), (0, False)):
        toy = Toy()
        sampler = make(CROSS, toy)
        hands = [Hand(toy, place, False) for place in range(3)]
        for _ in range(5):
            toy.advance(sampler, 1)
            drifts = [c.drift(perturbed(c)) for c in hands]
            for m, c in enumerate(hands):
                move(c, drifts[m], scaled(drifts[(m + shift) % 3]))
                c.step += 1
        pairs = [
            (ours, theirs)
            for m, c in enumerate(hands)
            for ours, theirs in zip(toy.tensors(m), c.theta, strict=True)
        ]
        close = all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)
        assert close == right


def test_the_frozen_direction_is_zero_in_burn_in_and_fixed_after():
    toy = Toy()
    sampler = make("rank1 frozen", toy)
    assert isinstance(sampler, SAMSGLDRank1)
    seen = []
    direction = sampler.direction

    def kept(g: Tensor) -> Tensor:
        seen.append(direction(g))
        return seen[-1]

    sampler.direction = kept  # type: ignore[method-assign]
    toy.advance(sampler, SWITCH + 4)
    assert all(not u.any() for u in seen[:SWITCH])
    assert all(torch.equal(u, seen[SWITCH]) for u in seen[SWITCH:])
    torch.testing.assert_close(seen[-1].norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_without_a_direction_it_is_sam_sgld():
    """σ_dir = 0, all u_modes, to the last bit."""
    for name in ("rank1 frozen", "rank1 current", CROSS):
        toy, twin = Toy(), Toy()
        toy.advance(make(name, toy, sigma_dir=0.0), 8)
        twin.advance(make("sam_sgld", twin), 8)
        assert all(torch.equal(p, q) for p, q in zip(toy.params, twin.params, strict=True))


def along_x(theta: Tensor, noise: float, rng: torch.Generator | None = None) -> Closure:
    """Curvature 1 in every direction, and minibatch noise of a known standard deviation."""

    def closure() -> Tensor:
        theta.grad = theta.detach().clone()
        if noise:
            theta.grad += noise * torch.randn(theta.shape, generator=rng, dtype=theta.dtype)
        return torch.zeros(len(theta))

    return closure


def pinned(theta: Tensor, **options: Any) -> SAMSGLDRank1:
    """A frozen sampler past its burn-in, with u along the first coordinate."""
    common = {"step_size": 0.1, "num_examples": 10, "rho": 0.0, "burn_in": 1, "chain_dim": 0}
    sampler = SAMSGLDRank1([theta], **{**common, **options})
    sampler.memory["step"] = 1
    sampler.memory["m"] = torch.zeros_like(theta.detach())
    sampler.memory["m"][:, 0] = 2.5
    return sampler


@pytest.mark.parametrize(("sigma_dir", "limit"), [(0.5, 2 / 1.5**2), (1.0, 0.5), (-0.5, 2.0)])
def test_its_stability_limit(sigma_dir: float, limit: float):
    """h(1+c)k < 2 along u, hk < 2 across it: the smaller is the limit."""
    for share, bounded in ((0.99, True), (1.01, False)):
        theta = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
        sampler = pinned(theta, sigma_dir=sigma_dir, temperature=0.0)
        assert sampler.stability == pytest.approx(limit)
        sampler.param_groups[0]["lr"] = share * limit
        for _ in range(1000):
            sampler.step(along_x(theta, 0.0))
        assert (theta.abs().max() <= 1) == bounded


def test_its_derived_variance_is_the_law_along_u():
    assert make("rank1 frozen", Toy()).variance_factor(0.2, 2.0) == pytest.approx(
        1 / (1 - 0.2 * (1 + C) * 2.0 / 2)
    )


@pytest.mark.parametrize("sigma_dir", [0.5, -0.5])
def test_effective_temperature_of_known_noise(sigma_dir: float):
    """Along u the heat is T + N h (1+c) v/2, across it T + N h v/2; both are seen in θ."""
    chains, sd, h, rng = 20_000, 0.7, 0.02, generator(0)
    theta = torch.zeros(chains, 2, dtype=torch.float64, requires_grad=True)
    sampler = pinned(theta, sigma_dir=sigma_dir, step_size=h, generators=rng)
    closure = along_x(theta, sd, rng)
    for _ in range(400):
        sampler.step(closure)
    for i, gain in enumerate(((1 + sigma_dir) ** 2, 1.0)):
        sampler.watch(torch.eye(2, dtype=torch.float64)[i].expand(chains, 2))
        for _ in range(21):
            sampler.step(closure)
        derived = 1 + 10 * h * gain * sd**2 / 2
        assert sampler.stats["t_eff"].mean().item() == pytest.approx(derived, rel=0.01)
        law = derived / 10 / (1 - h * gain / 2)
        assert theta.detach()[:, i].var().item() == pytest.approx(law, rel=0.04)  # error 1 %


def test_what_it_says_of_itself():
    assert make("rank1 frozen", Toy()).exactness == "m-sharpness posterior"
    assert make("rank1 frozen", Toy(), full_batch=True).exactness == "flat posterior"
    assert make("rank1 current", Toy(), full_batch=True).exactness == "not invariant"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_dir": -1.0}, "sigma_dir=-1.0: must be > −1, so that the noise keeps full rank"),
        ({"sigma_dir": math.inf}, "sigma_dir=inf"),
        ({"sigma_dir": math.nan}, "sigma_dir=nan"),
        ({"beta1": 1.0}, r"beta1=1.0: must be in \[0, 1\)"),
        ({"u_mode": "mean"}, "u_mode='mean': choose frozen, cross_chain or current"),
        ({"burn_in": 0}, r"burn_in=0: must be ≥ 1: u is averaged .* \(or choose another u_mode\)"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make("rank1 frozen", Toy(), **options)


def test_a_ring_needs_two_chains():
    with pytest.raises(ValueError, match=r"u_mode=cross_chain .* needs two chains"):
        make(CROSS, Toy([0]))
    make(CROSS, Toy([0, 1]), burn_in=0)
