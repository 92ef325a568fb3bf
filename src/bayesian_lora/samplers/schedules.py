"""When a chain moves how far, and which of its draws are kept."""

from dataclasses import dataclass


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

    def draw_after(self, step: int) -> int | None:
        """The draw (0-based) completed by `step` finished sampling steps, if any."""
        return step // self.thin - 1 if step and step % self.thin == 0 else None


def warmup_linear_decay(step: int, *, warmup: int, total: int) -> float:
    """Learning-rate factor: linear from 0 to 1 over `warmup` steps, then linear to 0 at `total`.

    The first step is 1/(warmup + 1), never 0, so that no step of a short run is lost.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (total - step) / max(1, total - warmup))
