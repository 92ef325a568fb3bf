"""Burn-in and thinned collection of posterior draws; the run's whole state in one object.

Shapes: M chains, B examples of a chain's batch, d parameters of a chain.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.data.batching import BatchOrder
from bayesian_lora.energy_range import EnergyRange
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.monitoring.milestones import Milestones
from bayesian_lora.objective import Objective
from bayesian_lora.posterior import prior_energy
from bayesian_lora.samplers.base import Closure, Sampler
from bayesian_lora.samplers.control_variate import ControlVariate
from bayesian_lora.samplers.failures import Diverged, Lose, refuse
from bayesian_lora.samplers.schedules import BurnIn, CycleThinning, Thinning
from bayesian_lora.traces import Traces
from bayesian_lora.utils.rng import restore_states, save_states
from bayesian_lora.warm_start import OnStep, StepReport, WarmStart


@dataclass(frozen=True)
class Streams:
    """One generator per chain and purpose; no two share a draw.

    order, dropout: of the warm start; batches, noise: of the sampler, on streams of their own, so
    that they do not depend on how long the warm start went on; probe: of the account's batches.
    """

    order: list[torch.Generator]
    dropout: list[torch.Generator]
    batches: list[torch.Generator]
    noise: list[torch.Generator]
    probe: list[torch.Generator]

    def all(self) -> list[torch.Generator]:
        return [*self.order, *self.dropout, *self.batches, *self.noise, *self.probe]

    def keep(self, kept: Sequence[int]) -> "Streams":
        """Those of these chains."""
        names = [field.name for field in dataclasses.fields(self)]
        return Streams(**{name: [getattr(self, name)[m] for m in kept] for name in names})


class Chains:
    """M chains driven by a sampler: burn-in on its own schedule, then thinned collection.

    Args:
        objective: the likelihood and its closures.
        sampler: over the model's tensors.
        order: i.i.d. batches, each chain its own.
        burn_in, thinning: which steps are made and which draws are kept.
        traces: recorded every `trace_every` sampling steps.
        control: reduces the variance of every batch's gradient, if given.
        lose: what becomes of chains that cannot take a step; it calls `keep`.
    """

    def __init__(
        self,
        objective: Objective,
        sampler: Sampler,
        order: BatchOrder,
        burn_in: BurnIn,
        thinning: Thinning | CycleThinning,
        traces: Traces,
        trace_every: int,
        control: ControlVariate | None = None,
        lose: Lose = refuse,
    ) -> None:
        self.objective, self.sampler, self.order = objective, sampler, order
        self.burn_in, self.thinning = burn_in, thinning
        self.traces, self.trace_every, self.control = traces, trace_every, control
        self.lose = lose
        self.energies = EnergyRange(objective.model.num_chains, burn_in.steps)
        self.milestones = Milestones(objective.model.num_chains)
        self.step, self.draws = 0, 0

    def run_burn_in(self, on_step: OnStep) -> None:
        """Go on to the end of burn-in."""
        while self.step < self.burn_in.steps:
            h = self.burn_in.step_size(self.step)
            on_step(self._one_step("burn_in", h, self.step + 1, self.burn_in.steps))

    def collect(self, on_step: OnStep, on_draw: Callable[[int], None]) -> None:
        """Go on to the last draw; `on_draw(draw)` finds the draw in the model's tensors."""
        while True:
            done = self.step - self.burn_in.steps
            if self.thinning.draw_after(done) == self.draws:
                on_draw(self.draws)
                self.draws += 1
            if done >= self.thinning.steps:
                break
            if done == 0 and (watch := self.sampler.memory.get("watch")) is not None:
                self.sampler.watch(watch["direction"], watch["curvature"])  # forgets burn-in
            report = self._one_step("sampling", self.burn_in.end, done + 1, self.thinning.steps)
            if (done + 1) % self.trace_every == 0 and self.thinning.sampled(done + 1):
                self.milestones.record(self.traces.record())
            self.milestones.stepped(done + 1)
            on_step(report)  # last, so that a state saved by it lacks nothing of this step
        self.objective.model.zero_grad(set_to_none=True)

    def closure(self, rows: np.ndarray) -> Closure:
        """Of one batch (M, B), with the control variate if there is one."""
        closure = self.objective.closure(rows)
        return closure if self.control is None else self.control.closure(closure)

    def _one_step(self, phase: str, h: float, number: int, total: int) -> StepReport:
        for group in self.sampler.param_groups:
            group["lr"] = h
        rows = self.order.iid()
        loss = self._step_of(rows)
        if self.energies.listens(self.step):
            with torch.no_grad():
                prior = prior_energy(self.traces.groups) / self.sampler.num_examples
            self.energies.record(loss, prior, self.step)
        self.step += 1
        accuracy = self.objective.accuracy
        h = float(self.sampler.stats["step_size"][0])
        return StepReport(phase, number, total, loss, accuracy, h, rows.size, self.sampler.t_eff)

    def _step_of(self, rows: np.ndarray) -> Tensor:
        """One step on a batch (M, B); where a chain is lost, the others take it again."""
        while True:
            try:
                return self.sampler.step(self.closure(rows))
            except Diverged as error:
                rows = rows[self.lose(error)]

    def keep(self, kept: list[int]) -> None:
        """Go on with these chains alone; the model has been cut to them, the traces taken."""
        assert not self.traces.rows
        self.sampler.keep_chains(kept)
        self.order.keep(kept)
        self.energies.keep(kept)
        self.milestones.keep(kept)
        if self.control is not None:
            self.control.keep(kept)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "draws": self.draws,
            "energies": self.energies.state_dict(),
            "milestones": self.milestones.state_dict(),
            "step_sizes": [self.burn_in.start, self.burn_in.end],
            "sampler": copy.deepcopy(self.sampler.state_dict()),
            "control": None if self.control is None else self.control.state_dict(),
            "traces": {name: torch.from_numpy(x) for name, x in self.traces.arrays().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.draws = state["step"], state["draws"]
        self.energies.load_state_dict(state["energies"])
        self.milestones.load_state_dict(state["milestones"])
        self.burn_in = BurnIn(self.burn_in.steps, *state["step_sizes"])
        self.sampler.load_state_dict(state["sampler"])
        if self.control is not None:
            self.control.load_state_dict(state["control"])
        columns = {name: x.numpy() for name, x in state["traces"].items()}
        rows = next(iter(columns.values())).shape[1] if columns else 0
        self.traces.rows = [{n: x[:, i].copy() for n, x in columns.items()} for i in range(rows)]


class RunState:
    """All that the next step depends on, in one object that can be saved and restored.

    The phases hold their own counters and optimisers; this adds the model's tensors and every
    generator. `warm` is None once sampling has begun, `chains` before.
    """

    def __init__(self, model: ChainModel, objective: Objective, streams: Streams) -> None:
        self.model, self.objective, self.streams = model, objective, streams
        self.warm: WarmStart | None = None
        self.chains: Chains | None = None

    def keep(self, kept: list[int]) -> None:
        """Go on with these chains alone, as if the others had never been; `streams` apart."""
        self.objective.keep(kept)
        for phase in (self.warm, self.chains):
            if phase is not None:
                phase.keep(kept)

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors and plain numbers."""
        log_noise = self.objective.log_noise
        return {
            "model": {n: p.detach().clone() for n, p in self.model.chain_parameters().items()},
            "log_noise": None if log_noise is None else log_noise.detach().clone(),
            "evaluations": self.objective.evaluations,
            "generators": save_states(self.streams.all()),
            "warm": None if self.warm is None else self.warm.state_dict(),
            "chains": None if self.chains is None else self.chains.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`; the same phases must be set up."""
        own = self.model.chain_parameters()
        if any(own[name].shape != tensor.shape for name, tensor in state["model"].items()):
            self.model.load_chains(state["model"])  # one fit had been spread over the chains
            if self.objective.log_noise is not None:
                self.objective.log_noise = state["log_noise"].to(self.model.device)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state["model"][name])
            if self.objective.log_noise is not None:
                self.objective.log_noise.copy_(state["log_noise"])
        self.objective.evaluations = state["evaluations"]
        if self.warm is not None:
            self.warm.load_state_dict(state["warm"])
        if self.chains is not None:
            self.chains.load_state_dict(state["chains"])
        restore_states(self.streams.all(), state["generators"])


@torch.no_grad()
def widen_start(model: ChainModel, objective: Objective, chains: int) -> None:
    """One fitted chain → M chains, each at the fit."""
    fitted = model.chain_parameters().items()
    model.load_chains({n: p[:1].expand(chains, *p.shape[1:]).clone() for n, p in fitted})
    if objective.log_noise is not None:
        objective.log_noise = objective.log_noise[:1].expand(chains).clone()


@torch.no_grad()
def spread_start(model: ChainModel, jitter: float, generators: Sequence[torch.Generator]) -> None:
    """M chains at one fit → M chains around it: θ_m = θ + jitter·z_m ("within one mode")."""
    for parameter in model.chain_parameters().values():
        for row, generator in zip(parameter, generators, strict=True):
            z = torch.empty_like(row, device=generator.device).normal_(generator=generator)
            row.add_(z.to(row.device), alpha=jitter)
