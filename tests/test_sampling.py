"""Burn-in and collection: schedules, draws, traces, heat, chains alone; in float64.

Shapes: M chains, B examples of a chain's batch, N training examples, T draws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.data.synthetic import generate
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.objective import Objective, prior_groups
from bayesian_lora.samplers import SGLD, ControlVariate
from bayesian_lora.samplers.flat import unit
from bayesian_lora.samplers.schedules import BurnIn, Thinning
from bayesian_lora.sampling import Chains, Streams
from bayesian_lora.traces import Traces
from bayesian_lora.utils.lora_params import flatten
from bayesian_lora.utils.rng import chain_generators
from bayesian_lora.warm_start import StepReport

N, BATCH, BURN_IN = 24, 4, BurnIn(5, 0.08, 0.02)


@dataclass
class Run:
    """Chains set up, and what they reported and gave."""

    chains: Chains
    streams: Streams
    steps: list[StepReport] = field(default_factory=list)
    draws: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def model(self) -> ChainModel:
        return self.chains.objective.model

    def direction(self) -> Tensor:
        """A random unit vector for each chain."""
        flat = flatten(self.tensors())
        rng = torch.Generator().manual_seed(3)
        return unit(torch.randn(flat.shape, generator=rng, dtype=flat.dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.chain_parameters().items()}

    def keep(self, draw: int) -> None:
        assert draw not in self.draws
        self.draws[draw] = self.tensors()

    def run(self, on_step: Callable[[StepReport], None] = lambda _: None) -> "Run":
        def both(report: StepReport) -> None:
            self.steps.append(report)
            on_step(report)

        self.chains.run_burn_in(both)
        self.chains.collect(both, self.keep)
        return self


SetUp = Callable[..., Run]


@pytest.fixture
def set_up(tiny_models: dict[str, Path]) -> SetUp:
    """Chains by their global numbers, so that some of them can be run alone."""
    folder = tiny_models["bert"]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def build(
        numbers: list[int],
        *,
        burn_in: BurnIn = BURN_IN,
        thin: int = 4,
        draws: int = 5,
        trace_every: int = 3,
        temperature: float = 1.0,
        batch_size: int = BATCH,
        dropout: float = 0.0,
    ) -> Run:
        model = build_huggingface_lora_model(
            str(folder),
            rank=2,
            dropout=dropout,
            chains=len(numbers),
            generators=chain_generators(0, numbers, "init"),
            dtype="float64",
        )
        sets = [generate("train", size=N), generate("validation", size=3)]
        train, probe = (TokenisedSet(examples, tokenizer, 64) for examples in sets)
        objective, groups = Objective(model, train, "categorical"), prior_groups(model, 0.2, 0.5)
        streams = Streams(*(chain_generators(0, numbers, p) for p in ("o", "d", "b", "n", "h")))
        sampler = SGLD(
            [{"params": list(g.tensors), "prior_std": g.std} for g in groups],
            step_size=burn_in.end,
            num_examples=N,
            temperature=temperature,
            chain_dim=0,
            generators=streams.noise,
        )
        chains = Chains(
            objective,
            sampler,
            BatchOrder(N, batch_size, streams.order),
            burn_in,
            Thinning(thin, draws),
            Traces(objective, groups, probe, train, seed=0),
            trace_every,
        )
        return Run(chains, streams)

    return build


def assert_same_draws(found: Run, expected: Run, atol: float = 0.0) -> None:
    assert found.draws.keys() == expected.draws.keys()
    for draw, tensors in found.draws.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected.draws[draw][name], rtol=0, atol=atol)


def test_burn_in_follows_its_schedule(set_up: SetUp):
    run = set_up([0, 1])
    seen: list[set[float]] = []
    run.run(lambda _: seen.append({g["lr"] for g in run.chains.sampler.param_groups}))
    burn_in, rest = run.steps[:5], run.steps[5:]
    assert [(r.phase, r.step, r.total) for r in burn_in] == [
        ("burn_in", i + 1, 5) for i in range(5)
    ]
    assert [r.lr for r in burn_in] == pytest.approx([0.08 * 0.25 ** (i / 4) for i in range(5)])
    assert [r.lr for r in rest] == [0.02] * 20
    assert seen == [{r.lr} for r in run.steps]
    assert all(r.examples == 2 * BATCH and r.loss.shape == (2,) for r in run.steps)


def test_no_burn_in(set_up: SetUp):
    run = set_up([0], burn_in=BurnIn(0, 0.1, 0.02)).run()
    assert [r.phase for r in run.steps] == ["sampling"] * 20


def test_every_draw_is_the_state_after_thin_steps(set_up: SetUp):
    run = set_up([0, 1])
    states: list[dict[str, Tensor]] = []
    known: list[int] = []

    def on_step(_: StepReport) -> None:
        states.append(run.tensors())
        known.append(len(run.draws))

    run.run(on_step)
    assert [(r.phase, r.step, r.total) for r in run.steps[5:]] == [
        ("sampling", i + 1, 20) for i in range(20)
    ]
    assert list(run.draws) == [0, 1, 2, 3, 4]
    for draw, tensors in run.draws.items():
        after = states[5 + 4 * (draw + 1) - 1]
        assert all(torch.equal(tensor, after[name]) for name, tensor in tensors.items())
    # A step is reported before its draw is kept: the state it saves says which draws are.
    assert known[5:] == [i // 4 for i in range(20)]
    assert all(p.grad is None for p in run.model.parameters())


def test_the_step_is_sglds(set_up: SetUp):
    """One step by hand: i.i.d. rows, mean NLL, prior of each group, noise of each chain."""
    run = set_up([0, 1], burn_in=BurnIn(1, 0.1, 0.1))
    before, twin = run.tensors(), set_up([0, 1])
    rows = BatchOrder(N, BATCH, chain_generators(0, [0, 1], "o")).iid()
    twin.chains.objective.closure(rows)()
    run.chains.run_burn_in(lambda _: None)
    noise = {n: [] for n in before}
    names = [
        name
        for group in run.chains.sampler.param_groups
        for name, p in run.model.chain_parameters().items()
        if _in(p, group["params"])
    ]
    sizes = [before[name][0].numel() for name in names]
    for rng in chain_generators(0, [0, 1], "n"):
        flat = torch.empty(sum(sizes), dtype=torch.float64).normal_(generator=rng)
        for name, part in zip(names, flat.split(sizes), strict=True):
            noise[name].append(part.reshape(before[name].shape[1:]))
    for name, p in twin.model.chain_parameters().items():
        sigma = 0.5 if name.startswith("classifier") else 0.2
        assert p.grad is not None
        drift = p.grad + before[name] / (N * sigma**2)
        moved = before[name] - 0.1 * drift + math.sqrt(2 * 0.1 / N) * torch.stack(noise[name])
        torch.testing.assert_close(run.tensors()[name], moved, rtol=0, atol=1e-12)


def _in(tensor: Tensor, tensors: list[Tensor]) -> bool:
    return any(tensor is other for other in tensors)


def test_traces_are_recorded_every_so_many_steps(set_up: SetUp):
    run = set_up([0, 1])
    measured = []

    def on_step(report: StepReport) -> None:
        if report.phase == "sampling" and report.step % 3 == 0:
            measured.append(run.chains.traces.measure())

    run.run(on_step)
    columns = run.chains.traces.arrays()
    assert len(measured) == 6
    for name, column in columns.items():
        assert column.shape == (2, 6)
        np.testing.assert_array_equal(column, np.stack([row[name] for row in measured], axis=1))


def test_recording_does_not_disturb_the_draws(set_up: SetUp):
    often, seldom = set_up([0, 1], trace_every=1).run(), set_up([0, 1], trace_every=10).run()
    assert len(often.chains.traces.rows) == 20
    assert len(seldom.chains.traces.rows) == 2
    assert_same_draws(often, seldom)


def test_following_the_heat_does_not_disturb_the_draws(set_up: SetUp):
    without, watched = set_up([0, 1]).run(), set_up([0, 1])
    direction = watched.direction()
    watched.chains.sampler.watch(direction)
    watched.run()
    assert_same_draws(without, watched)
    assert without.chains.sampler.t_eff is None
    known = [r.t_eff is not None for r in watched.steps]
    # Of each phase's first step there is no difference yet; collection starts afresh.
    assert known == [False, *[True] * 4, False, *[True] * 19]
    assert watched.chains.objective.evaluations == 25


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_heat_is_the_gradients_variance(set_up: SetUp, batch_size: int):
    """150 steps at a θ that all but stands still, against all N gradients one by one."""
    still = BurnIn(0, 1e-9, 1e-9)
    run = set_up([0], burn_in=still, thin=150, draws=1, temperature=0.0, batch_size=batch_size)
    direction = run.direction()
    along = []
    for i in range(N):
        run.chains.objective.closure(np.array([[i]]))()
        along.append((run.chains.sampler.drift() * direction).sum().item())
    run.chains.sampler.watch(direction)
    run.chains.traces.record = dict  # type: ignore[method-assign]
    run.run()
    t_eff = run.chains.sampler.t_eff
    assert t_eff is not None
    expected = N * 1e-9 * np.var(along) / (2 * batch_size)
    assert t_eff.item() == pytest.approx(expected, rel=0.25)  # 150 differences: 10 % error


def test_the_control_variate_acts_on_every_batch(set_up: SetUp):
    """At θ*, which T = 0 and a tiny step leave all but unchanged, no batch differs."""
    still = BurnIn(0, 1e-9, 1e-9)
    run = set_up([0, 1], burn_in=still, temperature=0.0)
    full = run.chains.objective.closure(np.tile(np.arange(N), (2, 1)))
    run.chains.control = ControlVariate(run.model.chain_parameters().values(), full)
    norms = []
    run.run(lambda _: norms.append(run.chains.sampler.stats["drift_norm"]))
    torch.testing.assert_close(torch.stack(norms), norms[0].expand(20, 2), rtol=1e-6, atol=0)
    assert run.chains.objective.evaluations == 1 + 2 * 20


def test_dropout_does_not_act(set_up: SetUp):
    without, with_dropout = set_up([0, 1]).run(), set_up([0, 1], dropout=0.5)
    before = [g.get_state() for g in with_dropout.streams.dropout]
    assert_same_draws(with_dropout.run(), without)
    for state, rng in zip(before, with_dropout.streams.dropout, strict=True):
        assert torch.equal(state, rng.get_state())


def test_a_chain_runs_as_if_alone(set_up: SetUp):
    """Draws and traces."""
    together = set_up([0, 1, 2]).run()
    columns = together.chains.traces.arrays()
    for m in range(3):
        alone = set_up([m]).run()
        for draw, tensors in alone.draws.items():
            for name, tensor in tensors.items():
                expected = together.draws[draw][name][m : m + 1]
                torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-10)
        for name, column in alone.chains.traces.arrays().items():
            np.testing.assert_allclose(column[0], columns[name][m], rtol=0, atol=1e-8)
