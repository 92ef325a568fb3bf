"""The table of a comparison: what stands in it, aligned and as CSV, and its notes."""

import csv
import io
from typing import Any

import pytest

from bayesian_lora.experiment import comparison_table
from bayesian_lora.experiment.comparison_table import figures_of, lines, notes, table, to_csv

RUN = {"wall_s": 12.34}


def metrics(nll: float = 0.5, **changes: Any) -> dict[str, Any]:
    ensemble = {"accuracy": 0.75, "f1": None, "nll": nll, "ece": 0.1, "brier": 0.3, "k": 4}
    spread = {name: {"mean": 0.6, "sd": 0.1} for name in ("accuracy", "nll", "ece", "brier")}
    return {
        "task": "synthetic",
        "split": "validation",
        "n": 600,
        "temperature": 1.0,
        "tempering": "posterior",
        "sampler": {"name": "sgld", "step_size": 2.5e-5, "exactness": "exact as h → 0"},
        "map": spread,
        "map_ensemble": {"nll": 0.55, "accuracy": 0.7},
        "single": {name: {"mean": 0.65, "sd": 0.1} for name in spread},
        "ensemble": ensemble | changes.pop("ensemble", {}),
        "diagnostics": {
            "rhat_max": 1.01,
            "ess_bulk_min": 250.0,
            "ess_tail_min": 200.0,
            "t_eff": 1.5,
            "verdict": "mixed",
            "reason": "R-hat at most 1.01",
            **changes.pop("diagnostics", {}),
        },
        "cost": {
            "train_s": 1.0,
            "sample_s": 2.0,
            "eval_s": 3.0,
            "gradient_evaluations": 9000,
            "sampling_gradient_evaluations": 5000,
        },
        **changes,
    }


def entry(name: str, **changes: Any) -> dict[str, Any]:
    known = {"name": name, "overrides": [f"sampler.name={name}"], "error": None}
    known |= {"status": "finished", "warm_start": name}
    return known | figures_of(metrics(**changes), RUN)


def failed(name: str) -> dict[str, Any]:
    known = {"name": name, "overrides": [f"sampler.name={name}"], "error": "unstable"}
    return known | {"status": "failed", "warm_start": name}


def test_ess_is_given_for_a_thousand_gradients_of_the_sampling_phase() -> None:
    assert figures_of(metrics(), RUN)["ess_per_1000"] == 1000 * 250 / 5000
    missing = figures_of(metrics(diagnostics={"ess_bulk_min": None}), RUN)
    assert missing["ess_per_1000"] is None
    assert missing["ess_per_1000_reason"]
    because = {"ess_bulk_min": None, "ess_bulk_min_reason": "constant"}
    assert figures_of(metrics(diagnostics=because), RUN)["ess_per_1000_reason"] == "constant"
    old = metrics()
    del old["cost"]["sampling_gradient_evaluations"]
    assert figures_of(old, RUN)["ess_per_1000"] is None
    assert "not recorded" in figures_of(old, RUN)["ess_per_1000_reason"]


def test_a_row_holds_the_figures_of_its_cell() -> None:
    first, second = table(["sampler.name"], [entry("sgld"), failed("psgld")])
    assert first == {
        "sampler.name": "sgld",
        "map_nll": 0.6,
        "map_ensemble_nll": 0.55,
        "accuracy": 0.75,
        "nll": 0.5,
        "ece": 0.1,
        "brier": 0.3,
        "step_size": 2.5e-5,
        "targets": "exact as h → 0",
        "tempering": "posterior, T = 1",
        "rhat_max": 1.01,
        "ess_per_1000": 50.0,
        "t_eff": 1.5,
        "verdict": "mixed",
        "seconds": 12.34,
        "status": "finished",
    }
    assert second == dict.fromkeys(first) | {"sampler.name": "psgld", "status": "failed"}


def test_metrics_are_shown_that_some_cell_has() -> None:
    """Regression has pearson and no accuracy; a task's own metrics may be another's."""
    gauss = entry("a", ensemble={"accuracy": None, "pearson": 0.8, "ece": None, "brier": None})
    (row,) = table(["sampler.name"], [gauss])
    assert list(row)[3:5] == ["pearson", "nll"]
    both = table(["sampler.name"], [gauss, entry("b", ensemble={"f1": 0.4})])
    assert list(both[0])[3:9] == ["accuracy", "f1", "pearson", "nll", "ece", "brier"]
    assert both[0]["f1"] is None
    assert both[1]["f1"] == 0.4


def test_lines_are_aligned() -> None:
    rows = table(["sampler.name"], [entry("sam_sgld_rank1", nll=10.5), failed("sgld")])
    head, first, second = lines(rows)
    figures = "0.6000 0.5500 0.7500 10.5000 0.1000 0.3000 2.5e-05 exact as h → 0 posterior, T = 1"
    more = "1.0100 50.0 1.5000 mixed 12.3 finished"
    assert first.split() == ["sam_sgld_rank1", *figures.split(), *more.split()]
    assert second.split() == ["sgld", *["n/a"] * 14, "failed"]
    assert head.split() == list(rows[0])
    for name, text in (("nll", "10.5000"), ("seconds", "12.3")):
        end = head.index(f" {name} ") + 1 + len(name)
        assert first[:end].endswith(text)
    for line in (first, second):
        at = head.index("verdict")
        assert line[at - 1] == " "
        assert line[at] != " "


def test_the_csv_has_every_digit_and_empty_fields() -> None:
    rows = table(["sampler.name"], [entry("sgld", nll=1 / 3), failed("a,b")])
    first, second = csv.DictReader(io.StringIO(to_csv(rows)))
    assert list(first) == list(rows[0])
    assert float(first["nll"]) == 1 / 3
    assert second == dict.fromkeys(first, "") | {"sampler.name": "a,b", "status": "failed"}


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"n": 500}, "number of examples"),
        ({"split": "test"}, "split"),
        ({"task": "rte"}, "task"),
        ({"ensemble": {"k": 8}}, "number of samples"),
        ({"temperature": 2.0, "tempering": "hot"}, "temperature"),
    ],
)
def test_what_is_not_alike_is_said(changes: dict[str, Any], title: str) -> None:
    assert notes([entry("a"), entry("b")]) == []
    (note,) = notes([entry("a"), entry("b", **changes)])
    assert note.startswith(f"Note: cells differ in the {title}")
    assert "(a), " in note
    assert note.endswith("(b)")


def test_failures_and_shared_warm_starts_are_said() -> None:
    taken = entry("b") | {"warm_start": "a"}
    first, second = notes([entry("a"), taken, failed("c")])
    assert first.startswith("Warm starts of a were taken by b: ")
    assert second == "c failed: unstable"
    assert comparison_table.notes([failed("c")]) == ["c failed: unstable"]


def test_a_cold_posterior_is_labelled() -> None:
    found = notes([entry("sgld", temperature=0.5, tempering="cold")])
    assert found == ["Note: sgld is a cold posterior (cold, T = 0.5)"]
    assert notes([entry("sgld")]) == []


def test_the_ess_of_stuck_chains_is_no_rate() -> None:
    (note,) = notes([entry("sgld", diagnostics={"verdict": "not mixed"})])
    assert "no rate" in note


def test_the_error_of_the_nll_stands_beside_it_where_some_cell_has_it() -> None:
    errors = {"standard_errors": {"ensemble": {"nll": 0.02}}, "map_last": None}
    new = entry("sgld", **errors)
    rows = table(["sampler.name"], [new, entry("sghmc"), failed("psgld")])
    assert list(rows[0])[4:7] == ["nll", "nll_se", "ece"]
    assert [row["nll_se"] for row in rows] == [0.02, None, None]
    assert "0.0200" in lines(rows)[1]
    damaged = entry("sgld", standard_errors={"ensemble": [0.02]})
    assert "nll_se" not in table(["sampler.name"], [damaged])[0]


def test_a_record_keeps_the_baselines_and_errors_that_there_are() -> None:
    scaled = {"accuracy": 0.7, "nll": 0.5, "temperature": 1.4}
    more = {"map_temperature_scaled": scaled, "map_last": None, "calibration": {"bins": 15}}
    kept = entry("sgld", **more)["metrics"]
    assert kept["map_temperature_scaled"] == scaled
    assert kept["calibration"] == {"bins": 15}
    assert "map_last" not in kept
