"""Columns of one width, words to the left and numbers to the right."""

import pytest

from bayesian_lora.utils.text_table import aligned, span


def test_columns_are_of_one_width() -> None:
    rows = [["task", "n", "nll"], ["a", "1043", "0.5"], ["longer"]]
    assert aligned(rows) == ["task       n  nll", "a       1043  0.5", "longer"]
    assert aligned(rows, left=None) == ["task    n     nll", "a       1043  0.5", "longer"]
    assert aligned(rows, left=2) == ["task    n     nll", "a       1043  0.5", "longer"]
    assert aligned([["x", "n", "y"], ["1", "22", "333"]], left=2) == ["x  n     y", "1  22  333"]
    assert aligned([]) == []


@pytest.mark.parametrize(("columns", "text"), [((0, 1), "1"), ((1, 3), "2–3"), ((4, 5), "5")])
def test_columns_are_counted_from_one(columns: tuple[int, int], text: str) -> None:
    assert span(*columns) == text
