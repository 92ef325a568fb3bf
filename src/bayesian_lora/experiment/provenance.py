"""The head of `ensemble.json`: what the members belong to and how they came about."""

import dataclasses
from typing import Any

from bayesian_lora.config import MAP, SAMPLERS
from bayesian_lora.experiment.setup import Setup
from bayesian_lora.manifest import Provenance
from bayesian_lora.sampling import Chains


def provenance(
    setup: Setup, chains: Chains | None, dropped: list[dict[str, Any]] | None = None
) -> Provenance:
    """As things stand; `chains` is None before sampling, `dropped` the chains that were."""
    config, info = setup.config, setup.model.info
    model = {
        "name": config.model.name,
        "base": info.source.public_id,
        "fingerprint": setup.fingerprint,
        "num_labels": setup.task.num_labels,
        "max_length": config.data.max_length,
        "dtype": config.model.dtype,
    }
    task = {
        "name": setup.task.name,
        "label_names": list(setup.task.label_names),
        "likelihood": setup.task.likelihood,
    }
    return Provenance(
        model,
        task,
        dataclasses.asdict(info.spec),
        {**_sampler(setup, chains), "dropped_chains": dropped or []},
    )


def _sampler(setup: Setup, chains: Chains | None) -> dict[str, Any]:
    s = setup.config.sampler
    if s.name == MAP:
        return _fits(setup)
    measured = chains is not None and "watch" in chains.sampler.memory
    shared = setup.config.train.starts == "shared"
    given = {key: getattr(s, key) for key in SAMPLERS[s.name]}
    return {
        "name": s.name,
        "step_size": s.step_size if chains is None or not measured else chains.burn_in.end,
        **{key: value for key, value in given.items() if value is not None},
        "temperature": s.temperature,
        "tempering": tempering(s.temperature),
        "t_eff": None if chains is None else mean_t_eff(chains),
        "exactness": None if chains is None else chains.sampler.exactness,
        "law": None if chains is None else chains.sampler.law,
        "variance_reduction": s.variance_reduction,
        **_common(setup, "within one mode" if shared else "independent"),
    }


def _fits(setup: Setup) -> dict[str, Any]:
    """Where nothing was sampled; the fit is what a posterior's temperature 0 would leave."""
    several = setup.config.sampler.chains > 1
    return {
        "name": MAP,
        "step_size": None,
        "temperature": 0.0,
        "tempering": "none",
        "t_eff": None,
        "exactness": "MAP fits, not posterior draws" if several else "a MAP fit, no posterior draw",
        "law": None,
        "variance_reduction": False,
        **_common(setup, "independent"),
    }


def _common(setup: Setup, starts: str) -> dict[str, Any]:
    return {
        "chains": setup.config.sampler.chains,
        "starts": starts,
        "num_examples": len(setup.train),
        "prior": dataclasses.asdict(setup.prior),
    }


def chain_facts(chains: Chains | None, departures: list[dict[str, Any]]) -> dict[str, Any]:
    """What `run.json` says of the chains: heat, chains that left their energies, milestones.

    None of each before sampling, and of the departures where burn-in was too short to have a range.
    """
    if chains is None:
        return dict.fromkeys(("t_eff", "departures", "milestones"))
    return {
        "t_eff": mean_t_eff(chains),
        "departures": departures if chains.energies.known else None,
        "milestones": chains.milestones.facts(),
    }


def mean_t_eff(chains: Chains) -> float | None:
    """T_eff over chains; None before the phase's second step, or where it overflowed."""
    t_eff = chains.sampler.t_eff
    return None if t_eff is None or not bool(t_eff.isfinite().all()) else float(t_eff.mean())


def tempering(temperature: float) -> str:
    """The word for a temperature: posterior, cold or hot."""
    if temperature == 1.0:
        return "posterior"
    return "cold" if temperature < 1.0 else "hot"
