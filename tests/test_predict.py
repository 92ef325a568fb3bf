"""Logits of many members on many examples: order, padding, precision, independence.

Shapes: K members, N examples, C classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bayesian_lora import predict
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.synthetic import generate
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.models.hf_lora import Precision, build_huggingface_lora_model
from bayesian_lora.predict import Predictions, predict_logits

MEMBERS, EXAMPLES = 3, 25
FAMILIES = ("bert", "roberta", "distilbert")


def build(folder: Path, members: int, dtype: Precision) -> ChainModel:
    """K members that differ in every tensor, each drawn from its own number."""
    model = build_huggingface_lora_model(str(folder), 2, rank=2, chains=members, dtype=dtype)
    with torch.no_grad():
        for p in model.chain_parameters().values():
            for k, row in enumerate(p):
                row.normal_(0, 0.3, generator=torch.Generator().manual_seed(k))
    return model


def examples(folder: Path) -> TokenisedSet:
    """Lengths that differ, in no order."""
    data = TokenisedSet(generate("train", size=EXAMPLES), AutoTokenizer.from_pretrained(folder), 64)
    assert len(set(data.lengths)) > 4
    assert (np.diff(data.lengths) > 0).any()
    return data


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens_per_pass", [16_384, 200, 1])
def test_equal_to_a_forward_pass_per_example(
    tiny_models: dict[str, Path], family: str, tokens_per_pass: int
):
    """In the set's own order, whatever the batches are; padding changes nothing."""
    folder = tiny_models[family]
    model, data = build(folder, MEMBERS, "float32"), examples(folder)
    logits = predict_logits(model, data, tokens_per_pass=tokens_per_pass)
    assert logits.shape == (MEMBERS, EXAMPLES, 2)
    assert logits.dtype == np.float32
    with torch.no_grad():
        singly = [model(**data.batch(np.array([i])).inputs).numpy() for i in range(EXAMPLES)]
    np.testing.assert_allclose(logits, np.concatenate(singly, axis=1), rtol=0, atol=1e-5)
    assert np.ptp(logits, axis=(0, 1)).min() > 0.1


def test_float64_stays_float64(tiny_models: dict[str, Path]):
    folder = tiny_models["bert"]
    model, data = build(folder, MEMBERS, "float64"), examples(folder)
    logits = predict_logits(model, data)
    assert logits.dtype == np.float64
    cut = predict_logits(model, data, tokens_per_pass=100)
    np.testing.assert_allclose(logits, cut, rtol=0, atol=1e-12)


def test_a_member_among_many_is_the_member_alone(tiny_models: dict[str, Path]):
    folder = tiny_models["bert"]
    model, data = build(folder, MEMBERS, "float64"), examples(folder)
    together = predict_logits(model, data)
    state = {name: p.detach().clone() for name, p in model.chain_parameters().items()}
    for k in range(MEMBERS):
        model.load_chains({name: tensor[k : k + 1] for name, tensor in state.items()})
        alone = predict_logits(model, data)
        assert alone.shape == (1, EXAMPLES, 2)
        np.testing.assert_allclose(alone[0], together[k], rtol=0, atol=1e-12)


def test_progress_and_no_gradients(tiny_models: dict[str, Path]):
    folder = tiny_models["bert"]
    model, data = build(folder, MEMBERS, "float32"), examples(folder)
    done: list[int] = []
    predict_logits(model, data, on_done=done.append, tokens_per_pass=200)
    assert sum(done) == MEMBERS * EXAMPLES
    assert len(done) > 3
    assert all(p.grad is None for p in model.parameters())


def test_the_token_budget_is_over_all_members(tiny_models: dict[str, Path]):
    folder = tiny_models["bert"]
    model, data = build(folder, MEMBERS, "float32"), examples(folder)
    sizes: list[int] = []

    def measure(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(MEMBERS * kwargs["input_ids"].numel())

    handle = model.register_forward_pre_hook(measure, with_kwargs=True)
    predict_logits(model, data, tokens_per_pass=300)
    handle.remove()
    assert max(sizes) <= 300


def test_predictions_know_their_sizes():
    predictions = Predictions(
        np.zeros((4, 7, 2)), np.zeros(7, np.int64), np.full(4, 0.25), np.arange(7)
    )
    assert len(predictions) == 7
    assert predictions.num_members == 4


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_members_merged_into_the_weights_are_the_members(
    tiny_models: dict[str, Path], family: str, flat: bool, monkeypatch: pytest.MonkeyPatch
):
    folder = tiny_models[family]
    model, data = build(folder, MEMBERS, "float64"), examples(folder)
    model.flat = flat
    found = {}
    for merged in (True, False):
        monkeypatch.setattr(predict, "merging_pays", lambda *_, answer=merged: answer)
        found[merged] = predict_logits(model, data, tokens_per_pass=150)
    assert found[True].shape == (MEMBERS, EXAMPLES, 2)
    np.testing.assert_allclose(found[True], found[False], rtol=0, atol=1e-10)
    assert np.ptp(found[True], axis=0).min() > 0.01


def test_a_member_is_on_alone_and_only_for_a_while(tiny_models: dict[str, Path]):
    folder = tiny_models["bert"]
    model, data = build(folder, MEMBERS, "float64"), examples(folder)
    inputs = data.batch(np.arange(4)).inputs
    with torch.no_grad():
        before = model(**inputs)
        with model.member(2):
            alone = model(**inputs)
            assert model.num_chains == 1
        with pytest.raises(KeyError), model.member(1):
            raise KeyError
        torch.testing.assert_close(alone, before[2:], rtol=0, atol=1e-10)
        assert torch.equal(model(**inputs), before)
    assert model.num_chains == MEMBERS


def test_merging_is_for_enough_tokens_and_never_under_dropout(tiny_models: dict[str, Path]):
    folder = tiny_models["bert"]
    model, few = build(folder, MEMBERS, "float32"), examples(folder)
    many = TokenisedSet(generate("train", size=300), AutoTokenizer.from_pretrained(folder), 64)
    assert few.lengths.sum() < predict.MERGE_FROM["cpu"] < many.lengths.sum()
    assert not predict.merging_pays(model, few)
    assert predict.merging_pays(model, many)
    model.lora_dropout([torch.Generator() for _ in range(MEMBERS)])
    assert not predict.merging_pays(model, many)


def test_merged_bfloat16_is_near(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    folder = tiny_models["bert"]
    data = examples(folder)
    exact, half = (build(folder, MEMBERS, d) for d in ("float32", "bfloat16"))
    monkeypatch.setattr(predict, "merging_pays", lambda *_: True)
    difference = predict_logits(half, data) - predict_logits(exact, data)
    assert 1e-4 < np.abs(difference).max() < 0.2
