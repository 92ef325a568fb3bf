"""Dropping chains and going on is going on and looking at the others: in float64, to 1e-10.

`sam_sgld_rank1` with `u_mode=cross_chain` is exempt: its directions come from other chains.
Shapes: M chains, N training examples, d parameters of one chain.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.synthetic import generate
from bayesian_lora.energy_range import LEAST, EnergyRange
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.objective import Objective, prior_groups
from bayesian_lora.samplers import SGHMC, base
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.control_variate import ControlVariate
from bayesian_lora.samplers.schedules import BurnIn, Thinning
from bayesian_lora.sampling import Chains, RunState, Streams
from bayesian_lora.traces import Traces
from bayesian_lora.utils.rng import chain_generators
from bayesian_lora.warm_start import StepReport, WarmStart

from .toys import CROSS, SAMPLERS, Toy, make

CHAINS = [0, 1, 2, 3]
KEPT = st.lists(st.sampled_from(CHAINS), min_size=1, max_size=3, unique=True).map(sorted)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


class Walk:
    """A toy under a sampler, with or without a watched direction and a control variate."""

    def __init__(self, name: str, grouped: bool, watched: bool, reduced: bool) -> None:
        self.toy = Toy(CHAINS)
        self.sampler = make(name, self.toy, self.toy.groups() if grouped else None)
        if watched:
            size = sum(p[0].numel() for p in self.toy.params)
            rows = [torch.randn(size, generator=g) for g in chain_generators(3, CHAINS, "w")]
            w = torch.stack(rows).double()
            self.sampler.watch(w / w.norm(dim=1, keepdim=True), curvature=0.3)
        self.control = ControlVariate(self.toy.params, self.toy.closure) if reduced else None

    def go(self, steps: int) -> list[Tensor]:
        losses = []
        for _ in range(steps):
            toy, control = self.toy, self.control
            closure = toy.closure if control is None else control.closure(toy.closure)
            losses.append(self.sampler.step(closure))
            self.toy.batch += 1
        return losses

    def keep(self, kept: Sequence[int]) -> None:
        for p in self.toy.params:
            p.data, p.grad = p.data[list(kept)].clone(), None
        self.toy.chains = [self.toy.chains[m] for m in kept]
        self.sampler.keep_chains(kept)
        if self.control is not None:
            self.control.keep(kept)


def check(name: str, kept: list[int], before: int, after: int, *options: bool) -> None:
    """`before` steps with all chains, `after` with those kept; the same as with all."""
    all_chains, some = Walk(name, *options), Walk(name, *options)
    all_chains.go(before)
    some.go(before)
    some.keep(kept)
    for ours, theirs in zip(some.go(after), all_chains.go(after), strict=True):
        assert_close(ours, theirs[kept])
    for ours, theirs in zip(some.toy.params, all_chains.toy.params, strict=True):
        assert_close(ours.detach(), theirs.detach()[kept])
    for stat, values in some.sampler.stats.items():
        assert_close(values, all_chains.sampler.stats[stat][kept])
    ours, theirs = some.sampler.memory, all_chains.sampler.memory
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, Tensor):
            assert_close(value, theirs[key][kept])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != CROSS])
@given(KEPT, st.integers(0, 7), st.integers(1, 6), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=6, deadline=None)
def test_dropping_a_chain_commutes_with_stepping(
    name: str,
    kept: list[int],
    before: int,
    after: int,
    grouped: bool,
    watched: bool,
    reduced: bool,
) -> None:
    check(name, kept, before, after, grouped, watched, reduced)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != CROSS])
def test_the_same_where_everything_is_on(name: str, reduced: bool) -> None:
    """Dropped in burn-in and after it, twice, with a watched direction."""
    for before in (1, 5):
        check(name, [1, 3], before, 4, True, True, reduced)
        check(name, [2], before, 4, False, True, reduced)


def test_cross_chain_is_rightly_exempt() -> None:
    """Its chains do depend on one another, and the comparison sees it."""
    with pytest.raises(AssertionError):
        check(CROSS, [0, 2], 3, 2, False, False, False)


@pytest.mark.parametrize("name", ["sghmc", "psgld", "sgnht"])
def test_a_memory_cut_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = base.keep_rows
    monkeypatch.setattr(base, "keep_rows", lambda value, kept: right(value, range(len(kept))))
    with pytest.raises(AssertionError):
        check(name, [1, 3], 5, 4, False, False, False)


@given(KEPT, st.integers(0, 3 * LEAST), st.integers(0, 2**32))
@settings(deadline=None)
def test_energy_ranges(kept: list[int], drop_at: int, seed: int) -> None:
    burn_in, steps = 2 * LEAST, 3 * LEAST
    ours, theirs = (EnergyRange(len(CHAINS), burn_in) for _ in range(2))
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(steps, 2, len(CHAINS), generator=rng)
    rows[burn_in:] += 100 * (torch.rand(len(CHAINS), generator=rng) > 0.5)  # some chains depart
    told, expected = [], []
    for step, (loss, prior) in enumerate(rows):
        if step == drop_at:
            ours.keep(kept)
        mine = (loss[kept], prior[kept]) if step >= drop_at else (loss, prior)
        ours.record(*mine, step)
        theirs.record(loss, prior, step)
        told += [
            (kept[d.chain] if step >= drop_at else d.chain, d.step, d.energy) for d in ours.take()
        ]
        expected += [(d.chain, d.step, d.energy) for d in theirs.take()]
    left = {step for _, step, _ in expected}
    assert [d for d in told if d[0] in kept] == [d for d in expected if d[0] in kept]
    assert left <= set(range(steps + 1))
    if drop_at < steps:
        assert_close(ours.mean, theirs.mean[kept])
        assert_close(ours.sd, theirs.sd[kept])
        assert_close(ours.now, theirs.now[kept])
        assert torch.equal(ours.reported, theirs.reported[kept])


def streams_of(numbers: Sequence[int]) -> Streams:
    names = ("order", "dropout", "batches", "noise", "probe")
    return Streams(**{name: chain_generators(0, numbers, name) for name in names})


@given(KEPT)
@settings(deadline=None, max_examples=20)
def test_streams(kept: list[int]) -> None:
    """Those kept are those of chains that had always been alone."""
    some, alone = streams_of(CHAINS).keep(kept), streams_of(kept)
    drawn = [[torch.rand(3, generator=g) for g in streams.all()] for streams in (some, alone)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert len(some.all()) == 5 * len(kept)


N, BATCH, EPOCHS, BURN_IN, THIN, DRAWS = 14, 6, 3, 3, 2, 2
PER_EPOCH = 3
Build = Callable[[bool], RunState]


@pytest.fixture(scope="module")
def build(tiny_models: dict[str, Path]) -> Build:
    """A warm start and then chains under SGHMC with a control variate, of three chains."""
    folder = tiny_models["bert"]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenised(examples: Examples, regression: bool) -> TokenisedSet:
        if regression:
            labels = np.array([len(text) / 20 for text in examples.texts[0]], dtype=np.float32)
            examples = Examples(examples.texts, labels, examples.ids)
        return TokenisedSet(examples, tokenizer, 64)

    def make_state(regression: bool) -> RunState:
        outputs, numbers = (1 if regression else 2), [0, 1, 2]
        inits = chain_generators(0, numbers, "init")
        options: dict[str, Any] = {"rank": 2, "dropout": 0.2, "dtype": "float64"}
        model = build_huggingface_lora_model(
            str(folder), outputs, chains=3, generators=inits, **options
        )
        train, held_out = (
            tokenised(generate(split, size=size), regression)
            for split, size in (("train", N), ("validation", 6))
        )
        objective = Objective(model, train, "gaussian" if regression else "categorical")
        state = RunState(model, objective, streams_of(numbers))
        state.warm = WarmStart(
            objective,
            prior_groups(model, 0.2, 0.5),
            BatchOrder(N, BATCH, state.streams.order),
            epochs=EPOCHS,
            lr=0.02,
            validation=held_out,
            early_stopping=True,
            dropout=state.streams.dropout,
        )
        return state

    return make_state


def sampling(state: RunState) -> Chains:
    """The second phase of the chains that are left."""
    groups = prior_groups(state.model, 0.2, 0.5)
    objective, chains = state.objective, state.model.num_chains
    assert state.warm is not None
    validation = state.warm.validation
    assert validation is not None
    sampler: Sampler = SGHMC(
        [{"params": list(g.tensors), "prior_std": g.std} for g in groups],
        step_size=0.02,
        num_examples=N,
        chain_dim=0,
        generators=state.streams.noise[:chains],
    )
    every = np.tile(np.arange(N), (chains, 1))
    control = ControlVariate([p for g in groups for p in g.tensors], objective.closure(every))
    traces = Traces(objective, groups, validation, validation, seed=0)
    order = BatchOrder(N, BATCH, state.streams.batches[:chains])
    thinning = Thinning(THIN, DRAWS)
    state.warm = None
    return Chains(
        objective, sampler, order, BurnIn(BURN_IN, 0.03, 0.02), thinning, traces, 99, control
    )


def whole_run(state: RunState, drop_after: int | None, kept: list[int]) -> dict[str, Tensor]:
    """Warm start and sampling; after so many steps in all these chains go on alone."""
    done = [0]

    def on_step(report: StepReport) -> None:
        done[0] += 1
        if done[0] == drop_after:
            state.keep(kept)

    assert state.warm is not None
    state.warm.run(on_step, lambda report: None)
    whole = state.model.num_chains == 3
    if not whole:
        state.streams = state.streams.keep(kept)
    state.chains = sampling(state)
    state.chains.run_burn_in(on_step)
    state.chains.collect(on_step, lambda draw: None)
    assert done[0] == EPOCHS * PER_EPOCH + BURN_IN + THIN * DRAWS
    found: dict[str, Tensor] = {**state.model.chain_parameters()}
    if state.objective.log_noise is not None:
        found["log_noise"] = state.objective.log_noise
    return {name: tensor.detach().clone() for name, tensor in found.items()}


POINTS = [(1, [1, 2]), (4, [0, 2]), (6, [2]), (10, [1]), (14, [0, 2])]
FEW = [(False, 4, [0, 2]), (True, 14, [0, 2])]
ALL = [(regression, *point) for point in POINTS for regression in (False, True)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FEW]


@pytest.mark.parametrize(("regression", "drop_after", "kept"), [*FEW, *SLOW])
def test_a_run_of_fewer_chains_is_the_same_run(
    build: Build, regression: bool, drop_after: int, kept: list[int]
) -> None:
    """Dropped within an epoch, at its end, in burn-in, and while sampling; `RunState.keep`."""
    some = whole_run(build(regression), drop_after, kept)
    everyone = whole_run(build(regression), None, kept)
    assert some.keys() == everyone.keys()
    for name, tensor in some.items():
        assert_close(tensor, everyone[name][kept])
    assert any(float((t - t[:1]).abs().max()) > 1e-3 for t in everyone.values()), "chains differ"
