"""Chains are a leading dimension: chain m of M computes what it computes alone.

Shapes: M chains, K members, B examples of each chain, L tokens, R rank, C classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesian_lora.models.chain_dropout import ChainDropout
from bayesian_lora.models.chain_lora import ChainLinear, ChainLora, ChainModel
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model
from bayesian_lora.utils.rng import chain_generators

PAD = {"bert": 0, "roberta": 1, "distilbert": 0}
# Lengths of the texts of three chains: the second chain's batch is much the shortest.
LENGTHS = ([9, 4, 7], [3, 5, 4], [12, 12, 2])
TARGETS = {
    "bert": ["query", "value", "dense"],  # the pooler has no token dimension
    "roberta": ["query", "key", "output.dense"],
    "distilbert": ["q_lin", "v_lin", "ffn.lin1"],
}


def filled(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(path: Path, family: str, chains: int, dropout: float = 0.0) -> HuggingFaceLora:
    model = build_huggingface_lora_model(
        str(path),
        3,
        rank=2,
        dropout=dropout,
        target_modules=TARGETS[family],
        chains=chains,
        dtype="float64",
    )
    state = {
        n: 0.3 * filled(p.shape, i) for i, (n, p) in enumerate(model.chain_parameters().items())
    }
    model.load_chains(state)
    return model


def padded(rows: list[Tensor], length: int, pad: int) -> dict[str, Tensor]:
    ids = torch.stack([F.pad(row, (0, length - len(row)), value=pad) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (0, length - len(row))) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def chain_batches(pad: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Each chain's batch padded to its own longest text, and all in one (M, B, L) batch."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        [torch.randint(5, 190, (length,), generator=generator) for length in lengths]
        for lengths in LENGTHS
    ]
    own = [padded(rows, max(lengths), pad) for rows, lengths in zip(texts, LENGTHS, strict=True)]
    longest = max(map(max, LENGTHS))
    together = [padded(rows, longest, pad) for rows in texts]
    return own, {name: torch.stack([b[name] for b in together]) for name in together[0]}


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_chain_among_others_is_the_chain_alone(
    tiny_models: dict[str, Path], family: str, dropout: float, flat: bool
) -> None:
    own, together = chain_batches(PAD[family])
    model = build(tiny_models[family], family, 3, dropout)
    assert model.flat
    model.flat = flat
    weights = filled((3, 3), 99)
    if dropout:
        model.lora_dropout(chain_generators(5, range(3), "dropout"))
    logits = [model(**together), model(**together)]  # twice: the streams must stay in step
    (sum(logits) * weights).sum().backward()

    for m in range(3):
        alone = build(tiny_models[family], family, 1, dropout)
        alone.flat = flat
        alone.load_chains({n: p[m : m + 1].detach() for n, p in model.chain_parameters().items()})
        if dropout:
            alone.lora_dropout(chain_generators(5, [m], "dropout"))
        single = [alone(**own[m]), alone(**own[m])]
        (sum(single) * weights).sum().backward()
        for many, one in zip(logits, single, strict=True):
            torch.testing.assert_close(many[m], one[0], atol=1e-10, rtol=0)
        for name, parameter in alone.chain_parameters().items():
            grad = model.chain_parameters()[name].grad
            assert grad is not None
            assert parameter.grad is not None
            assert parameter.grad.any()
            torch.testing.assert_close(grad[m], parameter.grad[0], atol=1e-10, rtol=1e-10)
    assert torch.equal(logits[0], logits[1]) == (dropout == 0)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_shared_batch_is_each_chain_s_batch(tiny_models: dict[str, Path], family: str) -> None:
    own, _ = chain_batches(PAD[family])
    model = build(tiny_models[family], family, 4)
    types = torch.zeros_like(own[0]["input_ids"])
    types[:, 2:] = 1
    batch = {**own[0], "token_type_ids": types} if family != "roberta" else own[0]
    each = {name: tensor.expand(4, *tensor.shape) for name, tensor in batch.items()}
    shared = model(**batch)
    assert shared.shape == (4, 3, 3)
    torch.testing.assert_close(shared, model(**each), atol=1e-12, rtol=0)
    assert (shared[0] - shared[1]).abs().max() > 0.01


def test_token_types_reach_the_models_that_have_them(tiny_models: dict[str, Path]) -> None:
    own, _ = chain_batches(0)
    ones = torch.ones_like(own[0]["input_ids"])
    for family, matters in (("bert", True), ("distilbert", False)):
        model = build(tiny_models[family], family, 2)
        plain = model(**own[0], token_type_ids=torch.zeros_like(ones))
        assert torch.equal(plain, model(**own[0]))
        assert torch.equal(plain, model(**own[0], token_type_ids=ones)) != matters


def test_members_of_another_number_go_into_the_chain_dimension(
    tiny_models: dict[str, Path],
) -> None:
    own, _ = chain_batches(0)
    model = build(tiny_models["bert"], "bert", 2)
    logits = model(**own[0]).detach()
    state = {n: p.detach()[[1, 0, 1, 1, 0]].float() for n, p in model.chain_parameters().items()}

    model.load_chains(state)

    assert model.num_chains == 5
    assert all(
        p.dtype == torch.float64 and p.requires_grad for p in model.chain_parameters().values()
    )
    torch.testing.assert_close(model(**own[0]), logits[[1, 0, 1, 1, 0]], atol=1e-5, rtol=0)
    own = {n: p.detach().clone() for n, p in model.chain_parameters().items()}
    model.load_chains(own)
    own["classifier.bias"].zero_()
    assert model.chain_parameters()["classifier.bias"].any(), "the model must own its tensors"


def test_a_base_in_training_mode_is_put_into_eval_mode() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

    base = Base().train()
    ChainModel(base)
    assert not base.training
    assert not base.dropout.training


def missing(state: dict[str, Tensor]) -> None:
    del state["classifier.bias"]


def unknown(state: dict[str, Tensor]) -> None:
    state["classifier.scale"] = torch.zeros(2, 3)


def other_shape(state: dict[str, Tensor]) -> None:
    state["classifier.bias"] = torch.zeros(2, 4)


def other_chains(state: dict[str, Tensor]) -> None:
    state["classifier.bias"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"missing or not part of the model: \['classifier\.bias'\]"),
        (unknown, r"missing or not part of the model: \['classifier\.scale'\]"),
        (other_shape, r"classifier\.bias: shape \(4,\), the model has \(3,\)"),
        (other_chains, r"chain\) dimensions must agree, found \[2, 3\]"),
    ],
)
def test_members_that_do_not_fit_are_refused_whole(
    tiny_models: dict[str, Path], change, message: str
) -> None:
    model = build(tiny_models["bert"], "bert", 2)
    before = {n: p.detach().clone() for n, p in model.chain_parameters().items()}
    state = {n: torch.zeros_like(p) for n, p in before.items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        model.load_chains(state)
    after = model.chain_parameters()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("tokens", [(), (5,)])
def test_chain_lora_is_its_formula(tokens: tuple[int, ...]) -> None:
    base = nn.Linear(6, 4).double()
    layer = ChainLora(base, chains=3, rank=2, scaling=1.7, dropout=0.5)
    layer.lora_A.data, layer.lora_B.data = filled((3, 2, 6), 0), filled((3, 4, 2), 1)
    x = filled((3 * 2, *tokens, 6), 2)
    out = layer(x)
    assert out.shape == (6, *tokens, 4)
    for m in range(3):
        rows = x[2 * m : 2 * m + 2]
        delta = layer.lora_B[m] @ layer.lora_A[m]
        expected = rows @ (base.weight + 1.7 * delta).mT + base.bias
        torch.testing.assert_close(out[2 * m : 2 * m + 2], expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(), (5,)])
def test_chain_linear_is_its_formula(tokens: tuple[int, ...], bias: bool) -> None:
    base = nn.Linear(6, 4, bias=bias).double()
    layer = ChainLinear(base, chains=3)
    torch.testing.assert_close(layer.weight, base.weight.expand(3, -1, -1))
    with torch.no_grad():
        layer.weight.add_(filled((3, 4, 6), 0))
        if layer.bias is not None:
            layer.bias.add_(filled((3, 4), 1))
    assert (layer.bias is not None) == bias
    x = filled((3 * 2, *tokens, 6), 2)
    out = layer(x)
    assert out.shape == (6, *tokens, 4)
    for m in range(3):
        own_bias = None if layer.bias is None else layer.bias[m]
        expected = F.linear(x[2 * m : 2 * m + 2], layer.weight[m], own_bias)
        torch.testing.assert_close(out[2 * m : 2 * m + 2], expected)


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    dropout = ChainDropout(0.25)
    x, rows = torch.ones(500, 100), [200, 300]
    assert dropout(x, rows) is x, "it acts only where generators are given"
    dropout.generators = chain_generators(0, range(2), "dropout")
    out = dropout(x, rows)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    for part in out.split(rows):  # 20,000 draws and more: five standard errors
        assert (part == 0).double().mean().item() == pytest.approx(0.25, abs=0.015)
    assert (out[:200] != out[200:400]).any()
    assert (dropout(x, rows) != out).any()
    dropout.p = 0.0
    assert dropout(x, rows) is x


def tokens_of(lengths: list[list[int]]) -> np.ndarray:
    """(M, B, L): where a batch padded to its longest text has tokens."""
    own = np.array(lengths)
    return np.arange(own.max()) < own[..., None]


@pytest.mark.parametrize("lengths", [[[5, 8, 2], [8, 8, 8]], [[1, 1, 1], [8, 1, 1]]])
def test_a_chain_draws_for_its_own_tokens_only(lengths: list[list[int]]) -> None:
    """So padding on the right, which other chains' texts decide on, changes no draw."""
    x = torch.ones(2 * 3 * 8, 4)
    dropout = ChainDropout(0.5)
    dropout.generators = chain_generators(0, range(2), "dropout")
    dropout.present = tokens_of(lengths)
    first = dropout(x, [24, 24])
    alone = ChainDropout(0.5)
    alone.generators = chain_generators(0, [0], "dropout")
    present = torch.arange(8) < torch.tensor(lengths[0])[:, None]
    assert torch.equal(
        first[:24][present.flatten()], alone(x[: sum(lengths[0])], [sum(lengths[0])])
    )
    assert not first[:24][~present.flatten()].any()
    assert torch.equal(dropout.generators[0].get_state(), alone.generators[0].get_state())


def test_dropout_of_a_layer_without_tokens_draws_for_every_row() -> None:
    dropout = ChainDropout(0.5)
    dropout.generators = chain_generators(0, range(2), "dropout")
    dropout.present = tokens_of([[3, 1], [2, 2]])
    out = dropout(torch.ones(4, 50), [2, 2])
    assert (out == 2).any(1).all()


def test_tokens_of_a_pass_follow_the_bytes_of_a_number(tiny_models: dict[str, Path]) -> None:
    path = str(tiny_models["bert"])
    single, half = (build_huggingface_lora_model(path, 2, dtype=d) for d in ("float32", "bfloat16"))
    assert 2 * single.tokens_per_pass == half.tokens_per_pass
    single.flat = False
    assert single.tokens_per_pass > half.tokens_per_pass
