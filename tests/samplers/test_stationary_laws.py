"""Stationary laws of the samplers, written out once more; broken rules must fail the same checks.

The laws are literal here, and both the chains and the samplers' own `variance_factor` are held
against them. Shapes: M independent chains, d parameters of a chain. Units:
`bayesian_lora.samplers.base`. Every draw is the last state of a chain of its own.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.sam_sgld import SAMSGLD
from bayesian_lora.samplers.sam_sgld_rank1 import SAMSGLDRank1
from bayesian_lora.verification.laws import (
    CURVATURES,
    RADIAL,
    fixed_direction,
    sam_radius,
)
from bayesian_lora.verification.mutations import Rule, mutations
from bayesian_lora.verification.report import COORDINATES, DRAWS, FEWER, worst
from bayesian_lora.verification.toy import (
    Figure,
    Setting,
    build,
    normal,
    pushed,
    radial_variance,
)
from bayesian_lora.verification.variants import VARIANTS, Variant

N, T, H = 50, 0.5, 0.1
SEED = 11
NAMED = {variant.name: variant for variant in VARIANTS}
G = {k: 1 / (0.05 + root) for k, root in zip(CURVATURES, (0.15, 0.35, 0.75), strict=True)}
"""The preconditioner at each k, from λ = .05 and the square roots of V given to it."""
C = (1 + 0.5) ** 2 - 1


def cyclical(k: float, h0: float = H, cycle: int = 100, share: float = 0.5) -> float:
    """v ← (1 − h_t k)² v + [sampling] 2h_t k at the end of a cycle, once cycles repeat.

    The affine map of one cycle is v ← av + b, so its fixed point is b/(1 − a).
    """
    a, b = 1.0, 0.0
    for t in range(cycle):
        h = h0 / 2 * (math.cos(math.pi * t / cycle) + 1)
        a, b = a * (1 - h * k) ** 2, b * (1 - h * k) ** 2 + (2 * h * k if t >= share * cycle else 0)
    return b / (1 - a)


# The variance at curvature k over T/(Nk), and the standard deviation of a step's noise over
# √(2hT/N), here as in the theory of the samplers.
LAWS: dict[str, tuple[Callable[[float], float], float]] = {
    "sgld": (lambda k: 1 / (1 - H * k / 2), 1.0),
    "psgld": (lambda k: 1 / (1 - H * G[k] * k / 2), math.sqrt(1 / (0.05 + 0.15))),
    "asgld": (lambda k: 1 / (1 - H * k / 2), 1.0),
    "sghmc": (lambda k: 1 / (1 - H * k / (2 * (2 - 0.1))), math.sqrt(0.1)),
    "sghmc baoab": (lambda k: 1.0, math.sqrt(0.1 * (2 - 0.1) / 2) / 2),
    "sgnht": (lambda k: 1.0, math.sqrt(0.3)),
    "csgld": (cyclical, math.sqrt(0.5)),
    "sam_sgld": (lambda k: 1 / (1 - H * k / 2), 1.0),
    "sam_sgld_rank1": (lambda k: 1 / (1 - H * (1 + C) * k / 2), 1 + 0.5),
    "sam_sgld_rank1 cross_chain": (lambda k: 1 / (1 - H * (1 + C) * k / 2), 1 + 0.5),
}
BROKEN = [(name, wrong) for name in LAWS for wrong in mutations(NAMED[name].rule)]


@lru_cache
def figures(name: str) -> dict[float, Figure]:
    """Those of a variant's Gaussian check, by k."""
    variant = NAMED[name]
    found = variant.laws[0](variant.rule, variant.options, DRAWS, SEED)
    return dict(zip(CURVATURES, found, strict=True))


def test_every_sampler_that_claims_a_law_has_it_here() -> None:
    assert sorted(LAWS) == sorted(variant.name for variant in VARIANTS if variant.claims)


@pytest.mark.parametrize("k", CURVATURES)
@pytest.mark.parametrize("name", LAWS)
def test_gaussian_law(name: str, k: float) -> None:
    """Variance within 4 % (its sampling error is at most 1 %), mean within 4 MCSE."""
    figure, law = figures(name)[k], T / (N * k) * LAWS[name][0](k)
    assert 2 / figure.error**2 > 20_000  # the effective sample size of a variance
    assert figure.measured == pytest.approx(law, rel=0.04)
    assert abs(figure.shift) < 4
    assert figure.derived == pytest.approx(law, rel=1e-7)  # a recursion is cut off there
    assert figure.agrees


@pytest.mark.parametrize("name", LAWS)
def test_noise_unit(name: str) -> None:
    """Within .5 % (sampling error .07 to .1 %) at N, T, h and with each of them × 4."""
    variant, s = NAMED[name], math.sqrt(2 * H * T / N)
    assert variant.noise is not None
    figure, *others = variant.noise(variant.rule, variant.options, COORDINATES, SEED)
    scale = {"N=200": 0.5, "T=2 ": 2.0, "h=0.4": 2.0}
    factor = next((value for key, value in scale.items() if key in figure.law), 1.0)
    assert figure.measured == pytest.approx(LAWS[name][1] * s * factor, rel=0.005)
    assert figure.derived == pytest.approx(LAWS[name][1] * s * factor, rel=1e-6)
    assert all(other.agrees for other in [figure, *others])


# --- Broken rules ---------------------------------------------------------------------------


def one_step(rule: Rule, variant: Variant) -> torch.Tensor:
    """Where a step from θ = 1 with curvature 1 ends after two steps of the same gradient."""
    theta = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    sampler = build(rule, theta, Setting(), variant.options, 0)
    push = normal((2, 3), 5)
    for _ in range(variant.options.get("cycle_steps", 3)):
        sampler.step(pushed(theta, push))
    return theta.detach()


@pytest.mark.parametrize(("name", "wrong"), BROKEN)
def test_a_mutation_changes_the_rule(name: str, wrong: str) -> None:
    variant = NAMED[name]
    broken = mutations(variant.rule)[wrong]
    assert issubclass(broken, variant.rule)
    assert not torch.equal(one_step(broken, variant), one_step(variant.rule, variant))


@pytest.mark.parametrize(("name", "wrong"), BROKEN)
def test_the_checks_reject_broken_rules(name: str, wrong: str) -> None:
    """By more than four standard errors beyond the tolerance."""
    variant = NAMED[name]
    figure = worst(variant, mutations(variant.rule)[wrong], SEED, FEWER)
    assert figure.rejects
    assert not figure.agrees


@pytest.mark.parametrize("name", LAWS)
def test_so_few_draws_do_not_reject_the_sound_rule(name: str) -> None:
    variant = NAMED[name]
    assert not worst(variant, variant.rule, SEED, FEWER).rejects


@pytest.mark.parametrize(("wrong", "factor"), [("N dropped", N), ("noise × √½", 0.5)])
@pytest.mark.parametrize("name", sorted(set(LAWS) - {"sgnht"}))
def test_a_linear_rule_is_as_wide_as_its_noise(name: str, wrong: str, factor: float) -> None:
    """Variance follows the noise exactly; 12 % is four standard errors of the 2 % of 5,000."""
    variant = NAMED[name]
    broken = mutations(variant.rule)[wrong]
    figure = variant.laws[0](broken, variant.options, FEWER, SEED)[0]
    assert figure.ratio == pytest.approx(factor, rel=0.12)


def test_a_thermostat_absorbs_wrong_noise_and_only_the_noise_unit_tells() -> None:
    variant = NAMED["sgnht"]
    broken = mutations(variant.rule)["noise × √½"]
    assert all(f.agrees for f in variant.laws[0](broken, variant.options, DRAWS, SEED))
    assert variant.noise is not None
    assert variant.noise(broken, variant.options, COORDINATES // 10, SEED)[0].rejects


def test_the_check_tells_the_derived_law_from_the_target() -> None:
    """At hk = .4 an SGLD chain is 25 % wider than the posterior, and the check sees it."""
    figure = figures("sgld")[4.0]
    target = replace(figure, derived=T / (N * 4.0))
    assert target.ratio == pytest.approx(1.25, rel=0.04)
    assert not target.agrees
    assert target.rejects


# --- Laws of one sampler --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "cycle", "expected"), [(0.1, 100, 0.27), (1, 100, 0.86), (1, 1000, 1.00)]
)
def test_how_far_a_cycle_gets(k: float, cycle: int, expected: float) -> None:
    """Variance over the target's at the end of a cycle: short cycles freeze soft directions."""
    assert cyclical(k, cycle=cycle) == pytest.approx(expected, abs=0.01)
    variant = NAMED["csgld"]
    theta = torch.zeros(1, 1, requires_grad=True)
    options = {**variant.options, "cycle_steps": cycle}
    sampler = build(variant.rule, theta, Setting(), options, 0)
    assert sampler.variance_factor(H, k) == pytest.approx(cyclical(k, cycle=cycle), rel=1e-4)


def test_the_radial_law_by_quadrature() -> None:
    """Variance over T/(Nk) without a prior: .4087 at N = 3,668, .9847 at N = 1."""
    for n, expected in ((3668, 0.4087), (1, 0.9847)):
        setting = Setting(n, 1.0, 0.005, math.inf)
        found = radial_variance(setting, k=1.0, rho=0.05, d=10) / setting.unit
        assert found == pytest.approx(expected, abs=5e-5)


def test_sam_has_its_radial_law() -> None:
    """Bias under 2 % at h = .005 (sampling error .3 %); without the perturbation it is 100 %."""
    options = {"full_batch": True}
    assert sam_radius(SAMSGLD, options, RADIAL, 20_000, SEED).agrees
    still = sam_radius(Unperturbed, options, RADIAL, 2_000, SEED)
    assert still.rejects
    assert still.ratio > 1.8


class Unperturbed(SAMSGLD):
    def gradient(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._perturbation = torch.zeros(0)
        return Sampler.gradient(self, closure)


def test_a_frozen_direction_has_its_law_along_and_across() -> None:
    for sigma_dir in (-0.5, 1.0):
        options = {"burn_in": 1, "sigma_dir": sigma_dir}
        assert all(f.agrees for f in fixed_direction(SAMSGLDRank1, options, DRAWS, SEED))
