"""Reliability, selective prediction, growth with k: drawn from metrics.json or missed."""

import copy
import dataclasses
from typing import Any

import pytest

from bayesian_lora.report.page import Block, Chart, Missing, Table, Text
from bayesian_lora.report.run_calibration import calibration, cumulative, selective, thinned
from bayesian_lora.report.run_files import RunFiles


def changed(files: RunFiles, **parts: Any) -> RunFiles:
    return dataclasses.replace(files, metrics={**files.metrics, **parts})


def only(blocks: Any, kind: type) -> Any:
    found: list[Block] = [block for block in blocks if isinstance(block, kind)]
    assert len(found) == 1
    return found[0]


def test_the_diagram_shows_the_bins_that_have_examples(run_files: RunFiles) -> None:
    picture = only(calibration(run_files).blocks, Chart)
    shown = {t["name"]: t for t in picture.figure["data"] if t["type"] == "scatter"}
    for name, title in (("map", "MAP"), ("ensemble", "posterior ensemble")):
        row = run_files.metrics["calibration"]["reliability"][name]
        known = [x for x in row["confidence"] if x is not None]
        assert shown[title]["x"] == pytest.approx(known, rel=1e-4)
        bars = next(t for t in picture.figure["data"] if t["type"] == "bar" and t["name"] == title)
        assert sum(bars["y"]) == pytest.approx(1, abs=1e-3)
    assert shown["perfect"]["x"] == shown["perfect"]["y"] == [0, 1]


def test_bins_and_risks_have_bars_of_their_errors_where_they_are_known(
    run_files: RunFiles,
) -> None:
    for make in (calibration, selective):
        older = only(make(run_files).blocks, Chart)
        assert "standard error" not in older.caption
        assert not any("±" in c.text for row in older.numbers.rows for c in row)
    m = copy.deepcopy(dict(run_files.metrics))
    row = m["calibration"]["reliability"]["ensemble"]
    row["accuracy_se"] = [0.01 + i / 1000 for i in range(len(row["count"]))]
    m["selective"]["risk_se"] = {"ensemble": [0.02] * 100, "map": [None] + [0.03] * 99}
    files = dataclasses.replace(run_files, metrics=m)
    picture = only(calibration(files).blocks, Chart)
    shown = next(t for t in picture.figure["data"] if t["name"] == "posterior ensemble")
    filled = [i for i, n in enumerate(row["count"]) if n]
    assert shown["error_y"]["array"] == pytest.approx([row["accuracy_se"][i] for i in filled])
    accuracy = picture.numbers.rows[-1][2].text
    assert accuracy == f"{row['accuracy'][filled[-1]]:.3f} ± {row['accuracy_se'][filled[-1]]:.3f}"
    curves = only(selective(files).blocks, Chart)
    bars = [t["error_y"]["array"] for t in curves.figure["data"]]
    places = [{i for i, x in enumerate(one) if x is not None} for one in bars]
    assert all(places)
    assert not places[0] & places[1], "they would hide one another"
    assert [c.text for c in curves.numbers.rows[-1]] == [
        "100%", "0.2500 ± 0.0300", "0.2200 ± 0.0200"
    ]  # fmt: skip
    assert all("standard error" in one.caption for one in (picture, curves))
    row["accuracy_se"] = [None] * len(row["count"])
    m["selective"]["risk_se"] = {"ensemble": [None] * 100, "map": [None] * 100}
    for make in (calibration, selective):
        bare = only(make(dataclasses.replace(run_files, metrics=m)).blocks, Chart)
        assert "standard error" not in bare.caption


@pytest.mark.parametrize(("ece", "words"), [(0.047, "more than"), (0.045, "no more than")])
def test_the_ece_is_judged_against_that_of_a_calibrated_model(
    run_files: RunFiles, ece: float, words: str
) -> None:
    """0.03 ± 0.008 in the fixture, so two deviations are reached at 0.046."""
    files = changed(run_files, ensemble={**run_files.metrics["ensemble"], "ece": ece})
    said = only(calibration(files).blocks, Text).text
    assert f"miscalibration is {words} what chance explains" in said
    assert "0.0300 ± 0.0080" in said


def test_risk_and_accuracy_of_both(run_files: RunFiles) -> None:
    blocks = selective(run_files).blocks
    lines = only(blocks, Chart).figure["data"]
    assert [t["name"] for t in lines] == ["MAP", "posterior ensemble"]
    assert lines[1]["y"][-1] == pytest.approx(0.22)
    table = only(blocks, Table)
    assert list(table.columns) == ["", "50%", "80%", "90%", "95%"]
    assert [c.text for c in table.rows[1]] == [
        "posterior ensemble", "0.9500 ± 0.0150", "0.9000 ± 0.0120", "0.8600", "0.8400"
    ]  # fmt: skip


def test_the_curve_over_k_and_what_is_enough(run_files: RunFiles) -> None:
    blocks = cumulative(run_files).blocks
    assert only(blocks, Text).text.startswith("10 samples are enough: ")
    lines = only(blocks, Chart).figure["data"]
    assert [t["name"] for t in lines] == ["NLL", "accuracy", "ECE"]
    assert lines[0]["x"] == [1, 2, 5, 10, 20]
    assert lines[0]["y"] == [0.55, 0.53, 0.51, 0.5, 0.5]


def test_not_settled_keeps_its_reason(run_files: RunFiles) -> None:
    curve = {**run_files.metrics["cumulative"], "enough": {"k": None, "reason": "draw more"}}
    blocks = cumulative(changed(run_files, cumulative=curve)).blocks
    assert only(blocks, Text).text == "Not settled: draw more."


def test_what_more_samples_would_bring_is_said(run_files: RunFiles) -> None:
    gain = {"still_to_gain": 0.0123, "still_to_gain_se": 0.002}
    enough = {"k": 5, "reason": "so", "judged": 8, **gain}
    curve = {**run_files.metrics["cumulative"], "enough": enough}
    said = only(cumulative(changed(run_files, cumulative=curve)).blocks, Text).text
    assert "by the first 8 of the 20, more draws would change NLL by about -0.0123 ± 0.0020" in said
    curve["enough"] = {**enough, "still_to_gain": -0.0123}
    worse = only(cumulative(changed(run_files, cumulative=curve)).blocks, Text).text
    assert worse == "5 samples are enough: so.", "later draws that are worse promise nothing"
    curve["enough"] = {"k": 5, "reason": "so", **gain}
    older = only(cumulative(changed(run_files, cumulative=curve)).blocks, Text).text
    assert older == worse, "it was claimed too large, and nothing says by how much"


@pytest.mark.parametrize("part", ["calibration", "selective", "cumulative"])
def test_an_older_run_says_what_to_do(run_files: RunFiles, part: str) -> None:
    make = {"calibration": calibration, "selective": selective, "cumulative": cumulative}[part]
    assert (
        "bayesian-lora eval RUN"
        in only(make(changed(run_files, **{part: None})).blocks, Missing).reason
    )
    known = changed(run_files, **{part: None, f"{part}_reason": "a very good one"})
    assert only(make(known).blocks, Missing).reason == "a very good one"


def test_a_regression_shows_coverage_and_no_classes(run_files: RunFiles) -> None:
    task = {**run_files.manifest["task"], "likelihood": "gaussian"}
    row = {"coverage_0.5": 0.52, "coverage_0.9": 0.88, "coverage_0.95": 0.95, "k": 20}
    nothing = {"risk": None, "coverage": None, "reason": "a regression has no classes"}
    files = dataclasses.replace(
        changed(run_files, ensemble=row, selective=nothing),
        manifest={**run_files.manifest, "task": task},
    )
    table = only(calibration(files).blocks, Table)
    assert [row[0].text for row in table.rows] == ["50%", "90%", "95%"]
    assert [row[2].text for row in table.rows] == ["0.520", "0.880", "0.950"]
    assert "no class" in only(selective(files).blocks, Missing).reason


def test_long_tables_keep_their_ends() -> None:
    assert thinned(5) == [0, 1, 2, 3, 4]
    assert thinned(101, 21) == list(range(0, 101, 5))


def test_it_says_what_the_top_label_claims_and_keeps(run_files: RunFiles) -> None:
    m = copy.deepcopy(dict(run_files.metrics))
    bins = {"confidence": [None, 0.6, 0.9], "accuracy": [None, 0.5, 0.7], "count": [0, 1, 3]}
    m["calibration"]["reliability"]["ensemble"] = bins
    first = calibration(dataclasses.replace(run_files, metrics=m)).blocks[0]
    assert isinstance(first, Text)
    assert first.text.endswith("its top label has probability 0.825 and is right on 0.650.")
