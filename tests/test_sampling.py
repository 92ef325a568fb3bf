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

from bayesian_lora import sampling
from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.data.synthetic import generate
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.objective import Objective, prior_groups
from bayesian_lora.samplers import SGLD
from bayesian_lora.samplers.schedules import BurnIn, Thinning
from bayesian_lora.sampling import Chains, Streams, effective_temperature, hottest_direction
from bayesian_lora.traces import Traces
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
            BatchOrder(N, batch_size, streams.heat),
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
    # A step is reported after its draw is kept, so that what it saves is whole.
    assert known[5:] == [(i + 1) // 4 for i in range(20)]
    assert all(p.grad is None for p in run.model.parameters())


def test_the_step_is_sglds(set_up: SetUp):
    """One step by hand: i.i.d. rows, mean NLL, prior of each group, noise of each chain."""
    run = set_up([0, 1], burn_in=BurnIn(1, 0.1, 0.1))
    before, twin = run.tensors(), set_up([0, 1])
    rows = BatchOrder(N, BATCH, chain_generators(0, [0, 1], "o")).iid()
    twin.chains.objective.closure(rows)()
    run.chains.run_burn_in(lambda _: None)
    noise = {n: [] for n in before}
    for rng in chain_generators(0, [0, 1], "n"):
        for group in run.chains.sampler.param_groups:
            names = [n for n, p in run.model.chain_parameters().items() if _in(p, group["params"])]
            sizes = [before[n][0].numel() for n in names]
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


def test_measuring_heat_does_not_disturb_the_draws(set_up: SetUp, monkeypatch: pytest.MonkeyPatch):
    seldom = set_up([0, 1]).run()
    assert len(seldom.chains.t_eff) == 2
    probed = [r.t_eff is not None for r in seldom.steps]
    assert probed == [False] * 5 + [True, *[False] * 9] * 2
    monkeypatch.setattr(sampling, "HEAT_PROBES", 1000)
    monkeypatch.setattr(sampling, "HEAT_EVERY", 1)
    often = set_up([0, 1]).run()
    assert len(often.chains.t_eff) == 20
    assert_same_draws(often, seldom)
    assert often.chains.objective.evaluations == 25 + 2 * 20


def test_effective_temperature_is_the_one_the_chain_has():
    """Var = T_eff/(Nk) · 1/(1 − hk/2) on a quadratic whose batches' gradients vary by c/B."""
    n, batch, t, h, k, chains = 200, 5, 0.8, 0.1, 1.0, 40_000
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(n, generator=rng, dtype=torch.float64)
    theta = torch.zeros(chains, 1, dtype=torch.float64, requires_grad=True)
    options = {"step_size": h, "num_examples": n, "temperature": t, "chain_dim": 0}
    sampler = SGLD([theta], generators=rng, **options)

    def closure() -> Tensor:
        rows = torch.randint(n, (chains, batch), generator=rng)
        theta.grad = k * (theta.detach() - centres[rows].mean(1, keepdim=True))
        return torch.zeros(chains)

    for _ in range(80):
        sampler.step(closure)
    variance = torch.full((1,), float(centres.var(unbiased=False)) / batch)
    t_eff = effective_temperature(t, n, h, variance).item()
    assert t_eff > 3 * t
    expected = t_eff / (n * k) / (1 - h * k / 2)
    assert theta.detach().var().item() == pytest.approx(expected, rel=0.04)


def test_hottest_direction_holds_all_the_noise():
    """d coordinates, one of which has all the gradient variance v."""
    t, n, h, v, d = 0.5, 300, 0.02, 0.3, 40
    one = effective_temperature(t, n, h, torch.tensor([v])).item()
    mean = effective_temperature(t, n, h, torch.tensor([v / d])).item()
    assert hottest_direction(t, mean, d) == pytest.approx(one)
    assert one == pytest.approx(t + n * h * v / 2)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_measured_heat_is_the_gradients_variance(
    set_up: SetUp, batch_size: int, monkeypatch: pytest.MonkeyPatch
):
    """Mean of 150 probes at a θ that stands still against all N gradients, one by one."""
    monkeypatch.setattr(sampling, "HEAT_PROBES", 1000)
    monkeypatch.setattr(sampling, "HEAT_EVERY", 1)
    still = BurnIn(0, 1e-9, 1e-9)
    run = set_up([0], burn_in=still, thin=150, draws=1, temperature=0.0, batch_size=batch_size)
    gradients = []
    for i in range(N):
        run.chains.objective.closure(np.array([[i]]))()
        parts = [p.grad for p in run.model.chain_parameters().values() if p.grad is not None]
        gradients.append(torch.cat([g.flatten() for g in parts]))
    c = torch.stack(gradients).var(0, unbiased=False).mean().item()
    monkeypatch.setattr(run.chains.traces, "record", lambda: None)
    run.run()
    mean = torch.stack(run.chains.t_eff).mean().item()
    assert mean == pytest.approx(N * 1e-9 * c / (2 * batch_size), rel=0.15)


def test_dropout_does_not_act(set_up: SetUp):
    without, with_dropout = set_up([0, 1]).run(), set_up([0, 1], dropout=0.5)
    before = [g.get_state() for g in with_dropout.streams.dropout]
    assert_same_draws(with_dropout.run(), without)
    for state, rng in zip(before, with_dropout.streams.dropout, strict=True):
        assert torch.equal(state, rng.get_state())


def test_a_chain_runs_as_if_alone(set_up: SetUp):
    """Draws, traces and heat."""
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
        for ours, theirs in zip(alone.chains.t_eff, together.chains.t_eff, strict=True):
            torch.testing.assert_close(ours[0], theirs[m], rtol=1e-8, atol=0)
