"""What the figures of `verification` say, and that a broken sampler fails it.

The laws themselves are tested in `samplers/test_stationary_laws.py`.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bayesian_lora.errors import InputError
from bayesian_lora.samplers import MODULES
from bayesian_lora.samplers.flat import Scale
from bayesian_lora.samplers.sgld import SGLD
from bayesian_lora.samplers.sgnht import SGNHT
from bayesian_lora.verification import report
from bayesian_lora.verification.laws import gaussian
from bayesian_lora.verification.mutations import mutations
from bayesian_lora.verification.report import Row, check_rows, mutation_rows, worst
from bayesian_lora.verification.toy import (
    Figure,
    Quadratic,
    Setting,
    compare,
    normal,
    radial_variance,
    simulate,
)
from bayesian_lora.verification.variants import SAMPLERS, VARIANTS, chosen, claim, exactness

NAMED = {variant.name: variant for variant in VARIANTS}


@pytest.fixture(autouse=True)
def fewer_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "COORDINATES", 200_000)


# --- Figures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "shift", "agrees", "rejects"),
    [
        (1.03, 3.9, True, False),
        (0.97, -3.9, True, False),
        (1.05, 0.0, False, False),  # beyond the tolerance, not beyond what chance explains
        (1.09, 0.0, False, True),
        (0.91, 0.0, False, True),
        (1.0, 5.0, False, False),
        (1.0, -9.0, False, True),
        (math.nan, 0.0, False, True),
        (1.0, math.nan, False, True),
        (math.inf, 0.0, False, True),
    ],
)
def test_a_figure_agrees_or_rejects(
    measured: float, shift: float, agrees: bool, rejects: bool
) -> None:
    figure = Figure("law", 1.0, measured, tolerance=0.04, error=0.01, shift=shift)
    assert (figure.agrees, figure.rejects) == (agrees, rejects)


def test_standard_errors_come_from_the_spread_between_chains() -> None:
    """Equal coordinates of a chain count once, independent ones each."""
    alone = normal((20_000, 1), 0)
    for draws, count in ((alone.expand(-1, 10), 20_000), (normal((2_000, 10), 0), 20_000)):
        figure = compare("law", draws, 0.0, 1.0, 0.04)
        assert figure.error == pytest.approx(math.sqrt(2 / count), rel=0.05)
        assert figure.agrees
    shifted = compare("law", alone + 0.05, 0.0, 1.0, 0.04)
    assert shifted.shift == pytest.approx(0.05 * math.sqrt(20_000), abs=4)
    assert shifted.right_variance
    assert not shifted.agrees


def test_the_radius_without_a_perturbation_is_the_gaussians() -> None:
    setting = Setting(200, 0.5, 0.1, 1.0)
    assert radial_variance(setting, k=2.0, rho=0.0, d=7) == pytest.approx(0.5 / (200 * 2))


def test_a_diverged_sampler_is_rejected_not_a_crash() -> None:
    """Forty times the noise is more than a thermostat's friction can absorb."""

    class Hot(SGNHT):
        def noise_std(self, h: Scale) -> Scale:
            return 40 * super().noise_std(h)

    figure = worst(NAMED["sgnht"], Hot, seed=0, draws=1_000)
    assert math.isnan(figure.measured)
    assert figure.rejects
    problem = Quadratic(torch.ones(4, 1), 0.0, torch.zeros(4, 1))
    draws, _ = simulate(Hot, {}, problem, Setting(), lambda _: 500, 0)
    assert bool(draws.isnan().all())


def test_the_prior_is_a_part_of_the_curvature() -> None:
    """A sampler that forgets its prior is found out where the prior is a fifth of k."""

    class Flat(SGLD):
        def drift(self, prior: bool = True) -> Tensor:
            return super().drift(prior=False)

    figure = gaussian(Flat, {}, 5_000, 0)[0]
    assert figure.rejects
    assert figure.ratio == pytest.approx(1 / 0.8, rel=0.1)


# --- Samplers and their rows ----------------------------------------------------------------


def test_all_samplers_are_checked() -> None:
    assert list(SAMPLERS) == list(MODULES)
    assert chosen([]) == list(VARIANTS)
    assert {v.name for v in chosen(["sghmc", "sgld"])} == {"sgld", "sghmc", "sghmc baoab"}


@pytest.mark.parametrize(("typed", "near"), [("sgdl", "sgld"), ("sam-sgld", "sam_sgld")])
def test_an_unknown_sampler_names_the_nearest(typed: str, near: str) -> None:
    with pytest.raises(InputError, match=rf"{typed}'.*did you mean {near}\?") as raised:
        chosen(["sgld", typed])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_states_a_law_and_a_target(variant: report.Variant) -> None:
    sound = exactness(variant) not in ("biased", "not invariant")
    assert sound == variant.claims
    assert ("T/" in claim(variant)) == (variant.label != "current")
    assert len(mutations(variant.rule)) >= 4
    if not variant.claims:
        assert list(mutation_rows(variant, 0)) == []


def test_rows_of_a_sampler_that_holds_its_law() -> None:
    rows = list(check_rows(NAMED["sghmc baoab"], seed=0))
    assert [row.law.partition(",")[0] for row in rows] == [
        "noise",
        "variance at k=0.1",
        "variance at k=1",
        "variance at k=4",
    ]
    for row in rows:
        assert row.sampler == "sghmc baoab"
        assert (row.verdict, row.ok) == ("ok", True)
        assert row.ratio == pytest.approx(row.measured / row.derived)
    assert [row.derived for row in rows[1:]] == pytest.approx([0.1, 0.01, 0.0025])


def test_rows_of_broken_rules() -> None:
    rows = list(mutation_rows(NAMED["sgnht"], seed=0, draws=2_000))
    assert [row.law for row in rows] == [f"broken: {wrong}" for wrong in mutations(SGNHT)]
    assert all(row.ok and row.verdict.startswith("rejected (") for row in rows)
    assert rows[1].verdict.startswith("rejected (noise")


def test_a_wrong_mean_is_said() -> None:
    rows = {row.law: row for row in mutation_rows(NAMED["sam_sgld"], seed=0)}
    assert rows["broken: prior at θ + e"].verdict.startswith("rejected (mean, variance at k=")


@pytest.mark.parametrize("wrong", mutations(SGLD))
def test_a_broken_sampler_fails(wrong: str) -> None:
    """The very rows that pass for the sound rule."""
    broken = replace(NAMED["sgld"], rule=mutations(SGLD)[wrong])
    rows = list(check_rows(broken, seed=0, draws=5_000))
    assert not all(row.ok for row in rows)
    assert any(row.verdict.startswith(("OFF by", "MEAN OFF")) for row in rows)


def test_a_mutation_that_passes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound rule in the place of a broken one."""
    monkeypatch.setattr(report, "mutations", lambda rule: {"nothing": rule})
    (row,) = mutation_rows(NAMED["sgld"], seed=0, draws=2_000)
    assert (row.verdict, row.ok) == ("NOT REJECTED", False)


def test_a_rule_labelled_as_it_is() -> None:
    (row,) = check_rows(NAMED["sam_sgld_rank1 current"], seed=0)
    assert (row.verdict, row.ok) == ("not invariant, as labelled", True)
    assert row.ratio == pytest.approx(1.64, rel=0.04)
    wrongly = replace(NAMED["sgld"], claims=False)
    (row,) = check_rows(wrongly, seed=0, draws=2_000)
    assert not row.ok
    assert row.verdict == "AGREES, though labelled exact as h → 0"


def test_the_seed_decides() -> None:
    def rows(seed: int) -> list[Row]:
        return list(check_rows(NAMED["sghmc"], seed, draws=500))

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
