"""What the tests of the samplers share: two small problems, all samplers, and rules by hand.

Shapes: M chains, d parameters of a chain. Units: `bayesian_lora.samplers.base`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.samplers import (
    ASGLD,
    CSGLD,
    PSGLD,
    SAMSGLD,
    SGHMC,
    SGLD,
    SGNHT,
    SAMSGLDRank1,
)
from bayesian_lora.samplers.base import Closure, Sampler
from bayesian_lora.utils.rng import chain_generators

N, H, SIGMA, T = 20, 0.02, 0.7, 0.5
SWITCH = 3  # steps of burn-in, so that eight steps see both sides of it
CYCLE = 6
RHO, LAMBD = 0.1, 1e-12  # of SAM

SAMPLERS: dict[str, tuple[type[Sampler], dict[str, Any]]] = {
    "sgld": (SGLD, {}),
    "psgld": (PSGLD, {"beta2": 0.9, "lambd": 1e-2, "burn_in": SWITCH}),
    "asgld": (ASGLD, {"a": 0.3, "beta2": 0.9, "burn_in": SWITCH}),
    "asgld constant": (ASGLD, {"a": 0.3, "beta2": 0.9, "anneal": False}),
    "sghmc": (SGHMC, {"friction": 0.3}),
    "sghmc baoab": (SGHMC, {"friction": 0.3, "integrator": "baoab"}),
    "sgnht": (SGNHT, {"friction": 0.3, "thermostat_rate": 0.05}),
    "csgld": (CSGLD, {"cycle_steps": CYCLE, "explore_fraction": 0.5}),
    "sam_sgld": (SAMSGLD, {"rho": RHO}),
    "rank1 frozen": (SAMSGLDRank1, {"rho": RHO, "burn_in": SWITCH}),
    "rank1 cross_chain": (SAMSGLDRank1, {"rho": RHO, "u_mode": "cross_chain"}),
    "rank1 current": (SAMSGLDRank1, {"rho": RHO, "u_mode": "current"}),
}
"""Every sampler and what its rule adds to the common options."""
SAM = [name for name, (kind, _) in SAMPLERS.items() if issubclass(kind, SAMSGLD)]
CROSS = "rank1 cross_chain"

GROUPED = ((0.02, 0.03, 0.01), (0.7, 0.4, math.inf), (0.5, 1.0, 0.2))  # h, σ, T by tensor
SHAPES = ((3, 4), (5,), (2, 1, 3))  # of one chain's tensors: d = 23


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def closure_of(theta: Tensor, mean_nll: Callable[[Tensor], Tensor]) -> Closure:
    """The closure of a loss θ (M, d) → (M,)."""

    def closure() -> Tensor:
        theta.grad = None
        loss = mean_nll(theta)
        loss.sum().backward()
        return loss.detach()

    return closure


def toy_loss(tensors: Sequence[Tensor], batch: int, chain: int) -> Tensor:
    """A smooth loss that mixes one chain's tensors; every chain has batches of its own."""
    a, b, c = tensors
    x = math.sin(1.0 + batch + 10 * chain)
    return (a.tanh().sum(0) - b[:4] - x).square().mean() + (c.sum() * b[4] + x).cos()


class Toy:
    """Chains with their own starts and batches; chain m is the same wherever it stands.

    Args:
        chains: global numbers of the chains.
        dtype: of the parameters.
    """

    chain_dim: int | None = 0

    def __init__(self, chains: Sequence[int] = (0, 1, 2), dtype: torch.dtype = torch.float64):
        self.chains = list(chains)
        self.batch = self.calls = 0
        rngs = chain_generators(0, chains, "start")
        draws = [[torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES] for g in rngs]
        self.params = [
            torch.stack(own).to(dtype).requires_grad_() for own in zip(*draws, strict=True)
        ]
        self.used = self.params

    def groups(self) -> list[dict[str, Any]]:
        """Three groups that differ in everything; `Hand` has the same values."""
        given = zip(self.params, *GROUPED, strict=True)
        return [{"params": [p], "lr": h, "prior_std": s, "temperature": t} for p, h, s, t in given]

    def loss(self, tensors: Sequence[Tensor], place: int, batch: int) -> Tensor:
        """Of the chain at `place`, whose tensors are given."""
        return toy_loss(tensors, batch, self.chains[place])

    def tensors(self, place: int) -> list[Tensor]:
        """A chain's used tensors, of the shapes `loss` takes."""
        return [p.detach()[place].clone() for p in self.used]

    def closure(self) -> Tensor:
        self.calls += 1
        for p in self.params:
            p.grad = None
        places = range(len(self.chains))
        losses = [self.loss([p[i] for p in self.used], i, self.batch) for i in places]
        loss = torch.stack(losses)
        loss.sum().backward()
        return loss.detach()

    def advance(self, sampler: Sampler, steps: int) -> None:
        for _ in range(steps):
            sampler.step(self.closure)
            self.batch += 1


class Plain(torch.nn.Module):
    """An ordinary model: a layer, a parameter without dimensions, one that the loss ignores."""

    def __init__(self) -> None:
        super().__init__()
        rng = generator(5)
        self.layer = torch.nn.Linear(4, 3).double()
        self.ignored = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))
        self.scale = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        with torch.no_grad():
            for p in self.layer.parameters():
                p.normal_(0, 0.5, generator=rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


class PlainToy(Toy):
    """One chain without a chain dimension: `Plain` in an ordinary loop."""

    chain_dim = None

    def __init__(self) -> None:
        self.chains, self.batch, self.calls = [0], 0, 0
        self.model = Plain()
        self.params = list(self.model.parameters())
        self.used = [self.model.layer.weight, self.model.layer.bias, self.model.scale]

    def groups(self) -> list[dict[str, Any]]:
        m = self.model
        params = ([m.layer.weight], [m.ignored, m.layer.bias], [m.scale])
        given = zip(params, *GROUPED, strict=True)
        return [{"params": p, "lr": h, "prior_std": s, "temperature": t} for p, h, s, t in given]

    def tensors(self, place: int) -> list[Tensor]:
        return [p.detach().clone() for p in self.used]

    def loss(self, tensors: Sequence[Tensor], place: int, batch: int) -> Tensor:
        weight, bias, scale = tensors
        x = torch.randn(6, 4, generator=generator(batch), dtype=torch.float64)
        return (scale * (x @ weight.T + bias)).tanh().square().sum(1).mean()

    def closure(self) -> Tensor:
        self.calls += 1
        self.model.zero_grad()
        x = torch.randn(6, 4, generator=generator(self.batch), dtype=torch.float64)
        loss = self.model(x).tanh().square().sum(1).mean()
        loss.backward()
        return loss.detach()


def make(name: str, toy: Toy, params: Any = None, **options: Any) -> Sampler:
    """The sampler of a name on a toy's parameters, or on groups of them."""
    kind, own = SAMPLERS[name]
    common = {
        "step_size": H,
        "num_examples": N,
        "prior_std": SIGMA,
        "temperature": T,
        "chain_dim": toy.chain_dim,
        "generators": chain_generators(0, toy.chains, "noise"),
    }
    return kind(toy.params if params is None else params, **{**common, **own, **options})


class Hand:
    """One chain, tensor by tensor, for a rule written out by hand.

    Attributes:
        theta: the chain's tensors; h, sigma, t: step size, σ and T of each.
        memory: what a rule keeps, a list of tensors under a name.
    """

    def __init__(self, toy: Toy, place: int, grouped: bool) -> None:
        self.toy, self.place, self.step = toy, place, 0
        self.theta = toy.tensors(place)
        self.rng = chain_generators(0, toy.chains, "noise")[place]
        self.h, self.sigma, self.t = GROUPED if grouped else ((H,) * 3, (SIGMA,) * 3, (T,) * 3)
        self.memory: dict[str, list[Tensor]] = {}

    @property
    def s(self) -> list[float]:
        """√(2hT/N) of each tensor."""
        return [math.sqrt(2 * h * t / N) for h, t in zip(self.h, self.t, strict=True)]

    def gradient(self, at: Sequence[Tensor] | None = None) -> list[Tensor]:
        """∇L_B."""
        tensors = [p.clone().requires_grad_() for p in (self.theta if at is None else at)]
        loss = self.toy.loss(tensors, self.place, self.step)
        return list(torch.autograd.grad(loss, tensors))

    def drift(self, at: Sequence[Tensor] | None = None) -> list[Tensor]:
        """∇L_B(at) + θ/(Nσ²), the prior at θ."""
        parts = zip(self.gradient(at), self.theta, self.sigma, strict=True)
        return [g + p / (N * sigma**2) for g, p, sigma in parts]

    def z(self) -> list[Tensor]:
        """One row of d normal numbers, cut into the tensors."""
        sizes = [p.numel() for p in self.theta]
        row = torch.empty(sum(sizes), dtype=self.theta[0].dtype).normal_(generator=self.rng)
        return [z.reshape(p.shape) for z, p in zip(row.split(sizes), self.theta, strict=True)]

    def kept(self, name: str) -> list[Tensor]:
        return self.memory.setdefault(name, [torch.zeros_like(p) for p in self.theta])


Rule = Callable[[Hand], None]


def norm(tensors: Sequence[Tensor]) -> float:
    """Over all tensors of a chain."""
    return math.sqrt(sum(float(x.square().sum()) for x in tensors))


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def perturbed(c: Hand, per_tensor: bool = False) -> list[Tensor]:
    """θ + e, e = ρ∇L_B/(‖∇L_B‖ + λ), the norm over all of the chain's tensors."""
    g = c.gradient()
    norms = [norm([x] if per_tensor else g) for x in g]
    return [p + RHO * x / (n + LAMBD) for p, x, n in zip(c.theta, g, norms, strict=True)]


SETTINGS = {"chains": (Toy, False), "groups": (Toy, True), "model": (PlainToy, True)}


def assert_follows(name: str, rule: Rule, setting: str, steps: int = 8, **options: Any) -> None:
    """The sampler moves every chain as the rule by hand does, in float64 to 1e-12.

    Args:
        setting: a key of `SETTINGS`: one group of chains, three groups, a model without chains.
    """
    kind, grouped = SETTINGS[setting]
    toy = kind()
    sampler = make(name, toy, toy.groups() if grouped else None, **options)
    hands = [Hand(toy, place, grouped) for place in range(len(toy.chains))]
    for step in range(steps):
        toy.advance(sampler, 1)
        for place, hand in enumerate(hands):
            rule(hand)
            hand.step += 1
            for ours, theirs in zip(toy.tensors(place), hand.theta, strict=True):
                torch.testing.assert_close(
                    ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, s=step: f"step {s}: {m}"
                )
    if isinstance(toy, PlainToy):
        assert torch.equal(toy.model.ignored.detach(), torch.ones(7, dtype=torch.float64))
