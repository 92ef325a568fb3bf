"""From a `Config` to the sampler it names, its schedules, and its account.

Shapes: M chains.
"""

import math
from typing import Any

from bayesian_lora.account import Account, account_of, measure
from bayesian_lora.config import SAMPLERS, Config, SamplerConfig
from bayesian_lora.data.batching import BatchOrder
from bayesian_lora.data.preparation import probe_and_subset
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.setup import Setup
from bayesian_lora.posterior import PriorGroup
from bayesian_lora.samplers.asgld import ASGLD
from bayesian_lora.samplers.base import Closure, Sampler
from bayesian_lora.samplers.control_variate import ControlVariate
from bayesian_lora.samplers.csgld import CSGLD
from bayesian_lora.samplers.failures import Lose, refuse
from bayesian_lora.samplers.psgld import PSGLD
from bayesian_lora.samplers.sam_sgld import SAMSGLD
from bayesian_lora.samplers.sam_sgld_rank1 import SAMSGLDRank1
from bayesian_lora.samplers.schedules import BurnIn, CycleThinning, Thinning
from bayesian_lora.samplers.sghmc import SGHMC
from bayesian_lora.samplers.sgld import SGLD
from bayesian_lora.samplers.sgnht import SGNHT
from bayesian_lora.sampling import Chains, Streams
from bayesian_lora.traces import Traces

FAMILY: dict[str, type[Sampler]] = {
    "sgld": SGLD,
    "psgld": PSGLD,
    "asgld": ASGLD,
    "sghmc": SGHMC,
    "sgnht": SGNHT,
    "csgld": CSGLD,
    "sam_sgld": SAMSGLD,
    "sam_sgld_rank1": SAMSGLDRank1,
}
TRACES_A_DRAW = 20
"""By default; of the thinning alone, so that a longer run extends a shorter one's traces."""
CURVATURE_BATCHES = 1
"""Batches' worth of examples whose curvature is measured."""
PROVISIONAL = 1e-6
"""A step size before `auto` has chosen one; no step is made with it."""
ADAPTING = ("psgld", "asgld", "sam_sgld_rank1")


def make_sampler(config: Config, groups: list[PriorGroup], n: int, streams: Streams) -> Sampler:
    """The sampler a config names, over the tensors under their priors."""
    s = config.sampler
    options: dict[str, Any] = {key: getattr(s, key) for key in SAMPLERS[s.name]}
    options = {key: value for key, value in options.items() if value is not None}
    if s.name in ADAPTING:
        options["burn_in"] = s.burn_in
    return FAMILY[s.name](
        [{"params": list(g.tensors), "prior_std": g.std} for g in groups],
        step_size=PROVISIONAL if s.step_size == "auto" else s.step_size,
        num_examples=n,
        temperature=s.temperature,
        chain_dim=0,
        generators=streams.noise,
        **options,
    )


def idle_keys(s: SamplerConfig) -> list[str]:
    """Keys given that the sampler does not have."""
    every = {key for keys in SAMPLERS.values() for key in keys}
    given = {key for key in every if getattr(s, key) is not None}
    return sorted(given - set(SAMPLERS[s.name]))


def make_chains(setup: Setup, fresh: bool = True, lose: Lose = refuse) -> Chains:
    """Sampler, schedules, batches and traces of a run; the chains at the warm start.

    `fresh`: False if a saved state is loaded next, so that nothing is computed for it; `lose`: see
    `Chains`.
    """
    config = setup.config
    s, n = config.sampler, len(setup.train)
    sampler = make_sampler(config, setup.groups, n, setup.streams)
    draws = s.num_samples // s.chains
    if isinstance(sampler, CSGLD):
        thinning = CycleThinning(sampler.cycle, s.thin, draws)
    else:
        thinning = Thinning(s.thin, draws)
    probe, subset = probe_and_subset(
        setup.raw, setup.tokenizer, config.data.max_length, config.seed
    )
    return Chains(
        setup.objective,
        sampler,
        BatchOrder(n, config.data.batch_size, setup.streams.batches),
        BurnIn(s.burn_in, sampler.param_groups[0]["lr"], sampler.param_groups[0]["lr"]),
        thinning,
        Traces(setup.objective, setup.groups, probe, subset, config.seed),
        s.trace_every or max(1, s.thin // TRACES_A_DRAW),
        make_control(setup, fresh) if s.variance_reduction else None,
        lose,
    )


def make_control(setup: Setup, fresh: bool) -> ControlVariate:
    """The control variate at the chains' present parameters: one pass over the training set."""
    if not fresh:
        return ControlVariate(setup.model.chain_parameters().values(), None)
    n = len(setup.train)
    batches = -(-n // setup.config.data.batch_size)
    # On CPUs the objective bounds its passes itself.
    on_cpu = setup.model.device.type == "cpu"
    size = setup.objective.micro_batch or (None if on_cpu else setup.config.data.batch_size)
    full = setup.objective.closure(setup.all_rows(), evaluations=batches, micro_batch=size)
    return ControlVariate(setup.model.chain_parameters().values(), full)


def open_account(setup: Setup, chains: Chains) -> Account:
    """Measure, choose or check the step size, and set the chains' schedule by it.

    Raises:
        InputError: the step size is unstable, or the loss is flat.
    """
    config = setup.config
    s, n = config.sampler, len(setup.train)
    order = BatchOrder(n, config.data.batch_size, setup.streams.probe)
    fixed = BatchOrder(n, CURVATURE_BATCHES * config.data.batch_size, setup.streams.probe).iid()

    def plain() -> Closure:
        return setup.objective.closure(order.iid())

    def batch() -> Closure:
        return chains.closure(order.iid())

    closure = setup.objective.closure(fixed, evaluations=CURVATURE_BATCHES)
    measured = measure(chains.sampler, plain, closure, batch if s.variance_reduction else None)
    if s.variance_reduction and isinstance(chains.sampler, PSGLD):
        chains.sampler.freeze()  # V is that of plain gradients, which none will be from now on
    if not (math.isfinite(measured.k_max) and math.isfinite(measured.variance)):
        raise InputError(
            "the curvature at the warm start is not finite: the fit has diverged; lower train.lr"
        )
    account = account_of(
        chains.sampler,
        measured,
        step_size=None if s.step_size == "auto" else s.step_size,
        bias=s.bias,
        steps=chains.burn_in.steps + chains.thinning.steps,
        burn_in_step_size=s.burn_in_step_size,
    )
    h = account.step_size
    chains.burn_in = BurnIn(s.burn_in, s.burn_in_step_size or h, h)
    chains.sampler.watch(measured.direction, measured.curvature)
    return account
