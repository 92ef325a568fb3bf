"""The rows of `metrics.json`: every form of MAP, single members, the ensemble, and their errors.

Shapes: K members, M chains, N examples.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from bayesian_lora import diagnostics
from bayesian_lora.assessment import evaluation
from bayesian_lora.assessment.run_rows import (
    ENSEMBLE_SCALED,
    MAP_ROWS,
    MOST,
    Given,
    Predicted,
    rows,
)
from bayesian_lora.metrics import temperature_scale
from bayesian_lora.predict import Predictions
from bayesian_lora.scores import calibration

from .predictors import CLASSES, PARTS, SCORES, classifiers, gaussians, nulls_without_reason

M, DRAWS, N = 2, 5, 150
K = M * DRAWS
FITS = ("map", "map_last", "map_early_stopped")
SCALED = tuple(f"{name}_temperature_scaled" for name in FITS)
DEEP = tuple(f"{name}_ensemble" for name in FITS)
DEEP_SCALED = tuple(f"{name}_temperature_scaled" for name in DEEP)


def given(regression: bool = False, **changes: Any) -> Given:
    make = gaussians if regression else classifiers
    early = Predicted(make(M, N, seed=1), make(M, 60, seed=2))
    last = Predicted(make(M, N, seed=3), make(M, 60, seed=4))
    own = ("pearson",) if regression else ("accuracy", "mcc")
    members = Predicted(make(K, N, seed=5), make(K, 60, seed=6))
    parts = {"members": members, "chains": np.arange(K) % M, "starts": early}
    parts |= {"others": {"last": last, "early_stopped": early}}
    return Given(own, regression, **{**parts, **changes})


@pytest.mark.parametrize("regression", [False, True])
def test_every_row_has_every_figure(regression: bool) -> None:
    found = rows(given(regression))
    names = {*SCORES, "pearson"} if regression else {*CLASSES, *PARTS, "mcc", "expected_ece"}
    scaled = () if regression else (*SCALED, *DEEP_SCALED, ENSEMBLE_SCALED)
    for row in (*FITS, *DEEP, *scaled, "single", "ensemble"):
        assert names - {"expected_ece"} <= found[row].keys(), row
        assert row == "single" or names <= found[row].keys()
        assert found["standard_errors"][row].keys() >= names - {"expected_ece"}
    assert found["ensemble"]["k"] == K
    assert nulls_without_reason(found) == []
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("regression", [False, True])
def test_rows_are_means_over_fits_and_mixtures(regression: bool) -> None:
    g = given(regression)
    found = rows(g)
    for row, fits in (("map", g.starts), ("map_last", g.others["last"])):
        for name in ("nll", "crps" if regression else "adaptive_ece"):
            each = [
                evaluation.evaluate_in_full(g.own, regression, one)[name]
                for one in evaluation.alone(fits.on)
            ]
            wanted = {"mean": np.mean(each), "sd": np.std(each, ddof=1)}
            assert found[row][name] == pytest.approx(wanted)
    last = g.others["last"].on
    for row, p in (
        *(("map_ensemble", g.starts.on), ("map_last_ensemble", last)),
        ("ensemble", g.members.on),
    ):
        wanted = evaluation.evaluate_in_full(g.own, regression, p)
        assert {n: found[row][n] for n in wanted} == wanted


def test_the_starts_are_one_of_the_kinds() -> None:
    found = rows(given())
    for own, last, early in (FITS, SCALED, DEEP, DEEP_SCALED):
        assert found[early] == found[own]
        assert found[last]["nll"] != found[own]["nll"]
    errors = found["standard_errors"]
    assert errors["map_early_stopped"] == errors["map"]
    paired = errors["differences"]
    assert paired["ensemble-map_early_stopped"] == paired["ensemble-map"]
    assert set(paired) == {f"{own}-{r}" for own in ("ensemble", ENSEMBLE_SCALED) for r in MAP_ROWS}
    assert set(MAP_ROWS) == {*FITS, *SCALED, *DEEP, *DEEP_SCALED}


def test_each_kind_is_scaled_on_its_own_held_out_predictions() -> None:
    g = given()
    found = rows(g)
    for row, fits in (
        ("map_temperature_scaled", g.starts),
        ("map_last_temperature_scaled", g.others["last"]),
    ):
        assert fits.held_out is not None
        each = [temperature_scale(x, fits.held_out.labels) for x in fits.held_out.logits]
        assert found[row]["temperature"] == pytest.approx(np.mean(each))
        assert found[row]["temperature_fitted_on"] == 60
        scaled = [
            dataclasses.replace(one, logits=one.logits / t)
            for one, t in zip(evaluation.alone(fits.on), each, strict=True)
        ]
        for name in ("nll", "mcc"):
            means = np.mean([evaluation.evaluate(g.own, False, one)[name] for one in scaled])
            assert found[row][name] == pytest.approx(means)
    first, second = (found[row]["temperature"] for row in SCALED[:2])
    assert first != second


def test_an_ensemble_is_scaled_by_one_temperature_of_its_held_out_mixture() -> None:
    g = given()
    found = rows(g)
    mixtures = (*DEEP_SCALED[:2], ENSEMBLE_SCALED)
    for row, fits in zip(mixtures, (g.starts, g.others["last"], g.members), strict=True):
        assert fits.held_out is not None
        losses = {}
        for t in np.linspace(0.5, 4, 701):
            probs = fits.held_out.probs ** (1 / t)
            probs /= probs.sum(1, keepdims=True)
            losses[t] = -np.log(probs[np.arange(60), fits.held_out.labels]).mean()
        best = min(losses, key=losses.__getitem__)
        assert found[row]["temperature"] == pytest.approx(best, abs=0.005)
        probs = fits.on.probs ** (1 / found[row]["temperature"])
        probs /= probs.sum(1, keepdims=True)
        nll = -np.log(probs[np.arange(N), fits.on.labels]).mean()
        assert found[row]["nll"] == pytest.approx(nll)
        deep = found[row.removesuffix("_temperature_scaled")]
        assert found[row]["accuracy"] == deep["accuracy"], "a temperature changes no answer"


@pytest.mark.parametrize("regression", [False, True])
def test_what_cannot_be_scaled_says_why_in_rows_and_errors(regression: bool) -> None:
    g = given(regression)
    if not regression:
        nothing = {name: Predicted(getattr(g, name).on, None) for name in ("starts", "members")}
        g = dataclasses.replace(g, **nothing, others={}, reason="too old")
    found = rows(g)
    part = "Gaussian" if regression else "data.validation_share"
    errors = found["standard_errors"]
    for row in ("map_temperature_scaled", "map_ensemble_temperature_scaled", ENSEMBLE_SCALED):
        assert part in found[row]["reason"]
        assert part in errors[f"{row}_reason"]
        pair = f"{row}-map" if row == ENSEMBLE_SCALED else f"ensemble-{row}"
        assert errors["differences"][pair] is None
    assert nulls_without_reason(found) == []
    if not regression:
        for row in (x for forms in (FITS, SCALED, DEEP, DEEP_SCALED) for x in forms[1:]):
            assert found[row] is errors[row] is None
            assert found[f"{row}_reason"] == "too old"


def test_single_draws_have_the_monte_carlo_error_of_their_chains() -> None:
    g = given()
    found = rows(g)["single"]
    nll = [row["nll"] for row in evaluation.evaluate_members((), False, g.members.on)]
    trace = np.array(nll).reshape(DRAWS, M).T
    assert found["nll"]["mcse"] == diagnostics.mcse_mean(trace).value
    assert found["nll"]["sd"] == pytest.approx(np.std(nll, ddof=1))
    few = Predicted(classifiers(4, N), None)
    short = rows(dataclasses.replace(g, members=few, chains=np.array([0, 1, 0, 1])))["single"]
    assert short["nll"]["mcse"] is None
    assert "at least 4" in short["nll"]["mcse_reason"]


def test_chains_of_unequal_length_give_their_first_draws() -> None:
    g = given(members=Predicted(classifiers(K + 1, N), None), chains=np.arange(K + 1) % M)
    longer = rows(g)["single"]["nll"]
    fewer = Predicted(first_of(g.members.on, K), None)
    shorter = rows(dataclasses.replace(g, members=fewer, chains=g.chains[:K]))["single"]["nll"]
    assert longer["mcse"] == shorter["mcse"]


def first_of(p: Predictions, k: int) -> Predictions:
    return Predictions(p.logits[:k], p.labels, np.full(k, 1 / k), p.example_id)


def test_what_was_left_out_of_some_inputs_has_no_single_figures() -> None:
    part = dataclasses.replace(classifiers(K, N), members_used=np.full(N, K - 1))
    found = rows(given(members=Predicted(part, None)))
    assert found["single"]["nll"]["mean"] is found["single"]["nll"]["mcse"] is None
    assert found["single"]["nll"]["reason"] == evaluation.LEFT_OUT
    assert found["standard_errors"]["single"] is None
    assert found["standard_errors"]["single_reason"] == evaluation.LEFT_OUT
    assert found["standard_errors"]["ensemble"]["nll"] > 0
    assert nulls_without_reason(found) == []


def test_a_figure_that_a_member_lacks_has_no_monte_carlo_error() -> None:
    p = classifiers(K, N)
    p.logits[3] = [2.0, 0.0]
    mcc = rows(given(members=Predicted(p, None)))["single"]["mcc"]
    assert mcc["mean"] is mcc["sd"] is mcc["mcse"] is None
    assert "constant" in mcc["reason"]


def test_the_calibrated_error_of_a_row_is_of_its_own_probabilities() -> None:
    g = given()
    found = rows(g)
    wanted = calibration.expected_ece(g.members.on.probs, np.random.default_rng(3))
    assert found["ensemble"]["expected_ece"] == pytest.approx(wanted["mean"], abs=wanted["sd"] / 4)
    each = [
        calibration.expected_ece(one.probs, np.random.default_rng(3))["mean"]
        for one in evaluation.alone(g.starts.on)
    ]
    assert found["map"]["expected_ece"]["mean"] == pytest.approx(np.mean(each), rel=0.15)


def test_where_nothing_was_sampled_the_ensemble_is_the_fits() -> None:
    g = given()
    found = rows(dataclasses.replace(g, members=g.starts, chains=np.arange(M)))
    ensemble = {name: x for name, x in found["ensemble"].items() if name != "k"}
    assert ensemble == found["map_ensemble"]
    assert found[ENSEMBLE_SCALED] == found["map_ensemble_temperature_scaled"]
    gap = found["standard_errors"]["differences"]["ensemble-map_ensemble"]
    assert gap["nll"] is None
    assert gap["nll_reason"]


def test_of_many_members_some_stand_for_the_error_of_all() -> None:
    members = Predicted(classifiers(3 * MOST, N), None)
    many = given(members=members, chains=np.arange(3 * MOST) % M)
    error = rows(many)["standard_errors"]["single"]["nll"]
    each = evaluation.alone(many.members.on)
    loss = np.mean([-np.log(p.probs[np.arange(N), p.labels]) for p in each], axis=0)
    assert error == pytest.approx(loss.std() / np.sqrt(N), rel=0.2)
