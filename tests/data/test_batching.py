"""Tokenised examples and batches for M chains: complete, right-padded, by length.

Shapes: M chains, B examples of a chain's batch, b of a micro-batch, L tokens, N examples.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.synthetic import generate
from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.posterior import negative_log_likelihood
from bayesian_lora.utils.rng import chain_generators

WORDS = ("good", "bad", "film", "plot", "very", "dull", "the", "was")


def texts_of_lengths(lengths: list[int]) -> list[str]:
    return [" ".join(WORDS[(i + j) % 8] for j in range(n)) for i, n in enumerate(lengths)]


def a_set(tokenizer: Any, *columns: list[str], max_length: int = 64) -> TokenisedSet:
    n = len(columns[0])
    labels = np.arange(n, dtype=np.int64) % 2
    return TokenisedSet(Examples(columns, labels, np.arange(n)), tokenizer, max_length)


@pytest.fixture(scope="module")
def tokenizers(tiny_models: dict[str, Path]) -> dict[str, Any]:
    return {name: AutoTokenizer.from_pretrained(path) for name, path in tiny_models.items()}


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_batch_is_what_the_tokenizer_makes(
    tokenizers: dict[str, Any], family: str, pair: bool
) -> None:
    tokenizer = tokenizers[family]
    first = generate("train", size=20).texts[0]
    columns = (first, generate("shifted", size=20).texts[0]) if pair else (first,)
    data = a_set(tokenizer, *columns)
    rows = np.array([3, 17, 0, 3])

    batch = data.batch(rows, share=0.5)

    texts = [[column[i] for i in rows] for column in columns]
    expected = tokenizer(
        *texts, truncation=True, padding=True, padding_side="right", return_tensors="pt"
    )
    assert batch.inputs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert batch.inputs[name].dtype == torch.int64
        assert torch.equal(batch.inputs[name], tensor), name
    assert batch.labels.tolist() == [1, 1, 0, 1]
    assert batch.rows.tolist() == rows.tolist()
    assert batch.share == 0.5
    assert len(data) == 20
    assert data.lengths[rows].tolist() == expected["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_is_the_tokenizer_s_and_on_the_right(
    tokenizers: dict[str, Any], family: str
) -> None:
    data = a_set(tokenizers[family], texts_of_lengths([1, 9, 4]))
    rows = np.array([[0, 1], [2, 0]])
    inputs = data.batch(rows).inputs
    longest = int(data.lengths[1])
    assert inputs["input_ids"].shape == (2, 2, longest)
    positions = torch.arange(longest)
    own = torch.from_numpy(data.lengths[rows])[..., None]
    assert torch.equal(inputs["attention_mask"], (positions < own).long())
    padding = inputs["input_ids"][inputs["attention_mask"] == 0]
    assert len(padding) > 0
    assert (
        set(padding.tolist())
        == {tokenizers[family].pad_token_id}
        == {{"bert": 0, "roberta": 1}[family]}
    )


def test_pairs_are_told_apart_by_token_types_not_by_text(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bert"]
    data = a_set(tokenizer, ["good film", "bad"], ["the plot was dull", "very"])
    inputs = data.batch(np.array([0])).inputs
    separator = tokenizer.sep_token_id
    words = tokenizer.convert_tokens_to_ids
    assert inputs["input_ids"].tolist() == [
        [
            tokenizer.cls_token_id,
            *words(["good", "film"]),
            separator,
            *words(["the", "plot", "was", "dull"]),
            separator,
        ]
    ]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1]]
    roberta = tokenizers["roberta"]
    ids = a_set(roberta, ["good"], ["bad"]).batch(np.array([0])).inputs["input_ids"][0].tolist()
    assert ids.count(roberta.sep_token_id) == 3, "RoBERTa parts a pair by two separators"


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_long_texts_are_cut_and_stay_well_formed(tokenizers: dict[str, Any], family: str) -> None:
    tokenizer = tokenizers[family]
    first, second = texts_of_lengths([30, 3, 30]), texts_of_lengths([2, 30, 30])
    single = a_set(tokenizer, first, max_length=8)
    assert single.lengths.max() == 8
    assert (
        single.batch(np.array([0, 2])).inputs["input_ids"][:, -1] == tokenizer.sep_token_id
    ).all()
    pair = a_set(tokenizer, first, second, max_length=12)
    ids = pair.batch(np.array([0, 1, 2])).inputs["input_ids"]
    assert ids.shape == (3, 12)
    separators = {"bert": 2, "roberta": 3}[family]
    assert (ids == tokenizer.sep_token_id).sum(1).tolist() == [separators] * 3
    assert (ids[:, -1] == tokenizer.sep_token_id).all()
    short = a_set(tokenizer, ["bad"], ["good"], max_length=12)
    whole = (
        a_set(tokenizer, first, ["good"] * 3, max_length=12)
        .batch(np.array([0]))
        .inputs["input_ids"]
    )
    # The longer text of a pair is cut, the shorter one stays whole.
    tail = short.lengths[0] - 2 - {"bert": 1, "roberta": 2}[family]
    assert torch.equal(whole[0, -tail:], short.batch(np.array([0])).inputs["input_ids"][0, -tail:])


def test_empty_texts_are_texts(tokenizers: dict[str, Any]) -> None:
    data = a_set(tokenizers["bert"], ["", "good"])
    assert data.batch(np.array([0, 1])).inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_texts_outside_unicode_are_refused(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="lone surrogates"):
        a_set(tokenizers["bert"], ["good", "\ud800 film"])


@pytest.fixture(scope="module")
def varied(tokenizers: dict[str, Any]) -> TokenisedSet:
    lengths = np.random.default_rng(0).integers(1, 30, 40).tolist()
    return a_set(tokenizers["bert"], texts_of_lengths(lengths))


@given(
    chains=st.integers(1, 3),
    batch=st.integers(1, 17),
    size=st.none() | st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_micro_batches_are_the_batch(
    varied: TokenisedSet, chains: int, batch: int, size: int | None, seed: int
) -> None:
    rows = np.random.default_rng(seed).integers(0, len(varied), (chains, batch))

    parts = list(varied.micro_batches(rows, size))

    seen = np.concatenate([part.rows.numpy() for part in parts], axis=1)
    assert seen.shape == rows.shape
    assert np.array_equal(np.sort(seen, axis=1), np.sort(rows, axis=1))
    assert (np.diff(varied.lengths[seen], axis=1) >= 0).all(), "each chain by length"
    assert sum(part.share for part in parts) == pytest.approx(1)
    for part in parts:
        width = part.rows.shape[1]
        assert 1 <= width <= (size or batch)
        assert part.share == width / batch
        longest = varied.lengths[part.rows.numpy()].max()
        assert part.inputs["input_ids"].shape == (chains, width, longest)
        assert torch.equal(part.labels, varied.labels[part.rows])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_gradients_of_micro_batches_add_up_to_the_batch_s(
    tiny_models: dict[str, Path], varied: TokenisedSet, size: int
) -> None:
    model = build_huggingface_lora_model(
        str(tiny_models["bert"]), 2, chains=2, rank=2, dtype="float64"
    )
    rows = np.random.default_rng(1).integers(0, len(varied), (2, 8))
    with torch.no_grad():
        for parameter in model.chain_parameters().values():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))

    def gradients(size: int | None) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in varied.micro_batches(rows, size):
            nll = negative_log_likelihood("categorical", model(**part.inputs), part.labels)
            (nll.mean(1) * part.share).sum().backward()
        return {
            n: p.grad.clone() for n, p in model.chain_parameters().items() if p.grad is not None
        }

    whole, summed = gradients(None), gradients(size)
    assert whole.keys() == model.chain_parameters().keys()
    for name, gradient in whole.items():
        assert gradient.any()
        torch.testing.assert_close(summed[name], gradient, atol=1e-12, rtol=1e-9)


@given(st.integers(1, 200))
def test_by_length_covers_all_rows_within_its_tokens(varied: TokenisedSet, budget: int) -> None:
    parts = list(varied.by_length(budget))
    rows = np.concatenate(parts)
    assert np.array_equal(np.sort(rows), np.arange(len(varied)))
    assert (np.diff(varied.lengths[rows]) <= 0).all(), "longest first"
    for part in parts:
        padded = len(part) * varied.lengths[part].max()
        assert padded <= budget or len(part) == 1


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (10, 5), (4, 9), (1, 1)])
def test_an_epoch_is_a_permutation_in_batches(n: int, batch: int) -> None:
    order = BatchOrder(n, batch, chain_generators(0, range(3), "order"))
    first, second = order.epoch(), order.epoch()
    assert first.shape == (3, n)
    assert (np.sort(first, axis=1) == np.arange(n)).all()
    if n > 3:
        assert (first != second).any()
        assert (first[0] != first[1]).any()
    batches = [order.epoch_batch(first, i) for i in range(order.batches_per_epoch)]
    assert np.array_equal(np.concatenate(batches, axis=1), first)
    assert order.batch_size == min(n, batch)
    assert all(part.shape == (3, order.batch_size) for part in batches[:-1])
    assert 1 <= batches[-1].shape[1] <= order.batch_size


def test_a_chain_s_order_does_not_depend_on_the_others() -> None:
    many = BatchOrder(20, 4, chain_generators(5, range(6), "order"))
    alone = BatchOrder(20, 4, chain_generators(5, [4], "order"))
    for _ in range(2):
        assert np.array_equal(many.epoch()[4], alone.epoch()[0])
        assert np.array_equal(many.iid()[4], alone.iid()[0])


def test_iid_batches_are_uniform_with_replacement() -> None:
    order = BatchOrder(5, 4, chain_generators(0, range(2), "order"))
    draws = np.stack([order.iid() for _ in range(5000)])
    assert draws.shape == (5000, 2, 4)
    for m in range(2):
        counts = np.bincount(draws[:, m].ravel(), minlength=5)
        chi_square = ((counts - 4000) ** 2 / 4000).sum()
        assert chi_square < 23.5, counts  # 4 degrees of freedom: p = 0.0001
        distinct = [len(set(batch)) for batch in draws[:, m].tolist()]
        # Without replacement all four would differ; with it in 5·4·3·2/5⁴ = 19 % of the batches.
        assert np.mean(np.array(distinct) == 4) == pytest.approx(0.192, abs=0.03)
    correlation = np.corrcoef(draws[:, 0].ravel(), draws[:, 1].ravel())[0, 1]
    assert abs(correlation) < 0.04
