"""The page of a comparison: its table, every cell beside its baselines, verdicts in words."""

import dataclasses

import pytest

from bayesian_lora.report.comparison_report import (
    Compared,
    comparison_page,
    figure_order,
    forest_chart,
)
from bayesian_lora.report.page import Chart, Missing, Table, Text
from bayesian_lora.report.run_files import RunFiles


@pytest.fixture
def compared(run_files: RunFiles) -> Compared:
    worse = {**run_files.metrics["ensemble"], "nll": 0.9, "accuracy": 0.5, "ece": 0.3}
    bare = {**run_files.metrics, "ensemble": worse}
    del bare["standard_errors"]
    cells = {"one": run_files, "two": dataclasses.replace(run_files, metrics=bare)}
    table = [{"sampler": "sgld", "nll": 0.5}, {"sampler": "psgld", "nll": None}]
    return Compared({"sampler": ["sgld", "psgld"]}, table, ["a note"], cells, {"three": "it broke"})


def test_every_cell_and_kind_has_its_mark_and_bar(compared: Compared) -> None:
    found = forest_chart(compared.cells, "nll")
    marks = {t["name"]: t for t in found.figure["data"]}
    assert set(marks) == {
        *("posterior ensemble", "MAP", "MAP, temperature-scaled"),
        "deep ensemble",
    }
    own = marks["posterior ensemble"]
    expected = [f.metrics["ensemble"]["nll"] for f in compared.cells.values()]
    assert own["x"] == pytest.approx(expected, rel=1e-4)
    assert own["error_x"]["array"] == [0.02, None]
    rungs = [tuple(t["y"]) for t in marks.values()]
    assert len(set(rungs)) == len(rungs)  # or bars would hide one another
    assert all(abs(y - i) < 0.5 for rung in rungs for i, y in enumerate(rung))
    assert found.figure["layout"]["yaxis"]["ticktext"] == ["one", "two"]
    assert "the best posterior ensemble is one's" in found.text


@pytest.mark.parametrize("name", ["nll", "ece", "accuracy"])
def test_the_better_cell_comes_first(compared: Compared, name: str) -> None:
    assert figure_order(compared.cells, name) == ["one", "two"]


def test_the_page_says_what_failed_and_what_has_no_errors(compared: Compared) -> None:
    page = comparison_page(compared, "runs")
    table, forest, words = page.sections
    assert isinstance(table.blocks[0], Table)
    assert table.blocks[0].rows[1][1].text == "not available"
    assert Text("a note") in table.blocks
    assert sum(isinstance(b, Chart) for b in forest.blocks) == 3
    bare = forest.blocks[-1]
    assert isinstance(bare, Missing)
    assert bare.what == "Standard errors of two"
    assert words.blocks[-1] == Missing("three", "it broke")
    assert "2 of them finished" in page.lead


def test_a_comparison_without_finished_cells_is_a_page_too() -> None:
    page = comparison_page(Compared({}, [], [], {}, {}), "runs")
    assert all(isinstance(section.blocks[0], Missing) for section in page.sections)
