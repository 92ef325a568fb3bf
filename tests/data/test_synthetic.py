"""The synthetic task: its law is a function of the text, and labels follow that law."""

import hashlib
import math
import re

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from bayesian_lora.data.examples import Examples
from bayesian_lora.data.synthetic import (
    MAX_SIZE,
    SHIFTED_TOPICS,
    TOPICS,
    bayes_nll,
    generate,
    probability,
)
from bayesian_lora.errors import InputError


@pytest.fixture(scope="module")
def train() -> Examples:
    return generate("train", size=50_000)


@pytest.fixture(scope="module")
def validation() -> Examples:
    return generate("validation", size=4000)


@pytest.fixture(scope="module")
def shifted() -> Examples:
    return generate("shifted")


def logistic_law(score: float) -> float:
    return 0.03 + 0.94 / (1 + math.exp(-2.0 * score))


@pytest.mark.parametrize(
    ("sentence", "score"),
    [
        ("The rooms at the hotel were good.", 1.1),
        ("The rooms were very good.", 1.3 * 1.1),
        ("The rooms weren't good.", -0.75 * 1.1),
        ("The rooms were never remotely terrible.", 0.9 * 1.25 * 2.0),
        ("I suppose the plot of the film felt absolutely superb.", 0.5 * 0.9 * 1.3 * 2.0),
        ("The plot was good, and the acting seemed decent.", 0.7 * 1.1 + 0.7 * 0.8 * 0.6),
        ("The plot was good, but the acting was awful.", 0.35 * 1.1 - 0.95 * 1.8),
        ("The plot was good, although the acting was awful.", 0.95 * 1.1 - 0.35 * 1.8),
        ("Although the plot was good, the acting was awful.", 0.35 * 1.1 - 0.95 * 1.8),
        (
            "Last week we had lunch at an Irish café: the soup was bad, but I think the cakes "
            "were nice.",
            -0.35 * 1.3 + 0.95 * 0.8 * 0.8,
        ),
    ],
)
def test_law_of_sentences_worked_by_hand(sentence: str, score: float) -> None:
    assert probability(sentence) == pytest.approx(logistic_law(score), abs=1e-12)


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "The rooms were good",
        "The rooms were green.",
        "The rooms were good, so the beds were nice.",
        "The rooms were good, but the beds were nice, and the lobby was bad.",
        "Colourless green ideas sleep furiously.",
    ],
)
def test_sentence_outside_the_grammar_is_refused(sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(repr(sentence)) + " is not a sentence"):
        probability(sentence)


def test_stored_probabilities_are_a_function_of_the_text(
    train: Examples, validation: Examples, shifted: Examples
) -> None:
    for examples in (train, validation, shifted):
        assert examples.true_probs is not None
        parsed = np.array([probability(text) for text in examples.texts[0]])
        np.testing.assert_array_equal(examples.true_probs, np.stack([1 - parsed, parsed], axis=1))


def test_negation_flips_single_clauses(train: Examples) -> None:
    flips = {" was ": " was not ", " were ": " were never ", " felt ": " never felt "}
    flipped = 0
    for text in train.texts[0][:2000]:
        if "," in text or re.search("not|never|n't", text):
            continue
        for verb, negated in flips.items():
            if verb in text:
                p, q = probability(text), probability(text.replace(verb, negated))
                assert (p - 0.5) * (q - 0.5) < 0, text
                flipped += 1
    assert flipped > 200


def test_hedge_moves_towards_one_half(train: Examples) -> None:
    hedged = 0
    for text in train.texts[0][:2000]:
        if "," not in text and text.startswith("The "):
            for hedge in ("Perhaps", "I guess", "I suppose", "Arguably", "I think"):
                p, q = probability(text), probability(f"{hedge} the {text[4:]}")
                assert 0 < (q - 0.5) / (p - 0.5) < 1, text
            hedged += 1
    assert hedged > 200


def test_later_clause_weighs_more_after_but_and_less_after_although() -> None:
    good, bad = "the plot was good", "the acting was bad"
    ends_badly, ends_well = f"The plot was good, but {bad}.", f"The acting was bad, but {good}."
    assert probability(ends_badly) < 0.4 < 0.6 < probability(ends_well)
    assert probability(ends_badly.replace("but", "although")) > 0.5
    assert probability(f"Although {good}, {bad}.") == probability(ends_badly)


def test_labels_follow_the_law(train: Examples) -> None:
    assert train.true_probs is not None
    p, y = train.true_probs[:20_000, 1], train.labels[:20_000]
    bins = np.clip((p * 15).astype(int), 0, 14)
    z = [
        (y[bins == b].sum() - p[bins == b].sum())
        / np.sqrt((p[bins == b] * (1 - p[bins == b])).sum())
        for b in range(15)
    ]
    assert np.abs(z).max() < 3.5  # 15 standard normals exceed it once in 140 seeds
    assert (np.square(z)).sum() < 37.7  # the 0.999 quantile of chi-squared with 15 degrees


def test_task_is_noisy_balanced_and_short(
    train: Examples, validation: Examples, shifted: Examples
) -> None:
    for examples in (train, validation, shifted):
        assert examples.true_probs is not None
        assert 0.4 < examples.labels.mean() < 0.6
        assert examples.true_probs.min() > 0.03
        assert examples.true_probs.max() < 0.97
        assert 0.35 < bayes_nll(examples) < 0.45
        assert 0.80 < examples.true_probs.max(axis=1).mean() < 0.86
        assert max(len(text.split()) for text in examples.texts[0]) <= 30


def test_english_is_well_formed(train: Examples, shifted: Examples) -> None:
    for text in train.texts[0][:5000] + shifted.texts[0]:
        assert re.fullmatch(r"[A-Z][^.:]*(: [^.:]*)?[a-z]\.", text), text
        assert "  " not in text, text
        assert not re.search(r"\ba [aeiouAEIOU]|\ban [^aeiouAEIOU]|\bi\b", text), text
        plural = r"(rooms|seats|songs|characters|brakes)( \w+ the \w+)? (never )?"
        assert not re.search(plural + "was", text), text


def test_sentences_are_distinct_and_splits_disjoint(
    train: Examples, validation: Examples, shifted: Examples
) -> None:
    texts = [*train.texts[0], *validation.texts[0], *shifted.texts[0]]
    assert len(set(texts)) == len(texts) == 54_600
    elsewhere = generate("validation", seed=7, size=3000).texts[0]
    assert not set(elsewhere) & set(train.texts[0])


def test_shifted_topics_are_unseen_in_training(train: Examples, shifted: Examples) -> None:
    def words(topics: tuple) -> set[str]:
        return {w for t in topics for w in (t.noun, *t.aspects, *t.plural_aspects)}

    seen, unseen = " ".join(train.texts[0]), " ".join(shifted.texts[0])
    for word in words(SHIFTED_TOPICS):
        assert re.search(rf"\b{word}\b", unseen), word
        assert not re.search(rf"\b{word}\b", seen), word
    for word in words(TOPICS):
        assert re.search(rf"\b{word}\b", seen), word
        assert not re.search(rf"\b{word}\b", unseen), word


def test_default_sizes_and_layout() -> None:
    for split, size in (("train", 4000), ("validation", 600), ("shifted", 600)):
        examples = generate(split)
        assert examples.true_probs is not None
        assert len(examples.texts) == 1
        assert len(examples.texts[0]) == size
        assert examples.labels.dtype == np.int64
        assert set(examples.labels.tolist()) == {0, 1}
        np.testing.assert_array_equal(examples.ids, np.arange(size))
        assert examples.true_probs.shape == (size, 2)
        np.testing.assert_allclose(examples.true_probs.sum(axis=1), 1.0, rtol=1e-15)


def test_seed_alone_decides(train: Examples) -> None:
    again, other = generate("train", size=500), generate("train", seed=1, size=500)
    assert again.texts[0] == train.texts[0][:500]  # also: a longer set extends a shorter one
    np.testing.assert_array_equal(again.labels, train.labels[:500])
    assert len(set(again.texts[0]) & set(other.texts[0])) < 100


def test_first_sentences_are_pinned(train: Examples) -> None:
    """Results of all runs on this task change with the grammar: change it knowingly."""
    rows = [f"{y} {text}\n" for y, text in zip(train.labels[:200], train.texts[0], strict=False)]
    digest = hashlib.sha256("".join(rows).encode()).hexdigest()
    assert digest == "380fdce19795db6b860e7029c6137533559e8e4f87d91b286795d6901d4a617f"


def test_bag_of_words_stays_clearly_above_the_bayes_optimum(
    train: Examples, validation: Examples
) -> None:
    vectorizer = CountVectorizer(token_pattern=r"[\w']+")
    inputs = vectorizer.fit_transform(train.texts[0][:4000])
    best = math.inf
    for strength in (0.03, 0.1, 1.0):  # the best of these in hindsight: generous to the words
        model = LogisticRegression(C=strength, max_iter=2000).fit(inputs, train.labels[:4000])
        probs = model.predict_proba(vectorizer.transform(validation.texts[0]))
        best = min(best, -np.log(np.take_along_axis(probs, validation.labels[:, None], 1)).mean())
    assert best > bayes_nll(validation) + 0.03
    assert best < math.log(2) - 0.03  # yet words tell something: the task is not a riddle


def test_bayes_nll_by_hand() -> None:
    examples = Examples(
        texts=(["a", "b"],),
        labels=np.array([1, 0]),
        ids=np.arange(2),
        true_probs=np.array([[0.2, 0.8], [0.5, 0.5]]),
    )
    assert bayes_nll(examples) == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2)
    unknown = Examples(texts=examples.texts, labels=examples.labels, ids=examples.ids)
    with pytest.raises(InputError, match="true_probs is None"):
        bayes_nll(unknown)


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match=r"'test'.*train, validation, shifted"):
        generate("test")
    with pytest.raises(InputError, match="seed is -1"):
        generate("train", seed=-1)
    for size in (0, -3, MAX_SIZE + 1):
        with pytest.raises(InputError, match=f"size is {size}.*{MAX_SIZE}"):
            generate("train", size=size)
