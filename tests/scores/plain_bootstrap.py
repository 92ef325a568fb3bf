"""The bootstrap as a loop, for any function of an index."""

from collections.abc import Callable

import numpy as np

Figures = dict[str, float]


def plain_errors(
    statistic: Callable[[np.ndarray], Figures], n: int, rng: np.random.Generator, replicates: int
) -> Figures:
    """Standard deviation over replicates of each figure of the drawn examples' index (N,)."""
    rows = [statistic(rng.integers(n, size=n)) for _ in range(replicates)]
    return {name: float(np.std([row[name] for row in rows], ddof=1)) for name in rows[0]}
