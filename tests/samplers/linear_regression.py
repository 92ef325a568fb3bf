"""Conjugate Bayesian linear regression: every exact sampler, its derived law, and a run of it.

Laws are derived, not fitted: with linear drift a rule is x ← A x + B η + ζ, x = θ or (θ, v), η the
minibatch noise of the gradient and ζ the rule's own, so that its stationary covariance solves
S = A S Aᵀ + B C(S) Bᵀ + Q, the discrete Lyapunov equation. C(S) is the gradient covariance of an
i.i.d. batch averaged over the law itself, in closed form.

Shapes: M chains, d parameters. Units: `bayesian_lora.samplers.base`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import brentq
from torch import Tensor

from bayesian_lora.samplers import ASGLD, CSGLD, PSGLD, SGHMC, SGLD, SGNHT
from bayesian_lora.samplers import ControlVariate as Control
from bayesian_lora.samplers import SAMSGLDRank1 as Rank1
from bayesian_lora.samplers.base import Closure, Sampler
from bayesian_lora.samplers.flat import unit

N, D, PRIOR_STD, BATCH, CHAINS = 100, 4, 0.5, 8, 6_000
EYE = np.eye(D)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Problem:
    """y = Xw + ε, ε ~ N(0, 1), w ~ N(0, σ²I): curvatures 1 to 3, posterior in closed form."""

    def __init__(self) -> None:
        rng = generator(3)
        scale = torch.tensor([1.0, 1.3, 1.5, 1.7], dtype=torch.float64)
        self.x = torch.randn(N, D, generator=rng, dtype=torch.float64) * scale
        w = PRIOR_STD * torch.randn(D, generator=rng, dtype=torch.float64)
        self.y = self.x @ w + torch.randn(N, generator=rng, dtype=torch.float64)
        self.hessian = self.x.T @ self.x / N
        self.b = self.x.T @ self.y / N
        curvature = self.hessian + torch.eye(D, dtype=torch.float64) / (N * PRIOR_STD**2)
        self.mean = torch.linalg.solve(curvature, self.b)
        self.k = curvature.numpy()
        self.top = torch.from_numpy(np.linalg.eigh(self.k)[1][:, -1].copy())
        self.k_top = float(np.linalg.eigvalsh(self.k)[-1])
        at_mean = (self.x * (self.x @ self.mean - self.y)[:, None]).numpy()
        self.noise_at_mean = np.cov(at_mean.T, bias=True)

    def gradient(self, w: Tensor, rows: Tensor | None) -> Tensor:
        """Of the mean NLL, (M, d), of all examples or of each chain's rows (M, B)."""
        if rows is None:
            return w @ self.hessian - self.b
        x = self.x[rows]
        residual = (x @ w[:, :, None])[..., 0] - self.y[rows]
        return (residual[:, None] @ x)[:, 0] / rows.shape[1]

    def closure(self, theta: Tensor, rows: Tensor | None) -> Closure:
        def compute() -> Tensor:
            theta.grad = self.gradient(theta.detach(), rows)
            return torch.zeros(len(theta))

        return compute

    def noise(self, s: np.ndarray, control: bool = False) -> np.ndarray:
        """B·C(S): per-example gradient covariance, averaged over w ~ (mean, S)."""
        x, h = self.x.numpy(), self.hessian.numpy()
        spread = np.einsum("ni,nj,n->ij", x, x, np.einsum("ni,ij,nj->n", x, s, x)) / N - h @ s @ h
        return spread + (0.0 if control else 1.0) * self.noise_at_mean


@cache
def problem() -> Problem:
    return Problem()


# --- The laws -------------------------------------------------------------------------------


def lyapunov(
    a: np.ndarray, q: np.ndarray, b: np.ndarray, batch: int | None, control: bool = False
) -> np.ndarray:
    """S of x ← A x + B η + ζ, η's covariance C(S) by fixed-point iteration."""
    s = np.zeros_like(a)
    for _ in range(12 if batch else 1):
        c = problem().noise(s[:D, :D], control) / batch if batch else np.zeros((D, D))
        s = solve_discrete_lyapunov(a, b @ c @ b.T + q)
    return s


def langevin(h: float, batch: int | None, g: np.ndarray = EYE, control: bool = False) -> np.ndarray:
    """θ ← θ − hG g + √(2hG/N) z; full batch: (1/N)(K − hKGK/2)⁻¹."""
    return lyapunov(EYE - h * g @ problem().k, 2 * h / N * g, h * g, batch, control)


def of_psgld(sampler: Sampler, h: float, batch: int | None) -> np.ndarray:
    """Given its frozen G a chain has mean θ̂ and the law of G: the mixture has their mean."""
    metrics = sampler.metric(torch.zeros(CHAINS, D, dtype=torch.float64))
    assert metrics is not None
    return np.mean([langevin(h, batch, np.diag(g)) for g in metrics[:200].numpy()], 0)


def of_frozen_rank1(sampler: Sampler, h: float, batch: int | None) -> np.ndarray:
    assert isinstance(sampler, Rank1)
    u = unit(sampler.memory["m"])[:200].numpy()
    return np.mean([langevin(h, batch, EYE + sampler.c * np.outer(v, v)) for v in u], 0)


def of_cross_chain(sampler: Sampler, h: float, batch: int | None) -> np.ndarray:
    """S = E_u[(I − hPK) S (I − hPK)ᵀ + h² P C P] + (2h/N) E[P], u from another chain's gradient."""
    assert isinstance(sampler, Rank1)
    p, s, rng = problem(), langevin(h, batch), generator(11)
    z = torch.randn(20_000, D, generator=rng, dtype=torch.float64)
    rows = torch.randint(N, (20_000, batch), generator=rng) if batch else None
    for _ in range(4):
        w = p.mean + z @ torch.from_numpy(np.linalg.cholesky(s)).T
        u = unit(p.gradient(w, rows) + w / (N * PRIOR_STD**2)).numpy()
        projector = EYE + sampler.c * u[:, :, None] * u[:, None, :]
        a = EYE - h * projector @ p.k
        c = p.noise(s) / batch if batch else np.zeros((D, D))
        q = (2 * h / N * projector + h**2 * projector @ c @ projector).mean(0)
        kron = np.einsum("mij,mkl->ikjl", a, a, optimize=True).reshape(D * D, D * D) / len(a)
        s = np.linalg.solve(np.eye(D * D) - kron, q.ravel()).reshape(D, D)
    return s


def euler(h: float, f: float, friction: float, batch: int | None) -> np.ndarray:
    """Covariance of (θ, v): noise strength f, friction ξ."""
    k, c = problem().k, 1 - friction
    a = np.block([[EYE - h * k, c * EYE], [-h * k, c * EYE]])
    return lyapunov(
        a, 2 * f * h / N * np.kron(np.ones((2, 2)), EYE), h * np.vstack([EYE] * 2), batch
    )


def of_sghmc(sampler: Sampler, h: float, batch: int | None) -> np.ndarray:
    assert isinstance(sampler, SGHMC)
    f, k = sampler.friction, problem().k
    if sampler.integrator == "euler":
        return euler(h, f, f, batch)[:D, :D]
    kick = np.vstack([(1 - f / 2) * EYE, (1 - f) * EYE])
    a = np.block([[EYE, (1 - f / 2) * EYE], [np.zeros((D, D)), (1 - f) * EYE]])
    a[:, :D] -= h * kick @ k
    q = f * (2 - f) * h / N * np.kron([[0.25, 0.5], [0.5, 1.0]], EYE)
    return lyapunov(a, q, h * kick, batch)[:D, :D]


def of_sgnht(sampler: Sampler, h: float, batch: int | None) -> np.ndarray:
    """SGHMC's law at the friction ξ at which the kinetic energy is T's: only its mean over
    directions is held, so on an anisotropic problem single directions stay hot or cold."""
    assert isinstance(sampler, SGNHT)
    f = sampler.friction

    def excess(xi: float) -> float:
        kinetic = np.trace(euler(h, f, xi, batch)[D:, D:]) / D
        return kinetic * (2 - xi) / 2 - h / N

    xi = brentq(excess, 0.5 * f, 1.8)
    assert isinstance(xi, float)
    return euler(h, f, xi, batch)[:D, :D]


def of_csgld(sampler: Sampler, h: float, batch: int | None) -> np.ndarray:
    """S ← (I − h_t K) S (I − h_t K) + h_t² C(S) + [sampling] 2h_t/N, at the end of a cycle."""
    assert isinstance(sampler, CSGLD)
    s, cycle = np.zeros((D, D)), sampler.cycle
    for t in range(20 * cycle.steps):
        h_t = h * cycle.factor(t)
        a = EYE - h_t * problem().k
        c = problem().noise(s) / batch if batch else np.zeros((D, D))
        s = a @ s @ a + h_t**2 * c + 2 * h_t / N * cycle.sampling(t) * EYE
    return s


# --- The samplers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A sampler, its steps (full batch, minibatch), warm-up, steps between draws, and law."""

    make: Callable[..., Sampler]
    steps: tuple[float, float] = (0.2, 0.05)
    warm: int = 150
    gap: int = 30
    options: dict[str, Any] = field(default_factory=dict)
    law: Callable[[Sampler, float, int | None], np.ndarray] = lambda _, h, batch: langevin(h, batch)


RANK1 = {"rho": 0.0, "sigma_dir": 0.5}
CROSS = {**RANK1, "u_mode": "cross_chain"}
CASES = {
    "sgld": Case(SGLD),
    "asgld": Case(ASGLD, (0.02, 0.05), 250, options={"burn_in": 50, "a": 0.2}),
    "psgld": Case(PSGLD, (0.05, 0.03), 300, options={"burn_in": 100, "lambd": 0.05}, law=of_psgld),
    "sghmc_euler": Case(SGHMC, options={"friction": 0.3}, law=of_sghmc),
    "sghmc_baoab": Case(SGHMC, options={"friction": 0.3, "integrator": "baoab"}, law=of_sghmc),
    "sgnht": Case(SGNHT, warm=600, options={"friction": 0.3}, law=of_sgnht),
    "csgld": Case(CSGLD, (0.2, 0.1), 180, 60, {"cycle_steps": 60}, of_csgld),
    "rank1_frozen": Case(Rank1, options={**RANK1, "burn_in": 50}, law=of_frozen_rank1),
    "rank1_cross_chain": Case(Rank1, options=CROSS, law=of_cross_chain),
}


@dataclass(frozen=True)
class Run:
    """Of 4 draws of each chain: covariance, errors of the mean in MCSE; T_eff at the end."""

    covariance: np.ndarray
    mean_errors: Tensor
    t_eff: float
    sampler: Sampler


def run(case: Case, batch: int | None, control: bool = False) -> Run:
    p, order, rng = problem(), generator(5), generator(4)
    spread = torch.randn(CHAINS, D, generator=rng, dtype=torch.float64) / N**0.5
    theta = (p.mean + spread).requires_grad_()
    sampler = case.make(
        [theta],
        step_size=case.steps[batch is not None],
        num_examples=N,
        prior_std=PRIOR_STD,
        chain_dim=0,
        generators=rng,
        **case.options,
    )
    anchor = p.mean.expand(CHAINS, D).clone().requires_grad_()
    reduced = Control([anchor], p.closure(anchor, None)) if control else None
    if reduced:
        reduced.params = [theta]
    draws = []
    for step in range(1, case.warm + 4 * case.gap + 1):
        rows = torch.randint(N, (CHAINS, batch), generator=order) if batch else None
        closure = p.closure(theta, rows)
        sampler.step(reduced.closure(closure) if reduced else closure)
        if step == case.warm:
            sampler.watch(p.top.expand(CHAINS, D))
        elif step > case.warm and (step - case.warm) % case.gap == 0:
            draws.append(theta.detach().clone())
    stacked = torch.stack(draws) - p.mean
    per_chain = stacked.mean(0)
    errors = per_chain.mean(0) / (per_chain.std(0) / CHAINS**0.5)
    t_eff = sampler.stats["t_eff"].mean().item()
    return Run(np.cov(stacked.reshape(-1, D).T.numpy()), errors, t_eff, sampler)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
