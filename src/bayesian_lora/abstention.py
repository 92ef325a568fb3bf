"""When not to answer: a threshold of an uncertainty score, given or found for a target risk.

Shapes: K members, N examples.
"""

from dataclasses import dataclass

import numpy as np

from bayesian_lora.errors import InputError
from bayesian_lora.predict import Predictions
from bayesian_lora.scores import selective

SCORES = ("predictive_entropy", "mutual_information", "max_probability")


@dataclass(frozen=True)
class Abstention:
    """Abstain where an uncertainty score lies above a threshold.

    score: ``predictive_entropy`` or ``mutual_information`` (nats), ``max_probability`` (which is 1
    minus it, so that more is less certain too); of a regression always the predictive ``sd``.
    """

    above: float
    score: str = "predictive_entropy"

    def __post_init__(self) -> None:
        if not self.above >= 0:  # nor is nan
            raise InputError(f"above={self.above}: a threshold is a number from 0 upwards")
        check_score(self.score)


@dataclass(frozen=True)
class RiskThreshold:
    """The threshold of a target risk, and what it was found on.

    above: of the score; n: examples it was found on; kept: their share at or below it; risk: the
    share of wrong labels among those; confidence: 0 where risk alone was held to the target.
    """

    above: float
    score: str
    target: float
    confidence: float
    n: int
    kept: float
    risk: float

    def said(self, split: str) -> str:
        """The threshold in words, what it was found on, and what holds of it."""
        where = (
            f"Abstains where {self.score} > {self.above:.6g}: of the {self.n} examples of {split} "
            f"{self.kept:.1%} are kept, {self.risk:.1%} of them wrong"
        )
        if not self.confidence:
            return f"{where}. Other texts may differ: no guarantee."
        return (
            f"{where}; with confidence {self.confidence:g} at most {self.target:g} of the labels "
            "given to texts drawn as these were."
        )


def scores(p: Predictions, name: str) -> np.ndarray:
    """An uncertainty (N,) of each text, of which more is less certain; see `Abstention`.

    Raises:
        InputError: an unknown name, or mutual information where no members can differ.
    """
    check_score(name, int(np.count_nonzero(p.weights)), p.members_used is not None)
    return 1 - p.confidence if name == "max_probability" else p.uncertainty[name]


def check_score(name: str, members: int = 2, left_out: bool = False) -> None:
    """Whether so many members have a score.

    Raises:
        InputError: unknown, or mutual information of one member or of members left out.
    """
    if name not in SCORES:
        raise InputError(f"score={name!r}: choose {', '.join(SCORES)}")
    if name == "mutual_information" and members == 1:
        raise InputError(
            "score=mutual_information: not available, one member alone cannot disagree with "
            "itself; choose predictive_entropy or max_probability"
        )
    if name == "mutual_information" and left_out:
        raise InputError(
            "score=mutual_information: not available where members are left out (tolerance); "
            "leave the tolerance out, or choose predictive_entropy or max_probability"
        )


def check_target(target: float, confidence: float) -> None:
    """Whether there are such a target risk and confidence.

    Raises:
        InputError: one lies outside [0, 1).
    """
    if not 0 <= target < 1:
        raise InputError(f"target_risk={target}: a share of wrong labels, from 0 to below 1")
    if not 0 <= confidence < 1:
        raise InputError(f"confidence={confidence}: from 0 (no guarantee) to below 1")


def risk_threshold(
    p: Predictions, target: float, confidence: float = 0.95, score: str = "predictive_entropy"
) -> RiskThreshold:
    """The largest threshold at which the share of wrong labels among the kept is at most `target`.

    With a `confidence` above 0 that holds, with this probability over the choice of the N labelled
    examples, for texts drawn as they were and where a higher score is no less often wrong
    (`selective.safe_threshold_for`); with 0 on the N examples alone (`selective.threshold_for`).

    Raises:
        InputError: no threshold reaches the target, or a target or confidence that there is not.
    """
    check_target(target, confidence)
    if p.noise_std is not None:
        raise InputError(
            "target_risk: a regression has no wrong labels; give a threshold of its sd"
        )
    value, wrong = scores(p, score), p.predicted != p.labels
    plain = selective.threshold_for(value, wrong, target)
    above = plain
    if confidence > 0:
        above = selective.safe_threshold_for(value, wrong, target, confidence=confidence)
    if above is None:
        found = f"no threshold of {score} keeps the risk at {target:g} or below"
        if plain is None or confidence == 0:
            raise InputError(
                f"target_risk={target}: {found}, on {len(p)} examples; ask for a higher one"
            )
        raise InputError(
            f"target_risk={target}: {found} with confidence {confidence:g}, for which {len(p)} "
            "examples are too few or too often wrong; ask for a higher risk or a lower confidence "
            f"(with 0 the threshold is {plain:.4g}, on these examples alone, without a guarantee)"
        )
    kept = value <= above
    risk = float(wrong[kept].mean())
    return RiskThreshold(float(above), score, target, confidence, len(p), float(kept.mean()), risk)
