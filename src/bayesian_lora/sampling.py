"""Burn-in and thinned collection of posterior draws; the run's whole state in one object.

Shapes: M chains, B examples of a chain's batch, d parameters of a chain.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.data.batching import BatchOrder
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.objective import Objective
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.schedules import BurnIn, Thinning
from bayesian_lora.traces import Traces
from bayesian_lora.utils.rng import restore_states, save_states
from bayesian_lora.warm_start import OnStep, StepReport, WarmStart

HEAT_PROBES = 10
"""How often the gradient's variance is measured along the sampling phase, at most."""
HEAT_EVERY = 10
"""Steps between two such measurements, at least: each costs two gradients."""


@dataclass(frozen=True)
class Streams:
    """One generator per chain and purpose; no two share a draw.

    order, dropout: of the warm start; batches, noise: of the sampler, on streams of their own, so
    that they do not depend on how long the warm start went on; heat: of `Chains`' probes.
    """

    order: list[torch.Generator]
    dropout: list[torch.Generator]
    batches: list[torch.Generator]
    noise: list[torch.Generator]
    heat: list[torch.Generator]

    def all(self) -> list[torch.Generator]:
        return [*self.order, *self.dropout, *self.batches, *self.noise, *self.heat]


class Chains:
    """M chains driven by a sampler: burn-in on its own schedule, then thinned collection.

    Args:
        objective: the likelihood and its closures.
        sampler: over the model's tensors.
        order: i.i.d. batches, each chain its own.
        burn_in, thinning: which steps are made and which draws are kept.
        traces: recorded every `trace_every` sampling steps.
        heat: batches for the estimate of the minibatch heat, from streams of their own.
    """

    def __init__(
        self,
        objective: Objective,
        sampler: Sampler,
        order: BatchOrder,
        burn_in: BurnIn,
        thinning: Thinning,
        traces: Traces,
        trace_every: int,
        heat: BatchOrder,
    ) -> None:
        self.objective, self.sampler, self.order = objective, sampler, order
        self.burn_in, self.thinning = burn_in, thinning
        self.traces, self.trace_every, self.heat = traces, trace_every, heat
        self.step = 0
        self.t_eff: list[Tensor] = []

    def run_burn_in(self, on_step: OnStep) -> None:
        """Go on to the end of burn-in."""
        while self.step < self.burn_in.steps:
            h = self.burn_in.step_size(self.step)
            on_step(self._one_step("burn_in", h, self.step + 1, self.burn_in.steps))

    def collect(self, on_step: OnStep, on_draw: Callable[[int], None]) -> None:
        """Go on to the last draw; `on_draw(draw)` finds the draw in the model's tensors."""
        while (done := self.step - self.burn_in.steps) < self.thinning.steps:
            heat = self._measure_heat() if self._heat_due(done) else None
            total = self.thinning.steps
            report = self._one_step("sampling", self.burn_in.end, done + 1, total, heat)
            if (done + 1) % self.trace_every == 0:
                self.traces.record()
            draw = self.thinning.draw_after(done + 1)
            if draw is not None:
                on_draw(draw)
            on_step(report)  # last, so that a state saved by it lacks nothing of this step
        self.objective.model.zero_grad(set_to_none=True)

    def _one_step(
        self, phase: str, h: float, number: int, total: int, heat: Tensor | None = None
    ) -> StepReport:
        for group in self.sampler.param_groups:
            group["lr"] = h
        rows = self.order.iid()
        loss = self.sampler.step(self.objective.closure(rows))
        self.step += 1
        accuracy = self.objective.accuracy
        return StepReport(phase, number, total, loss, accuracy, h, rows.size, heat)

    def _heat_due(self, done: int) -> bool:
        """At the first step and evenly along the phase."""
        steps = self.thinning.steps
        probes = max(1, min(HEAT_PROBES, steps // HEAT_EVERY))
        before, now = (step * probes // steps for step in (done - 1, done))
        return before != now

    def _measure_heat(self) -> Tensor:
        """T_eff (M,), see `effective_temperature`, from two i.i.d. batches at the same θ."""
        first, second = (self._gradient() for _ in range(2))
        variance = 0.5 * (first - second).square().mean(1)
        group = self.sampler.param_groups[0]
        value = effective_temperature(
            group["temperature"], self.sampler.num_examples, self.burn_in.end, variance
        )
        self.t_eff.append(value)
        return value

    def _gradient(self) -> Tensor:
        self.objective.closure(self.heat.iid())()
        parts = [
            p.grad.flatten(1).cpu().double()
            for group in self.sampler.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        return torch.cat(parts, dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "sampler": copy.deepcopy(self.sampler.state_dict()),
            "traces": {name: torch.from_numpy(x) for name, x in self.traces.arrays().items()},
            "t_eff": [t.clone() for t in self.t_eff],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.sampler.load_state_dict(state["sampler"])
        columns = {name: x.numpy() for name, x in state["traces"].items()}
        rows = next(iter(columns.values())).shape[1] if columns else 0
        self.traces.rows = [{n: x[:, i].copy() for n, x in columns.items()} for i in range(rows)]
        self.t_eff = [t.clone() for t in state["t_eff"]]


def effective_temperature(
    temperature: float, num_examples: int, step_size: float, gradient_variance: Tensor
) -> Tensor:
    """T_eff = T + N h v/2, v the minibatch gradient's variance (c/B), mean over coordinates, (M,).

    From Var = (T/N + h c/(2B))/(k(1 − hk/2)): minibatch noise acts as N h c/(2B) of temperature.
    Along stiff directions, where c is larger than its mean, the chain is hotter than this.
    """
    return temperature + 0.5 * num_examples * step_size * gradient_variance


def hottest_direction(temperature: float, t_eff: float, num_parameters: int) -> float:
    """The most T_eff can be along any direction: all minibatch noise in that one, T + N h tr(C)/2.

    With `t_eff` the mean over d coordinates (`effective_temperature`) that is T + d (t_eff − T).
    The mean is small where most coordinates have no gradient; the chain may still be hot where
    the loss is stiff.
    """
    return temperature + num_parameters * (t_eff - temperature)


class RunState:
    """All that the next step depends on, in one object that can be saved and restored.

    The phases hold their own counters and optimisers; this adds the model's tensors and every
    generator. `warm` is None once sampling has begun, `chains` before.
    """

    def __init__(self, model: ChainModel, objective: Objective, streams: Streams) -> None:
        self.model, self.objective, self.streams = model, objective, streams
        self.warm: WarmStart | None = None
        self.chains: Chains | None = None

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
        with torch.no_grad():
            for name, parameter in self.model.chain_parameters().items():
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
def spread_start(
    model: ChainModel, objective: Objective, jitter: float, generators: Sequence[torch.Generator]
) -> None:
    """One fitted chain → M chains around it: θ_m = θ + jitter·z_m ("within one mode")."""
    chains = len(generators)
    state = {}
    for name, parameter in model.chain_parameters().items():
        rows = parameter[:1].expand(chains, *parameter.shape[1:]).clone()
        for row, generator in zip(rows, generators, strict=True):
            z = torch.empty_like(row, device=generator.device).normal_(generator=generator)
            row.add_(z.to(row.device), alpha=jitter)
        state[name] = rows
    model.load_chains(state)
    if objective.log_noise is not None:
        objective.log_noise = objective.log_noise[:1].expand(chains).clone()
