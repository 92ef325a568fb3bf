"""The samplers' common ground: flat tensors, noise, statistics, heat, state, arguments.

What is checked for every sampler is in `test_every_sampler.py`. Shapes: M chains, d parameters.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import SGLD
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.flat import Scale, chain_dot, require, unit
from bayesian_lora.utils.rng import chain_generators

from .toys import H, N, T, Toy, generator, make


class Still(Sampler):
    """Keeps what it is given, and does not move."""

    law = "none"

    def update(self, g: Tensor, h: Scale) -> None:
        self.seen = g, h
        self.add_noise(torch.zeros_like(g))


def still(params: Any, **options: Any) -> Still:
    return Still(params, **{"step_size": 0.05, "num_examples": 20, "chain_dim": 0, **options})


def stepped(sampler: Sampler, toy: Toy) -> Any:
    toy.advance(sampler, 1)
    return sampler


# --- Flat tensors ---------------------------------------------------------------------------


def test_the_drift_is_one_row_per_chain_in_the_order_of_the_groups():
    toy = Toy()
    a, b, c = toy.params
    groups = [{"params": [c], "prior_std": math.inf}, {"params": [a, b], "prior_std": 0.7}]
    g, _ = stepped(still(groups), toy).seen
    parts = [c.grad, a.grad + a / (20 * 0.49), b.grad + b / (20 * 0.49)]  # type: ignore[operator]
    torch.testing.assert_close(g, torch.cat([p.flatten(1) for p in parts], dim=1))


def test_statistics_are_global_over_a_chain():
    """One norm over all tensors of a chain, none across chains; the step sizes' mean over d."""
    toy = Toy()
    groups = [{"params": toy.params[:1]}, {"params": toy.params[1:], "lr": 0.01}]
    sampler = stepped(still(groups), toy)
    g, h = sampler.seen
    assert torch.equal(h, torch.tensor([0.05] * 12 + [0.01] * 11, dtype=torch.float64))
    torch.testing.assert_close(sampler.stats["drift_norm"], g.square().sum(1).sqrt())
    mean = (12 * 0.05 + 11 * 0.01) / 23
    assert sampler.stats["step_size"].tolist() == pytest.approx([mean] * 3)


def test_groups_that_agree_have_one_number():
    toy = Toy()
    _, h = stepped(still([{"params": [p]} for p in toy.params]), toy).seen
    assert h == 0.05
    assert isinstance(h, float)


@pytest.mark.parametrize("scale", [-0.3, torch.arange(23.0, dtype=torch.float64)])
def test_shift_moves_every_tensor(scale: Scale):
    toy = Toy()
    sampler = stepped(still(toy.params), toy)
    before = torch.cat([p.detach().flatten(1) for p in toy.params], dim=1)
    x = torch.randn(3, 23, generator=generator(0), dtype=torch.float64)
    with torch.no_grad():
        sampler.shift(x, scale)
    after = torch.cat([p.detach().flatten(1) for p in toy.params], dim=1)
    torch.testing.assert_close(after, before + scale * x)


def test_every_chain_draws_one_flat_row_from_its_own_generator():
    toy, rngs = Toy(), chain_generators(0, [0, 1, 2], "noise")
    sampler = make("sgld", toy)
    toy.closure()
    like = sampler.drift()
    assert like.shape == (3, 23)
    rows = [torch.empty(23, dtype=torch.float64).normal_(generator=g) for g in rngs]
    z = sampler.normal(like)
    assert torch.equal(z, torch.stack(rows))
    sampler.stats = {}
    with torch.no_grad():
        sampler.add_noise(0.3 * z)
    torch.testing.assert_close(sampler.stats["noise_norm"], 0.3 * z.norm(dim=1))
    for ours, theirs in zip(sampler.generators, rngs, strict=True):  # type: ignore[arg-type]
        assert torch.equal(ours.get_state(), theirs.get_state())


def test_one_generator_serves_all_chains():
    toy = Toy()
    sampler = make("sgld", toy, generators=generator(4))
    toy.closure()
    z = sampler.normal(sampler.drift())
    assert torch.equal(z, torch.empty_like(z).normal_(generator=generator(4)))


def test_chains_differ_by_their_generators_only():
    toy = Toy([5, 5])
    assert torch.equal(toy.params[0][0], toy.params[0][1])
    stepped(make("sgld", toy, generators=chain_generators(0, [0, 1], "noise")), toy)
    assert all(bool((p[0] != p[1]).all()) for p in toy.params)


def test_the_noise_unit():
    """s = √(2hT/N), by group where they differ."""
    toy = Toy()
    sampler = stepped(make("sgld", toy), toy)
    assert sampler.noise_std(H) == pytest.approx(math.sqrt(2 * H * T / N))
    groups = [{"params": toy.params[:1], "temperature": 2.0}, {"params": toy.params[1:]}]
    sampler = stepped(make("sgld", toy, groups), toy)
    stds = [math.sqrt(2 * H * 2.0 / N)] * 12 + [math.sqrt(2 * H * T / N)] * 11
    assert sampler.noise_std(H).tolist() == pytest.approx(stds)


def test_parameters_that_lose_their_gradient_are_an_error_where_they_are_remembered():
    toy = Toy()
    sampler = stepped(make("sghmc", toy), toy)

    def closure() -> Tensor:
        loss = toy.closure()
        toy.params[1].grad = None
        return loss

    with pytest.raises(ValueError, match=r"\(3, 23\) values before, \(3, 18\) now; make a new"):
        sampler.step(closure)


def test_small_helpers():
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert chain_dot(a, a).tolist() == [[25.0], [0.0]]
    torch.testing.assert_close(unit(a), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    require("x", 1.0, "fine", True)
    with pytest.raises(ValueError, match=r"^x=2\.0: must be < 1$"):
        require("x", 2.0, "< 1", False)


# --- Minibatch heat -------------------------------------------------------------------------


def test_watching_is_half_the_mean_square_of_successive_differences():
    theta = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    sampler = still([theta], temperature=0.5)
    g = torch.randn(5, 2, 3, generator=generator(0), dtype=torch.float64)
    w = unit(torch.randn(2, 3, generator=generator(1), dtype=torch.float64))
    sampler.watch(w)

    def closure() -> Tensor:
        theta.grad = g[sampler.memory["step"]].clone()
        return torch.zeros(2)

    assert sampler.t_eff is None
    sampler.step(closure)
    assert sampler.stats["t_eff"].isnan().all()  # one gradient has no variance
    assert sampler.t_eff is None
    for step in range(1, 5):
        sampler.step(closure)
        along = (g[: step + 1] * w).sum(2)
        variance = along.diff(dim=0).square().mean(0) / 2
        torch.testing.assert_close(sampler.stats["t_eff"], 0.5 + 20 * 0.05 * variance / 2)
    assert sampler.t_eff is sampler.stats["t_eff"]
    sampler.watch(sampler.memory["watch"]["direction"])
    assert sampler.t_eff is None
    assert torch.equal(sampler.memory["watch"]["direction"], w)


def test_the_direction_is_copied():
    toy, w = Toy(), torch.zeros(3, 23, dtype=torch.float64)
    w[:, 0] = 1.0
    sampler = make("sgld", toy)
    sampler.watch(w)
    w.zero_()
    toy.advance(sampler, 3)
    assert (sampler.stats["t_eff"] > T).all()


def test_groups_are_weighted_along_the_direction():
    """T and h of a watched direction are Σ w²T and Σ w²h."""
    theta = [torch.zeros(1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    groups = [
        {"params": theta[:1], "lr": 0.1, "temperature": 1.0},
        {"params": theta[1:], "lr": 0.2, "temperature": 3.0},
    ]
    sampler = still(groups)
    sampler.watch(torch.tensor([[0.6, 0.8]], dtype=torch.float64))

    def closure() -> Tensor:
        for p in theta:
            p.grad = torch.full((1, 1), float(sampler.memory["step"]), dtype=torch.float64)
        return torch.zeros(1)

    for _ in range(3):
        sampler.step(closure)
    t, h, variance = 0.36 + 0.64 * 3, 0.036 + 0.128, 1.4**2 / 2
    assert sampler.stats["t_eff"].item() == pytest.approx(t + 20 * h * variance / 2)


# --- State ----------------------------------------------------------------------------------


def test_memory_is_neither_cast_nor_shared():
    """torch would cast float64 state to the float32 of its parameter, and keep the same tensors."""
    sampler = still(Toy(dtype=torch.float32).params)
    moments = torch.tensor([1 / 3, 2 / 3, 1.0], dtype=torch.float64)
    sampler.memory |= {"moments": moments, "counts": torch.tensor([2**40 + 1, 3]), "name": "x"}
    saved = sampler.state_dict()
    fresh = still(Toy(dtype=torch.float32).params)
    fresh.load_state_dict(saved)
    assert fresh.memory["moments"].dtype == torch.float64
    assert torch.equal(fresh.memory["moments"], moments)
    assert torch.equal(fresh.memory["counts"], torch.tensor([2**40 + 1, 3]))
    assert fresh.memory["name"] == "x"
    fresh.memory["moments"].zero_()
    assert moments.sum() == 2
    assert saved["memory"]["moments"].sum() == 2


def test_loading_checks_the_generators():
    sampler = make("sgld", Toy())
    saved = sampler.state_dict()
    assert all(s.dtype == torch.uint8 for s in saved["generators"])
    saved["generators"] = saved["generators"][:1]
    with pytest.raises(ValueError, match="1 generator states for 3"):
        sampler.load_state_dict(saved)


def test_loading_leaves_the_given_state_alone():
    sampler = make("sgld", Toy())
    saved = sampler.state_dict()
    copied = copy.deepcopy(saved)
    sampler.load_state_dict(saved)
    assert saved.keys() == copied.keys()


# --- Arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": -0.1}, "step_size=-0.1"),
        ({"step_size": math.inf}, "step_size=inf"),
        ({"step_size": math.nan}, "step_size=nan"),
        ({"prior_std": -1.0}, "prior_std=-1.0"),
        ({"prior_std": math.nan}, "prior_std=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"num_examples": math.nan}, "num_examples=nan"),
        ({"generators": [torch.Generator()] * 4}, "4 generators for 3 chains"),
        ({"chain_dim": None, "generators": [torch.Generator()] * 2}, "2 generators for 1 chains"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str):
    """Those that `test_every_sampler.py` does not try."""
    with pytest.raises(ValueError, match=message):
        still(Toy().params, **options)


def test_chains_must_agree_in_number():
    scalar = torch.zeros((), requires_grad=True)
    with pytest.raises(ValueError, match="number of chains"):
        still([scalar])
    two, three = torch.zeros(2, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"number of chains: \[2, 3\]"):
        still([two, three])


def test_groups_are_checked_whenever_they_come():
    params = Toy().params
    with pytest.raises(ValueError, match="prior_std"):
        still([{"params": params, "prior_std": -1.0}])
    sampler = still(params[:1])
    with pytest.raises(ValueError, match="temperature"):
        sampler.add_param_group({"params": params[1:2], "temperature": -1.0})
    with pytest.raises(ValueError, match="number of chains"):
        sampler.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    assert len(sampler.param_groups) == 1  # a refused group is not kept


def test_the_base_has_no_rule_of_its_own():
    with pytest.raises(TypeError, match="abstract"):
        Sampler(Toy().params, step_size=0.1, num_examples=1)  # type: ignore[abstract]


def test_the_laws_of_the_plain_rule():
    sampler = SGLD(Toy().params, step_size=0.1, num_examples=1)
    assert sampler.stability == 2.0
    assert sampler.variance_factor(0.1, 4.0) == pytest.approx(1.25)
    assert sampler.relaxation_steps(0.1, 4.0) == pytest.approx(2.5)
