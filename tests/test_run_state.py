"""A run stopped anywhere and resumed is the run itself; chains spread from one fit; in float64.

Shapes: M chains, N training examples, T draws.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.synthetic import generate
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.objective import Objective, prior_groups
from bayesian_lora.samplers import SGLD
from bayesian_lora.samplers.schedules import BurnIn, Thinning
from bayesian_lora.sampling import Chains, RunState, Streams, spread_start, widen_start
from bayesian_lora.traces import Traces
from bayesian_lora.utils.lora_params import flatten
from bayesian_lora.utils.rng import chain_generators
from bayesian_lora.warm_start import EpochReport, StepReport, WarmStart

N, BATCH, EPOCHS, BURN_IN, THIN, DRAWS = 24, 10, 4, 5, 4, 3
PER_EPOCH = 3


@dataclass
class Run:
    """A whole run, warm start and sampling, driven as a program would drive it."""

    state: RunState
    sets: tuple[TokenisedSet, TokenisedSet]
    steps: list[StepReport] = field(default_factory=list)
    epochs: list[EpochReport] = field(default_factory=list)
    draws: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {**self.state.model.chain_parameters()}
        if self.state.objective.log_noise is not None:
            tensors["log_noise"] = self.state.objective.log_noise
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def set_up_warm_start(self) -> WarmStart:
        state, streams = self.state, self.state.streams
        state.warm = WarmStart(
            state.objective,
            prior_groups(state.model, 0.2, 0.5),
            BatchOrder(N, BATCH, streams.order),
            epochs=EPOCHS,
            lr=0.02,
            validation=self.sets[1],
            early_stopping=True,
            both=True,
            patience=2,
            dropout=streams.dropout,
        )
        return state.warm

    def set_up_chains(self) -> Chains:
        state, streams = self.state, self.state.streams
        groups = prior_groups(state.model, 0.2, 0.5)
        sampler = SGLD(
            [{"params": list(g.tensors), "prior_std": g.std} for g in groups],
            step_size=0.02,
            num_examples=N,
            chain_dim=0,
            generators=streams.noise,
        )
        state.warm = None
        flat = torch.ones_like(flatten(dict(state.model.chain_parameters())).detach())
        sampler.watch(flat / flat.norm(dim=1, keepdim=True))
        state.chains = Chains(
            state.objective,
            sampler,
            BatchOrder(N, BATCH, streams.order),
            BurnIn(BURN_IN, 0.05, 0.02),
            Thinning(THIN, DRAWS),
            Traces(state.objective, groups, self.sets[1], self.sets[0], seed=0),
            3,
        )
        return state.chains

    def go(
        self,
        on_step: Callable[[StepReport], None] = lambda _: None,
        resume: dict[str, Any] | None = None,
    ) -> "Run":
        def both(report: StepReport) -> None:
            self.steps.append(report)
            on_step(report)

        def keep(draw: int) -> None:
            self.draws[draw] = self.tensors()

        if resume is None or resume["chains"] is None:
            warm = self.set_up_warm_start()
            if resume is not None:
                self.state.load_state_dict(resume)
            warm.run(both, self.epochs.append)
            resume = None
        chains = self.set_up_chains()
        if resume is not None:
            self.state.load_state_dict(resume)
        chains.run_burn_in(both)
        chains.collect(both, keep)
        self.columns = chains.traces.arrays()
        return self


SetUp = Callable[..., Run]


@pytest.fixture(scope="module")
def set_up(tiny_models: dict[str, Path]) -> SetUp:
    """`model_chains` are in the model at first, `numbers` have streams."""
    folder = tiny_models["bert"]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def build(regression: bool, numbers: list[int], model_chains: list[int] | None = None) -> Run:
        model_chains = model_chains or numbers
        model = build_huggingface_lora_model(
            str(folder),
            1 if regression else 2,
            rank=2,
            dropout=0.2,
            chains=len(model_chains),
            generators=chain_generators(0, model_chains, "init"),
            dtype="float64",
        )
        examples = [generate("train", size=N), generate("validation", size=9)]
        if regression:
            examples = [
                Examples(e.texts, np.array([len(t) for t in e.texts[0]], np.float32) / 20, e.ids)
                for e in examples
            ]
        train, held_out = (TokenisedSet(e, tokenizer, 64) for e in examples)
        objective = Objective(model, train, "gaussian" if regression else "categorical")
        streams = Streams(*(chain_generators(0, numbers, p) for p in ("o", "d", "b", "n", "h")))
        return Run(RunState(model, objective, streams), (train, held_out))

    return build


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_end(again: Run, whole: Run, after: int) -> None:
    """`again` made the steps of `whole` that come after number `after`, to the last bit."""
    assert len(again.steps) == len(whole.steps) - after
    for ours, theirs in zip(again.steps, whole.steps[after:], strict=True):
        assert (ours.phase, ours.step, ours.lr) == (theirs.phase, theirs.step, theirs.lr)
        assert torch.equal(ours.loss, theirs.loss)
    for epoch in again.epochs:
        assert torch.equal(epoch.train_loss, whole.epochs[epoch.epoch].train_loss)
    for draw, tensors in again.draws.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, whole.draws[draw][name]), (draw, name)
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name
    for name, column in again.columns.items():
        np.testing.assert_array_equal(column, whole.columns[name])
    assert again.state.chains is not None
    assert whole.state.chains is not None
    ours, theirs = again.state.chains.sampler.t_eff, whole.state.chains.sampler.t_eff
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs)
    assert again.state.objective.evaluations == whole.state.objective.evaluations
    pairs = zip(again.state.streams.all(), whole.state.streams.all(), strict=True)
    assert all(torch.equal(ours.get_state(), theirs.get_state()) for ours, theirs in pairs)


POINTS = [
    ("map", 1),
    ("map", PER_EPOCH),  # an epoch's end: its validation counts
    ("map", 2 * PER_EPOCH + 2),
    ("map", EPOCHS * PER_EPOCH),
    ("burn_in", 2),
    ("burn_in", BURN_IN),
    ("sampling", 3),  # a row of the traces
    ("sampling", 2 * THIN),  # a draw
    ("sampling", 2 * THIN + 2),
    ("sampling", THIN * DRAWS),
]
CASES = [(False, point) for point in POINTS] + [(True, point) for point in POINTS[1:8:2]]


@pytest.fixture(scope="module")
def whole_runs(set_up: SetUp) -> dict[bool, tuple[Run, dict[tuple[str, int], dict[str, Any]]]]:
    """A run not stopped, and its state after every step, for each task."""
    found = {}
    for regression in (False, True):
        run, states = set_up(regression, [0, 1]), {}
        run.go(lambda r, run=run, at=states: at.update({(r.phase, r.step): run.state.state_dict()}))
        assert list(run.draws) == [0, 1, 2]
        found[regression] = run, states
    return found


@pytest.mark.parametrize(("regression", "point"), CASES)
def test_a_resumed_run_is_the_run(
    regression: bool,
    point: tuple[str, int],
    set_up: SetUp,
    whole_runs: dict[bool, tuple[Run, dict[tuple[str, int], dict[str, Any]]]],
):
    """From memory, where later steps must not have written into the state, and from a file."""
    whole, states = whole_runs[regression]
    after = list(states).index(point) + 1
    # A state lacks the draw that its own step completed: it is kept right after, or on resuming.
    kept = (point[1] - 1) // THIN if point[0] == "sampling" else 0
    for through in (lambda state: state, through_a_file):
        again = set_up(regression, [0, 1]).go(resume=through(states[point]))
        assert_same_end(again, whole, after)
        assert list(again.draws) == list(range(kept, DRAWS))


def test_a_run_from_one_fit_is_resumed_too(set_up: SetUp):
    """The model is spread before the state is loaded; its tensors are then those of the state."""
    saved: list[dict[str, Any]] = []
    numbers = [0, 1, 2]

    def spread(seed: int) -> Run:
        run = set_up(True, numbers, [7])
        widen_start(run.state.model, run.state.objective, len(numbers))
        spread_start(run.state.model, 0.05, chain_generators(seed, numbers, "s"))
        return run

    def sample(run: Run, resume: dict[str, Any] | None) -> Run:
        chains = run.set_up_chains()
        if resume is not None:
            run.state.load_state_dict(resume)

        def on_step(report: StepReport) -> None:
            run.steps.append(report)
            if (report.phase, report.step) == ("sampling", 6):
                saved.append(run.state.state_dict())

        chains.run_burn_in(on_step)
        chains.collect(on_step, lambda draw: run.draws.update({draw: run.tensors()}))
        run.columns = chains.traces.arrays()
        return run

    whole = sample(spread(0), None)
    again = sample(spread(1), saved[0])
    assert_same_end(again, whole, BURN_IN + 6)
    assert list(again.draws) == [1, 2]


def start_from(run: Run, jitter: float, numbers: list[int]) -> None:
    generators = chain_generators(0, numbers, "start")
    widen_start(run.state.model, run.state.objective, len(numbers))
    spread_start(run.state.model, jitter, generators)


def test_spread_start(set_up: SetUp):
    """θ + jitter·z, each chain its own z, over all tensors but the noise scale."""
    run = set_up(True, [5])
    fitted = run.tensors()
    start_from(run, 0.07, [0, 1, 2])
    assert run.state.model.num_chains == 3
    spread = run.tensors()
    assert torch.equal(spread.pop("log_noise"), fitted["log_noise"].expand(3))
    z = torch.cat([((t - fitted[n]) / 0.07).flatten(1) for n, t in spread.items()], dim=1)
    d = z.shape[1]
    assert d > 500
    assert z.std(1).tolist() == pytest.approx([1, 1, 1], abs=4 / math.sqrt(2 * d))
    assert z.mean(1).abs().max() < 4 / math.sqrt(d)
    assert (torch.corrcoef(z) - torch.eye(3)).abs().max() < 4 / math.sqrt(d)

    alone = set_up(True, [5])
    start_from(alone, 0.07, [2])
    found = alone.tensors()
    assert all(torch.equal(found[name][0], tensor[2]) for name, tensor in spread.items())


def test_spread_start_without_jitter_is_the_fit(set_up: SetUp):
    run = set_up(False, [5])
    objective, fitted = run.state.objective, run.tensors()
    nll = objective.mean_nll(objective.data)
    start_from(run, 0.0, [0, 1])
    for name, tensor in run.tensors().items():
        assert torch.equal(tensor, fitted[name].expand_as(tensor))
    torch.testing.assert_close(objective.mean_nll(objective.data), nll.expand(2))
