"""Growth task by task: what stays, what earlier columns gave, on every split."""

import pytest

from tests.report.study_records import (
    SECTIONS,
    answers,
    entry,
    grown,
    record,
    row,
    split,
    tables,
)

pytestmark = pytest.mark.usefixtures("blank_plots")


@pytest.mark.parametrize(
    ("identical", "largest", "words", "reached"),
    [(True, 0.0, "bit for bit", "yes"), (False, 1e-3, "moved by more than 0.001", "no")],
)
def test_what_growth_leaves_as_it_was(
    identical: bool, largest: float, words: str, reached: str
) -> None:
    given = record(sequential=entry(grown(identical, largest)))
    (text,) = answers(given, SECTIONS[6])
    assert words in text
    assert [cells[-1].text for cells in tables(given, "In short")[0].rows] == [reached]
    forgotten = row(tables(given, SECTIONS[6])[1], "SST-2", "CoLA")
    assert forgotten[4:8] == ["1,000", "0.8000", "0.7000", "-0.1000"]
    assert forgotten[-1] == "+0.2000"


def test_every_split_with_mcc_and_what_earlier_columns_gave() -> None:
    step = grown(True, 0.0)
    own = step["tasks"]["cola"]
    own["after"] = split(0.75, mcc=0.2) | {"other": {"n": 500, "accuracy": 0.6, "nll": 0.7}}
    own["columns"] = [1, 3]
    own["transfer"] = {"accuracy": {"mean": -0.02}, "nll": {"mean": 0.1}}
    own["transfer"]["mcc"] = {"mean": None, "reason": "constant"}
    given = record(sequential=entry(step))
    assert answers(given, SECTIONS[6])[1].endswith("CoLA's by -0.020 (standard error 0.014).")
    table = tables(given, SECTIONS[6])[0]
    none = "not available"
    assert row(table, "SST-2")[1] == "1"
    shown = row(table, "CoLA validation")
    assert shown[1] == "2–3"
    assert shown[3:] == ["1,000", "0.7500", "0.2000", "0.4000", "-0.0200", none, "0.1000"]
    assert row(table, "CoLA other")[3:] == ["500", "0.6000", none, "0.7000", none, none, none]
    assert {"constant", "the first task has no earlier columns"} < {*table.missing}


def test_chance_is_given_for_both_sides() -> None:
    step = grown(True, 0.0)
    mean = {"cosine": 0.1, "angle_left": 1.5, "angle_right": 1.4, "phi_left": 0.2, "phi_right": 0.3}
    chance = {"cosine": 0.01, "phi_left": 0.02, "phi_right": 0.03}
    angles = [{"against": "sst2", "mean": mean | {"random": chance}}]
    step["tasks"]["cola"]["angles"] = angles
    table = tables(record(sequential=entry(step)), SECTIONS[6])[-1]
    assert row(table, "CoLA", "SST-2")[-4:] == ["0.2000", "0.0200", "0.3000", "0.0300"]
