"""The account of a step size: curvature, gradient variance, `auto`, limits; on known quadratics.

Shapes: M chains, d parameters of a chain. Units: `bayesian_lora.samplers.base`.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora.account import account_lines, account_of, longer, measure, top_curvature
from bayesian_lora.errors import InputError
from bayesian_lora.samplers import PSGLD, SAMSGLD, SGHMC, SGLD, SGNHT, ControlVariate, SAMSGLDRank1
from bayesian_lora.samplers.base import Closure, Sampler

N, BATCH, PRIOR_STD = 400, 8, 1.0
CURVATURES = torch.tensor([3.0, 1.0, 0.5, 0.1, 0.01], dtype=torch.float64)


class Quadratic:
    """L_i(θ) = ½ Σ_j k_j (θ_j − x_ij)²: curvature k_j, gradient variance per example k_j² Var x."""

    def __init__(self, chains: int, make: type[Sampler] = SGLD, **options: Any) -> None:
        rng = torch.Generator().manual_seed(0)
        self.rng, self.chains = rng, chains
        self.x = torch.randn(N, len(CURVATURES), generator=rng, dtype=torch.float64)
        self.theta = self.x.mean(0).expand(chains, -1).clone().requires_grad_()
        settings = {"step_size": 0.01, "num_examples": N, "prior_std": PRIOR_STD, **options}
        self.sampler = make([self.theta], chain_dim=0, generators=rng, **settings)

    def closure(self, rows: Tensor) -> Closure:
        def compute() -> Tensor:
            self.theta.grad = None
            gaps = self.theta[:, None] - self.x[rows]
            loss = 0.5 * (CURVATURES * gaps.square()).sum(-1).mean(1)
            loss.sum().backward()
            return loss.detach()

        return compute

    def batch(self) -> Closure:
        return self.closure(torch.randint(N, (self.chains, BATCH), generator=self.rng))

    def full(self) -> Closure:
        return self.closure(torch.arange(N).expand(self.chains, -1))


def test_the_stiffest_direction_is_found():
    """k = 3 + 1/(Nσ²), along the first coordinate; θ stays as it is to the last bit."""
    problem = Quadratic(chains=3)
    before = problem.theta.detach().clone()
    problem.sampler.gradient(problem.full())
    start = problem.sampler.drift() + 1.0
    k, direction = top_curvature(problem.sampler, problem.full(), start)
    assert k.tolist() == pytest.approx([3.0 + 1 / N] * 3, rel=1e-3)
    assert (direction[:, 0].abs() > 0.99).all()
    assert torch.equal(problem.theta.detach(), before)


def test_measured_along_it():
    problem = Quadratic(chains=40)
    found = measure(problem.sampler, problem.batch, problem.full())
    assert found.k_max == pytest.approx(3.0 + 1 / N, rel=0.01)
    assert found.k_prior == pytest.approx(1 / N)
    # 160 gradients in all: a sampling error of 11 %
    expected = 9.0 * float(problem.x[:, 0].var(unbiased=False)) / BATCH
    assert found.variance == pytest.approx(expected, rel=0.4)


def test_where_nothing_is_learnt_the_prior_is_the_curvature():
    problem = Quadratic(chains=2, prior_std=0.1)

    def flat() -> Tensor:
        problem.theta.grad = torch.zeros_like(problem.theta)
        return torch.zeros(2)

    found = measure(problem.sampler, lambda: flat, flat)
    assert found.k_prior == pytest.approx(1 / (N * 0.01))
    assert found.k_max == pytest.approx(found.k_prior)
    account = account_of(problem.sampler, found, step_size=None, bias=0.1, steps=10)
    assert math.isfinite(account.step_size)


def test_a_flat_prior_never_relaxes():
    problem = Quadratic(chains=2, prior_std=math.inf)
    found = measure(problem.sampler, problem.batch, problem.full())
    account = account_of(problem.sampler, found, step_size=0.01, bias=0.1, steps=10)
    assert account.relaxation_prior == math.inf
    assert "infinitely many" in "\n".join(account_lines(account, 0.1))
    assert json.loads(json.dumps(account.facts(), allow_nan=False))["relaxation_prior"] is None


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SGLD, {}),
        (SGHMC, {"friction": 0.3}),
        (SGHMC, {"friction": 0.3, "integrator": "baoab"}),
        (SAMSGLDRank1, {"rho": 0.0, "u_mode": "cross_chain", "sigma_dir": 0.5}),
        (PSGLD, {"burn_in": 1}),
        (SGNHT, {}),
    ],
)
def test_auto_keeps_the_stated_bias(make: type[Sampler], options: dict[str, Any]):
    problem = Quadratic(chains=20, make=make, **options)
    found = measure(problem.sampler, problem.batch, problem.full())
    account = account_of(problem.sampler, found, step_size=None, bias=0.1, steps=10)
    assert account.heat is not None
    assert account.discretisation + account.heat == pytest.approx(0.1)
    assert account.t_eff == pytest.approx(1 + account.heat)
    assert account.auto
    assert account.step_size < 0.5 * account.largest_stable


def test_the_chain_is_as_wide_as_the_account_says():
    """Along the stiffest direction Var = T/(Nk) · (1 + heat)/(1 − discretisation)."""
    problem = Quadratic(chains=10_000)
    small = Quadratic(chains=50)
    found = measure(small.sampler, small.batch, small.full())
    account = account_of(small.sampler, found, step_size=None, bias=0.3, steps=10)
    problem.sampler.param_groups[0]["lr"] = account.step_size
    for _ in range(math.ceil(3 * account.relaxation)):
        problem.sampler.step(problem.batch())
    assert account.heat is not None
    expected = (1 + account.heat) / (1 - account.discretisation) / (N * found.k_max)
    # the account's own variance estimate has an error of 10 %, of which heat/(1 + heat) acts
    assert problem.theta.detach()[:, 0].var().item() == pytest.approx(expected, rel=0.08)
    assert problem.theta.detach()[:, 0].var().item() > 1.15 / (N * found.k_max)


def test_an_unstable_step_names_the_largest_stable_one():
    problem = Quadratic(chains=2, make=SGHMC, friction=0.5)
    found = measure(problem.sampler, problem.batch, problem.full())
    limit = 3 / found.k_max  # 2(2 − f)/k, not SGLD's 2/k
    account_of(problem.sampler, found, step_size=0.99 * limit, bias=0.1, steps=1)
    with pytest.raises(InputError, match="unstable") as raised:
        account_of(problem.sampler, found, step_size=1.01 * limit, bias=0.1, steps=1)
    assert f"= {limit:.3g}: set sampler.step_size" in str(raised.value)
    settings = {"bias": 0.1, "steps": 1, "burn_in_step_size": 3.0}
    with pytest.raises(InputError, match="burn_in_step_size=3: unstable"):
        account_of(problem.sampler, found, step_size=None, **settings)


def test_a_preconditioned_rule_is_measured_in_its_metric():
    """λmax(GK), the prior included, with the G that the gradients at the warm start give."""
    problem = Quadratic(chains=3, make=PSGLD, burn_in=5)
    found = measure(problem.sampler, problem.batch, problem.full())
    metric = problem.sampler.metric(problem.theta.detach())
    assert metric is not None
    stiffness = metric * (CURVATURES + 1 / (N * PRIOR_STD**2))
    assert found.k_max == pytest.approx(stiffness.max().item(), rel=0.05)
    assert found.k_prior == pytest.approx((metric / N).min().item())


def test_a_sharpness_aware_rule_is_measured_at_its_own_gradient():
    calls = 0
    problem = Quadratic(chains=2, make=SAMSGLD, rho=0.1)
    closure = problem.full()

    def counting() -> Tensor:
        nonlocal calls
        calls += 1
        return closure()

    measure(problem.sampler, lambda: counting, counting)
    assert calls
    assert calls % 2 == 0


def test_a_control_variate_is_measured_a_posterior_width_away():
    """Where its variance is not 0. Here examples share their curvature, so that it is 0 anywhere:
    each curvature is scaled by the example."""
    problem = Quadratic(chains=10)
    scale = torch.linspace(0.5, 1.5, N, dtype=torch.float64)

    def scaled(rows: Tensor) -> Closure:
        def compute() -> Tensor:
            problem.theta.grad = None
            gaps = problem.theta[:, None] - problem.x[rows]
            loss = 0.5 * ((CURVATURES * gaps.square()).sum(-1) * scale[rows]).mean(1)
            loss.sum().backward()
            return loss.detach()

        return compute

    full = scaled(torch.arange(N).expand(10, -1))
    control = ControlVariate([problem.theta], full)

    def batch() -> Closure:
        rows = torch.randint(N, (10, BATCH), generator=problem.rng)
        return control.closure(scaled(rows))

    plain = problem.batch
    along = [control.closure(scaled(torch.arange(8).expand(10, -1))) for _ in range(2)]
    gradients = []
    for closure in along:
        closure()
        gradients.append(problem.theta.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1])
    away = measure(problem.sampler, plain, full, batch)
    assert away.grows
    # the spread of k_i (θ − θ*) over examples, θ − θ* of variance 1/(N k)
    expected = 9.0 * float(scale.var(unbiased=False)) / BATCH / (N * 3.0)
    assert away.variance == pytest.approx(expected, rel=0.8)
    far = away.variance_at(problem.sampler, 0.01, 1000)
    reached = 1 - math.exp(-2 * 1000 * 0.01 * away.k_prior)
    assert far == pytest.approx(away.variance * reached * away.k_max / away.k_prior)
    flat = dataclasses.replace(away, k_prior=0.0).variance_at(problem.sampler, 0.01, 1000)
    assert flat == pytest.approx(away.variance * 2 * 1000 * 0.01 * away.k_max, rel=1e-3)
    assert away.variance_at(problem.sampler, 1e-9, 10) == away.variance
    widest = away.variance * away.k_max / away.k_prior
    assert away.variance_at(problem.sampler, 0.01, 10**9) == pytest.approx(widest)


BAOAB = partial(SGHMC, integrator="baoab")


@pytest.mark.parametrize(("make", "steps", "batch_size"), [(SGLD, 400, 8), (BAOAB, 100, 320)])
def test_auto_bounds_the_heat_of_a_run_that_leaves_the_control_variate(
    make: Callable[..., Sampler], steps: int, batch_size: int
):
    """d = 100, one stiff direction: at the end T_eff is at most what the account says, and not
    what it would be one stiff width away (47 times less, measured). With momentum the stiff
    direction is underdamped, so that its relaxation says nothing of how fast others diffuse."""
    n, d, chains = 400, 100, 50
    rng = torch.Generator().manual_seed(1)
    k = torch.full((d,), 0.1, dtype=torch.float64)
    k[0] = 10.0
    x = torch.randn(n, d, generator=rng, dtype=torch.float64) * k.sqrt()
    theta = torch.zeros(chains, d, dtype=torch.float64, requires_grad=True)
    settings = {"step_size": 0.01, "num_examples": n, "prior_std": 1.0, "chain_dim": 0}
    sampler = make([theta], generators=rng, **settings)

    def closure_of(rows: Tensor) -> Closure:
        def compute() -> Tensor:
            theta.grad = None
            loss = 0.5 * (x[rows] * theta[:, None]).sum(-1).square().mean(1)
            loss.sum().backward()
            return loss.detach()

        return compute

    full = closure_of(torch.arange(n).expand(chains, -1))
    control = ControlVariate([theta], full)

    def plain() -> Closure:
        return closure_of(torch.randint(n, (chains, batch_size), generator=rng))

    found = measure(sampler, plain, full, lambda: control.closure(plain()))
    account = account_of(sampler, found, step_size=None, bias=0.1, steps=steps)
    lines = "\n".join(account_lines(account, 0.1))
    assert f"variance of a batch gradient {found.variance:.3g} a posterior width away" in lines
    assert f"by step {steps}, at a variance of {account.variance_end:.3g}" in lines
    near = account_of(
        sampler, dataclasses.replace(found, grows=False), step_size=None, bias=0.1, steps=steps
    )
    assert near.step_size > 2 * account.step_size
    sampler.param_groups[0]["lr"] = account.step_size
    sampler.watch(found.direction, found.curvature)
    for _ in range(steps):
        sampler.step(control.closure(plain()))
    t_eff = sampler.t_eff
    assert t_eff is not None
    assert 1.0 < t_eff.mean().item() < account.t_eff


@pytest.mark.parametrize("grows", [False, True])
def test_a_longer_run_has_the_account_of_its_steps(grows: bool):
    problem = Quadratic(chains=2)
    found = measure(problem.sampler, problem.batch, problem.full())
    found = dataclasses.replace(found, variance=1e-3, grows=grows)
    first, last = (
        account_of(problem.sampler, found, step_size=0.01, bias=0.1, steps=steps)
        for steps in (400, 4000)
    )
    then = longer(problem.sampler, first, 4000)
    assert dataclasses.asdict(then) == pytest.approx(dataclasses.asdict(last))
    assert last.heat is not None
    assert first.heat is not None
    assert (last.heat > 2 * first.heat) == grows
    chosen = account_of(problem.sampler, found, step_size=None, bias=0.1, steps=400)
    assert longer(problem.sampler, chosen, 400) == chosen


def test_the_lines_say_when_a_run_is_too_short():
    problem = Quadratic(chains=2)
    found = measure(problem.sampler, problem.batch, problem.full())
    short = account_of(problem.sampler, found, step_size=0.01, bias=0.1, steps=5)
    middle = account_of(problem.sampler, found, step_size=0.01, bias=0.1, steps=500)
    long = account_of(problem.sampler, found, step_size=0.01, bias=0.1, steps=50_000)
    assert "too short for any direction" in account_lines(short, 0.1)[-1]
    assert "too short for directions that the data leave free" in account_lines(middle, 0.1)[-1]
    assert "Warning" not in "\n".join(account_lines(long, 0.1))
    text = "\n".join(account_lines(long, 0.1))
    assert f"{1 / (0.01 * found.k_max):.3g} steps there" in text
    assert "4e+04 where only the prior holds" in text
    assert "as given" in text
    cold = Quadratic(chains=2, temperature=0.0)
    found = measure(cold.sampler, cold.batch, cold.full())
    still = account_of(cold.sampler, found, step_size=0.01, bias=0.1, steps=5)
    assert still.heat is None
    assert "not defined at T = 0" in "\n".join(account_lines(still, 0.1))
