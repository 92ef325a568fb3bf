"""Conjugate Bayesian linear regression: every sampler's covariance, mean and heat, full batch and
minibatch, against derived laws (`linear_regression.py`); broken rules must fail the same checks.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import ASGLD, CSGLD, PSGLD, SGHMC, SGLD, SGNHT
from bayesian_lora.samplers import SAMSGLDRank1 as Rank1
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.flat import Scale, unit

from .linear_regression import (
    BATCH,
    CASES,
    CHAINS,
    EYE,
    PRIOR_STD,
    D,
    N,
    Run,
    error,
    langevin,
    problem,
    run,
)

# --- Covariance and mean --------------------------------------------------------------------


def follows(found: Run, law: np.ndarray) -> bool:
    """Within 5 % (sampling error 1 to 2 %) in covariance and 4 MCSE in mean."""
    return error(found.covariance, law) < 0.05 and bool((found.mean_errors.abs() < 4).all())


@pytest.mark.parametrize("name", CASES)
def test_full_batch(name: str):
    case = CASES[name]
    found = run(case, None)
    assert follows(found, case.law(found.sampler, case.steps[0], None)), found


@pytest.mark.parametrize("name", CASES)
def test_minibatch(name: str):
    """The law with C(S) holds, that without it (the full batch's) does not."""
    case = CASES[name]
    found = run(case, BATCH)
    assert follows(found, case.law(found.sampler, case.steps[1], BATCH)), found
    assert error(found.covariance, case.law(found.sampler, case.steps[1], None)) > 0.1


def test_langevin_law_is_the_closed_form():
    """Full batch Σ(I − hK/2)⁻¹; minibatch KS + SK − hKSK = (2T/N)I + hC(S)."""
    k, h = problem().k, 0.2
    assert error(langevin(h, None), np.linalg.inv(k) @ np.linalg.inv(EYE - h * k / 2) / N) < 1e-10
    s = langevin(h, BATCH)
    right = 2 / N * EYE + h * problem().noise(s) / BATCH
    assert error(k @ s + s @ k - h * k @ s @ k, right) < 1e-6


class HalfTheNoise(SGLD):
    def noise_std(self, h: Scale) -> Scale:
        return super().noise_std(h) * 0.5**0.5


class PriorOnTheMeanLoss(SGLD):
    def drift(self, prior: bool = True) -> Tensor:
        g = super().drift(prior=False)
        return g + self.param_groups[0]["params"][0].detach() / PRIOR_STD**2


class DriftWithoutG(PSGLD):
    def update(self, g: Tensor, h: Scale) -> None:
        super().update(g / self.metric(g) * self.metric(g).mean(), h)


class NoiseOfBAOAB(SGHMC):
    def noise_std(self, h: Scale) -> Scale:
        return super().noise_std(h) * (1 - self.friction / 2) ** 0.5


class NoiseOfEuler(SGHMC):
    def noise_std(self, h: Scale) -> Scale:
        return super().noise_std(h) / (1 - self.friction / 2) ** 0.5


class ThermostatWithoutFiniteStep(SGNHT):
    """ξ ← ξ + γ[‖v‖²/d/(hT/N) − 1]: without (2 − ξ)/2."""

    def update(self, g: Tensor, h: Scale) -> None:
        super().update(g, h)
        xi, v = self.memory["xi"], self.memory["v"]
        kinetic = v.square().mean(1, keepdim=True) / (float(h) / N)  # pyright: ignore
        xi += self.rate * kinetic * xi / 2


class NoiseOfTheFirstStep(CSGLD):
    def noise_std(self, h: Scale) -> Scale:
        return super().noise_std(self.param_groups[0]["lr"])


class DriftWithoutP(Rank1):
    def update(self, g: Tensor, h: Scale) -> None:
        u = unit(self.memory["m"]) if "m" in self.memory else torch.zeros_like(g)
        super().update(g - self.c / (1 + self.c) * u * (u * g).sum(1, keepdim=True), h)


BROKEN = [
    ("sgld", HalfTheNoise),
    ("sgld", PriorOnTheMeanLoss),
    ("asgld", partial(ASGLD, anneal=False)),
    ("psgld", DriftWithoutG),
    ("sghmc_euler", NoiseOfBAOAB),
    ("sghmc_baoab", NoiseOfEuler),
    ("sgnht", ThermostatWithoutFiniteStep),
    ("csgld", NoiseOfTheFirstStep),
    ("rank1_frozen", DriftWithoutP),
]


@pytest.mark.parametrize(("name", "rule"), BROKEN)
def test_the_check_rejects_broken_rules(name: str, rule: Callable[..., Sampler]):
    case = replace(CASES[name], make=rule)
    found = run(case, None)
    assert not follows(found, case.law(found.sampler, case.steps[0], None)), found


# --- Heat -----------------------------------------------------------------------------------

WARM = 600
HOT = {
    "sgld": replace(CASES["sgld"], steps=(0.0, 0.008), warm=WARM),
    "asgld": replace(CASES["asgld"], steps=(0.0, 0.008), warm=WARM),
    "psgld": replace(CASES["psgld"], steps=(0.0, 0.015), warm=WARM),
    "sghmc_euler": replace(CASES["sghmc_euler"], steps=(0.0, 0.004), warm=WARM),
    "sghmc_baoab": replace(CASES["sghmc_baoab"], steps=(0.0, 0.004), warm=WARM),
    "sgnht": replace(CASES["sgnht"], steps=(0.0, 0.004), warm=WARM),
    "csgld": replace(CASES["csgld"], steps=(0.0, 0.016), warm=WARM),
    "rank1_frozen": replace(CASES["rank1_frozen"], steps=(0.0, 0.008), warm=WARM),
}
"""Small steps and small batches: much heat, little motion of a chain within a step."""


def predicted_heat(found: Run, law: np.ndarray, h: float, batch: int) -> float:
    """T + ηNhv/2, v = wᵀ√G C √G w averaged over chains, each sampler with its own η."""
    sampler, w = found.sampler, problem().top.expand(CHAINS, D)
    c = torch.from_numpy(problem().noise(law) / batch)
    whitened = sampler.whitened(w)  # √G and √P are symmetric: ⟨w, √G g⟩ = ⟨√G w, g⟩
    v = torch.einsum("mi,ij,mj->m", whitened, c, whitened)
    gain = 1.0 if isinstance(sampler, SGNHT) else sampler.heat_gain
    heated = 1.0 + gain * N * h * v / 2
    if isinstance(sampler, SGNHT):
        xi = sampler.memory["xi"][:, 0]
        heated = (sampler.friction + N * h * v / 2) / xi.mean()
    return heated.mean().item()


@pytest.mark.parametrize("name", HOT)
def test_watched_temperature(name: str):
    """`watch`'s T_eff along the stiffest direction: the formula's, within 5 %; and the chain's
    variance there, where the rule's noise is isotropic and of a constant step.
    """
    case, batch = HOT[name], 2
    found = run(case, batch)
    h = case.steps[1]
    law = case.law(found.sampler, h, batch)
    predicted = predicted_heat(found, law, h, batch)
    assert predicted > 1.2
    assert found.t_eff == pytest.approx(predicted, rel=0.05)
    if name not in ("psgld", "csgld", "rank1_frozen"):
        w, k = problem().top.numpy(), problem().k_top
        variance = w @ found.covariance @ w
        hottest = variance * N * k / found.sampler.variance_factor(h, k)
        assert hottest == pytest.approx(found.t_eff, rel=0.06)


def test_control_variate_restores_the_full_batch_law():
    """Near the anchor only H_B(θ − θ*) makes noise: heat of some 5 % where it was 100 %."""
    case = CASES["sgld"]
    h, found = case.steps[1], run(case, BATCH, control=True)
    assert follows(found, langevin(h, BATCH, control=True))
    assert not follows(found, langevin(h, BATCH))
    assert error(found.covariance, langevin(h, None)) < 0.1
    assert error(langevin(h, BATCH), langevin(h, None)) > 0.5
