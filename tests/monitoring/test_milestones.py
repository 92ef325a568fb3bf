"""Milestones of sampling: when, of what, after dropped chains, from a saved state; in float64.

Shapes: M chains, T rows, Q quantities.
"""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch

from bayesian_lora.diagnostics import mcse_mean
from bayesian_lora.monitoring import milestones
from bayesian_lora.monitoring.milestones import Milestones
from bayesian_lora.traces import RAW

SLOW, FAST = "probe_logprob[0]", "log_posterior"
PHI = {SLOW: 0.8, FAST: 0.0}


def autoregressive(chains: int, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """(M, T) of each: AR(1) with unit innovations; the raw parameter is a random walk."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, phi in {**PHI, f"{RAW}norm]": 1.0}.items():
        x, noise = np.zeros((chains, rows)), rng.standard_normal((chains, rows))
        for t in range(1, rows):
            x[:, t] = phi * x[:, t - 1] + noise[:, t]
        found[name] = x
    return found


def feed(found: Milestones, traces: dict[str, np.ndarray], rows: range, every: int = 1) -> None:
    """One row after every `every`-th step."""
    for t in rows:
        for step in range(t * every + 1, (t + 1) * every + 1):
            if step == (t + 1) * every:
                found.record({name: x[:, t] for name, x in traces.items()})
            found.stepped(step)


def test_milestones_are_powers_of_ten_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (milestones.FIRST, milestones.FACTOR) == (1_000, 10)
    monkeypatch.setattr(milestones, "FIRST", 100)
    found, traces = Milestones(2), autoregressive(2, 500)
    taken = []
    for t in range(500):
        feed(found, traces, range(t, t + 1), every=3)
        taken += found.take()
    assert [row["step"] for row in taken] == [100, 1000]
    assert [row["rows"] for row in taken] == [33, 333]
    assert [row["step"] for row in found.facts()] == [100, 1000, 1500]
    assert found.facts()[:2] == taken
    assert found.take() == []
    json.dumps(found.facts(), allow_nan=False)


def test_the_end_is_not_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milestones, "FIRST", 50)
    found = Milestones(1)
    assert found.facts() == []
    feed(found, autoregressive(1, 50), range(50))
    assert [row["step"] for row in found.facts()] == [50]


def test_the_figures_are_those_of_the_slowest_quantity() -> None:
    """AR(1) with φ: n(1−φ)/(1+φ) effective draws; a random walk of raw parameters is left out."""
    chains, rows, every = 4, 20_000, 2
    found, traces = Milestones(chains), autoregressive(chains, rows)
    feed(found, traces, range(rows), every)
    row = found.now()
    ess = {name: chains * rows * (1 - phi) / (1 + phi) for name, phi in PHI.items()}
    assert row["quantity"] == SLOW
    assert row["ess_min"] == pytest.approx(ess[SLOW], rel=0.15)
    assert row["ess_median"] == pytest.approx(np.median(list(ess.values())), rel=0.15)
    assert row["ess_per_step"] == pytest.approx(row["ess_min"] / (chains * rows * every))
    assert row["mcse"] == pytest.approx(mcse_mean(traces[SLOW]).value, rel=0.1)
    assert (row["undefined"], row["chains"], row["rows"]) == (0, chains, rows)
    assert "note" not in row


def test_chains_in_separate_modes_are_noted() -> None:
    traces = autoregressive(3, 2_000)
    for x in traces.values():
        x += 50 * np.arange(3)[:, None]
    found = Milestones(3)
    feed(found, traces, range(2_000))
    row = found.now()
    assert row["ess_min"] == pytest.approx(3, rel=0.1)
    assert "separate modes" in row["note"]


@pytest.mark.parametrize(
    ("rows", "value", "reason"),
    [(0, None, "no row"), (3, None, "3 rows"), (40, 1.5, "constant"), (40, np.nan, "not finite")],
)
def test_what_has_no_figure_has_a_reason(rows: int, value: float | None, reason: str) -> None:
    found, traces = Milestones(2), autoregressive(2, max(1, rows))
    if value is not None:
        traces = {name: np.full_like(x, value) for name, x in traces.items()}
    feed(found, traces, range(rows))
    row = found.now()
    for name in ("ess_min", "ess_median", "quantity", "mcse", "ess_per_step"):
        assert row[name] is None
        assert reason in row[f"{name}_reason"]
    assert row["undefined"] == (2 if rows else 0)


def test_a_quantity_without_figures_does_not_hide_the_others() -> None:
    found, traces = Milestones(2), autoregressive(2, 400)
    traces["delta_w_norm[q]"] = np.ones((2, 400))
    feed(found, traces, range(400))
    assert found.now()["undefined"] == 1
    assert found.now()["quantity"] == SLOW


def test_a_dropped_chain_leaves_the_others_as_if_it_had_never_been() -> None:
    traces = autoregressive(3, 600)
    kept = {name: x[[0, 2]] for name, x in traces.items()}
    found, alone = Milestones(3), Milestones(2)
    feed(found, traces, range(250))
    found.keep([0, 2])
    feed(found, kept, range(250, 600))
    feed(alone, kept, range(600))
    assert found.now() == alone.now()
    assert found.now()["chains"] == 2


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [0, 7, 130, 311])
def test_a_saved_state_goes_on_to_the_same_bits(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory, where later rows must not have written into the state, and from a file."""
    monkeypatch.setattr(milestones, "FIRST", 100)
    traces = autoregressive(2, 400)
    whole = Milestones(2)
    feed(whole, traces, range(stop))
    state = whole.state_dict()
    feed(whole, traces, range(stop, 400))
    for through in (lambda state: state, through_a_file):
        again = Milestones(2)
        again.load_state_dict(through(state))
        feed(again, traces, range(stop, 400))
        assert again.facts() == whole.facts()
        noted = [row["step"] for row in again.take()]
        assert noted == [step for step in (100,) if step > stop], "told once, before the stop"
