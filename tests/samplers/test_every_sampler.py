"""What holds for every sampler, M chains of d parameters; the rules are in files of their own."""

import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora import samplers
from bayesian_lora.samplers.base import Sampler

from .toys import CROSS, CYCLE, SAM, SAMPLERS, SHAPES, SWITCH, H, Toy, generator, make

EVERY = pytest.mark.parametrize("name", SAMPLERS)
ALONE = [name for name in SAMPLERS if name != CROSS]
NEEDS_ONE = [name for name in SAMPLERS if name not in (CROSS, "sgnht")]  # T = 0, one chain
KEYS = {"drift_norm", "noise_norm", "step_size", "t_eff"}


def ones(chains: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A unit direction (M, d) to watch."""
    return torch.nn.functional.normalize(torch.ones(chains, 23, dtype=dtype), dim=1)


def run(name: str, chains: Sequence[int], steps: int = 50) -> tuple[Toy, Sampler]:
    toy = Toy(chains)
    sampler = make(name, toy)
    sampler.watch(ones(len(chains)))
    toy.advance(sampler, steps)
    return toy, sampler


@pytest.mark.parametrize("name", ALONE)
def test_a_chain_moves_as_if_alone(name: str):
    together, whole = run(name, [0, 1, 2])
    for m in range(3):
        alone, single = run(name, [m])
        for ours, theirs in zip(alone.params, together.params, strict=True):
            torch.testing.assert_close(ours[0], theirs[m], rtol=0, atol=1e-10)
        for key, value in single.stats.items():
            assert value.shape == (1,)
            torch.testing.assert_close(value[0], whole.stats[key][m], rtol=0, atol=1e-10)


def test_chains_that_are_coupled_are_seen():
    """The same check, of the one rule that couples them."""
    three, two = run(CROSS, [0, 1, 2])[0], run(CROSS, [0, 1])[0]
    assert (three.params[0][0] - two.params[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALONE)
def test_one_chain_dimension_or_none_is_the_same_chain(name: str):
    """Chain 0 of one, and its tensors without the leading dimension."""
    toy, bare = Toy([0]), Toy([0])
    bare.params = bare.used = [p.detach()[0].clone().requires_grad_() for p in bare.params]
    bare.chain_dim = None

    def closure() -> Tensor:
        for p in bare.params:
            p.grad = None
        loss = bare.loss(bare.params, 0, bare.batch)
        loss.backward()
        return loss.detach()

    sampler = make(name, bare)
    toy.advance(make(name, toy), 8)
    for _ in range(8):
        assert sampler.step(closure).shape == ()
        bare.batch += 1
    for ours, theirs in zip(bare.params, toy.params, strict=True):
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-12)


@EVERY
def test_two_equal_groups_are_one_group(name: str):
    """To the last bit: norms and noise are of the chain, not of a group."""
    toy, twin = Toy(), Toy()
    toy.advance(make(name, toy), 8)
    split = [{"params": twin.params[:1]}, {"params": twin.params[1:]}]
    twin.advance(make(name, twin, split), 8)
    assert all(torch.equal(p, q) for p, q in zip(toy.params, twin.params, strict=True))


@EVERY
def test_groups_that_differ_a_little_differ_a_little(name: str):
    """Values by coordinate and one value for all are the same arithmetic, to rounding."""
    toy, twin = Toy(), Toy()
    toy.advance(make(name, toy), 8)
    nearly = {"temperature": 0.5 * (1 + 1e-14), "lr": H * (1 + 1e-14), "prior_std": 0.7}
    split = [{"params": twin.params[:1]}, {"params": twin.params[1:], **nearly}]
    twin.advance(make(name, twin, split), 8)
    for p, q in zip(toy.params, twin.params, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


@pytest.mark.parametrize("one_generator", [False, True])
@pytest.mark.parametrize("steps", [SWITCH - 1, SWITCH + 2])
@EVERY
def test_state_dict_continues_to_the_last_bit(name: str, steps: int, one_generator: bool):
    """float32 parameters, saved in burn-in and after it, read with ``weights_only``."""
    options: dict[str, Any] = {"generators": generator(1)} if one_generator else {}
    toy = Toy(dtype=torch.float32)
    sampler = make(name, toy, **options)
    sampler.watch(ones(3, torch.float32))
    sampler.memory["own"] = torch.full((3, 23), 1 / 3, dtype=torch.float64)
    toy.advance(sampler, steps)
    sampler.param_groups[0]["lr"] = 0.03
    file = io.BytesIO()
    torch.save({"params": toy.params, "sampler": sampler.state_dict()}, file)
    toy.advance(sampler, 6)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Toy(dtype=torch.float32)
    fresh = make(name, again, **({"generators": generator(9)} if one_generator else {}))
    with torch.no_grad():
        for ours, old in zip(again.params, saved["params"], strict=True):
            ours.copy_(old)
    fresh.load_state_dict(saved["sampler"])
    assert fresh.memory["step"] == steps
    assert fresh.param_groups[0]["lr"] == 0.03
    assert torch.equal(fresh.memory["own"], sampler.memory["own"])
    assert fresh.memory["watch"]["sum"].dtype == torch.float64
    again.batch = steps
    again.advance(fresh, 6)
    assert all(torch.equal(p, q) for p, q in zip(again.params, toy.params, strict=True))
    assert all(torch.equal(fresh.stats[key], value) for key, value in sampler.stats.items())


@EVERY
def test_a_state_dict_is_a_snapshot(name: str):
    """Later steps do not change it, and it is not changed by being loaded and stepped from."""
    toy = Toy()
    sampler = make(name, toy)
    toy.advance(sampler, 2)
    saved, file = sampler.state_dict(), io.BytesIO()
    torch.save(saved, file)
    toy.advance(sampler, 2)
    sampler.load_state_dict(saved)
    toy.advance(sampler, 2)
    file.seek(0)
    first = torch.load(file, weights_only=True)["memory"]
    assert first.keys() == saved["memory"].keys()
    for key, value in first.items():
        other = saved["memory"][key]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def same_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Of the generators."""
    pairs = zip(one["generators"], other["generators"], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# --- Statistics and the closure -------------------------------------------------------------


@EVERY
def test_statistics_are_one_value_a_chain_and_draw_nothing(name: str):
    toy, watched = Toy(), Toy()
    sampler, other = make(name, toy), make(name, watched)
    other.watch(ones(3))
    toy.advance(sampler, 8)
    watched.advance(other, 8)
    assert all(torch.equal(p, q) for p, q in zip(toy.params, watched.params, strict=True))
    assert same_states(sampler.state_dict(), other.state_dict())
    own = {"friction"} if name == "sgnht" else {"perturbation_norm"} if name in SAM else set()
    assert sampler.stats.keys() == other.stats.keys() == KEYS | own
    assert all(value.shape == (3,) for value in sampler.stats.values())
    assert sampler.stats["t_eff"].isnan().all()
    assert (other.stats["t_eff"] > 0).all()
    factor = sampler.cycle.factor(7) if name == "csgld" else 1.0  # type: ignore[attr-defined]
    assert sampler.stats["step_size"].tolist() == pytest.approx([H * factor] * 3)


@EVERY
def test_the_closure_is_called_once_for_each_gradient(name: str):
    toy, enabled = Toy(), []
    sampler = make(name, toy)

    def closure() -> Tensor:
        enabled.append(torch.is_grad_enabled())
        return toy.closure()

    for step in range(1, SWITCH + 3):
        with torch.no_grad():
            here = torch.stack([toy.loss(toy.tensors(m), m, toy.batch) for m in range(3)])
            assert torch.equal(sampler.step(closure), here)
        assert enabled == [True] * (2 if name in SAM else 1) * step


@EVERY
def test_no_gradient_is_an_error(name: str):
    toy = Toy()
    with pytest.raises(ValueError, match=r"no parameter has a gradient: .* call .backward\(\)"):
        make(name, toy).step(lambda: torch.zeros(3))


@EVERY
def test_an_infinitely_wide_prior_has_no_drift(name: str):
    """To the last bit that of a prior of σ = 1e100; a narrow one is different."""
    ends = []
    for sigma in (math.inf, 1e100, 1.0):
        toy = Toy()
        toy.advance(make(name, toy, prior_std=sigma), 8)
        ends.append(toy.params)
    assert all(torch.equal(p, q) for p, q in zip(ends[0], ends[1], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(ends[0], ends[2], strict=True))


@pytest.mark.parametrize("name", NEEDS_ONE)
def test_zero_temperature_draws_nothing(name: str):
    toy = Toy()
    sampler = make(name, toy, temperature=0.0)
    before = sampler.state_dict()
    toy.advance(sampler, CYCLE)
    assert same_states(before, sampler.state_dict())
    assert sampler.stats["noise_norm"].tolist() == [0.0] * 3


@EVERY
def test_torch_schedulers_set_the_step_size(name: str):
    """To the last bit as if set by hand."""
    toy, twin = Toy(), Toy()
    sampler, plain = make(name, toy), make(name, twin)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sampler, gamma=0.5)
    for step in range(8):
        toy.advance(sampler, 1)
        scheduler.step()
        plain.param_groups[0]["lr"] = H * 0.5**step
        twin.advance(plain, 1)
        assert all(torch.equal(p, q) for p, q in zip(toy.params, twin.params, strict=True))
        assert torch.equal(sampler.stats["step_size"], plain.stats["step_size"])


@EVERY
def test_half_precision_is_the_same_rule(name: str):
    """bfloat16 (8 bits) against float64 from θ = 0 with the same gradients and noise."""
    ends = []
    for dtype in (torch.float64, torch.bfloat16):
        toy, rng = Toy(), generator(0)
        toy.params = [torch.zeros(3, *s, dtype=dtype, requires_grad=True) for s in SHAPES]
        sampler = make(name, toy)
        z = [torch.randn(3, 23, generator=rng, dtype=torch.float64) for _ in range(6)]
        pull = [torch.randn(3, *s, generator=rng, dtype=torch.float64) for s in SHAPES]
        sampler.normal = lambda like, z=z, s=sampler: z[s.memory["step"]].to(like.dtype)

        def closure(toy: Toy = toy, pull: list[Tensor] = pull) -> Tensor:
            for p, g in zip(toy.params, pull, strict=True):
                p.grad = g.to(p.dtype)
            return torch.zeros(3)

        for _ in range(6):
            sampler.step(closure)
        assert all(p.dtype == dtype for p in toy.params)
        ends.append(torch.cat([p.detach().double().flatten(1) for p in toy.params], dim=1))
    error = (ends[1] - ends[0]).abs().max() / ends[0].abs().max()
    assert 0 < error < 0.03  # six steps of rounding by up to .004


@EVERY
def test_memory_of_half_precision_parameters_is_float32(name: str):
    """In 8 bits a moving average of memory .999 never falls: .999 V rounds to V."""
    toy = Toy(dtype=torch.bfloat16)
    sampler = make(name, toy)
    toy.advance(sampler, SWITCH + 1)
    kept = [v for v in sampler.memory.values() if isinstance(v, Tensor)]
    assert all(v.dtype == torch.float32 for v in kept)
    assert sampler.stats["drift_norm"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size=0.0: must be finite and > 0"),
        ({"num_examples": 0}, "num_examples=0: N, the training set's size, is ≥ 1"),
        ({"prior_std": 0.0}, r"prior_std=0.0: must be > 0 \(math.inf: flat prior\)"),
        ({"temperature": -0.5}, "temperature=-0.5: must be"),
        ({"chain_dim": 1}, r"chain_dim=1: 0 \(leading dimension\) or None \(one chain\)"),
        ({"generators": []}, "0 generators for 3 chains: one for each"),
    ],
)
@EVERY
def test_bad_arguments(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(name, Toy(), **options)


def test_every_name_has_its_class():
    found = {getattr(samplers, cls) for cls in samplers.MODULES.values()}
    assert found == {kind for kind, _ in SAMPLERS.values()}
    assert set(samplers.__all__) == {*samplers.MODULES.values(), "ControlVariate"}
    with pytest.raises(AttributeError, match="no attribute 'Metropolis'"):
        _ = samplers.Metropolis  # type: ignore[attr-defined]
