"""The samplers and their variants, each with the checks that its claims must pass."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bayesian_lora.errors import InputError
from bayesian_lora.samplers.asgld import ASGLD
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.csgld import CSGLD
from bayesian_lora.samplers.psgld import PSGLD
from bayesian_lora.samplers.sam_sgld import SAMSGLD
from bayesian_lora.samplers.sam_sgld_rank1 import SAMSGLDRank1
from bayesian_lora.samplers.sghmc import SGHMC
from bayesian_lora.samplers.sgld import SGLD
from bayesian_lora.samplers.sgnht import SGNHT
from bayesian_lora.verification.laws import (
    directional_noise,
    fixed_direction,
    gaussian,
    isotropic,
    noise,
    radial,
)
from bayesian_lora.verification.mutations import Rule
from bayesian_lora.verification.toy import Figure, MakeSampler

Check = Callable[[MakeSampler, Mapping[str, Any], int, int], list[Figure]]
"""Of a class, its options, the number of draws and a seed."""


@dataclass(frozen=True)
class Variant:
    """A sampler with options under which its law is known.

    `claims` is False for the rules that are kept for reproduction: they are shown against the
    law they miss.
    """

    sampler: str
    rule: Rule
    laws: tuple[Check, ...]
    noise: Check | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    claims: bool = True

    @property
    def name(self) -> str:
        return f"{self.sampler} {self.label}".strip()


SAM_CENTRE = 200.0
SAM = {"rho": 0.5}

VARIANTS = (
    Variant("sgld", SGLD, (gaussian,), partial(noise, gain=lambda s: 1.0)),
    Variant(
        "psgld",
        PSGLD,
        (partial(gaussian, warm=(0.15, 0.35, 0.75)),),
        partial(noise, gain=lambda s: s.metric(s.memory["V"])[0, 0].sqrt().item(), gradient=0.15),
        {"lambd": 0.05, "burn_in": 1},
    ),
    Variant(
        "asgld",
        ASGLD,
        (partial(gaussian, settle=20),),
        partial(noise, gain=lambda s: 1.0),
        {"burn_in": 20},
    ),
    Variant(
        "asgld",
        ASGLD,
        (partial(gaussian, settle=1000),),
        options={"anneal": False},
        label="anneal=false",
        claims=False,
    ),
    Variant("sghmc", SGHMC, (gaussian,), partial(noise, gain=lambda s: s.friction**0.5)),
    Variant(
        "sghmc",
        SGHMC,
        (gaussian,),
        partial(noise, gain=lambda s: (s.friction * (2 - s.friction) / 8) ** 0.5),
        {"integrator": "baoab"},
        label="baoab",
    ),
    Variant(
        "sgnht",
        SGNHT,
        (partial(gaussian, d=100, settle=300),),
        partial(noise, gain=lambda s: s.friction**0.5),
        {"friction": 0.3},
    ),
    Variant(
        "csgld",
        CSGLD,
        (gaussian,),
        partial(noise, gain=lambda s: s.cycle.factor(50) ** 0.5, before=50),
        {"cycle_steps": 100, "explore_fraction": 0.5},
    ),
    Variant(
        "sam_sgld",
        SAMSGLD,
        (partial(gaussian, centre=SAM_CENTRE), radial),
        partial(noise, gain=lambda s: 1.0),
        {**SAM, "full_batch": True},
    ),
    Variant(
        "sam_sgld_rank1",
        SAMSGLDRank1,
        (partial(gaussian, centre=SAM_CENTRE, warm=(1.0, 1.0, 1.0)), fixed_direction),
        directional_noise,
        {**SAM, "full_batch": True, "burn_in": 1},
    ),
    Variant(
        "sam_sgld_rank1",
        SAMSGLDRank1,
        (partial(gaussian, centre=SAM_CENTRE), isotropic),
        directional_noise,
        {**SAM, "full_batch": True, "u_mode": "cross_chain"},
        label="cross_chain",
    ),
    Variant(
        "sam_sgld_rank1",
        SAMSGLDRank1,
        (partial(isotropic, step_size=0.05),),
        options={"u_mode": "current"},
        label="current",
        claims=False,
    ),
)
SAMPLERS = tuple(dict.fromkeys(variant.sampler for variant in VARIANTS))


def chosen(names: Iterable[str]) -> list[Variant]:
    """The variants of the samplers named; all without a name.

    Raises:
        InputError: no sampler has such a name; the nearest is named.
    """
    names = list(names) or SAMPLERS
    for name in names:
        if name not in SAMPLERS:
            near = difflib.get_close_matches(name.lower(), SAMPLERS, 1)
            hint = f": did you mean {near[0]}?" if near else ";"
            raise InputError(f"sampler {name!r} is not known{hint} known: {', '.join(SAMPLERS)}")
    return [variant for variant in VARIANTS if variant.sampler in names]


def claim(variant: Variant) -> str:
    """The law that a variant states for itself."""
    return _example(variant).law


def exactness(variant: Variant) -> str:
    """What a variant says it targets."""
    return _example(variant).exactness


def _example(variant: Variant) -> Sampler:
    theta = torch.zeros(2, 1, requires_grad=True)
    return variant.rule([theta], step_size=0.1, num_examples=1, chain_dim=0, **variant.options)
