"""What a person is shown of `metrics.json`: the table with its errors, and the lines below it.

Shapes: M chains, K members, N examples.
"""

import re
from typing import Any

import numpy as np
import pytest

from bayesian_lora.assessment import diagrams, evaluation, summary
from bayesian_lora.assessment.ensemble_curve import cumulative
from bayesian_lora.assessment.run_rows import ENSEMBLE_SCALED, MAP_ROWS, Given, Predicted, rows

from .predictors import classifiers, gaussians

M, K, N = 2, 8, 150


def metrics(regression: bool = False, n: int = N, **changes: Any) -> dict[str, Any]:
    """The contents of `metrics.json` that are shown below its head."""
    make = gaussians if regression else classifiers
    starts, other = (Predicted(make(M, n, seed=s), make(M, 60, seed=s)) for s in (1, 2))
    members, held_out = make(K, n, seed=3), make(K, 60, seed=3)
    own = ("pearson",) if regression else ("accuracy",)
    kinds = {"last": other, "early_stopped": starts}
    return {
        "n": n,
        **rows(
            Given(own, regression, Predicted(members, held_out), np.arange(K) % M, starts, kinds)
        ),
        "uncertainty": evaluation.uncertainty(regression, members),
        "calibration": diagrams.calibration_figures(regression, starts.on, members),
        "selective": diagrams.selective_figures(regression, starts.on, members),
        "cumulative": cumulative(regression, members, M),
        "diagnostics": {"t_eff": 1.0, "verdict": "mixed", "reason": "all well"},
        "temperature": 1.0,
        "sampler": {"name": "sgld"},
        **changes,
    }


def cells(m: dict[str, Any]) -> dict[str, list[str]]:
    """{row: its columns}, errors with their values."""
    head, *lines = summary.table_lines(m)
    table = {"": head.split()}
    for line in lines:
        title, *row = re.split(r"\s{2,}", line)
        table[title] = row
    return table


def test_the_table_shows_each_figure_with_its_error() -> None:
    m = metrics()
    found = cells(m)
    assert found[""] == ["accuracy", "nll", "ece", "brier"]
    for title, key in (("posterior ensemble of 8", "ensemble"), ("single sample (mean)", "single")):
        value, error = found[title][1].split(" ± ")
        nll = m[key]["nll"]
        assert value == f"{nll['mean'] if key == 'single' else nll:.4f}"
        assert float(error) == pytest.approx(m["standard_errors"][key]["nll"], abs=5e-5)
        assert error.startswith(".")
    lengths = {len(line) for line in summary.table_lines(m)}
    assert len(lengths) == 1, "columns end together"


def test_fits_that_sampling_did_not_start_from_have_a_row() -> None:
    found = cells(metrics())
    assert {"MAP (mean of warm starts)", "MAP, last epoch"} <= found.keys()
    assert {"MAP, temperature-scaled", "MAP, last epoch, scaled"} <= found.keys()
    assert {"MAP ensemble, last epoch", "MAP ensemble, last epoch, scaled"} <= found.keys()
    assert not any("early-stopped" in title for title in found)
    gone = cells({**metrics(), **dict.fromkeys(row for row in MAP_ROWS if "last" in row)})
    assert not any("last epoch" in title for title in gone)


def test_figures_without_an_error_stand_alone_and_one_missing_is_told() -> None:
    one = metrics(n=1)
    found = cells(one)
    assert re.fullmatch(r"\d\.\d{4}", found["posterior ensemble of 8"][1])
    closing = "\n".join(summary.closing_lines(one))
    assert "Standard errors are not available: one example has no spread" in closing
    assert "one standard error over" not in closing
    assert f"one standard error over the {N} examples" in "\n".join(
        summary.closing_lines(metrics())
    )
    older = metrics()
    del older["standard_errors"], older["calibration"], older["selective"], older["cumulative"]
    older["ensemble"].pop("aurc")
    del older["map_ensemble_temperature_scaled"], older[ENSEMBLE_SCALED]
    assert not any("ensemble, scaled" in title for title in cells(older))
    assert cells(older).keys() >= {"MAP (mean of warm starts)", "posterior ensemble of 8"}
    closing = "\n".join(summary.closing_lines(older))
    assert "Enough" not in closing
    assert "perfectly calibrated" not in closing


def test_what_is_said_below_the_table() -> None:
    m = metrics()
    closing = "\n".join(summary.closing_lines(m))
    expected = m["calibration"]["expected_ece"]
    assert f"would score ECE {expected['mean']:.4f} ± .{1e4 * expected['sd']:04.0f}" in closing
    assert f"on {N} examples (ensemble {m['ensemble']['ece']:.4f})" in closing
    assert f"Area under risk–coverage: {m['ensemble']['aurc']:.4f}" in closing
    assert m["cumulative"]["enough"]["reason"] in closing
    error = m["selective"]["accuracy_at_se"]["0.8"]
    assert f"{m['selective']['accuracy_at']['0.8']:.1%} ± {error:.1%}" in closing
    del m["selective"]["accuracy_at_se"]  # of an older run
    m["truth"] = {"bayes_nll": 0.4, "bayes_accuracy": 0.8, "excess": 0.02, "excess_se": 0.003}
    older = "\n".join(summary.closing_lines(m))
    assert re.search(r"surest 80 %: [\d.]+%$", older, re.MULTILINE)
    assert "0.0200 ± 0.0030 nats" in older


def test_a_baseline_that_is_none_is_told() -> None:
    m = metrics()
    assert "stopped at a bound" not in "\n".join(summary.closing_lines(m))
    m["map_temperature_scaled"]["temperature_note"] = "2 of 2 temperatures stopped at a bound"
    assert "MAP, temperature-scaled: 2 of 2" in "\n".join(summary.closing_lines(m))


def test_a_regression_is_shown_without_what_classes_need() -> None:
    m = metrics(regression=True)
    assert cells(m)[""] == ["pearson", "rmse", "nll", "crps"]
    closing = "\n".join(summary.closing_lines(m))
    assert "risk–coverage" not in closing
    assert "perfectly calibrated" not in closing
    assert "Enough samples" in closing
    inside = m["ensemble"]["coverage_0.9"]
    assert f"90 % intervals hold {inside:.1%} of the labels" in closing


def test_large_errors_keep_their_width() -> None:
    m = metrics()
    m["standard_errors"]["ensemble"]["nll"] = 12.3456
    assert "± 12.3" in summary.table_lines(m)[-2]


@pytest.mark.parametrize("regression", [False, True])
def test_the_ensemble_is_compared_with_the_simple_baselines(regression: bool) -> None:
    m = metrics(regression)
    m["map"]["nll"]["mean"] = 0.01
    lines = [x for x in summary.closing_lines(m) if x.startswith("Ensemble less ")]
    titles = ["MAP (mean of warm starts)", "MAP, temperature-scaled"]
    titles += ["MAP ensemble (deep ensemble)", "MAP ensemble, scaled"]
    if regression:
        titles = [title for title in titles if "scaled" not in title]
    assert len(lines) == len(titles)
    for line, title in zip(lines, titles, strict=True):
        assert line.startswith(f"Ensemble less {title}")
    gap = m["ensemble"]["nll"] - m["map_ensemble"]["nll"]
    error = m["standard_errors"]["differences"]["ensemble-map_ensemble"]["nll"]
    deep = next(line for line in lines if "(deep ensemble)" in line)
    assert f"NLL {gap:+.4f} ± {error:.4f}".replace("± 0.", "± .") in deep
    assert not any(
        "Ensemble less" in x for x in summary.closing_lines(m | {"sampler": {"name": "map"}})
    )


def test_the_ensemble_with_a_temperature_of_its_own_is_held_against_the_strongest_baseline() -> (
    None
):
    m = metrics()
    assert "posterior ensemble, scaled" in cells(m)
    m["map"]["nll"]["mean"] = 0.01
    m["standard_errors"]["differences"]["ensemble_temperature_scaled-map"]["nll"] = 0.0123
    lines = [x for x in summary.closing_lines(m) if x.startswith("Ensemble, scaled")]
    assert len(lines) == 1
    assert lines[0].startswith("Ensemble, scaled, less MAP (mean of warm starts): ")
    assert f"NLL {m[ENSEMBLE_SCALED]['nll'] - 0.01:+.4f} ± .0123" in lines[0]
    m[ENSEMBLE_SCALED]["temperature_note"] = "1 of 1 temperatures stopped at a bound"
    closing = summary.closing_lines(m)
    assert not any("scaled, less" in x for x in closing), "it is as unfair as a baseline's"
    assert any(x.startswith("posterior ensemble, scaled: 1 of 1") for x in closing)
    assert "posterior ensemble (cold), scaled" in cells(m | {"tempering": "cold"})
    none = metrics(regression=True)
    assert not any("scaled, less" in x for x in summary.closing_lines(none))
    assert "posterior ensemble, scaled" not in cells(none)
    only = cells(m | {"sampler": {"name": "map"}})
    assert not any("posterior" in title for title in only)


def test_the_strongest_baseline_is_compared_with_too() -> None:
    m = metrics()
    m["map_last_ensemble_temperature_scaled"]["nll"] = 0.01
    lines = [
        x for x in summary.closing_lines(m) if x.startswith("Ensemble less MAP ensemble, last")
    ]
    gap = m["ensemble"]["nll"] - 0.01
    assert len(lines) == 1
    assert lines[0].startswith("Ensemble less MAP ensemble, last epoch, scaled: accuracy ")
    assert f"NLL {gap:+.4f} ± ." in lines[0]
    m["map_last_ensemble_temperature_scaled"]["temperature_note"] = "stopped at a bound"
    assert not any(
        x.startswith("Ensemble less MAP ensemble, last") for x in summary.closing_lines(m)
    )
