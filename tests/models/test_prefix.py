"""The frozen layers below the first adapter: computed once a text, with nothing changed by it.

Shapes: M chains, B examples, L tokens, C classes.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model

TOPS = {
    "bert": ("layer.1.attention.self.query", "layer.1.attention.self.value"),
    "roberta": ("layer.1.attention.self.value", "layer.1.attention.output.dense"),
    "distilbert": ("layer.1.attention.q_lin", "layer.1.ffn.lin1"),
}
M, LENGTHS = 3, torch.tensor([[5, 9, 2], [9, 4, 7], [3, 3, 8]])


def model_of(name: str, path: Path, targets: tuple[str, ...] | None = None) -> HuggingFaceLora:
    """With random factors, so that the adapters act."""
    model = build_huggingface_lora_model(
        str(path), 2, rank=2, chains=M, target_modules=targets or TOPS[name], dtype="float64"
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.chain_parameters().values():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model


def batch(seed: int = 0, lengths: Tensor = LENGTHS) -> tuple[Tensor, Tensor]:
    """Ids and mask (M, B, L) of texts of these lengths; 1 pads, as RoBERTa wants it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 30, (*lengths.shape, 9), generator=generator)
    mask = (torch.arange(9) < lengths[..., None]).long()
    return torch.where(mask == 1, ids, 1), mask


def outcome(model: HuggingFaceLora, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits and gradients."""
    for parameter in model.chain_parameters().values():
        parameter.grad = None
    logits = model(ids, mask)
    logits.square().sum().backward()
    grads = [p.grad for p in model.chain_parameters().values()]
    assert all(g is not None for g in grads)
    return [logits.detach(), *(g.clone() for g in grads if g is not None)]


@pytest.mark.parametrize("name", TOPS)
def test_logits_and_gradients_are_those_of_the_whole_network(
    name: str, tiny_models: dict[str, Path]
) -> None:
    model = model_of(name, tiny_models[name])
    prefix = model.prefix
    assert prefix is not None
    first, again = outcome(model, *batch()), outcome(model, *batch())
    assert len(prefix.kept) == 9
    model.prefix = None
    for found, same, whole in zip(first, again, outcome(model, *batch()), strict=True):
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
        assert torch.equal(found, same)


def test_a_kept_text_is_not_computed_again(tiny_models: dict[str, Path]) -> None:
    model = model_of("bert", tiny_models["bert"])
    calls: list[int] = []
    lowest = model.base.get_submodule("bert.encoder.layer.0")
    lowest.register_forward_hook(lambda *_: calls.append(1))
    ids, mask = batch()
    model(ids, mask)
    assert len(calls) == 9
    model(ids.flip(1), mask.flip(1))
    model(ids[:, :1], mask[:, :1])
    assert len(calls) == 9


def test_what_is_kept_depends_on_no_other_text(tiny_models: dict[str, Path]) -> None:
    """To the last bit, so that a run that goes on finds the same numbers."""
    together, single = (model_of("bert", tiny_models["bert"]) for _ in range(2))
    ids, mask = batch()
    together(ids, mask)
    for b in (2, 0, 1):
        single(ids[:, b : b + 1], mask[:, b : b + 1])
    assert together.prefix is not None
    assert single.prefix is not None
    assert together.prefix.kept.keys() == single.prefix.kept.keys()
    for key, hidden in together.prefix.kept.items():
        assert torch.equal(hidden, single.prefix.kept[key])


def test_texts_met_in_inference_can_be_trained_on(tiny_models: dict[str, Path]) -> None:
    model = model_of("bert", tiny_models["bert"])
    with torch.inference_mode():
        predicted = model(*batch())
    torch.testing.assert_close(outcome(model, *batch())[0], predicted, rtol=0, atol=1e-12)


def test_members_alone_and_no_adapters_begin_at_it_too(tiny_models: dict[str, Path]) -> None:
    model = model_of("bert", tiny_models["bert"])
    ids, mask = batch()
    whole = model(ids[0], mask[0])
    with torch.inference_mode(), model.member(1):
        torch.testing.assert_close(model(ids[0], mask[0])[0], whole[1], rtol=0, atol=1e-12)
    with torch.inference_mode(), model.without_adapters():
        bare, model.prefix = model(ids[0], mask[0]), None
        torch.testing.assert_close(bare, model(ids[0], mask[0]), rtol=0, atol=1e-12)


def test_memory_has_a_limit_and_results_do_not_depend_on_it(tiny_models: dict[str, Path]) -> None:
    model = model_of("bert", tiny_models["bert"])
    prefix = model.prefix
    assert prefix is not None
    expected = outcome(model, *batch())
    size = max(x.nbytes for x in prefix.kept.values())
    prefix.kept, prefix.bytes, prefix.limit = {}, 0, 2 * size
    found = outcome(model, *batch())
    assert 0 < prefix.bytes == sum(x.nbytes for x in prefix.kept.values()) <= 2 * size
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_adapters_from_the_first_layer_on_have_no_prefix(tiny_models: dict[str, Path]) -> None:
    assert model_of("bert", tiny_models["bert"], ("query",)).prefix is None


def test_types_tell_texts_apart(tiny_models: dict[str, Path]) -> None:
    model = model_of("bert", tiny_models["bert"])
    ids, mask = batch()
    plain, typed = (model(ids, mask, torch.full_like(ids, kind)) for kind in (0, 1))
    assert (plain - typed).abs().max() > 1e-6
    assert model.prefix is not None
    assert len(model.prefix.kept) == 18
