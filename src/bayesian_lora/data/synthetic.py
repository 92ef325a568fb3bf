"""The embedded task `synthetic`: opinions whose true p(y = 1 | sentence) is known.

A sentence says, in one clause or two, what somebody thought of a hotel, a film, ...:

    sentence = [opening ":"] body "."
    body     = clause | clause ", and|but|although" clause | "although" clause "," clause
    clause   = [hedge] subject verb [degree] adjective

A clause's score is the product of the values of its hedge, verb, degree and adjective, in the
tables below; a sentence's score s is the weighted sum of its clauses', the weights given by the
connective; and

    p(y = 1 | sentence) = FLOOR + (1 - 2 FLOOR) / (1 + exp(-SCALE s)),    y in {0, 1}.

`probability` computes this from the text alone and is the only place where the law stands: labels
are drawn from it after the sentence is written, so that nothing but the text can matter. The Bayes
classifier reaches a mean NLL of about 0.41 nats and an accuracy of about 0.83.
The text is written for this project; there is no other source.

Shapes: N examples, C = 2 classes (0 negative, 1 positive).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from bayesian_lora.data.examples import Examples
from bayesian_lora.errors import InputError

T = TypeVar("T")


class Topic(NamedTuple):
    """What the opinion is about; `aspects` take "was", `plural_aspects` take "were"."""

    noun: str
    met: str
    preposition: str
    aspects: tuple[str, ...]
    plural_aspects: tuple[str, ...]


TOPICS = (
    Topic("hotel", "stayed at", "at", ("breakfast", "lobby", "bathroom"), ("rooms", "beds")),
    Topic("film", "watched", "of", ("plot", "acting", "ending"), ("costumes", "special effects")),
    Topic("phone", "bought", "of", ("screen", "battery", "camera"), ("speakers", "controls")),
    Topic("café", "had lunch at", "at", ("coffee", "service", "soup"), ("cakes", "sandwiches")),
    Topic("train", "travelled on", "on", ("heating", "dining car", "crew"), ("seats", "windows")),
    Topic("book", "read", "in", ("prose", "first chapter", "map"), ("characters", "drawings")),
    Topic("concert", "went to", "at", ("singer", "sound", "stage"), ("songs", "musicians")),
    Topic("museum", "visited", "at", ("exhibition", "guide", "gift shop"), ("paintings", "lifts")),
)
SHIFTED_TOPICS = (
    Topic("campsite", "camped at", "at", ("kitchen", "playground"), ("showers", "pitches")),
    Topic("podcast", "listened to", "of", ("host", "editing"), ("interviews", "jingles")),
    Topic("bicycle", "rented", "of", ("frame", "saddle"), ("brakes", "tyres")),
    Topic("gym", "joined", "at", ("equipment", "trainer"), ("classes", "lockers")),
)
# None of these bears an opinion: they move the surface of a sentence and not its label.
WHENS = ("last week", "in June", "on Sunday", "last winter", "in spring", "yesterday")
PEOPLE = ("I", "we", "they")
KINDS = ("small", "large", "old", "new", "Irish", "Italian", "modern", "unfamiliar")

HEDGES = {"perhaps": 0.4, "I guess": 0.5, "I suppose": 0.5, "arguably": 0.6, "I think": 0.8}
VERBS = {"was": 1.0, "proved": 1.0, "felt": 0.9, "seemed": 0.8}
NEGATED_VERBS = {
    "was never": -0.9,
    "never felt": -0.8,
    "was not": -0.75,
    "wasn't": -0.75,
    "did not seem": -0.65,
}
# Which degrees sound natural depends on what they modify: "very good", "absolutely superb".
MILD_DEGREES = {"somewhat": 0.6, "fairly": 0.8, "very": 1.3, "remarkably": 1.5}
STRONG_DEGREES = {"truly": 1.15, "absolutely": 1.3}
NEGATED_DEGREES = {"particularly": 0.7, "exactly": 0.8, "remotely": 1.25}
MILD_ADJECTIVES = {
    "acceptable": 0.4,
    "decent": 0.6,
    "nice": 0.8,
    "appealing": 0.9,
    "pleasant": 1.0,
    "good": 1.1,
    "satisfying": 1.2,
    "impressive": 1.3,
    "forgettable": -0.4,
    "mediocre": -0.6,
    "dull": -0.8,
    "unimpressive": -0.9,
    "annoying": -1.0,
    "unpleasant": -1.1,
    "disappointing": -1.2,
    "bad": -1.3,
}
STRONG_ADJECTIVES = {
    "flawless": 1.7,
    "excellent": 1.8,
    "wonderful": 1.9,
    "superb": 2.0,
    "outstanding": 2.0,
    "abysmal": -1.7,
    "awful": -1.8,
    "dreadful": -1.9,
    "terrible": -2.0,
    "atrocious": -2.0,
}
CONNECTIVES = {"and": (0.7, 0.7), "but": (0.35, 0.95), "although": (0.95, 0.35)}
SCALE = 2.0
FLOOR = 0.03

SIZES = {"train": 4000, "validation": 600, "shifted": 600}
MAX_SIZE = 100_000

_ADJECTIVES = MILD_ADJECTIVES | STRONG_ADJECTIVES
_DEGREES = MILD_DEGREES | STRONG_DEGREES | NEGATED_DEGREES
_VERBS = VERBS | NEGATED_VERBS
_VALUES = {
    word.lower(): v for t in (HEDGES, _VERBS, _DEGREES, _ADJECTIVES) for word, v in t.items()
}
_UNIFORMS = 32  # per candidate sentence: more than the longest one consumes


def _any_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words)).lower()


_EVERY_TOPIC = TOPICS + SHIFTED_TOPICS
_NOUNS = _any_of(topic.noun for topic in _EVERY_TOPIC)
_OPENING = re.compile(
    rf"(?:{_any_of(WHENS)}) (?:{_any_of(PEOPLE)}) (?:{_any_of(t.met for t in _EVERY_TOPIC)})"
    rf" an? (?:{_any_of(KINDS)}) (?:{_NOUNS}): "
)
_CLAUSE = re.compile(
    rf"(?:({_any_of(HEDGES)}) )?"
    rf"the (?:{_any_of(a for t in _EVERY_TOPIC for a in t.aspects + t.plural_aspects)})"
    rf"(?: (?:{_any_of(t.preposition for t in _EVERY_TOPIC)}) the (?:{_NOUNS}))?"
    rf" ({_any_of(_VERBS)}) (?:({_any_of(_DEGREES)}) )?({_any_of(_ADJECTIVES)})"
)


def probability(sentence: str) -> float:
    """The true p(y = 1 | sentence), parsed from the text alone.

    Raises `InputError` for a sentence outside the grammar.
    """
    try:
        score = _sentence_score(sentence)
    except LookupError:
        raise InputError(
            f"{sentence!r} is not a sentence of the synthetic task, so its probability is unknown; "
            "pass a text that `generate` made"
        ) from None
    return FLOOR + (1 - 2 * FLOOR) / (1 + math.exp(-SCALE * score))


def _sentence_score(sentence: str) -> float:
    text = sentence.lower()
    opening = _OPENING.match(text)
    body = text[opening.end() if opening else 0 :]
    if not body.endswith("."):
        raise LookupError(sentence)
    first, comma, second = body[:-1].partition(", ")
    if not comma:
        return _clause_score(first)
    if first.startswith("although "):  # the main clause comes second and weighs as after "but"
        connective, first = "but", first.removeprefix("although ")
    else:
        connective, _, second = second.partition(" ")
    weights = CONNECTIVES[connective]
    return weights[0] * _clause_score(first) + weights[1] * _clause_score(second)


def _clause_score(clause: str) -> float:
    match = _CLAUSE.fullmatch(re.sub(r"\bwere", "was", clause.lower()))
    if match is None:
        raise LookupError(clause)
    return math.prod(_VALUES[part] for part in match.groups() if part is not None)


def generate(split: str, *, seed: int = 0, size: int | None = None) -> Examples:
    """Distinct sentences with labels drawn from their known probabilities.

    `split` is "train", "validation" or "shifted" (topics that the two others never mention);
    `size` N defaults to 4000, 600 and 600. A hash of its text gives each sentence to train or to
    validation, so that these share none whatever their seeds and sizes; a larger set of the same
    seed extends a smaller one. The result has one text column, labels (N,), ids (N,) 0 ... N - 1
    and true_probs (N, 2).

    Raises `InputError` for an unknown split, a negative seed or a size out of range.
    """
    if split not in SIZES:
        raise InputError(f"unknown split {split!r} of the synthetic task; use {', '.join(SIZES)}")
    if seed < 0:
        raise InputError(f"seed is {seed}, but must be 0 or more; use the default 0")
    size = SIZES[split] if size is None else size
    if not 1 <= size <= MAX_SIZE:
        raise InputError(
            f"size is {size}, but the synthetic task gives 1 to {MAX_SIZE} sentences a split; "
            f"use at most {MAX_SIZE}"
        )
    # NumPy keeps PCG64's bits for ever, but not what choice() or integers() make of them: hence
    # plain uniforms only. A fixed number for each candidate makes longer sets extend shorter ones.
    entropy = np.random.SeedSequence([seed, list(SIZES).index(split)])
    generator = np.random.Generator(np.random.PCG64(entropy))
    topics = SHIFTED_TOPICS if split == "shifted" else TOPICS
    drawn: dict[str, tuple[float, int]] = {}
    while len(drawn) < size:
        label_uniform, *uniforms = generator.random(_UNIFORMS).tolist()
        sentence = _write_sentence(topics, _Dice(uniforms))
        if sentence not in drawn and split in ("shifted", _home(sentence)):
            p = probability(sentence)
            drawn[sentence] = p, int(label_uniform < p)
    p_positive = np.array([p for p, _ in drawn.values()])
    return Examples(
        texts=(list(drawn),),
        labels=np.array([label for _, label in drawn.values()], dtype=np.int64),
        ids=np.arange(size, dtype=np.int64),
        true_probs=np.stack([1 - p_positive, p_positive], axis=1),
    )


def bayes_nll(examples: Examples) -> float:
    """Mean -log p(y_i | x_i) in nats under the true law: what no model beats in expectation.

    Raises `InputError` if the examples have no true probabilities.
    """
    if examples.true_probs is None:
        raise InputError("true_probs is None: only the synthetic task knows them; use `generate`")
    chosen = np.take_along_axis(examples.true_probs, examples.labels[:, None], axis=1)
    return float(-np.log(chosen).mean())


def _home(sentence: str) -> str:
    digest = hashlib.sha256(sentence.encode()).digest()
    return "validation" if digest[0] % 4 == 0 else "train"


class _Dice:
    """Choices made from a fixed list of uniforms."""

    def __init__(self, uniforms: Iterable[float]) -> None:
        self._left = iter(uniforms)

    def chance(self, p: float) -> bool:
        return next(self._left) < p

    def pick(self, options: Iterable[T]) -> T:
        options = tuple(options)
        return options[int(next(self._left) * len(options))]


def _write_sentence(topics: Sequence[Topic], dice: _Dice) -> str:
    topic = dice.pick(topics)
    opening, place = "", f" {topic.preposition} the {topic.noun}"
    if dice.chance(0.4):
        kind = dice.pick(KINDS)
        article = "an" if kind[0].lower() in "aeiou" else "a"
        who = f"{dice.pick(WHENS)} {dice.pick(PEOPLE)} {topic.met}"
        opening, place = f"{who} {article} {kind} {topic.noun}: ", ""
    aspect = dice.pick(topic.aspects + topic.plural_aspects)
    body = _write_clause(topic, aspect, place, dice)
    if dice.chance(0.6):
        others = [a for a in topic.aspects + topic.plural_aspects if a != aspect]
        second = _write_clause(topic, dice.pick(others), "", dice)
        agree = _clause_score(body) * _clause_score(second) > 0
        contrasts = ("{}, but {}", "{}, although {}", "although {}, {}")
        form = "{}, and {}" if agree else dice.pick(contrasts)
        body = form.format(body, second)
    text = f"{opening}{body}."
    return text[0].upper() + text[1:]


def _write_clause(topic: Topic, aspect: str, place: str, dice: _Dice) -> str:
    hedge = f"{dice.pick(HEDGES)} " if dice.chance(0.2) else ""
    negated, strong = dice.chance(0.2), dice.chance(0.4)
    verb = dice.pick(NEGATED_VERBS if negated else VERBS)
    if aspect in topic.plural_aspects:
        verb = verb.replace("was", "were")
    degrees = NEGATED_DEGREES if negated else STRONG_DEGREES if strong else MILD_DEGREES
    degree = f"{dice.pick(degrees)} " if dice.chance(0.5) else ""
    adjective = dice.pick(STRONG_ADJECTIVES if strong else MILD_ADJECTIVES)
    return f"{hedge}the {aspect}{place} {verb} {degree}{adjective}"
