"""`bayesian-lora verify`: each sampler against the law it claims, as a table."""

from collections.abc import Callable, Iterable

from bayesian_lora.verification.report import Row, check_rows, mutation_rows
from bayesian_lora.verification.variants import chosen, claim

WIDTHS = (26, 38, 10, 10, 8)
COLUMNS = ("sampler", "law", "derived", "measured", "ratio", "verdict")


def verify(names: Iterable[str], seed: int, echo: Callable[[str], None] = print) -> bool:
    """Print a row as each check ends, then a summary; whether nothing failed.

    Raises:
        InputError: a name that is no sampler's, before anything is run.
    """
    variants = chosen(names)
    checks = passed = rejected = failed = 0
    echo(_line(COLUMNS))
    for variant in variants:
        echo(f"{variant.name}: {claim(variant)}")
        for row in check_rows(variant, seed):
            echo(_text(row))
            checks, passed, failed = checks + 1, passed + row.ok, failed + (not row.ok)
        for row in mutation_rows(variant, seed):
            echo(_text(row))
            rejected, failed = rejected + row.ok, failed + (not row.ok)
    summary = f"{checks} checks, {passed} passed, {rejected} mutations rejected"
    echo(summary + (f"; {failed} FAILED" if failed else ""))
    return failed == 0


def _text(row: Row) -> str:
    figures = (f"{row.derived:.4g}", f"{row.measured:.4g}", f"{row.ratio:.4f}")
    return _line((row.sampler, row.law, *figures, row.verdict))


def _line(cells: Iterable[str]) -> str:
    *columns, verdict = cells
    fixed = [
        text.ljust(width) if i < 2 else text.rjust(width)
        for i, (text, width) in enumerate(zip(columns, WIDTHS, strict=True))
    ]
    return "  ".join([*fixed, verdict])
