"""The rows of a run's `metrics.json`: forms of MAP, single members, the ensemble.

What stands beside an ensemble are the strongest simple things that its warm starts already give:
the fits of the last epoch and the early-stopped ones, and the deep ensemble of either kind, each
as it is and with its temperature fitted; so is the ensemble, lest a baseline have what it has not.

Shapes: K members, M chains, N examples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from bayesian_lora.assessment import evaluation
from bayesian_lora.assessment.evaluation import Figures
from bayesian_lora.assessment.standard_errors import SEED, standard_errors
from bayesian_lora.predict import Predictions
from bayesian_lora.scores import calibration

KINDS = ("last", "early_stopped")
"""Of warm starts: see `ensemble.other_starts`."""
FITS = ("map", *(f"map_{kind}" for kind in KINDS))
SCALED, MIXED = "_temperature_scaled", "_ensemble"
MAP_ROWS = tuple(fits + form for fits in FITS for form in ("", SCALED, MIXED, MIXED + SCALED))
ENSEMBLE_SCALED = "ensemble" + SCALED
MOST = 20
"""Members, spread evenly, whose mean's standard error over examples stands for that of all."""
NOT_KEPT = "the run keeps no such fits"

Row = list[Predictions] | str
"""The predictors whose figures a row is the mean of, or why there is no such row."""


@dataclass(frozen=True)
class Predicted:
    """What fits or members predict: on the examples evaluated, and on some held out of train.

    on: logits (M, N, C); held_out: None where nothing was held out.
    """

    on: Predictions
    held_out: Predictions | None


@dataclass(frozen=True)
class Given:
    """What the rows are made of.

    own: the task's own metrics; members: of the ensemble, in the order of their draws, `on` of
    shape (K, N, C); chains: the number of each member's chain (K,); starts: the fits that sampling
    began from; others: by kind (`KINDS`), one of them the starts themselves (the same object);
    reason: why a kind is missing.
    """

    own: tuple[str, ...]
    regression: bool
    members: Predicted
    chains: np.ndarray
    starts: Predicted
    others: Mapping[str, Predicted] = field(default_factory=dict)
    reason: str | None = None


def rows(given: Given) -> Figures:
    """Every row, the standard errors of all and of the ensemble's differences from the others.

    Returns:
        Of the fits (FITS: ``map``, ``map_last``, ``map_early_stopped``) the rows ``FITS``:
        {figure: {mean, sd}}, ``FITS_temperature_scaled``: means over the fits,
        ``FITS_ensemble`` and ``FITS_ensemble_temperature_scaled``: figures of their mixture;
        ``single``: {figure: {mean, sd, mcse}}; ``ensemble``: figures; ``standard_errors``. In all
        but ``single`` ``expected_ece`` is the ECE that a model would score here whose probabilities
        are these and right; ``ensemble_temperature_scaled``: the ensemble's mixture with one
        temperature, a recalibration and no posterior. A row that there is not is null with
        ``<row>_reason``.
    """
    work = _Work(given)
    found: Figures = {}
    predictors: dict[str, Row] = {}
    kept = (given.starts, *map(given.others.get, KINDS))
    for name, fits in zip(FITS, kept, strict=True):
        for form, make in work.forms.items():
            row = name + form
            if fits is None:
                reason = given.reason or NOT_KEPT
                found |= {row: None, f"{row}_reason": reason}
                predictors[row] = reason
            else:
                predictors[row], found[row] = make(fits)
    pairs = [(own, row) for own in ("ensemble", ENSEMBLE_SCALED) for row in predictors]
    members = given.members.on
    ensemble = {**work.figures(members), "k": members.num_members}
    found |= {"single": work.single(), "ensemble": ensemble}
    predictors |= {"single": work.some_members(), "ensemble": [members]}
    predictors[ENSEMBLE_SCALED], found[ENSEMBLE_SCALED] = work.forms[MIXED + SCALED](given.members)
    errors = standard_errors(given.own, given.regression, predictors, pairs)
    return {**found, "standard_errors": errors}


class _Work:
    """Figures of predictors, each computed once however many rows show it."""

    def __init__(self, given: Given) -> None:
        self.given = given
        # By identity: arrays have no hash. What is a key here must live as long as this does.
        self._alone: dict[int, list[Predictions]] = {}
        self._scaled: dict[int, tuple[Row, Figures]] = {}
        self._figures: dict[int, Figures] = {}
        self._pooled: dict[int, Predicted] = {}
        self.forms: dict[str, Callable[[Predicted], tuple[Row, Figures]]] = {
            "": self.spread,
            SCALED: self.scaled,
            MIXED: self.mixture,
            MIXED + SCALED: lambda fits: self.scaled(self.pooled(fits)),
        }

    def alone(self, p: Predictions) -> list[Predictions]:
        """Each member as a predictor."""
        if id(p) not in self._alone:
            self._alone[id(p)] = evaluation.alone(p)
        return self._alone[id(p)]

    def figures(self, p: Predictions) -> Figures:
        """Of the mixture."""
        if id(p) not in self._figures:
            regression = self.given.regression
            found = evaluation.evaluate_in_full(self.given.own, regression, p)
            if not regression:
                # As in the diagrams: the same figure twice in a file is the same number.
                expected = calibration.expected_ece(p.probs, np.random.default_rng(SEED))
                found["expected_ece"] = expected["mean"]
            self._figures[id(p)] = found
        return self._figures[id(p)]

    def spread(self, fits: Predicted) -> tuple[Row, Figures]:
        """Each fit as a predictor, and {figure: {mean, sd}} over them."""
        members = self.alone(fits.on)
        return list(members), evaluation.mean_and_sd([self.figures(p) for p in members])

    def mixture(self, fits: Predicted) -> tuple[Row, Figures]:
        """Their deep ensemble."""
        return [fits.on], self.figures(fits.on)

    def pooled(self, fits: Predicted) -> Predicted:
        """The mixture as one fit, to be scaled as one (Rahaman & Thiery 2021); what cannot be
        scaled stays as it is.
        """
        if self.given.regression or fits.held_out is None:
            return fits
        if id(fits) not in self._pooled:
            both = (evaluation.pooled(p) for p in (fits.on, fits.held_out))
            self._pooled[id(fits)] = Predicted(*both)
        return self._pooled[id(fits)]

    def scaled(self, fits: Predicted) -> tuple[Row, Figures]:
        """The fits with their temperatures, and the means of their figures."""
        if id(fits) not in self._scaled:
            found = evaluation.scale(self.given.regression, fits.on, fits.held_out)
            if isinstance(found, str):
                self._scaled[id(fits)] = found, evaluation.no_temperature(found)
            else:
                assert fits.held_out is not None
                members, n = evaluation.alone(found[0]), len(fits.held_out)
                rows = [self.figures(p) for p in members]
                self._scaled[id(fits)] = list(members), evaluation.scaled_means(rows, found[1], n)
        return self._scaled[id(fits)]

    def single(self) -> Figures:
        """{figure: {mean, sd, mcse}} over the ensemble's members."""
        given = self.given
        return evaluation.single_draws(given.own, given.regression, given.members.on, given.chains)

    def some_members(self) -> Row:
        """At most `MOST` of them, evenly spread."""
        p = self.given.members.on
        if evaluation.left_out(p):
            return evaluation.LEFT_OUT
        chosen = np.linspace(0, p.num_members - 1, min(MOST, p.num_members)).round().astype(int)
        return [self.alone(p)[k] for k in chosen]
