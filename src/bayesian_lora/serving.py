"""Answers to texts as they come: label, probability, uncertainty, and whether to abstain.

Texts are predicted in blocks, so that an input of any length needs the memory of one block. An
answer is a mapping of plain numbers and words, one for every text, in the order of the texts.

Shapes: K members, N texts (of a block), C classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from bayesian_lora.abstention import Abstention, check_score, scores
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import unlabelled
from bayesian_lora.ensemble import Ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import HuggingFaceLora
from bayesian_lora.predict import Predictions

T = TypeVar("T")
Answer = dict[str, Any]
Texts = Sequence[str] | Sequence[tuple[str, str]]
BLOCK = 256
DIGITS = 7
"""What a float32 holds: more digits of an answer would be noise."""
EMPTY = "empty text"
CLASSES = ("label", "probability", "probabilities", "entropy", "mutual_information")
NUMBERS = ("mean", "sd", "lower", "upper", "members_sd")
BESIDE = ("members", "abstain", "reason")
"""What an answer holds: of a classification, of a regression, and of either."""


@dataclass(frozen=True)
class Service:
    """Predictions turned into answers.

    predict: N texts or pairs → `Predictions`; num_labels: C, or 1 of a regression; label_names: the
    C names, () for numbers; members: K; with_used: whether predict leaves members out (tolerance).
    """

    predict: Callable[[Any], Predictions]
    num_labels: int
    members: int
    regression: bool = False
    label_names: tuple[str, ...] = ()
    abstention: Abstention | None = None
    with_used: bool = False

    def __post_init__(self) -> None:
        if self.label_names and len(self.label_names) != self.num_labels:
            raise InputError(
                f"label_names {list(self.label_names)}: the model has {self.num_labels} outputs; "
                "name each, or leave the names out"
            )
        if self.abstention is not None and not self.regression:
            check_score(self.abstention.score, self.members, self.with_used)

    @classmethod
    def of(
        cls,
        ensemble: Ensemble,
        abstention: Abstention | None = None,
        *,
        predict: Callable[[Any], Predictions] | None = None,
        label_names: Sequence[str] | None = None,
        with_used: bool = False,
    ) -> "Service":
        """Answers of an ensemble, with the label names it was stored with.

        Raises:
            InputError: a score that these members do not have.
        """
        task, num_labels = ensemble.provenance.task, ensemble.provenance.model["num_labels"]
        regression = task["likelihood"] == "gaussian"
        if regression and abstention is not None and ensemble.noise_std is None:
            raise InputError(
                f"above={abstention.above:g}: the members carry no noise_std, so their predictions "
                "have no sd to compare with it; leave the threshold out"
            )
        names = tuple(task.get("label_names") or ()) if label_names is None else tuple(label_names)
        return cls(
            predict=ensemble.predict if predict is None else predict,
            num_labels=num_labels,
            members=int(np.count_nonzero(ensemble.weights)),
            regression=regression,
            label_names=names,
            abstention=abstention,
            with_used=with_used,
        )

    @property
    def labels(self) -> list[Any]:
        """C names or numbers."""
        return list(self.label_names) or list(range(self.num_labels))

    @property
    def names(self) -> tuple[str, ...]:
        """What an answer holds, in order; ``reason`` only where there is no answer."""
        own = NUMBERS if self.regression else CLASSES
        return (*own, *(BESIDE if self.with_used else BESIDE[1:]))

    def stream(self, texts: Iterable[Any], block: int = BLOCK) -> Iterator[Answer]:
        """One answer a text (or pair of texts), as they come; N = `block` texts at a time.

        Raises:
            InputError: as `predict`, or what the texts' own iterator raises, after the answers to
                the texts before it.
        """
        for part in in_blocks(texts, block):
            yield from self.answer(part)

    def answer(self, texts: Sequence[Any]) -> list[Answer]:
        """One answer a text; an empty one (white space alone) has none, and says so.

        Raises:
            InputError: as `predict`.
        """
        full = [i for i, text in enumerate(texts) if not _is_empty(text)]
        nothing = self._no_answer()
        answers = [dict(nothing) for _ in texts]
        if full:
            found = self._answers(self.predict([texts[i] for i in full]))
            for i, answer in zip(full, found, strict=True):
                answers[i] = answer
        return answers

    def _no_answer(self) -> Answer:
        abstain = None if self.abstention is None else True
        return {**dict.fromkeys(self.names), "abstain": abstain, "reason": EMPTY}

    def _answers(self, p: Predictions) -> list[Answer]:
        columns = _regression(p) if self.regression else self._classes(p)
        if self.with_used:
            used = np.full(len(p), self.members) if p.members_used is None else p.members_used
            columns["members"] = used.tolist()
        columns["abstain"] = self._abstains(p)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _classes(self, p: Predictions) -> dict[str, list[Any]]:
        probs, labels = p.probs, self.labels
        unsure = p.uncertainty
        mutual: list[Any] = [None] * len(p)
        if self.members > 1:
            whole = np.ones(len(p), bool) if p.members_used is None else _whole(p)
            values = _rounded(unsure["mutual_information"])
            mutual = [v if ok else None for v, ok in zip(values, whole, strict=True)]
        by_name = [dict(zip(map(str, labels), _rounded(row), strict=True)) for row in probs]
        return {
            "label": [labels[c] for c in p.predicted],
            "probability": _rounded(p.confidence),
            "probabilities": by_name,
            "entropy": _rounded(unsure["predictive_entropy"]),
            "mutual_information": mutual,
        }

    def _abstains(self, p: Predictions) -> list[bool | None]:
        if self.abstention is None:
            return [None] * len(p)
        if self.regression:
            assert p.sd is not None, "checked in of()"
            score = p.sd
        else:
            score = scores(p, self.abstention.score)
        return [bool(value > self.abstention.above) for value in score]


class Predictor:
    """An ensemble on a model that is loaded already: N texts → `Predictions`.

    cut: how many texts so far reached the most tokens that the model was given, where they are cut.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        model: HuggingFaceLora,
        tokenizer: Any,
        tolerance: float | None = None,
    ) -> None:
        ensemble.check_tolerance(tolerance)
        self.ensemble, self.model, self.tokenizer = ensemble, model, tokenizer
        self.tolerance, self.cut = tolerance, 0

    @property
    def max_length(self) -> int:
        """Tokens."""
        return int(self.ensemble.provenance.model["max_length"])

    def __call__(self, texts: Texts) -> Predictions:
        data = TokenisedSet(unlabelled(texts), self.tokenizer, self.max_length)
        self.cut += int((data.lengths >= self.max_length).sum())
        return self.ensemble.predict_set(self.model, data, self.tolerance)


def in_blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter; what comes before an `InputError` goes first."""
    block: list[T] = []
    failure: InputError | None = None
    iterator = iter(items)
    while failure is None:
        try:
            block.append(next(iterator))
        except StopIteration:
            break
        except InputError as error:
            failure = error
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
    if failure is not None:
        raise failure


def _regression(p: Predictions) -> dict[str, list[Any]]:
    unknown: list[Any] = [None] * len(p)
    sd, ends = p.sd, p.interval()
    several = np.count_nonzero(p.weights) > 1
    return {
        "mean": _rounded(p.predicted),
        "sd": unknown if sd is None else _rounded(sd),
        "lower": unknown if ends is None else _rounded(ends[0]),
        "upper": unknown if ends is None else _rounded(ends[1]),
        "members_sd": _rounded(p.members_sd) if several else unknown,
    }


def _whole(p: Predictions) -> np.ndarray:
    """(N,) whether a text was given every member that has a weight."""
    assert p.members_used is not None
    return np.asarray(p.members_used) >= np.count_nonzero(p.weights)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def _is_empty(text: Any) -> bool:
    parts: Iterable[Any] = [text] if isinstance(text, str) else text
    return any(isinstance(part, str) and not part.strip() for part in parts)
