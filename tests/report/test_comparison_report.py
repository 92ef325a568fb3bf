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
from tests.report.finished_runs import changed, with_nll


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
    short, table, forest, words = page.sections
    assert isinstance(short.blocks[0], Text)
    assert short.blocks[0].text.startswith("The lowest NLL of a posterior ensemble is that of one")
    assert isinstance(table.blocks[0], Table)
    assert table.blocks[0].rows[1][1].text == "not available"
    assert Text("a note") in table.blocks
    assert sum(isinstance(b, Chart) for b in forest.blocks) == 3
    bare = forest.blocks[-1]
    assert isinstance(bare, Missing)
    assert bare.what == "Standard errors of two"
    assert words.blocks[-1] == Missing("three", "it broke")
    assert "2 of them finished" in page.lead


def short(found: Compared) -> list[str]:
    blocks = comparison_page(found, "runs").sections[0].blocks
    return [block.text if isinstance(block, Text) else "missing" for block in blocks]


def test_cells_are_counted_by_how_they_stand_to_their_baselines(compared: Compared) -> None:
    """The fixture's standard error of a difference is .004."""
    files = compared.cells["one"]
    theirs = files.metrics["map_temperature_scaled"]["nll"]
    cells = {f"{gap:+}": with_nll(files, theirs + gap) for gap in (-0.1, -0.05, 0.1, 0.001)}
    said = short(dataclasses.replace(compared, cells=cells))
    assert said[0].startswith("The lowest NLL of a posterior ensemble is that of -0.1, ")
    assert said[1].startswith("Of 4 posterior ensembles 2 have a lower NLL")
    assert said[1].endswith("standard errors, 1 a higher one, and 1 cannot be told from it.")
    assert "of 1 no standard error is known" in short(compared)[1]


@pytest.mark.parametrize("other", [{"task": "sst2"}, {"split": "test"}, {"n": 80}])
def test_cells_of_other_examples_have_no_best_among_them(
    compared: Compared, other: dict[str, str | int]
) -> None:
    files = compared.cells["one"]
    cells = {"one": files, "other": changed(files, **other)}
    found = dataclasses.replace(compared, cells=cells)
    said = short(found)
    assert len(said) == 1
    assert said[0].startswith("Of 2 posterior ensembles")
    *charts, errors = comparison_page(found, "runs").sections[2].blocks
    assert [b.text for b in charts if isinstance(b, Chart)] == [
        f"{name} of 2 cells." for name in ("NLL", "ECE", "Accuracy")
    ]
    assert isinstance(errors, Text)
    assert errors.text.startswith("The cells did not answer the same examples")


def test_cells_of_the_same_examples_differ_more_surely_than_their_bars(
    compared: Compared,
) -> None:
    files = compared.cells["one"]
    found = dataclasses.replace(compared, cells={"one": files, "other": with_nll(files, 0.9)})
    errors = comparison_page(found, "runs").sections[2].blocks[-1]
    assert isinstance(errors, Text)
    assert errors.text.startswith("The cells answered the same examples")


def test_cells_that_sampled_nothing_are_no_posterior_ensembles(compared: Compared) -> None:
    files = compared.cells["one"]
    fits = dataclasses.replace(files, manifest={**files.manifest, "sampler": {"name": "map"}})
    cells = {"one": files, "fits": fits}
    assert "Of 1 posterior ensembles" in short(dataclasses.replace(compared, cells=cells))[0]
    assert short(dataclasses.replace(compared, cells={"fits": fits})) == ["missing"]


def test_the_table_stands_in_two_parts_that_fit_on_paper(compared: Compared) -> None:
    table = [{"sampler": "sgld", "nll": 0.5, "verdict": "mixed", "seconds": 3.0}]
    blocks = comparison_page(dataclasses.replace(compared, table=table), "runs").sections[1].blocks
    parts = [list(block.columns) for block in blocks if isinstance(block, Table)]
    assert parts == [["sampler", "NLL"], ["sampler", "verdict", "seconds"]]


def test_a_comparison_without_finished_cells_is_a_page_too() -> None:
    page = comparison_page(Compared({}, [], [], {}, {}), "runs")
    assert all(isinstance(section.blocks[0], Missing) for section in page.sections)
