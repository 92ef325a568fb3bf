"""Is the posterior worth it: the words follow the figures and their standard errors."""

import copy
import dataclasses

import pytest

from bayesian_lora.report.run_files import RunFiles
from bayesian_lora.report.verdicts import asides, strongest, verdict, way_of
from tests.report.finished_runs import MEMBERS, changed, scaled_nll, with_nll


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (-0.0081, "Worth it by NLL."),
        (0.0081, "Not worth it by NLL."),
        (-0.0079, "Not shown to be worth it."),
        (0.0079, "Not shown to be worth it."),
    ],
)
def test_worth_is_judged_by_two_standard_errors(
    run_files: RunFiles, gap: float, words: str
) -> None:
    """The fixture's standard error of the difference is 0.004."""
    said = verdict(with_nll(run_files, scaled_nll(run_files) + gap))[0]
    assert said.startswith(words)
    assert f"{gap:+.4f}" in said
    assert "MAP, temperature-scaled" in said


def test_the_strongest_baseline_is_the_one_compared_with(run_files: RunFiles) -> None:
    better = {**run_files.metrics["map_ensemble"], "nll": 0.1}
    said = verdict(changed(run_files, map_ensemble=better))[0]
    assert "deep ensemble of the warm starts (NLL 0.1000)" in said
    assert said.startswith("Not worth it")


def test_the_posterior_with_a_temperature_of_its_own_is_told_from_the_same_baseline(
    run_files: RunFiles,
) -> None:
    assert "temperature of its own" not in verdict(run_files)[0]
    nll = scaled_nll(run_files) - 0.003
    errors = copy.deepcopy(dict(run_files.metrics["standard_errors"]))
    pair = "ensemble_temperature_scaled-map_temperature_scaled"
    errors["differences"][pair] = {"nll": 0.0015}
    row = {**run_files.metrics["ensemble"], "nll": nll, "temperature_fitted_on": 64}
    files = changed(run_files, ensemble_temperature_scaled=row, standard_errors=errors)
    said = verdict(files)[0]
    assert f"its NLL is {nll:.4f}, -0.0030 ± 0.0015 against the same baseline." in said
    assert "fitted on 64 held-out examples" in said
    assert strongest(files.metrics) == "map_temperature_scaled", "it is no baseline"
    stuck = {**row, "temperature_note": "1 of 1 temperatures stopped at a bound"}
    files = changed(files, ensemble_temperature_scaled=stuck)
    assert "temperature of its own" not in verdict(files)[0]
    title = "posterior ensemble, temperature-scaled"
    assert any(x.startswith(f"{title}: 1 of 1") for x in asides(files))
    manifest = {**files.manifest, "sampler": {**files.manifest["sampler"], "name": "map"}}
    none = dataclasses.replace(files, manifest=manifest)
    assert not any("posterior" in x for x in asides(none)), "nothing was sampled"


def test_without_standard_errors_nothing_is_judged(run_files: RunFiles) -> None:
    said = verdict(changed(run_files, standard_errors=None))[0]
    assert "its standard error was not computed" in said
    assert "orth it" not in said


def test_an_error_that_cannot_be_computed_says_why_and_not_to_try_again(
    run_files: RunFiles,
) -> None:
    why = "the same in every resample: these examples do not show how it varies"
    none = {"differences": {"ensemble-map_temperature_scaled": {"nll": None, "nll_reason": why}}}
    said = verdict(changed(run_files, standard_errors=none))[0]
    assert said.endswith(f"; its standard error is not known – {why}.")


def test_the_chains_verdict_is_repeated_with_its_reason(run_files: RunFiles) -> None:
    assert (
        verdict(run_files)[1]
        == f"Chains: not mixed – {run_files.metrics['diagnostics']['reason']}."
    )


def test_the_change_is_given_as_a_share_too(run_files: RunFiles) -> None:
    said = verdict(with_nll(run_files, scaled_nll(run_files) * 1.1))[0]
    assert "(+10.0 %)" in said


def test_a_worse_accuracy_is_said_beside_a_better_nll(run_files: RunFiles) -> None:
    """The fixture's standard errors: .01 of the accuracy, .004 of the NLL, .008 of the ECE."""
    theirs = run_files.metrics["map_temperature_scaled"]
    own = {**run_files.metrics["ensemble"], "nll": theirs["nll"] - 0.1, "ece": theirs["ece"]}
    own |= {"brier": theirs["brier"], "accuracy": theirs["accuracy"] - 0.03}
    assert "clearly worse by Accuracy." in verdict(changed(run_files, ensemble=own))[0]
    own["accuracy"] = theirs["accuracy"] - 0.015
    assert "clearly" not in verdict(changed(run_files, ensemble=own))[0]


def test_less_is_better_but_for_the_figures_of_which_more_is(run_files: RunFiles) -> None:
    theirs = run_files.metrics["map_temperature_scaled"]
    own = {**run_files.metrics["ensemble"]}
    own |= {name: theirs[name] + 0.5 for name in ("nll", "accuracy")}
    files = changed(run_files, ensemble=own)
    assert way_of(files, "map_temperature_scaled", "nll") == -1
    assert way_of(files, "map_temperature_scaled", "accuracy") == 1
    assert way_of(files, "map_temperature_scaled", "crps") == 0, "it is not known"


def test_no_baseline_is_the_strongest_of_none(run_files: RunFiles) -> None:
    assert strongest(run_files.metrics) == "map_temperature_scaled"
    assert strongest({"ensemble": run_files.metrics["ensemble"]}) is None


def test_a_row_that_is_no_fair_baseline_is_the_strongest_only_of_its_like(
    run_files: RunFiles,
) -> None:
    stuck = {**run_files.metrics["map_temperature_scaled"], "temperature_note": "at a bound"}
    files = changed(run_files, map_temperature_scaled={**stuck, "nll": 0.1})
    fair = strongest(files.metrics)
    assert fair in ("map", "map_ensemble")
    assert "temperature-scaled" not in verdict(files)[0]
    assert strongest({"map_temperature_scaled": stuck}) == "map_temperature_scaled"


def test_a_baseline_whose_temperature_stopped_at_a_bound_is_named(run_files: RunFiles) -> None:
    note = "1 of 4 temperatures stopped at a bound"
    assert not any(note in words for words in asides(run_files))
    row = {**run_files.metrics["map_temperature_scaled"], "temperature_note": note}
    said = asides(changed(run_files, map_temperature_scaled=row))
    assert any(words == f"MAP, temperature-scaled: {note}." for words in said)


def test_what_an_answer_takes_is_said_of_several_members(run_files: RunFiles) -> None:
    assert any(f"takes {MEMBERS} forward passes" in words for words in asides(run_files))
    one = changed(run_files, ensemble={**run_files.metrics["ensemble"], "k": 1})
    assert not any("forward passes" in words for words in asides(one))
