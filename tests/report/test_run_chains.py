"""The chains' section: ranks, growth and traces say what the numbers say."""

import dataclasses

import numpy as np
import pytest

from bayesian_lora import diagnostics
from bayesian_lora.report.page import Chart, Missing, Table
from bayesian_lora.report.run_chains import (
    MOST_POINTS,
    chains,
    growth_chart,
    milestones,
    rank_chart,
    rank_counts,
    short,
    shown_quantities,
    trace_chart,
)
from bayesian_lora.report.run_files import RunFiles
from tests.report.finished_runs import CHAINS, ROWS, changed, traces


def test_ranks_of_chains_that_take_turns_are_even() -> None:
    x = np.arange(400.0).reshape(100, 4).T  # each chain has every fourth rank
    assert (rank_counts(x) == 100 / 20).all()


def test_ranks_of_chains_apart_fill_bins_of_their_own() -> None:
    x = np.arange(400.0).reshape(4, 100)
    counts = rank_counts(x)
    assert counts.shape == (4, 20)
    assert (counts.sum(1) == 100).all()
    assert (counts.sum(0) == 20).all()
    for chain in range(4):
        assert counts[chain, 5 * chain : 5 * chain + 5].sum() == 100


def test_a_rank_chart_shows_every_draw_and_what_is_even() -> None:
    x = np.arange(400.0).reshape(4, 100)
    found = rank_chart("log_posterior", x, (0, 1, 3, 5))
    assert isinstance(found, Chart)
    bars = [t for t in found.figure["data"] if t["type"] == "bar"]
    assert [sum(t["y"]) for t in bars] == [100] * 4
    assert {tuple(t["y"]) for t in found.figure["data"] if t["type"] == "scatter"} == {(5.0, 5.0)}
    assert "300% off the 5.0 draws expected" in found.text
    assert found.numbers.columns == ["Rank", "chain 0", "chain 1", "chain 3", "chain 5"]


def test_growth_is_the_ess_of_growing_parts() -> None:
    x = np.random.default_rng(0).normal(size=(4, 60))
    found = growth_chart({"q": x})
    assert isinstance(found, Chart)
    line, asked = found.figure["data"]
    assert line["x"][-1] == 60
    assert len(line["x"]) > 5
    for rows, value in zip(line["x"], line["y"], strict=True):
        expected = diagnostics.ess_bulk(x[:, : int(rows)]).value
        assert value == pytest.approx(expected, rel=1e-4)
    assert set(asked["y"]) == {diagnostics.ESS_BULK_LIMIT}


def test_a_short_trace_has_no_growth() -> None:
    found = growth_chart({"q": np.zeros((4, 5))})
    assert isinstance(found, Missing)
    assert "5 rows" in found.reason


def test_a_constant_trace_leaves_a_gap_with_a_reason() -> None:
    found = growth_chart({"q": np.ones((4, 40))})
    assert isinstance(found, Chart)
    assert set(found.figure["data"][0]["y"]) == {None}
    assert found.numbers.missing == ["the trace has no ESS yet, being constant or not finite"]


def test_long_traces_are_thinned_and_say_so() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4 * MOST_POINTS))
    found = trace_chart({"a": x, "b": x}, (0, 1))
    assert len(found.figure["data"]) == 4
    assert len(found.figure["data"][0]["x"]) == MOST_POINTS
    assert found.figure["data"][0]["x"][1] == 4
    assert "every 4th of 1,600 rows" in found.caption


def test_the_worst_quantities_are_shown_and_raw_ones_are_not() -> None:
    found = traces(np.random.default_rng(0))
    found["raw[norm]"] += np.arange(CHAINS)[:, None] * 50
    quantities = diagnostics.summarise(found)["quantities"]
    names = shown_quantities(quantities, found)
    assert names[:2] == ["log_posterior", "probe_logprob[2]"]
    assert not any(name.startswith("raw[") for name in names)
    least = min(
        (n for n in found if not n.startswith("raw[")), key=lambda n: quantities[n]["ess_bulk"]
    )
    assert least in names


def test_short_names_keep_the_layer() -> None:
    assert short("delta_w_norm[bert.encoder.layer.3.attention.self.query]") == (
        "delta_w_norm[layer.3.attention.self.query]"
    )
    assert short("probe_logprob[3]") == "probe_logprob[3]"


def test_milestones_keep_their_reasons() -> None:
    rows = [
        {"step": 10**n, "rows": 10, "ess_min": 4.0**n, "ess_median": 5.0**n, "quantity": "q"}
        for n in (3, 4)
    ]
    rows[0] |= {"mcse": None, "mcse_reason": "too few batches"}
    picture, table = milestones(rows)
    assert isinstance(picture, Chart)
    assert picture.figure["data"][0]["x"] == [1000.0, 10000.0]
    assert picture.figure["layout"]["xaxis"]["type"] == "log"
    assert isinstance(table, Table)
    assert "too few batches" in table.missing
    assert isinstance(milestones([])[0], Missing)


def test_one_chain_has_no_rank_plots(run_files: RunFiles) -> None:
    alone = {name: x[:1] for name, x in run_files.traces.items()}
    blocks = chains(dataclasses.replace(run_files, traces=alone, chains=(0,))).blocks
    assert any(isinstance(b, Missing) and b.what == "Rank plots" for b in blocks)
    assert not any(isinstance(b, Chart) and "ranks" in b.caption for b in blocks)


def test_the_section_shows_traces_of_every_chain(run_files: RunFiles) -> None:
    blocks = chains(run_files).blocks
    first = next(b for b in blocks if isinstance(b, Chart))
    assert {t["name"] for t in first.figure["data"]} == {f"chain {i}" for i in range(CHAINS)}
    assert len(first.figure["data"][0]["x"]) == ROWS
    verdict = run_files.metrics["diagnostics"]["reason"]
    assert any(verdict in getattr(b, "text", "") for b in blocks)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_trace_that_is_not_finite_has_no_rank_plot_and_spoils_nothing_else(
    run_files: RunFiles, value: float
) -> None:
    spoilt = {name: x.copy() for name, x in run_files.traces.items()}
    spoilt["log_posterior"][1, [2, 7]] = value
    blocks = chains(dataclasses.replace(run_files, traces=spoilt)).blocks
    why = f"2 of {CHAINS * ROWS} values are not finite, and have no rank"
    assert Missing("Rank plot of log_posterior", why) in blocks
    whole = chains(run_files).blocks
    captions = [[b.caption for b in s if isinstance(b, Chart | Table)] for s in (blocks, whole)]
    ranks = "log_posterior: ranks of each chain's draws among all."
    assert captions[0] == [c for c in captions[1] if not c.startswith(ranks)]
    traced = next(b for b in blocks if isinstance(b, Chart))
    assert traced.figure["data"][1]["y"][2] is None
    assert traced.numbers.rows[1][1].reason == "the trace is not finite"
    assert traced.numbers.rows[2][1].reason == ""


def test_the_dispersion_of_the_starts_stands_by_quantity_and_as_their_median(
    run_files: RunFiles,
) -> None:
    starts = {"log_posterior": np.array([-600.0, -300, 0, 300]), "probe_logprob[0]": np.arange(4.0)}
    quantities = {name: run_files.traces[name] for name in (*starts, "probe_logprob[1]")}
    found = diagnostics.summarise(quantities, starts)
    blocks = chains(changed(run_files, diagnostics=found)).blocks
    table = next(b for b in blocks if isinstance(b, Table) and "highest R-hat" in b.caption)
    place = table.columns.index("Dispersion of the starts")
    shown = {row[0].text: row[place] for row in table.rows}
    for name in starts:
        assert float(shown[name].text) == pytest.approx(
            found["quantities"][name]["start_dispersion"], rel=1e-3
        )
    assert shown["probe_logprob[1]"].reason == "no starts were recorded"
    key = next(b for b in blocks if isinstance(b, Table) and "all judged" in b.caption)
    assert any(row[0].text == "Dispersion of the starts, median" for row in key.rows)


def test_milestones_without_any_ess_are_but_their_reason() -> None:
    rows = [{"step": 25, "rows": 12, "ess_min": None, "ess_min_reason": "12 rows: 25 are needed"}]
    assert milestones(rows) == [Missing("Milestones of the sampling", "12 rows: 25 are needed")]
