"""What the keys of a config ask of one another, and which sampler has which.

`config_schema` checks every value alone; here are the rules that join several.
"""

import difflib

from bayesian_lora.config_schema import Config, SamplerConfig
from bayesian_lora.errors import InputError
from bayesian_lora.samplers.schedules import CYCLE_STEPS, EXPLORE_FRACTION, Cycle

SAMPLERS: dict[str, tuple[str, ...]] = {
    "sgld": (),
    "psgld": ("beta2", "lambd"),
    "asgld": ("a", "beta1", "beta2", "lambd", "anneal"),
    "sghmc": ("friction", "integrator"),
    "sgnht": ("friction", "thermostat_rate"),
    "csgld": ("cycle_steps", "explore_fraction"),
    "sam_sgld": ("rho", "lambd"),
    "sam_sgld_rank1": ("rho", "lambd", "sigma_dir", "u_mode", "beta1"),
}
"""Every sampler and the keys that are its own; a key left out has the sampler's default."""
MAP = "map"
"""In a sampler's place: none, the members are the warm starts."""


def check_consistency(config: Config) -> None:
    """Raises InputError for keys that contradict each other."""
    sampler, data, train = config.sampler, config.data, config.train
    _check_sampler(sampler)
    if sampler.num_samples % sampler.chains:
        nearest = -(-sampler.num_samples // sampler.chains) * sampler.chains
        raise InputError(
            f"sampler.num_samples={sampler.num_samples} is the total over all chains and must be "
            f"a multiple of sampler.chains={sampler.chains}: set sampler.num_samples={nearest}"
        )
    if sampler.name == MAP and sampler.chains > 1 and train.starts == "shared":
        raise InputError(
            f"sampler.name=map: the {sampler.chains} members would all be the one shared fit; set "
            "train.starts=independent, or sampler.chains=1"
        )
    held_out = {
        "train.early_stopping=true": train.early_stopping,
        "train.schedule=plateau": train.schedule == "plateau",
        "prior.std=auto": config.prior.std == "auto",
    }
    for key, wanted in held_out.items():
        if wanted and data.validation_share == 0:
            raise InputError(f"{key} needs data held out of train: set data.validation_share=0.1")
    if not config.prior.candidates:
        raise InputError("prior.candidates=[]: give at least one standard deviation")
    if len(set(config.prior.candidates)) < len(config.prior.candidates):
        raise InputError(f"prior.candidates={config.prior.candidates}: a value stands twice")
    if train.patience is not None and not train.early_stopping:
        raise InputError(
            f"train.patience={train.patience} acts only with early stopping: "
            "set train.early_stopping=true or leave train.patience out"
        )
    targets = config.model.lora.target_modules
    if targets == [] or (isinstance(targets, str) and targets != "auto"):
        raise InputError(
            f"model.lora.target_modules={targets!r}: give 'auto' or a list such as [query, value]"
        )


def without_idle(s: SamplerConfig) -> SamplerConfig:
    """Of ``map`` the keys that count, the others at values that say so; any other as it is."""
    if s.name != MAP:
        return s
    kept = {"chains": s.chains, "on_nonfinite": s.on_nonfinite}
    return SamplerConfig(name=MAP, num_samples=s.chains, burn_in=0, thin=1, **kept)


def least_chains(s: SamplerConfig) -> int:
    """The chains without which a sampler is not what it says."""
    return 2 if s.name == "sam_sgld_rank1" and s.u_mode == "cross_chain" else 1


def _check_sampler(s: SamplerConfig) -> None:
    """That there is such a sampler, and what it needs of the other keys."""
    if s.name not in (*SAMPLERS, MAP):
        near = difflib.get_close_matches(s.name.lower(), [*SAMPLERS, MAP], 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join([*SAMPLERS, f"{MAP} (no sampling)"])
        raise InputError(f"sampler.name={s.name}: unknown sampler{hint}; known: {known}")
    if s.name in {"psgld", "asgld", "sam_sgld_rank1"} and s.burn_in == 0:
        adapts = s.anneal is not False if s.name == "asgld" else s.u_mode in {None, "frozen"}
        if adapts:
            raise InputError(
                f"sampler.burn_in=0: {s.name} adapts during burn-in and is fixed after it; "
                "set sampler.burn_in=100 or more"
            )
    if s.chains < least_chains(s):
        raise InputError(
            "sampler.u_mode=cross_chain takes each chain's direction from another chain: "
            "set sampler.chains=2 or more"
        )
    if s.name == "sgnht" and s.temperature == 0:
        raise InputError(
            "sampler.temperature=0: sgnht's thermostat holds a temperature above 0; "
            "raise it or set sampler.name=sghmc"
        )
    if s.step_size == "auto" and s.temperature == 0:
        raise InputError(
            "sampler.step_size=auto weighs minibatch noise against the temperature, which is 0: "
            "give a number or raise sampler.temperature"
        )
    if s.name == "csgld":
        _check_cycles(s)


def _check_cycles(s: SamplerConfig) -> None:
    share = EXPLORE_FRACTION if s.explore_fraction is None else s.explore_fraction
    cycle = Cycle(s.cycle_steps or CYCLE_STEPS, share)
    if cycle.sampling_steps < 1:
        raise InputError(
            f"sampler.explore_fraction={share:g}: leaves no sampling step in a cycle of "
            f"{cycle.steps}; lower it, or make sampler.cycle_steps longer"
        )
    if s.burn_in % cycle.steps:
        nearest = -(-s.burn_in // cycle.steps) * cycle.steps
        raise InputError(
            f"sampler.burn_in={s.burn_in}: csgld burns in whole cycles of "
            f"sampler.cycle_steps={cycle.steps}: set sampler.burn_in={nearest} or 0, "
            "or other cycles"
        )
    if s.thin > cycle.sampling_steps:
        raise InputError(
            f"sampler.thin={s.thin}: a cycle has {cycle.sampling_steps} sampling steps "
            f"(sampler.cycle_steps={cycle.steps}): set sampler.thin={cycle.sampling_steps} or "
            "less, or longer cycles"
        )
