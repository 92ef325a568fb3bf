"""Measurements that alternate, and what becomes of them: ratios within a round, and a table."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Case = Callable[[], float]
"""Works for a while; examples (times chains or members) a second."""
Rates = dict[str, list[float]]
"""By case, one a round."""


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some values."""

    median: float
    smallest: float
    largest: float

    def format(self, digits: int) -> str:
        low, high = f"{self.smallest:.{digits}f}", f"{self.largest:.{digits}f}"
        return f"{self.median:.{digits}f} ({low}–{high})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], peer: Sequence[float]) -> list[float]:
    """Ours over the peer's of the same round: what slows a whole round cancels."""
    return [a / b for a, b in zip(ours, peer, strict=True)]


def alternate(cases: Mapping[str, Case], rounds: int) -> Rates:
    """Rates of all cases, one after the other in each round; a round before warms them up.

    A case with a method `warm` is warmed by it, else by a whole call.
    """
    for case in cases.values():
        getattr(case, "warm", case)()
    rates: Rates = {name: [] for name in cases}
    for number in range(rounds):
        for name, case in cases.items():
            rates[name].append(case())
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return rates


def best(rates: Rates, names: Sequence[str]) -> str:
    """The fastest by its median."""
    return max(names, key=lambda name: statistics.median(rates[name]))


def table(rates: Rates, ours: Sequence[str], unit: str = "examples/s") -> list[str]:
    """Markdown: a row a case, a column for each of ours with its ratio against the row."""
    lines = [
        "| | " + " | ".join([unit, *(f"{name}, against it" for name in ours)]) + " |",
        "|---" * (2 + len(ours)) + "|",
    ]
    for name, values in rates.items():
        against = [spread(ratios(rates[own], values)).format(2) for own in ours]
        lines.append("| " + " | ".join([name, spread(values).format(1), *against]) + " |")
    return lines


def sides(rates: Rates, ours: Sequence[str], peers: Mapping[str, Sequence[str]]) -> list[str]:
    """The best of ours against the best of each kind of peer."""
    own = best(rates, ours)
    lines: list[str] = []
    for kind, names in peers.items():
        other = best(rates, names)
        ratio = spread(ratios(rates[own], rates[other])).format(2)
        lines.append(f"best of each side, {kind}: {own} against {other}: {ratio}")
    return lines
