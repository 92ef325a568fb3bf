"""Tables for a terminal: cells of text in columns of one width."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int | None = 1) -> list[str]:
    """A line a row, columns two spaces apart; short rows end early.

    Args:
        left: so many columns stand to the left, as words do, the others to the right; None is all.
    """
    count = max(map(len, rows), default=0)
    padded = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    return [
        "  ".join(_cells(row, widths, count if left is None else left)).rstrip() for row in padded
    ]


def _cells(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    pairs = enumerate(zip(row, widths, strict=True))
    return [text.ljust(width) if i < left else text.rjust(width) for i, (text, width) in pairs]


def span(start: int, stop: int) -> str:
    """Columns [start, stop) of a stack as a person counts them, from 1: ``1`` or ``2–3``."""
    return f"{stop}" if stop == start + 1 else f"{start + 1}–{stop}"
