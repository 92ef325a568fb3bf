"""The page of a run: every section, from whatever of its files there is."""

import dataclasses

import pytest

from bayesian_lora.report.page import Block, Missing, Page, Table
from bayesian_lora.report.run_files import RunFiles
from bayesian_lora.report.run_inputs import Texts
from bayesian_lora.report.run_report import run_page

NOTHING = Texts({}, "no data")
ANCHORS = [
    *("short", "figures", "calibration", "selective", "enough", "chains", "shift", "inputs"),
    *("sampler", "made"),
]
PARTS = (
    *("map", "map_ensemble", "single", "ensemble", "standard_errors", "calibration", "selective"),
    *("cumulative", "uncertainty", "diagnostics", "cost", "sampler", "temperature", "n"),
)


def blocks(page: Page) -> list[Block]:
    return [block for section in page.sections for block in section.blocks]


def test_every_section_has_its_place(run_files: RunFiles) -> None:
    page = run_page(run_files, NOTHING, "run")
    assert [section.anchor for section in page.sections] == ANCHORS
    assert all(section.blocks for section in page.sections)
    assert page.lead == (
        "all-MiniLM-L6-v2 on synthetic: 20 samples by sgld, measured on validation (400 examples)."
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["null", "missing"])
def test_no_part_of_the_metrics_is_taken_for_granted(
    run_files: RunFiles, part: str, how: str
) -> None:
    metrics = {**run_files.metrics, part: None}
    if how == "missing":
        del metrics[part]
    # Without traces, so that this stays quick: they are drawn in the tests of the chains.
    files = dataclasses.replace(run_files, metrics=metrics, traces={})
    page = run_page(files, NOTHING, "run")
    assert [section.anchor for section in page.sections] == ANCHORS
    for block in blocks(page):
        if isinstance(block, Table):
            assert block.rows
            assert len({len(row) for row in block.rows} | {len(block.columns)}) == 1
        if isinstance(block, Missing):
            assert block.reason


def test_map_fits_have_a_report(run_files: RunFiles) -> None:
    sampler = {**run_files.manifest["sampler"], "name": "map"}
    reason = {"reason": "no sampling: the members are MAP fits, so there are no chains to judge"}
    files = dataclasses.replace(
        run_files,
        manifest={**run_files.manifest, "sampler": sampler},
        metrics={**run_files.metrics, "diagnostics": reason},
        traces={},
    )
    page = run_page(files, NOTHING, "run")
    assert "20 MAP fits" in page.lead
    by_anchor = {section.anchor: section for section in page.sections}
    assert by_anchor["chains"].blocks == [Missing("Diagnostics", reason["reason"])]
    assert by_anchor["enough"].blocks == [Missing("Cumulative curve", "nothing was sampled")]
