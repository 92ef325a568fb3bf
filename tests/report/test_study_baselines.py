"""The single adapters: the original's tables beside theirs, and what curves say in words."""

import pytest

from bayesian_lora.report import anchors
from bayesian_lora.report.page import Code, Picture
from bayesian_lora.report.record import Figures
from bayesian_lora.report.study_baselines import curves
from tests.report.conftest import AxesOf
from tests.report.study_records import (
    SECTIONS,
    baseline,
    entry,
    record,
    row,
    section,
    tables,
)

pytestmark = pytest.mark.usefixtures("blank_plots")


def test_the_original_s_tables_are_filled_in_beside_its_figures() -> None:
    given = record(baseline__sst2=entry(baseline()))
    found = next(t for t in tables(given, SECTIONS[1]) if t.caption.startswith("SST-2"))
    assert [cells[0].text for cells in found.rows] == list(anchors.BASELINE["sst2"])
    assert row(found, "val/acc") == ["val/acc", "0.8000", "0.8463"]
    code = next(b for b in section(given, SECTIONS[1]).blocks if isinstance(b, Code))
    assert code.text == f"sst2_baseline = {baseline()['logged']!r}"


def test_the_original_stands_beside_a_task_of_its_data_set_whatever_the_name() -> None:
    given = record(baseline__mine=entry(baseline()), baseline__sst2=entry(baseline("cola")))
    mine = next(t for t in tables(given, SECTIONS[1]) if t.caption.startswith("mine: as"))
    assert row(mine, "val/acc")[2] == "0.8463"
    other = next(t for t in tables(given, SECTIONS[1]) if t.caption.startswith("sst2: as"))
    assert row(other, "val/acc")[2] == f"{anchors.BASELINE['cola']['val/acc']:.4f}"


def test_every_figure_says_on_how_many_examples() -> None:
    given = record(baseline__cola=entry(baseline("cola")))
    given["config"]["evaluation"] = {"examples": 700}
    table = next(t for t in tables(given, SECTIONS[1]) if t.caption.startswith("The single"))
    assert table.columns[2:5] == ["n", "Accuracy", "MCC"]
    assert row(table, "CoLA")[2:5] == ["1,000", "0.8000", "0.5000"]
    assert "of a split of more than 700" in table.note


def test_curves_in_words() -> None:
    rows: list[Figures] = [{"trainer/global_step": 1.0, "val/acc": 0.123456789}]
    unknown: list[Figures] = [{"trainer/global_step": 1.0, "val/acc": None}]
    (picture,) = curves({"a": rows, "b": unknown}, "two")
    assert isinstance(picture, Picture)
    assert picture.text == "Training curves of two; val/acc at the end: a 0.123, b not recorded"


def test_axes_say_their_unit(axes_of: AxesOf) -> None:
    rows: list[Figures] = [{"trainer/global_step": 1.0, "val/acc": 0.5, "val/loss": 0.6}]
    panels = axes_of(lambda: curves({"a": rows}, "one"))
    assert [axes.get_ylabel() for axes in panels] == ["nats", "nats", "accuracy"]
