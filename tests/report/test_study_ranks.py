"""Rank against performance: accuracy and NLL, each held against the spread over fits."""

import pytest

from tests.report.conftest import AxesOf
from tests.report.study_records import (
    SECTIONS,
    Figures,
    answers,
    entry,
    rank,
    record,
    row,
    section,
    tables,
)

pytestmark = pytest.mark.usefixtures("blank_plots")


@pytest.mark.parametrize(
    ("steps", "accuracy", "nll"),
    [
        (
            [rank(1, 0.80), rank(4, 0.83, nll=0.35)],
            "+0.030 against rank 1: more than two standard errors",
            "0.350 nats at rank 4, -0.050 against rank 1: more than two standard errors",
        ),
        (
            [rank(1, 0.80, 0.1), rank(4, 0.83, 0.1, nll=0.39)],
            "within two standard errors",
            "-0.010 against rank 1: within two standard errors",
        ),
        (
            [rank(1, 0.80), rank(4, 0.79, nll=0.41)],
            "accuracy: no rank is better than rank 1 (0.800)",
            "NLL: no rank is better than rank 1 (0.400 nats)",
        ),
    ],
)
def test_rank_against_accuracy_and_nll(steps: list[Figures], accuracy: str, nll: str) -> None:
    named = {f"rank__{step['rank']}": entry(step) for step in reversed(steps)}
    given = record(**named)
    words = answers(given, SECTIONS[9])
    assert len(words) == 2
    assert accuracy in words[0]
    assert nll in words[1]
    table = tables(given, SECTIONS[9])[0]
    assert [cells[0].text for cells in table.rows] == ["1", "4"]
    assert row(table, "1")[3] == "1,000"


def test_axes_say_their_unit(axes_of: AxesOf) -> None:
    given = record(rank__1=entry(rank(1, 0.8)))
    panels = axes_of(lambda: section(given, SECTIONS[9]))
    assert [axes.get_ylabel() for axes in panels] == ["accuracy", "NLL (nats)"]
