"""Samplers broken on purpose, each by one mistake: what the checks must reject."""

import math
from typing import TYPE_CHECKING

from torch import Tensor

from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.csgld import CSGLD
from bayesian_lora.samplers.flat import Scale, chain_dot, unit
from bayesian_lora.samplers.psgld import PSGLD
from bayesian_lora.samplers.sam_sgld import SAMSGLD
from bayesian_lora.samplers.sam_sgld_rank1 import SAMSGLDRank1
from bayesian_lora.samplers.sghmc import SGHMC
from bayesian_lora.samplers.sgnht import SGNHT

Rule = type[Sampler]
Mixin = Sampler if TYPE_CHECKING else object


class _NDropped(Mixin):
    """N = 1 wherever the rule uses it: noise √(2hT)."""

    def update(self, g: Tensor, h: Scale) -> None:
        kept, self.num_examples = self.num_examples, 1
        try:
            super().update(g, h)  # type: ignore[safe-super]
        finally:
            self.num_examples = kept


class _HalfTheNoise(Mixin):
    """Noise variance hT/N instead of 2hT/N."""

    def noise_std(self, h: Scale) -> Scale:
        return math.sqrt(0.5) * super().noise_std(h)


class _TemperatureDivides(Mixin):
    """1/T in the place of T."""

    @property
    def temperature(self) -> Scale:
        return 1.0 / super().temperature


class _PriorOnTheMeanLoss(Mixin):
    """θ/σ² in the place of θ/(Nσ²)."""

    def drift(self, prior: bool = True) -> Tensor:
        kept, self.num_examples = self.num_examples, 1
        try:
            return super().drift(prior)
        finally:
            self.num_examples = kept


class _PlainDrift(PSGLD):
    """θ ← θ − hg + s√G z."""

    def update(self, g: Tensor, h: Scale) -> None:
        if self.memory["step"] < self.burn_in:
            self.adapt(g)
        self.shift(g, -h)
        self.add_noise(self.noise_std(h) * self.metric(g).sqrt() * self.normal(g))


class _NoiseWithoutFriction(SGHMC):
    """√(2hT/N) z (or its BAOAB counterpart) in the place of √(2fhT/N) z."""

    def noise_std(self, h: Scale) -> Scale:
        return super().noise_std(h) / math.sqrt(self.friction)


class _PlainThermostat(SGNHT):
    """ξ ← ξ + γ[(‖v‖²/d)/(hT/N) − 1]."""

    def update(self, g: Tensor, h: Scale) -> None:
        before = self.memory["xi"].clone() if "xi" in self.memory else self.friction
        super().update(g, h)
        square = self.memory["v"].square().mean(1, keepdim=True)
        kinetic = square / (h * self.temperature / self.num_examples)
        self.memory["xi"] += self.rate * kinetic * before / 2  # 1 − (2 − ξ)/2


class _NoiseOfTheFirstStep(CSGLD):
    """s(h₀) throughout a cycle's sampling share."""

    def noise_std(self, h: Scale) -> Scale:
        return super().noise_std(self.per_coordinate(lambda group: group["lr"]))


class _PriorAtThePerturbedPoint(SAMSGLD):
    """(θ + e)/(Nσ²) in the place of θ/(Nσ²)."""

    def drift(self, prior: bool = True) -> Tensor:
        g = super().drift(prior)
        if not prior:
            self._e = self.rho * unit(g)
            return g
        return g + self._e / (self.num_examples * self.param_groups[0]["prior_std"] ** 2)


class _OwnDirection(SAMSGLDRank1):
    """u from the chain's own present gradient, while claimed to be fixed or another chain's."""

    def direction(self, g: Tensor) -> Tensor:
        return unit(g)


class _DirectionOfNoiseOnly(SAMSGLDRank1):
    """The noise has covariance s²P, the drift is without P."""

    def update(self, g: Tensor, h: Scale) -> None:
        u = self.direction(g)
        self.shift(g, -h)
        z = self.normal(g)
        self.add_noise(self.noise_std(h) * (z + self.sigma_dir * u * chain_dot(u, z)))


SHARED = {
    "N dropped": _NDropped,
    "noise × √½": _HalfTheNoise,
    "T divides": _TemperatureDivides,
    "prior on the mean loss": _PriorOnTheMeanLoss,
}
OWN: dict[Rule, dict[str, Rule]] = {
    PSGLD: {"no preconditioner in the drift": _PlainDrift},
    SGHMC: {"noise without f": _NoiseWithoutFriction},
    SGNHT: {"thermostat without (2−ξ)/2": _PlainThermostat},
    CSGLD: {"noise of h₀, not h_t": _NoiseOfTheFirstStep},
    SAMSGLD: {"prior at θ + e": _PriorAtThePerturbedPoint},
    SAMSGLDRank1: {
        "u of the same batch": _OwnDirection,
        "no P in the drift": _DirectionOfNoiseOnly,
    },
}


def mutations(rule: Rule) -> dict[str, Rule]:
    """The broken versions of a sampler's class, by what is wrong with them."""
    shared = {name: type(mixin.__name__, (mixin, rule), {}) for name, mixin in SHARED.items()}
    return {**shared, **OWN.get(rule, {})}
