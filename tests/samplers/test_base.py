"""The samplers' common ground: chains and their generators, statistics, state, arguments.

Shapes: M chains, d parameters of a chain.
"""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import SGLD
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.utils.rng import chain_generators

SHAPES = ((3, 4), (5,), (2, 1, 3))  # of one chain's tensors


def start(chains: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Chain m's tensors, drawn from its own number: a list of (M, …)."""
    rngs = chain_generators(0, chains, "start")
    return [
        torch.stack([torch.randn(shape, generator=g, dtype=dtype) for g in rngs]).requires_grad_()
        for shape in SHAPES
    ]


def sgld(params: list[Tensor], chains: list[int], **options: Any) -> Sampler:
    settings = {"step_size": 0.05, "num_examples": 20, "prior_std": 0.7, "temperature": 0.5}
    generators = chain_generators(0, chains, "noise")
    return SGLD(params, **{**settings, "generators": generators, **options}, chain_dim=0)


def coupled_loss(params: list[Tensor]) -> Tensor:
    """A smooth loss (M,) that mixes a chain's tensors."""
    a, b, c = params
    first = (a.tanh().sum(1) - b[:, :4]).square().sum(1)
    return first + (c.flatten(1).sum(1) * b[:, 4]).cos()


def advance(sampler: Sampler, params: list[Tensor], steps: int) -> Tensor:
    def closure() -> Tensor:
        sampler.zero_grad()
        loss = coupled_loss(params)
        loss.sum().backward()
        return loss.detach()

    return [sampler.step(closure) for _ in range(steps)][-1]


def test_a_chain_moves_as_if_alone():
    together = start([0, 1, 2])
    sampler = sgld(together, [0, 1, 2])
    loss = advance(sampler, together, 50)
    assert loss.shape == (3,)
    for m in range(3):
        alone = start([m])
        single = sgld(alone, [m])
        advance(single, alone, 50)
        for ours, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(ours[0], whole[m], rtol=0, atol=1e-10)
        for name, value in single.stats.items():
            torch.testing.assert_close(value[0], sampler.stats[name][m], rtol=0, atol=1e-10)


def test_chains_differ():
    """The same start, the same loss: only the generators tell chains apart."""
    params = [p.detach()[:1].expand(2, *p.shape[1:]).clone() for p in start([0])]
    for p in params:
        p.requires_grad_()
    advance(sgld(params, [0, 1]), params, 1)
    assert all(bool((p[0] != p[1]).all()) for p in params)


def test_a_step_draws_one_flat_row_of_noise_per_chain():
    params, rngs = start([0, 1]), chain_generators(0, [0, 1], "noise")
    sampler = sgld(params, [0, 1])
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        sampler.add_noise(params, 0.3)
    flat = torch.stack([torch.empty(23, dtype=torch.float64).normal_(generator=g) for g in rngs])
    moved = torch.cat([(p - b).flatten(1) for p, b in zip(params, before, strict=True)], dim=1)
    torch.testing.assert_close(moved, 0.3 * flat)
    torch.testing.assert_close(sampler.stats["noise_norm"], 0.3 * flat.norm(dim=1))
    for ours, theirs in zip(sampler.generators, rngs, strict=True):  # type: ignore[arg-type]
        assert torch.equal(ours.get_state(), theirs.get_state())


def test_statistics_are_global_over_a_chain():
    """One norm over all tensors of a chain, none across chains."""
    params = start([0, 1])
    sampler = sgld(params, [0, 1], temperature=0.0)
    for p in params:
        p.grad = None
    loss = coupled_loss(params)
    grads = torch.autograd.grad(loss.sum(), params)
    drift = [(g + p / (20 * 0.7**2)).flatten(1) for g, p in zip(grads, params, strict=True)]
    expected = torch.cat(drift, dim=1).norm(dim=1)
    advance(sampler, params, 1)
    torch.testing.assert_close(sampler.stats["drift_norm"], expected)
    assert sampler.stats["noise_norm"].tolist() == [0.0, 0.0]
    assert sampler.stats["step_size"].tolist() == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("one_generator", [True, False])
def test_state_dict_continues_to_the_last_bit(one_generator: bool):
    def make(chains: list[int]) -> tuple[list[Tensor], Sampler]:
        params = start(chains, torch.float32)
        rng = torch.Generator().manual_seed(1)
        options = {"generators": rng} if one_generator else {}
        return params, sgld(params, chains, **options)

    params, sampler = make([0, 1])
    advance(sampler, params, 3)
    sampler.param_groups[0]["lr"] = 0.02
    file = io.BytesIO()
    torch.save({"params": params, "sampler": sampler.state_dict()}, file)
    advance(sampler, params, 5)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, fresh = make([0, 1])
    with torch.no_grad():
        for ours, old in zip(again, saved["params"], strict=True):
            ours.copy_(old)
    fresh.load_state_dict(saved["sampler"])
    assert fresh.param_groups[0]["lr"] == 0.02
    advance(fresh, again, 5)
    for ours, whole in zip(again, params, strict=True):
        assert torch.equal(ours, whole)


def test_state_is_neither_cast_nor_shared():
    """torch would cast float64 state to the float32 of its parameter, and keep the same tensors."""
    params = start([0, 1], torch.float32)
    sampler = sgld(params, [0, 1])
    moments = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    counts = torch.tensor([2**40 + 1, 3])
    sampler.state[params[1]] = {"moments": moments, "counts": counts, "steps": 7}
    saved = sampler.state_dict()
    fresh_params = start([0, 1], torch.float32)
    fresh = sgld(fresh_params, [0, 1])
    fresh.load_state_dict(saved)
    state = fresh.state[fresh_params[1]]
    assert state["moments"].dtype == torch.float64
    assert torch.equal(state["moments"], moments)
    assert torch.equal(state["counts"], counts)
    assert state["steps"] == 7
    assert fresh_params[0] not in fresh.state
    state["moments"].zero_()
    assert moments.sum() == 1
    assert all(s.dtype == torch.uint8 for s in saved["generators"])


def test_loading_checks_the_generators():
    sampler = sgld(start([0, 1]), [0, 1])
    saved = sampler.state_dict()
    saved["generators"] = saved["generators"][:1]
    with pytest.raises(ValueError, match="1 generator states for 2"):
        sampler.load_state_dict(saved)


def test_loading_leaves_the_given_state_alone():
    sampler = sgld(start([0]), [0])
    saved = sampler.state_dict()
    copied = copy.deepcopy(saved)
    sampler.load_state_dict(saved)
    assert saved.keys() == copied.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": -0.1}, "step_size"),
        ({"step_size": math.inf}, "step_size"),
        ({"step_size": math.nan}, "step_size"),
        ({"num_examples": 0}, "num_examples"),
        ({"prior_std": 0.0}, "prior_std"),
        ({"prior_std": -1.0}, "prior_std"),
        ({"prior_std": math.nan}, "prior_std"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"generators": []}, "0 generators for 2 chains"),
        ({"generators": [torch.Generator()] * 3}, "3 generators for 2 chains"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        sgld(start([0, 1]), [0, 1], **options)


def test_bad_chain_dimensions():
    with pytest.raises(ValueError, match="chain_dim=1"):
        SGLD(start([0]), step_size=0.1, num_examples=1, chain_dim=1)
    scalar = torch.zeros((), requires_grad=True)
    with pytest.raises(ValueError, match="number of chains"):
        SGLD([scalar], step_size=0.1, num_examples=1, chain_dim=0)
    two, three = torch.zeros(2, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"number of chains: \[2, 3\]"):
        SGLD([two, three], step_size=0.1, num_examples=1, chain_dim=0)
    with pytest.raises(ValueError, match="2 generators for 1 chains"):
        SGLD([two], step_size=0.1, num_examples=1, generators=[torch.Generator()] * 2)


def test_groups_are_checked_whenever_they_come():
    params = start([0, 1])
    with pytest.raises(ValueError, match="prior_std"):
        sgld([{"params": params, "prior_std": -1.0}], [0, 1])  # type: ignore[list-item]
    sampler = sgld(params[:1], [0, 1])
    with pytest.raises(ValueError, match="temperature"):
        sampler.add_param_group({"params": params[1:2], "temperature": -1.0})
    sampler = sgld(params[:1], [0, 1])
    with pytest.raises(ValueError, match="number of chains"):
        sampler.add_param_group({"params": [torch.zeros(3, requires_grad=True)]})


def test_the_base_has_no_rule_of_its_own():
    with pytest.raises(TypeError, match="abstract"):
        Sampler(start([0]), step_size=0.1, num_examples=1, chain_dim=0)  # type: ignore[abstract]
