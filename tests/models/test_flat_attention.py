"""The flat forward pass against the plain padded one of HuggingFace, values and gradients.

Shapes: M chains, B examples, L tokens, C classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from bayesian_lora.models.flat import CURRENT
from bayesian_lora.models.flat_attention import family_of
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model

FAMILIES = ("bert", "roberta", "distilbert")
PAD = {"bert": 0, "roberta": 1, "distilbert": 0}
BERT_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "dense")
TARGETS = {
    "bert": BERT_TARGETS,
    "roberta": BERT_TARGETS,
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
}
CASES = [
    (family, target)
    for family in FAMILIES
    for target in (*[[t] for t in TARGETS[family]], list(TARGETS[family]))
]
LENGTHS = {
    "ragged": [[9, 2, 31, 4, 9], [3, 5, 40, 4, 2], [12, 12, 2, 2, 11]],
    "equal": [[9] * 5] * 3,
    "length 2": [[2] * 5] * 3,
    "one long": [[2, 2, 2, 2, 60], [3] * 5, [60] * 5],
}


def build(path: Path, chains: int, dtype: Any, targets: list[str]) -> HuggingFaceLora:
    model = build_huggingface_lora_model(
        str(path), 3, rank=2, target_modules=targets, chains=chains, dtype=dtype
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.chain_parameters().values():
            p.normal_(0, 0.1, generator=generator)
    return model


def batch(family: str, lengths: list[list[int]], types: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    own = torch.tensor(lengths)
    columns = torch.arange(int(own.max()))
    mask = (columns < own[..., None]).long()
    ids = torch.randint(5, 190, mask.shape, generator=generator)
    inputs = {"input_ids": ids * mask + PAD[family] * (1 - mask), "attention_mask": mask}
    if types:
        inputs["token_type_ids"] = (columns >= own[..., None] // 2).long() * mask
    return inputs


def run(model: HuggingFaceLora, inputs: dict[str, Tensor], flat: bool) -> dict[str, Tensor]:
    """Logits and every gradient, on flat or on padded batches."""
    model.flat = flat
    model.zero_grad()
    logits = model(**inputs)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights).sum().backward()
    found = {n: p.grad for n, p in model.chain_parameters().items() if p.grad is not None}
    assert found.keys() == model.chain_parameters().keys()
    return {"logits": logits.detach(), **found}


def assert_same(model: HuggingFaceLora, inputs: dict[str, Tensor], tolerance: float) -> None:
    fast, plain = (run(model, inputs, flat) for flat in (True, False))
    for name, value in plain.items():
        assert value.abs().max() > 1e-6, f"{name} tells nothing"
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(fast[name], value, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize(("family", "targets"), CASES)
def test_equal_to_the_padded_forward(
    tiny_models: dict[str, Path], family: str, targets: list[str], chains: int
) -> None:
    model = build(tiny_models[family], chains, "float64", targets)
    assert_same(model, batch(family, LENGTHS["ragged"][:chains]), 1e-10)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_the_lengths(
    tiny_models: dict[str, Path], family: str, chains: int, lengths: str
) -> None:
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-5)):
        model = build(tiny_models[family], chains, dtype, list(TARGETS[family][:3]))
        assert_same(model, batch(family, LENGTHS[lengths][:chains]), tolerance)


def test_pairs_with_token_types(tiny_models: dict[str, Path]) -> None:
    model = build(tiny_models["bert"], 3, "float64", ["query"])
    inputs = batch("bert", LENGTHS["ragged"], types=True)
    assert_same(model, inputs, 1e-10)
    without = {name: x for name, x in inputs.items() if name != "token_type_ids"}
    assert (model(**inputs) - model(**without)).abs().max() > 1e-3


def test_a_padding_token_within_a_text(tiny_models: dict[str, Path]) -> None:
    """RoBERTa gives it the padding's position and does not count it."""
    model = build(tiny_models["roberta"], 1, "float64", ["query"])
    inputs = batch("roberta", [[9, 2, 12, 5, 7]])
    inputs["input_ids"][0, 2, 4] = PAD["roberta"]
    assert_same(model, inputs, 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_tokens_pass_the_layers(tiny_models: dict[str, Path], family: str) -> None:
    model = build(tiny_models[family], 3, "float32", [TARGETS[family][0]])
    rows: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda _m, args, _o: rows.__setitem__(name, args[0].shape[:-1].numel())

    for name, module in model.base.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count(name))
    model(**batch(family, LENGTHS["ragged"]))
    tokens = int(np.sum(LENGTHS["ragged"]))
    first = {count for name, count in rows.items() if "layer.0." in name}
    last = {count for name, count in rows.items() if "layer.1." in name}
    assert first == {tokens}
    assert last == {tokens, 15}
    whole = [n for n, c in rows.items() if "layer.1." in n and c == tokens]
    assert len(whole) == 2, "keys and values"


def test_masks_of_other_kinds_take_the_padded_forward(tiny_models: dict[str, Path]) -> None:
    model = build(tiny_models["bert"], 2, "float64", ["query"])
    inputs = batch("bert", [[4, 4], [4, 4]])
    inputs["attention_mask"][0, 1, 0] = 0
    fast, plain = (run(model, inputs, flat) for flat in (True, False))
    assert torch.equal(fast["logits"], plain["logits"])


def test_an_error_leaves_the_model_as_it_was(tiny_models: dict[str, Path]) -> None:
    model = build(tiny_models["bert"], 1, "float64", ["query"])
    before = model.base.config._attn_implementation  # type: ignore[union-attr]
    inputs = batch("bert", [[4, 5]])
    expected = model(**inputs)
    with pytest.raises(IndexError):
        model(**(inputs | {"input_ids": inputs["input_ids"] + 10**6}))
    assert model.base.config._attn_implementation == before  # type: ignore[union-attr]
    assert CURRENT.get() is None
    assert torch.equal(model(**inputs), expected)


def test_unknown_models_run_padded() -> None:
    widths: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    known = transformers.BertConfig(vocab_size=50, intermediate_size=32, **widths)
    assert family_of(transformers.BertForSequenceClassification(known)) is not None
    chunked = transformers.BertConfig(
        vocab_size=50, intermediate_size=32, chunk_size_feed_forward=2, **widths
    )
    assert family_of(transformers.BertForSequenceClassification(chunked)) is None
    other = transformers.ElectraConfig(vocab_size=50, intermediate_size=32, **widths)
    assert family_of(transformers.ElectraForSequenceClassification(other)) is None
    assert family_of(nn.Linear(2, 2)) is None


def test_a_chain_that_is_not_finite_leaves_the_others_alone(tiny_models: dict[str, Path]) -> None:
    model = build(tiny_models["bert"], 3, "float64", ["query", "value"])
    expected = run(model, batch("bert", LENGTHS["ragged"]), flat=True)
    with torch.no_grad():
        for layer in model.lora_layers().values():
            layer.lora_B[1] = float("nan")
    logits = model(**batch("bert", LENGTHS["ragged"]))
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2]], expected["logits"][[0, 2]])
