"""Is the posterior worth it: the words follow the figures and their standard errors."""

import copy
import dataclasses
from typing import Any

import pytest

from bayesian_lora.report.page import Missing, Table, Text, with_error
from bayesian_lora.report.run_figures import rows, summary
from bayesian_lora.report.run_files import RunFiles, figure
from bayesian_lora.report.verdicts import ROWS, titles_of, verdict
from tests.report.finished_runs import changed, scaled_nll, with_nll


def test_differences_are_called_better_or_worse_only_where_clear(run_files: RunFiles) -> None:
    files = with_nll(run_files, scaled_nll(run_files) + 0.0085)
    table = next(b for b in summary(files).blocks if isinstance(b, Table))
    column = list(table.columns).index("NLL")
    found = {row[0].text: row[column] for row in table.rows}
    worse, level = found["MAP, temperature-scaled"], found["deep ensemble of the warm starts"]
    assert worse.text == "+0.0085 ± 0.0040 worse"
    assert worse.tone == "bad"
    assert level.text.startswith("-0.0015 ± 0.0040")  # 0.01 above the scaled one
    assert level.tone == ""


def test_a_difference_without_standard_error_is_not_judged(run_files: RunFiles) -> None:
    other = {"nll": {"mean": 0.9, "sd": 0.1}}
    files = changed(run_files, map_early_stopped=other)
    table = next(b for b in summary(files).blocks if isinstance(b, Table))
    row = next(row for row in table.rows if row[0].text == "MAP, early-stopped")
    bare = row[list(table.columns).index("NLL")]
    assert "±" not in bare.text
    assert bare.tone == ""


def test_rows_that_are_the_same_stand_once(run_files: RunFiles) -> None:
    m = dict(run_files.metrics)
    m |= {"map_early_stopped": m["map"], "map_last": {"nll": {"mean": 0.9, "sd": 0.1}}}
    found = titles_of(m)
    assert found["map"].endswith("(early-stopped)")
    assert "map_early_stopped" not in found
    assert found["map_last"] == "MAP of the last epoch"
    assert found["map_temperature_scaled"] == ROWS["map_temperature_scaled"]


def test_every_row_has_its_figures_and_errors(run_files: RunFiles) -> None:
    tables = [b for b in rows(run_files).blocks if isinstance(b, Table)]
    first = tables[0]
    found = {row[0].text: row for row in first.rows}
    assert set(found) == {
        f"{ROWS['map']} (last epoch)",  # which the fixture's warm starts are
        *(ROWS[n] for n in ("map_temperature_scaled", "map_ensemble", "single")),
        "posterior ensemble of 20",
    }
    own = found["posterior ensemble of 20"][list(first.columns).index("Accuracy")]
    assert own.text == f"{run_files.metrics['ensemble']['accuracy']:.4f} ± 0.0180"
    absent = next(b for b in rows(run_files).blocks if isinstance(b, Missing))
    assert (absent.what, absent.reason) == ("MAP, early-stopped", "no data were held out")
    spread = next(t for t in tables if t.caption.startswith("Spread"))
    assert [row[0].text for row in spread.rows][-1] == "Monte Carlo error of the mean over draws"


def test_parts_of_the_brier_score_have_their_errors(run_files: RunFiles) -> None:
    errors = copy.deepcopy(dict(run_files.metrics["standard_errors"]))
    errors["ensemble"] = {**errors["ensemble"], "brier_reliability": 0.0123}
    blocks = rows(changed(run_files, standard_errors=errors)).blocks
    table = next(b for b in blocks if isinstance(b, Table) and b.caption.startswith("Brier"))
    own = next(row for row in table.rows if row[0].text.startswith("posterior ensemble"))
    place = list(table.columns).index("Reliability")
    assert own[place].text == "0.0040 ± 0.0123"


def test_an_older_run_says_what_to_do(run_files: RunFiles) -> None:
    found = rows(changed(run_files, standard_errors=None)).blocks[0]
    assert isinstance(found, Table)
    assert "bayesian-lora eval RUN" in found.note
    assert not any("±" in c.text for row in found.rows for c in row)


def test_map_fits_alone_are_no_posterior(run_files: RunFiles) -> None:
    manifest = {**run_files.manifest, "sampler": {**run_files.manifest["sampler"], "name": "map"}}
    files = dataclasses.replace(run_files, manifest=manifest)
    assert verdict(files) == [
        "Nothing was sampled: the members are MAP fits, a deep ensemble of warm starts."
    ]
    table = rows(files).blocks[0]
    assert isinstance(table, Table)
    assert not any("posterior" in row[0].text for row in table.rows)


@pytest.mark.parametrize(("status", "said"), [("finished", False), ("stopped", True)])
def test_a_run_that_has_not_finished_says_so(run_files: RunFiles, status: str, said: bool) -> None:
    files = dataclasses.replace(run_files, run={**run_files.run, "status": status})
    words = [b.text for b in summary(files).blocks if isinstance(b, Text)]
    assert any(text.endswith("its status is stopped.") for text in words) is said


@pytest.mark.parametrize(
    ("row", "value"),
    [({"a": {"mean": 0.5, "sd": 1}}, 0.5), ({"a": 2}, 2.0), ({"a": None}, None), (None, None)],
)
def test_a_figure_is_the_mean_where_there_are_several(row: Any, value: float | None) -> None:
    assert figure(row, "a") == value


def test_a_missing_figure_keeps_its_reason() -> None:
    found = with_error(None, 0.1, "why not")
    assert (found.text, found.reason) == ("not available", "why not")


def test_what_no_row_has_is_no_cause_to_evaluate_again(run_files: RunFiles) -> None:
    m = copy.deepcopy(dict(run_files.metrics))
    m["map"]["expected_ece"] = {"mean": 0.02, "sd": 0.001}
    blocks = rows(dataclasses.replace(run_files, metrics=m)).blocks
    table = next(b for b in blocks if isinstance(b, Table) and b.caption.startswith("Spread"))
    assert table.missing == ["ECE if calibrated: not computed for this row"]
