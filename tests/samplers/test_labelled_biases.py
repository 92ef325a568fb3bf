"""What is labelled biased or conditional has the bias that theory derives, in numbers.

On ‖θ‖²/2 (mean loss, k = 1), full batch or with isotropic gradient noise. "Ratio" is variance
over T/(Nk). Shapes: M chains, d parameters. Units: `bayesian_lora.samplers.base`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import ASGLD, PSGLD, SGHMC, SGNHT, SAMSGLDRank1
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.flat import Scale

N, T = 50, 0.5
TARGET = T / N


def ratio(
    make: Callable[..., Sampler],
    *,
    h: float,
    steps: int,
    shape: tuple[int, int],
    noise: float = 0.0,
    **options: Any,
) -> tuple[float, Sampler]:
    """Variance over T/(Nk) of θ, averaged over every 20th step of the second half.

    Args:
        shape: (M, d).
        noise: standard deviation of the gradient's isotropic noise.
    """
    rng, order = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    start = torch.randn(shape, generator=rng, dtype=torch.float64) * TARGET**0.5
    theta = start.requires_grad_()
    sampler = make(
        [theta],
        step_size=h,
        num_examples=N,
        temperature=T,
        chain_dim=0,
        generators=rng,
        **options,
    )

    def closure() -> Tensor:
        theta.grad = theta.detach().clone()
        if noise:
            theta.grad += noise * torch.randn(shape, generator=order, dtype=torch.float64)
        return torch.zeros(shape[0])

    squares = []
    for step in range(1, steps + 1):
        if noise and step == steps - 400:
            sampler.watch(torch.full(shape, shape[1] ** -0.5, dtype=torch.float64))
        sampler.step(closure)
        if step > steps // 2 and step % 20 == 0:
            squares.append(theta.detach().square().mean().item())
    return float(np.mean(squares)) / TARGET, sampler


# --- rank-1 noise along the chain's own gradient ----------------------------------------------


@pytest.mark.parametrize(("d", "stated"), [(5, 1.64), (20, 1.18), (200, 1.04)])
def test_current_direction_is_not_invariant(d: int, stated: float):
    """r² ← (1 − h)² r² + s²(d + c): ratio (1 + c/d)/(1 − h/2), c = 3; theory's figures."""
    h, c = 0.05, 3.0
    derived = (1 + c / d) / (1 - h / 2)
    assert derived == pytest.approx(stated, abs=0.005)
    options = {"rho": 0.0, "sigma_dir": 1.0, "u_mode": "current"}
    found, sampler = ratio(SAMSGLDRank1, h=h, steps=400, shape=(100_000 // d, d), **options)
    assert found == pytest.approx(derived, rel=0.01)
    assert sampler.exactness == "not invariant"


@pytest.mark.parametrize("mode", [{"u_mode": "cross_chain"}, {"u_mode": "frozen", "burn_in": 50}])
def test_other_directions_are_not_so(mode: dict[str, Any]):
    """At most 1/(1 − h(1 + c)/2) = 1.11 along u, one of five directions."""
    options = {"rho": 0.0, "sigma_dir": 1.0, **mode}
    found, _ = ratio(SAMSGLDRank1, h=0.05, steps=400, shape=(20_000, 5), **options)
    assert 1 / (1 - 0.05 / 2) < found < 1.06


# --- A constant adaptive drift ----------------------------------------------------------------


def constant_drift_law(a: float) -> float:
    """x of x = 1/(1 + a/√V), V = x k T/N."""
    x = 1.0
    for _ in range(100):
        x = 1 / (1 + a / (x * TARGET) ** 0.5)
    return x


@pytest.mark.parametrize("a", [0.02, 0.05])
def test_constant_adaptive_drift_is_too_narrow(a: float):
    """T_eff ≈ T/(1 + a/√V), to first order in h and in the memories' lengths over 1/(hk)."""
    options = {"a": a, "anneal": False, "beta1": 0.5, "beta2": 0.9995, "burn_in": 0}
    found, sampler = ratio(ASGLD, h=0.005, steps=12_000, shape=(600, 1), **options)
    assert found == pytest.approx(constant_drift_law(a), rel=0.05)
    assert found < 0.9
    assert sampler.exactness == "biased"


def test_annealed_adaptive_drift_is_not_so():
    options = {"a": 0.1, "beta1": 0.5, "burn_in": 500}
    found, _ = ratio(ASGLD, h=0.01, steps=2_500, shape=(10_000, 1), **options)
    assert found == pytest.approx(1 / (1 - 0.01 / 2), rel=0.02)


# --- A preconditioner that moves ----------------------------------------------------------------


def moving_metric_law(lambd: float) -> float:
    """Ratio of exp(−U/T)/G(θ), G = 1/(λ + k|θ|): the law without Γ as h → 0 at a fixed memory."""
    x = np.linspace(0, 12, 100_001)
    p = (lambd / TARGET**0.5 + x) * np.exp(-(x**2) / 2)
    return float((p * x**2).sum() / p.sum())


def test_moving_preconditioner_is_too_wide():
    """1.7 of the target at λ = .5√(T/N); frozen, the derived law."""
    lambd = 0.5 * TARGET**0.5
    options = {"beta2": 0.5, "lambd": lambd}
    moving, _ = ratio(PSGLD, h=2e-4, steps=6_000, shape=(4_000, 1), burn_in=10**9, **options)
    assert moving == pytest.approx(moving_metric_law(lambd), rel=0.05)
    frozen, _ = ratio(PSGLD, h=2e-4, steps=6_000, shape=(4_000, 1), burn_in=500, **options)
    assert frozen == pytest.approx(1.0, rel=0.05)


# --- A thermostat absorbs isotropic minibatch noise ---------------------------------------------


def test_thermostat_absorbs_isotropic_gradient_noise():
    """N h v/(2f) = .9 T: SGHMC's ratio is 1.9, SGNHT's 1, and each one's T_eff says so."""
    h, f, d = 0.02, 0.3, 100
    noise = (0.9 * T * 2 * f / (N * h)) ** 0.5
    common = {"h": h, "steps": 2_400, "shape": (100, d), "noise": noise, "friction": f}
    hot, sampler = ratio(SGHMC, **common)
    assert hot == pytest.approx(1.9, rel=0.05)
    assert sampler.stats["t_eff"].mean().item() / T == pytest.approx(1.9, rel=0.05)
    absorbed, sampler = ratio(SGNHT, **common)
    assert absorbed == pytest.approx(1.0, rel=0.04)
    assert sampler.stats["t_eff"].mean().item() / T == pytest.approx(1.0, rel=0.05)
    stuck, _ = ratio(StuckThermostat, **common)
    assert stuck == pytest.approx(1.9, rel=0.05)


class StuckThermostat(SGNHT):
    def update(self, g: Tensor, h: Scale) -> None:
        super().update(g, h)
        self.memory["xi"].fill_(self.friction)
