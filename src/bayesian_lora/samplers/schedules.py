"""When a chain moves how far, and which of its draws are kept."""

import math
from dataclasses import dataclass

CYCLE_STEPS = 1000
EXPLORE_FRACTION = 0.5


@dataclass(frozen=True)
class BurnIn:
    """Step sizes of burn-in: geometric from `start` to `end` over `steps`; constant if equal."""

    steps: int
    start: float
    end: float

    def step_size(self, step: int) -> float:
        """Step size of burn-in step `step` = 0 … steps − 1; the last one is `end`."""
        if self.steps <= 1 or self.start == self.end:
            return self.end
        return self.start * (self.end / self.start) ** (step / (self.steps - 1))


@dataclass(frozen=True)
class Thinning:
    """Of every `thin` sampling steps the last is kept, `draws` times."""

    thin: int
    draws: int

    @property
    def steps(self) -> int:
        return self.thin * self.draws

    def sampled(self, step: int) -> bool:
        """Whether the last of `step` finished steps was one of sampling: here all are."""
        return True

    def draw_after(self, step: int) -> int | None:
        """The draw (0-based) completed by `step` finished sampling steps, if any."""
        return step // self.thin - 1 if step and step % self.thin == 0 else None


def warmup_constant(step: int, *, warmup: int) -> float:
    """Learning-rate factor: linear from 0 to 1 over `warmup` steps, then 1.

    The first step is 1/(warmup + 1), never 0, so that no step of a short run is lost.
    """
    return min(1.0, (step + 1) / (warmup + 1))


def warmup_linear_decay(step: int, *, warmup: int, total: int) -> float:
    """Learning-rate factor: `warmup_constant` over `warmup` steps, then linear to 0 at `total`."""
    if step < warmup:
        return warmup_constant(step, warmup=warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


@dataclass(frozen=True)
class Cycle:
    """A cosine cycle of `steps` steps, the first `explore_fraction` of them without noise."""

    steps: int
    explore_fraction: float

    @property
    def explore_steps(self) -> int:
        return math.ceil(round(self.explore_fraction * self.steps, 6))  # .55·100 is 55.00…01

    @property
    def sampling_steps(self) -> int:
        return self.steps - self.explore_steps

    def factor(self, t: int) -> float:
        """h_t/h₀ = (cos(π·mod(t, C)/C) + 1)/2."""
        return 0.5 * (math.cos(math.pi * (t % self.steps) / self.steps) + 1)

    def sampling(self, t: int) -> bool:
        """Whether step t (0-based) has noise."""
        return t % self.steps >= self.explore_steps


@dataclass(frozen=True)
class CycleThinning:
    """In each cycle's sampling share every `thin`-th step is kept, counted back from its end."""

    cycle: Cycle
    thin: int
    draws: int

    def __post_init__(self) -> None:
        if self.thin > self.cycle.sampling_steps:
            raise ValueError(f"thin={self.thin} exceeds {self.cycle.sampling_steps} sampling steps")

    def sampled(self, step: int) -> bool:
        """Whether the last of `step` finished steps was in a sampling share."""
        return self.cycle.sampling(step - 1)

    @property
    def per_cycle(self) -> int:
        return self.cycle.sampling_steps // self.thin

    @property
    def steps(self) -> int:
        """Up to the last draw."""
        number, place = divmod(self.draws - 1, self.per_cycle)
        return (number + 1) * self.cycle.steps - (self.per_cycle - 1 - place) * self.thin

    def draw_after(self, step: int) -> int | None:
        """The draw (0-based) completed by `step` finished sampling steps, if any."""
        number, place = divmod(step - 1, self.cycle.steps)
        left, over = divmod(self.cycle.steps - 1 - place, self.thin)
        if step < 1 or over or left >= self.per_cycle:
            return None
        draw = number * self.per_cycle + self.per_cycle - 1 - left
        return draw if draw < self.draws else None
