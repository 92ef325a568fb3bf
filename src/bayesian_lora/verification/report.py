"""Every sampler's checks, and that its broken versions fail them, row by row."""

from collections.abc import Iterator
from dataclasses import dataclass

from bayesian_lora.utils.rng import derive_seed
from bayesian_lora.verification.mutations import Rule, mutations
from bayesian_lora.verification.toy import Figure
from bayesian_lora.verification.variants import Variant, exactness

DRAWS = 40_000
"""Independent draws behind a variance: its standard error is .7 %."""
FEWER = 5_000
"""Behind one of a broken rule."""
COORDINATES = 1_000_000
"""Behind a standard deviation of the noise: its standard error is .07 %."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    sampler: str
    law: str
    derived: float
    measured: float
    ratio: float
    verdict: str
    ok: bool


def check_rows(variant: Variant, seed: int, draws: int = DRAWS) -> Iterator[Row]:
    """The checks that a variant must pass; of a rule that claims no law, what it does instead."""
    seed = derive_seed(seed, 0, variant.name)
    if not variant.claims:
        yield _without_a_law(variant, seed, draws)
        return
    if variant.noise is not None:
        for figure in variant.noise(variant.rule, variant.options, COORDINATES, seed):
            yield _row(variant, figure, figure.law, _verdict(figure), figure.agrees)
    for check in variant.laws:
        for figure in check(variant.rule, variant.options, draws, seed):
            yield _row(variant, figure, figure.law, _verdict(figure), figure.agrees)


def mutation_rows(variant: Variant, seed: int, draws: int = FEWER) -> Iterator[Row]:
    """Each broken version of the variant under the same checks: `ok` where they reject it."""
    if not variant.claims:
        return
    seed = derive_seed(seed, 1, variant.name)
    for wrong, rule in mutations(variant.rule).items():
        figure = worst(variant, rule, seed, draws)
        where = f"mean, {figure.law}" if figure.right_variance else figure.law
        verdict = f"rejected ({where})" if figure.rejects else "NOT REJECTED"
        yield _row(variant, figure, f"broken: {wrong}", verdict, figure.rejects)


def worst(variant: Variant, rule: Rule, seed: int, draws: int) -> Figure:
    """The figure furthest off of the first check that rejects a rule, else of the last check.

    The unit of the noise is checked last: it is needed where a thermostat absorbs the mistake.
    """
    checks = [(check, draws) for check in variant.laws]
    if variant.noise is not None:
        checks.append((variant.noise, COORDINATES // 10))
    figures: list[Figure] = []
    for check, count in checks:
        figures = check(rule, variant.options, count, seed)
        rejecting = [figure for figure in figures if figure.rejects]
        if rejecting:
            figures = rejecting
            break
    return max(figures, key=lambda figure: abs(figure.ratio - 1))


def _verdict(figure: Figure) -> str:
    if figure.agrees:
        return "ok"
    if figure.right_variance:
        return f"MEAN OFF by {figure.shift:+.1f} standard errors"
    return f"OFF by more than {figure.tolerance:.1%}"


def _without_a_law(variant: Variant, seed: int, draws: int) -> Row:
    """The figure furthest off; a label that the figures contradict is not `ok`."""
    figure, label = worst(variant, variant.rule, seed, draws), exactness(variant)
    verdict = f"{label}, as labelled" if figure.rejects else f"AGREES, though labelled {label}"
    return _row(variant, figure, figure.law, verdict, figure.rejects)


def _row(variant: Variant, figure: Figure, law: str, verdict: str, ok: bool) -> Row:
    return Row(variant.name, law, figure.derived, figure.measured, figure.ratio, verdict, ok)
