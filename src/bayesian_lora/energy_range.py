"""Whether chains stay in the range of energies that their burn-in had.

A chain that diverges climbs: its energy per example U/N leaves the range of burn-in long before
anything is infinite. Each step gives one value from its own batch, so watching costs no gradient.

Shapes: M chains.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MEMORY = 20
"""Steps over which the present energy is averaged."""
FAR = 6.0
"""Standard deviations of one batch's energy in burn-in; the average of `MEMORY` is far steadier."""
LEAST = 20
"""Steps of burn-in's second half below which it has no range."""


@dataclass(frozen=True)
class Departure:
    """A chain whose energy per example (nats) went far above its range in burn-in."""

    chain: int
    step: int
    energy: float
    mean: float
    sd: float

    def told(self, number: int) -> str:
        """One line, with the chain under this number."""
        return (
            f"chain {number}: energy per example {self.energy:.4g} at step {self.step}, in burn-in "
            f"it was {self.mean:.4g} ± {self.sd:.2g}: it diverges, or burn-in was too short"
        )


class EnergyRange:
    """Mean and sd of U/N over burn-in's second half, and a moving average after it.

    Args:
        chains: M.
        burn_in: its steps; of fewer than 2·`LEAST` no range is known and nothing is reported.
    """

    def __init__(self, chains: int, burn_in: int) -> None:
        self.burn_in = burn_in
        zeros = torch.zeros(chains, dtype=torch.float64)
        self.count, self.mean, self.squares = 0, zeros.clone(), zeros.clone()
        self.now = zeros.clone()
        self.reported = torch.zeros(chains, dtype=torch.bool)
        self.found: list[Departure] = []

    @property
    def known(self) -> bool:
        """Whether burn-in was long enough to have a range."""
        return self.burn_in - self.burn_in // 2 >= LEAST

    @property
    def sd(self) -> Tensor:
        """(M,) of one batch's energy in burn-in's second half."""
        return (self.squares / max(1, self.count - 1)).sqrt()

    def listens(self, step: int) -> bool:
        """Whether step number `step` (from 0) counts: not in burn-in's first half."""
        return self.known and step >= self.burn_in // 2

    def record(self, loss: Tensor, prior: Tensor, step: int) -> None:
        """Take in step number `step` (from 0): batch loss (M,) and prior energy over N (M,)."""
        if not self.listens(step):
            return
        energy = loss.detach().cpu().double() + prior.cpu().double()
        if step < self.burn_in:  # Welford's update
            self.count += 1
            gap = energy - self.mean
            self.mean = self.mean + gap / self.count
            self.squares = self.squares + gap * (energy - self.mean)
            self.now = self.mean
            return
        self.now = self.now + (energy - self.now) / MEMORY
        # A range of 0 (equal batches at T = 0) would call rounding a departure.
        far = self.now - self.mean > FAR * self.sd + 1e-6 * self.mean.abs()
        for m in (far & ~self.reported).nonzero()[:, 0].tolist():
            values = (float(x[m]) for x in (self.now, self.mean, self.sd))
            self.found.append(Departure(m, step + 1, *values))
        self.reported = self.reported | far

    def take(self) -> list[Departure]:
        """What was found since the last call; each chain is reported once."""
        found, self.found = self.found, []
        return found

    def keep(self, kept: list[int]) -> None:
        """Go on with these chains alone."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[kept])

    def state_dict(self) -> dict[str, Any]:
        """Sums so far; what was found has been taken."""
        tensors = {n: v.clone() for n, v in vars(self).items() if isinstance(v, Tensor)}
        return {"count": self.count, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)
