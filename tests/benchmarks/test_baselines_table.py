"""`benchmarks/baselines_table.py`: figures over seeds, the table, and the targets in words."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest

VERDICT = {"rhat_max": 1.2, "ess_bulk_min": 40.0, "t_eff": 1.1, "verdict": "not mixed"}


@pytest.fixture(scope="module")
def table(load: Callable[[str], Any]) -> Any:
    return load("baselines_table")


def metrics(**rows: Any) -> dict[str, Any]:
    """What one seed's `metrics.json` has of what the table reads."""
    figures = {"accuracy": 0.8, "nll": 0.4, "ece": 0.05, "brier": 0.3, "expected_ece": 0.03}
    spread = {name: {"mean": value, "sd": 0.01} for name, value in figures.items()}
    fits = ("map_last", "map_early_stopped")
    mixtures = ("map_ensemble", "map_last_ensemble")
    scaled = (f"{row}_temperature_scaled" for row in ("map", "map_last", *mixtures))
    others = (*mixtures, *scaled, "ensemble")
    return {
        **{"n": 100, "cost": {"train_s": 30.0, "sample_s": 12.0}, "diagnostics": VERDICT},
        **dict.fromkeys(fits, spread),
        **dict.fromkeys(others, figures),
        **rows,
    }


def ensemble(nll: float = 0.4, accuracy: float = 0.8, ece: float = 0.05) -> dict[str, float]:
    return {"nll": nll, "accuracy": accuracy, "ece": ece, "brier": 0.3}


# --- Figures ----------------------------------------------------------------------------------


def test_a_figure_is_the_mean_over_seeds_with_both_standard_errors(table: Any) -> None:
    values, errors = [0.40, 0.44, 0.46], [0.02, 0.03, 0.04]
    runs = [
        metrics(ensemble=ensemble(v), standard_errors={"ensemble": {"nll": e}})
        for v, e in zip(values, errors, strict=True)
    ]
    found = table.figure(runs, "ensemble", "nll")
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.over_seeds == pytest.approx(statistics.stdev(values) / math.sqrt(3))
    assert found.over_examples == pytest.approx(0.03)
    assert str(found) == "0.4333 ± 0.0176 (0.0300)"


def test_one_seed_has_no_error_over_seeds(table: Any) -> None:
    found = table.figure([metrics()], "map_last", "nll")
    assert (found.mean, found.over_seeds, found.over_examples) == (0.4, None, None)
    assert str(found) == "0.4000"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"map_last": None, "map_last_reason": "nothing held out"}, "nothing held out"),
        ({"map_last": {"nll": {"mean": None, "reason": "it diverged"}}}, "it diverged"),
        ({"map_last": {}}, "map_last has no nll"),
    ],
)
def test_a_seed_without_a_figure_leaves_none_and_the_reason(
    table: Any, row: dict[str, Any], reason: str
) -> None:
    found = table.figure([metrics(), metrics(**row)], "map_last", "nll")
    assert found.mean is None
    assert str(found) == "n/a"
    assert "1 of 2" in found.reason
    assert reason in found.reason


def test_a_difference_takes_the_paired_error_where_there_is_one(table: Any) -> None:
    paired = {"ensemble-map_ensemble": {"nll": 0.005}}
    errors = {"ensemble": {"nll": 0.03}, "map_ensemble": {"nll": 0.04}}
    runs = [metrics(ensemble=ensemble(0.38), standard_errors=errors)]
    found = table.difference(runs, "map_ensemble", "nll")
    assert found.mean == pytest.approx(-0.02)
    assert found.over_examples == pytest.approx(0.05), "of two independent rows"
    runs[0]["standard_errors"] = {**errors, "differences": paired}
    assert table.difference(runs, "map_ensemble", "nll").over_examples == 0.005


# --- The table --------------------------------------------------------------------------------


def cells(line: str) -> list[str]:
    return [text.strip() for text in line.strip().strip("|").split("|")]


def test_the_table_has_every_row_and_the_worst_of_the_chains(table: Any) -> None:
    second = {**VERDICT, "rhat_max": 1.5, "ess_bulk_min": 90.0, "verdict": "mixed"}
    first = [metrics(), metrics(diagnostics=second)]
    other = [metrics(ensemble=ensemble(0.3), cost={"train_s": 0.0, "sample_s": 20.0})] * 2
    head, rule, *body = (cells(x) for x in table.table({"sgld": first, "sghmc": other}))
    assert {len(row) for row in (head, rule, *body)} == {len(head)}
    samplers = [x for name in ("sgld", "sghmc") for x in (name, f"{name}, temperature-scaled")]
    assert [row[0] for row in body] == [*table.BASELINES, *samplers]
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    sgld = rows["sgld"]
    assert (sgld["R-hat"], sgld["ESS"], sgld["T_eff"]) == ("1.50", "40", "1.10")
    assert sgld["chains"] == "not mixed (1), mixed (1)"
    assert sgld["seconds"] == "30 + 12"
    assert rows["sghmc"]["seconds"] == "30 + 20", "the fits are those of the first sampler's runs"
    assert rows["sghmc"]["NLL"].startswith("0.3000")
    assert {row["ECE if calibrated"] for row in rows.values()} == {"0.0300", ""}
    assert rows["MAP, last epoch"]["ECE if calibrated"] == "0.0300"
    assert "F1" not in head


def test_the_tasks_own_metric_has_a_column(table: Any) -> None:
    runs = [metrics(ensemble={**ensemble(), "mcc": 0.41})]
    head, _, *body = (cells(x) for x in table.table({"sgld": runs}))
    column = head.index("MCC")
    assert body[-2][column] == "0.4100"
    assert body[0][column] == "n/a"


def test_old_metrics_without_the_new_rows_are_not_available_but_tabled(table: Any) -> None:
    old = metrics()
    for row in ("map_last", "map_early_stopped", "map_last_temperature_scaled"):
        del old[row]
    lines = table.table({"sgld": [old]})
    assert "n/a" in lines[2]
    words = "\n".join(table.verdicts("mrpc", {"sgld": [old]}))
    assert "not available (missing in 1 of 1: map_last is not in metrics.json" in words


def test_every_sampler_states_its_step_size_and_its_gradients(table: Any) -> None:
    cost = {"sampling_gradient_evaluations": 2000}
    runs = [metrics(sampler={"step_size": 7.25e-05}, cost=cost), metrics(cost={})]
    (line,) = table.sampler_lines({"sgld": runs})
    assert line == "- sgld: step size 7.25e-05, n/a; gradients of a chain after burn-in 2,000, n/a"


# --- Targets ----------------------------------------------------------------------------------


def words_of(table: Any, task: str = "cola", **rows: Any) -> dict[str, str]:
    """By the target's first words: met, missed or not available."""
    lines = table.verdicts(task, {"sgld": [metrics(**rows)]})[1:]
    return {line[2:].split(":")[0]: line for line in lines}


@pytest.mark.parametrize(
    ("target", "good", "bad"),
    [
        ("ECE at least 50 %", ensemble(ece=0.024), ensemble(ece=0.026)),
        ("NLL at least 15 %", ensemble(nll=0.339), ensemble(nll=0.341)),
        ("accuracy not lower", ensemble(accuracy=0.8), ensemble(accuracy=0.79)),
        *(
            (f"NLL not worse than temperature-scaled {fit}", ensemble(0.399), ensemble(0.401))
            for fit in ("early-stopped MAP", "MAP of the last epoch")
        ),
        ("NLL not worse than the deep ensemble", ensemble(0.399), ensemble(0.401)),
    ],
)
def test_a_target_is_met_on_one_side_of_its_limit(
    table: Any, target: str, good: dict[str, float], bad: dict[str, float]
) -> None:
    for figures, word in ((good, ": met ("), (bad, ": missed (")):
        found = words_of(table, ensemble=figures)
        line = next(text for words, text in found.items() if words.startswith(target))
        assert word in line


def test_the_ece_stands_beside_that_of_a_calibrated_model(table: Any) -> None:
    row = {**ensemble(ece=0.02), "expected_ece": 0.031}
    lines = words_of(table, ensemble=row)
    known = [words for words, line in lines.items() if "if calibrated 0.0310)" in line]
    assert known == ["ECE at least 50 % below the last epoch's MAP"]


def test_accuracy_may_be_lower_by_one_standard_error(table: Any) -> None:
    errors = {"differences": {"ensemble-map_last": {"accuracy": 0.02}}}
    lower = {"ensemble": ensemble(accuracy=0.79), "standard_errors": errors}
    line = next(text for words, text in words_of(table, **lower).items() if "accuracy" in words)
    assert ": met (difference -0.0100 (0.0200))" in line


@pytest.mark.parametrize(("nll", "word"), [(0.405, "met"), (0.42, "missed")])
def test_mrpc_alone_has_a_stretch(table: Any, nll: float, word: str) -> None:
    found = words_of(table, task="mrpc", ensemble=ensemble(nll))
    assert f"stretch: NLL ≤ 0.41: {word}" in found["stretch"]
    assert "stretch" not in words_of(table, ensemble=ensemble(nll))


def test_the_best_sampler_has_the_lowest_mean_nll(table: Any) -> None:
    runs = {"sgld": [metrics()], "sghmc": [metrics(ensemble=ensemble(0.39))]}
    assert table.best(runs) == "sghmc"
    assert "sghmc" in table.verdicts("cola", runs)[0]
    nothing = {"sgld": [metrics(ensemble={"nll": None})]}
    assert table.best(nothing) is None
    assert "not available" in table.verdicts("cola", nothing)[0]


def test_where_the_truth_is_known_the_excess_over_it_is_told(table: Any) -> None:
    known = words_of(table, truth={"bayes_nll": 0.35})
    assert known["NLL above the Bayes optimum of these labels"].endswith(": 0.0500")
    assert not any("Bayes" in words for words in words_of(table))
