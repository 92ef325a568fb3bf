"""What a sampler or a fit refuses to step on.

Shapes: M chains.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

Lose = Callable[["Diverged"], list[int]]
"""Asked what becomes of chains that cannot go on: the places of those that do, or it raises."""


class Diverged(RuntimeError):
    """Chains cannot take their step: a value is not finite, or out of its rule's stable range.

    Nothing has moved. `what` is wrong with `chains` (places in the chain dimension).
    """

    def __init__(self, what: str, chains: Sequence[int]) -> None:
        self.what, self.chains = what, list(chains)
        super().__init__(self.told(self.chains))

    def told(self, numbers: Sequence[int]) -> str:
        """The message, with the chains under these numbers."""
        names = ", ".join(map(str, numbers))
        return f"chain{'s' if len(numbers) > 1 else ''} {names}: {self.what}"


def refuse(error: Diverged) -> list[int]:
    """No chain may be lost: raises the error."""
    raise error


def require_finite(what: str, values: Tensor) -> None:
    """Raises Diverged naming the chains whose value, of (M,), is NaN or infinite."""
    lost = [m for m, value in enumerate(values.tolist()) if not math.isfinite(value)]
    if lost:
        raise Diverged(f"{what} is not finite", lost)
