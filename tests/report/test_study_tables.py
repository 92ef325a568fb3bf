"""Stacks, untrained and trained further: what is lost and gained, with errors, MCC and splits."""

from typing import Any

import pytest

from bayesian_lora.report.page import Table
from tests.report.study_records import (
    SECTIONS,
    Figures,
    answers,
    baselines,
    entry,
    further,
    record,
    row,
    split,
    stack,
    tables,
)

pytestmark = pytest.mark.usefixtures("blank_plots")


@pytest.mark.parametrize(("lost", "met"), [(0.03, "met"), (0.06, "not met"), (-0.01, "met")])
def test_stacking_is_held_against_half_of_what_the_original_lost(lost: float, met: str) -> None:
    given = record(**baselines(), stack__both=entry(stack(lost)))
    words = answers(given, SECTIONS[2])
    assert len(words) == 2
    assert all(text.endswith(f"is {met}.") for text in words)
    assert f"{-lost:+.3f}" in words[0]
    aims = tables(given, "In short")[0]
    assert [cells[-1].text for cells in aims.rows] == [{"met": "yes", "not met": "no"}[met]] * 2
    table = tables(given, SECTIONS[2])[0]
    shown = row(table, "SST-2", "stacked exactly")
    assert shown[3:6] == ["1,000", f"{0.85 - lost:.4f}", f"{-lost:+.4f}"]
    assert row(table, "CoLA", "the adapter alone")[6] == "0.4000"


def test_the_limit_is_for_the_original_s_data_sets_whatever_a_task_is_called() -> None:
    given = record(**baselines(sst2="imdb"), stack__both=entry(stack(0.03)))
    named, other = answers(given, SECTIONS[2])
    assert "sst2's accuracy from 0.850 by -0.030 (standard error 0.011)" in named
    assert named.endswith("the original gives no stacked figure of its data set.")
    assert "(0.039), is met" in other
    assert len(tables(given, "In short")[0].rows) == 1


def both_splits() -> Figures:
    """Figures of MNLI's two splits, of different sizes."""
    first = {"n": 2000, "accuracy": 0.61, "nll": 0.8}
    return {"matched": first, "mismatched": first | {"n": 1000, "accuracy": 0.62}}


def test_every_split_and_mcc_is_shown_after_further_training() -> None:
    step = further(a=(0.86, 0.70))
    for figures in (step["alone"], step["before"], step["variants"]["a"]["figures"]):
        figures["mnli"] = both_splits()
        figures["cola"] = split(0.7, mcc=0.25)
    table = tables(record(further__both=entry(step)), SECTIONS[3])[0]
    assert row(table, "MNLI matched", "a")[3:5] == ["2,000", "0.6100"]
    assert row(table, "MNLI mismatched", "a")[3:5] == ["1,000", "0.6200"]
    assert table.columns[6] == "MCC"
    assert row(table, "CoLA", "a")[6] == "0.2500"
    assert row(table, "SST-2", "a")[6] == "not available"


# Standard errors: √(.85·.15/1000) = .0113 and √(.8·.2/1000) = .0126.
@pytest.mark.parametrize(
    ("variants", "better", "level", "best"),
    [
        ({"a": (0.88, 0.84)}, "a", "none", "a: +0.030 on SST-2"),
        ({"a": (0.88, 0.80), "b": (0.86, 0.79)}, "none", "a and b", "a: 0.000 on CoLA"),
        ({"a": (0.95, 0.70), "b": (0.83, 0.82)}, "none", "none", "b: -0.020 on SST-2"),
    ],
)  # fmt: skip
def test_better_on_both_is_answered_with_standard_errors(
    variants: dict[str, tuple[float, float]], better: str, level: str, best: str
) -> None:
    words, over_stack = answers(record(further__both=entry(further(**variants))), SECTIONS[3])
    assert words.startswith("Better than the single adapters on SST-2 and CoLA? ")
    assert f"more than one standard error on every one: {better}. Nowhere worse" in words
    assert f"not better by more than one on all: {level}. " in words
    assert f"worst change is best is {best}, where the standard error is 0.01" in words
    assert over_stack.startswith("Better than the untrained exact stack on SST-2 and CoLA? ")


def test_only_changes_beyond_two_standard_errors_are_marked() -> None:
    given = record(further__both=entry(further(a=(0.86, 0.70))))
    table, summary, *_ = tables(given, SECTIONS[3])

    def change(task: str) -> tuple[str, str]:
        cells: Any = next(c for c in table.rows if (c[0].text, c[1].text) == (task, "a"))
        return cells[5].text, cells[5].tone

    assert [change("SST-2"), change("CoLA")] == [("+0.0100", ""), ("-0.1000", "bad")]
    assert row(summary, "trainer/global_step")[1] == "20"


def test_what_was_trained_on_says_how_many_batches() -> None:
    def note(step: Figures) -> str:
        table: Table = tables(record(further__both=entry(step)), SECTIONS[3])[0]
        return table.note

    step = further(a=(0.86, 0.70))
    drawn = "Drawn from 90 of SST-2 and 90 of CoLA: at most 2 epochs of"
    assert f"{drawn} 120 batches of 32, learning rate 0.001." in note(step)
    step["recipe"]["steps_per_epoch"] = None
    assert f"{drawn} one pass over the largest of them, in batches of 32" in note(step)
