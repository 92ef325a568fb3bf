"""The observations: every section, words that follow the figures, figures left as they are."""

import copy

import pytest

from bayesian_lora.report.observations import observations
from bayesian_lora.report.page import Missing, render
from tests.report.study_records import (
    SECTIONS,
    baseline,
    baselines,
    entry,
    further,
    gate,
    rank,
    record,
    section,
    stack,
    tables,
)


@pytest.mark.usefixtures("blank_plots")
def test_every_section_is_there_and_says_why_it_is_empty() -> None:
    page = observations(record())
    assert [s.title for s in page.sections] == SECTIONS
    for found in page.sections[1:-1]:
        assert found.blocks
        assert all(isinstance(block, Missing) for block in found.blocks), found.title
    failed = record(stack__both=entry(None, status="failed", error="no such base"))
    block = section(failed, SECTIONS[2]).blocks[0]
    assert isinstance(block, Missing)
    assert (block.what, block.reason) == ("a step", "no such base")
    assert "no such base" in render(observations(failed))
    pending = section(record(rank__1=entry(None, status="pending")), SECTIONS[9]).blocks[0]
    assert isinstance(pending, Missing)
    assert pending.reason == "this step has not been made yet"


def test_the_lead_names_what_was_done_and_nothing_else() -> None:
    assert observations(record()).lead.startswith("Adapters of SST-2 and CoLA: none made yet.")
    made = record(**baselines(), stack__both=entry(stack(0.03)), gate__token=entry(None))
    made["steps"]["gate-token"]["status"] = "failed"
    assert "on minilm: trained one by one and stacked. Every" in observations(made).lead


@pytest.mark.usefixtures("blank_plots")
def test_aims_name_the_worst_task_of_every_gate() -> None:
    over = gate(0.96)
    over["ensembles"] = over["alone"]
    given = record(gate__token=entry(gate(0.94)), ensemblegate__ensembles=entry(over))
    shown = [[cell.text for cell in cells[1:]] for cells in tables(given, "In short")[0].rows]
    assert shown == [
        ["gate token: CoLA", "at least 95%", "94.0%", "no"],
        ["gate over ensembles: CoLA", "at least 95%", "96.0%", "yes"],
    ]


def test_figures_are_left_as_they_are() -> None:
    given = record(
        baseline__sst2=entry(baseline()),
        stack__both=entry(stack(0.03)),
        further__both=entry(further(a=(0.86, 0.7))),
        gate__sequence=entry(gate(0.9)),
        rank__1=entry(rank(1, 0.8)),
    )
    before = copy.deepcopy(given)
    assert render(observations(given)).count("data:image/svg+xml") == 8  # four, for two grounds
    assert given == before
