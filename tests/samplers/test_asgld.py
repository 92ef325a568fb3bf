"""aSGLD: its rule, its drift annealed to exactly 0, and what makes it biased."""

import math
from typing import Any

import pytest
import torch

from .toys import SETTINGS, SWITCH, Hand, Toy, assert_follows, make

A, BETA1, BETA2, LAMBD = 0.3, 0.9, 0.9, 1e-8


def rule(c: Hand, anneal: bool = True, early: bool = False) -> None:
    """θ ← θ − h(g + a_t m/√(V+λ)) + s z; m and V take in g only afterwards (unless `early`)."""
    g, z, m, V = c.drift(), c.z(), c.kept("m"), c.kept("V")
    a = A * max(0.0, 1 - c.step / SWITCH) if anneal else A
    M = [BETA1 * x + (1 - BETA1) * y for x, y in zip(m, g, strict=True)]
    W = [BETA2 * x + (1 - BETA2) * y**2 for x, y in zip(V, g, strict=True)]
    used, below = (M, W) if early else (m, V)
    for i, p in enumerate(c.theta):
        push = a * used[i] / torch.sqrt(below[i] + LAMBD)
        c.theta[i] = p - c.h[i] * (g[i] + push) + c.s[i] * z[i]
    m[:], V[:] = M, W


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_follows_its_rule(setting: str):
    assert_follows("asgld", rule, setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_annealing_it_follows_the_papers_rule(setting: str):
    assert_follows("asgld constant", lambda c: rule(c, anneal=False), setting)


def test_this_steps_gradient_is_not_in_its_moments():
    with pytest.raises(AssertionError, match="step 0"):
        assert_follows("asgld", lambda c: rule(c, early=True), "chains")


def test_after_burn_in_it_is_sgld_to_the_last_bit():
    """Both from the state at the end of burn-in, with the same noise."""
    toy, twin = Toy(), Toy()
    sampler, sgld = make("asgld", toy), make("sgld", twin)
    toy.advance(sampler, SWITCH)
    assert sampler.memory["m"].abs().min() > 0
    with torch.no_grad():
        for p, q in zip(twin.params, toy.params, strict=True):
            p.copy_(q)
    saved = sgld.state_dict()
    saved["generators"] = sampler.state_dict()["generators"]
    sgld.load_state_dict(saved)
    twin.batch = toy.batch
    toy.advance(sampler, 5)
    twin.advance(sgld, 5)
    assert all(torch.equal(p, q) for p, q in zip(toy.params, twin.params, strict=True))


def test_what_it_says_of_itself():
    assert make("asgld", Toy()).exactness == "exact as h → 0"
    constant = make("asgld constant", Toy())
    assert constant.exactness == "biased"
    assert "too narrow" in constant.law
    assert make("asgld constant", Toy(), a=0.0).exactness == "exact as h → 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": -0.1}, r"a=-0.1: must be .*≥ 0"),
        ({"a": math.nan}, "a=nan"),
        ({"a": math.inf}, "a=inf"),
        ({"beta1": 1.0}, r"beta1=1.0: must be in \[0, 1\)"),
        ({"beta2": 1.0}, r"beta2=1.0: must be in \[0, 1\)"),
        ({"lambd": 0.0}, "lambd=0.0: must be > 0"),
        ({"burn_in": 0}, r"burn_in=0: must be ≥ 1: a is annealed .* \(or anneal=False"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make("asgld", Toy(), **options)


def test_without_annealing_there_is_no_burn_in_to_ask_for():
    make("asgld constant", Toy(), burn_in=0)
