"""From a task to its examples, lengths and fixed sets.

Shapes: N examples in a set.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from bayesian_lora.data.examples import Examples
from bayesian_lora.data.glue_datasets import get_task, load_split
from bayesian_lora.data.preparation import (
    PROBE_SIZE,
    SUBSET_SIZE,
    RawData,
    check_max_length,
    fixed_part,
    length_limit,
    load_train,
    probe_and_subset,
)
from bayesian_lora.errors import InputError

TASK = get_task("synthetic")


def load(
    train_examples: int | None = 200, share: float = 0.1, seed: int = 0
) -> tuple[Examples, Examples | None]:
    return load_train(
        TASK,
        data_dir=None,
        train_examples=train_examples,
        validation_share=share,
        seed=seed,
    )


def test_the_subset_is_divided_into_what_is_trained_on_and_what_is_held_out() -> None:
    train, held_out = load()
    assert held_out is not None
    assert (len(train), len(held_out)) == (180, 20)
    assert not set(train.ids) & set(held_out.ids)
    whole = load_split(TASK, "train")
    shares = [part.labels.mean() for part in (train, held_out, whole)]
    assert np.ptp(shares) < 0.06


def test_no_share_holds_nothing_out() -> None:
    train, held_out = load(share=0)
    assert len(train) == 200
    assert held_out is None
    assert len(load(None, share=0)[0]) == len(load_split(TASK, "train"))


def test_the_seed_alone_decides() -> None:
    first, again, other = load(), load(), load(seed=1)
    assert first[0].fingerprint() == again[0].fingerprint()
    assert first[0].fingerprint() != other[0].fingerprint()


def test_the_held_out_share_never_comes_from_the_evaluation_split() -> None:
    train, held_out = load()
    assert held_out is not None
    evaluation = set(load_split(TASK, "validation").texts[0])
    assert not evaluation & {*train.texts[0], *held_out.texts[0]}


def test_too_many_examples_name_the_key() -> None:
    with pytest.raises(InputError, match=r"data\.train_examples=5000: .* has 4000"):
        load(5000)


def test_fingerprints_of_every_part() -> None:
    train, held_out = load()
    evaluation = load_split(TASK, "validation")
    found = RawData(TASK, train, held_out, evaluation).fingerprint()
    assert found.keys() == {"train", "validation", "evaluation"}
    assert len(set(found.values())) == 3
    assert RawData(TASK, train, None, evaluation).fingerprint().keys() == {"train", "evaluation"}


def test_limits_are_those_of_tokenizer_and_positions(tiny_models: dict[str, Path]) -> None:
    for folder in tiny_models.values():
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert length_limit(tokenizer, config) == 64
    unlimited = SimpleNamespace(model_max_length=10**30)
    assert length_limit(unlimited, SimpleNamespace(max_position_embeddings=512)) == 512
    roberta = SimpleNamespace(max_position_embeddings=514, model_type="roberta", pad_token_id=1)
    assert length_limit(unlimited, roberta) == 512
    relative = SimpleNamespace(model_type="t5")
    assert length_limit(SimpleNamespace(model_max_length=512), relative) == 512


def test_max_length_over_the_limit_says_what_to_set() -> None:
    check_max_length(64, 64, "bert")
    with pytest.raises(InputError, match=r"data\.max_length=65: bert .* data\.max_length=64"):
        check_max_length(65, 64, "bert")


def test_fixed_parts_are_the_same_for_every_run() -> None:
    data = load_split(TASK, "train")
    part = fixed_part(data, 30, seed=3)
    assert len(part) == len(set(part.ids)) == 30
    np.testing.assert_array_equal(part.ids, fixed_part(data, 30, seed=3).ids)
    assert list(part.ids) == sorted(part.ids)
    assert list(part.ids) != list(fixed_part(data, 30, seed=4).ids)
    assert fixed_part(part, 30, seed=0) is part


@pytest.mark.parametrize("share", [0.1, 0.0])
def test_traces_look_at_held_out_probes_and_a_part_of_train(
    tiny_models: dict[str, Path], share: float
) -> None:
    train, held_out = load(share=share)
    raw = RawData(TASK, train, held_out, load_split(TASK, "validation"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["bert"])
    probe, subset = probe_and_subset(raw, tokenizer, 48, seed=0)
    assert (len(probe), len(subset)) == (PROBE_SIZE, SUBSET_SIZE)
    assert set(subset.examples.texts[0]) <= set(train.texts[0])
    source = train if held_out is None else held_out
    assert set(probe.examples.texts[0]) <= set(source.texts[0])
