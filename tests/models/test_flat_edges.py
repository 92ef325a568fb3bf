"""Flat passes at their edges, against HuggingFace's own forward pass and plain autograd.

Shapes: M chains, B examples, L tokens, R rank.
"""

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from bayesian_lora import predict
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.synthetic import generate
from bayesian_lora.models import flat
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model
from bayesian_lora.predict import predict_logits

PAD = {"bert": 0, "roberta": 1, "distilbert": 0}
_BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
ALL = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}
# One token, as many as the model takes, and lengths that no two chains share.
LENGTHS = [[9, 1, 31, 4, 64], [3, 5, 40, 1, 2], [12, 12, 2, 2, 11]]


def build(
    path: Path, dtype: Any, targets: list[str], chains: int = 3, **options: Any
) -> HuggingFaceLora:
    model = build_huggingface_lora_model(
        str(path), 3, target_modules=targets, chains=chains, dtype=dtype, **options
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.chain_parameters().values():
            p.normal_(0, 0.05, generator=generator)
    return model


def batch(family: str, lengths: list[list[int]]) -> dict[str, Tensor]:
    own = torch.tensor(lengths)
    columns = torch.arange(int(own.max()))
    mask = (columns < own[..., None]).long()
    ids = torch.randint(5, 190, mask.shape, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids * mask + PAD[family] * (1 - mask), "attention_mask": mask}
    if family == "bert":
        inputs["token_type_ids"] = (columns >= own[..., None] // 2).long() * mask
    return inputs


class PlainLora(nn.Module):
    """y = W x + b + s·B A x by autograd, of one chain."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.lora_A, self.lora_B = (
            nn.Parameter(a.detach().clone()),
            nn.Parameter(b.detach().clone()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * ((x @ self.lora_A.T) @ self.lora_B.T)


def plain_network(path: Path, model: HuggingFaceLora, m: int, dtype: torch.dtype) -> Any:
    """Chain m as a network that shares no code with the model's."""
    network: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=3, attn_implementation="eager"
    )
    network.to(dtype).eval().requires_grad_(False)
    for name, layer in model.lora_layers().items():
        own = network.get_submodule(name)
        twin = PlainLora(own, layer.lora_A[m], layer.lora_B[m], layer.scaling)
        network.set_submodule(name, twin)
    for name, layer in model.head_layers().items():
        own = network.get_submodule(name)
        assert layer.bias is not None
        own.weight = nn.Parameter(layer.weight[m].detach().clone())
        own.bias = nn.Parameter(layer.bias[m].detach().clone())
    return network


@pytest.mark.parametrize(("rank", "rslora"), [(1, False), (8, True)])
@pytest.mark.parametrize("family", list(PAD))
def test_huggingface_s_own_forward_and_gradients(
    tiny_models: dict[str, Path], family: str, rank: int, rslora: bool
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        name = str(dtype).removeprefix("torch.")
        model = build(tiny_models[family], name, ALL[family], rank=rank, rslora=rslora)
        inputs = batch(family, LENGTHS)
        logits = model(**inputs)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=dtype).view_as(logits)
        (logits * weights).sum().backward()
        for m in range(3):
            network = plain_network(tiny_models[family], model, m, dtype)
            expected = network(**{n: x[m] for n, x in inputs.items()}).logits
            (expected * weights[m]).sum().backward()
            torch.testing.assert_close(logits[m], expected, rtol=0, atol=tolerance)
            twins = dict(network.named_parameters())
            for name, parameter in model.chain_parameters().items():
                grad, twin = parameter.grad, twins[name].grad
                assert grad is not None
                assert twin is not None
                assert twin.abs().max() > 1e-6, f"{name} tells nothing"
                scale = max(1.0, twin.abs().max().item())
                torch.testing.assert_close(grad[m], twin, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("cost", [0.0, 1e9])
def test_the_groups_change_nothing(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, cost: float
) -> None:
    model = build(tiny_models["bert"], "float64", ALL["bert"])
    inputs = batch("bert", LENGTHS)

    def run() -> list[Tensor]:
        model.zero_grad()
        logits = model(**inputs)
        logits.pow(3).sum().backward()
        grads = [p.grad for p in model.chain_parameters().values() if p.grad is not None]
        return [logits.detach(), *grads]

    expected = run()
    monkeypatch.setattr(flat, "GROUP_COST", {"cpu": cost})
    different = np.unique(LENGTHS).size
    groups = flat.Flat(np.array(LENGTHS), torch.device("cpu")).groups
    assert len(groups) == (1 if cost else different)
    for found, value in zip(run(), expected, strict=True):
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(found, value, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("family", list(PAD))
def test_an_encoder_of_one_layer(tiny_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Its only layer is the last one, whose rows are the first tokens alone."""
    config = transformers.AutoConfig.from_pretrained(tiny_models[family])
    config.update({"n_layers" if family == "distilbert" else "num_hidden_layers": 1})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    model = build(tmp_path, "float64", ALL[family][:3])
    inputs = batch(family, LENGTHS)
    logits = model(**inputs)
    model.flat = False
    torch.testing.assert_close(logits, model(**inputs), rtol=0, atol=1e-10)


def test_two_passes_and_two_backward_passes(tiny_models: dict[str, Path]) -> None:
    model = build(tiny_models["bert"], "float64", ["query", "value"])
    parameters = list(model.chain_parameters().values())
    first = model(**batch("bert", LENGTHS)).pow(2).sum()
    second = model(**batch("bert", [[2, 2], [30, 1], [7, 7]])).pow(2).sum()
    both = torch.autograd.grad(first + second, parameters, retain_graph=True)
    parts = [torch.autograd.grad(x, parameters, retain_graph=True) for x in (first, second)]
    again = torch.autograd.grad(first + second, parameters)
    for whole, a, b, same in zip(both, *parts, again, strict=True):
        assert torch.equal(whole, same)
        torch.testing.assert_close(whole, a + b, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_refused(tiny_models: dict[str, Path]) -> None:
    """The update's backward pass has none: a wrong curvature would pass for a right one."""
    targets = ["encoder.layer.0.attention.self.value"]
    model = build(tiny_models["bert"], "float64", targets, chains=1)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(
            model(**batch("bert", LENGTHS[:1])).pow(3).sum(),
            list(model.chain_parameters().values()),
            create_graph=True,
        )


def test_copies_are_models_of_their_own(tiny_models: dict[str, Path]) -> None:
    model, inputs = build(tiny_models["bert"], "float64", ["query"]), batch("bert", LENGTHS)
    expected = model(**inputs).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs), expected)
        with torch.no_grad():
            next(iter(other.chain_parameters().values())).add_(1)
        assert not torch.equal(other(**inputs), expected)
        other(**inputs).sum().backward()
    assert torch.equal(model(**inputs), expected)
    assert all(p.grad is None for p in model.chain_parameters().values())


@pytest.mark.slow
def test_a_model_unpickled_in_another_process(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model, inputs = build(tiny_models["bert"], "float64", ["query"]), batch("bert", LENGTHS)
    (tmp_path / "model").write_bytes(pickle.dumps((model, inputs, model(**inputs).detach())))
    code = (
        "import pathlib, pickle, sys, torch\n"
        "m, x, y = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "torch.testing.assert_close(m(**x), y, rtol=0, atol=1e-10)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-500:]


def test_a_second_model_around_the_same_network(tiny_models: dict[str, Path]) -> None:
    model, inputs = build(tiny_models["bert"], "float64", ["query"]), batch("bert", LENGTHS)
    expected = model(**inputs)
    assert torch.equal(ChainModel(model.base)(**inputs), expected)


def test_threads_take_turns(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny_models["bert"], "float32", ["query", "value"], chains=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_models["bert"])
    data = TokenisedSet(generate("train", size=60), tokenizer, 64)
    monkeypatch.setattr(predict, "merging_pays", lambda *_: True)
    expected = predict_logits(model, data)
    inputs = data.batch(np.arange(8)).inputs
    beside = model(**inputs).detach()
    wrong: list[Any] = []

    def work(merged: bool) -> None:
        try:
            for _ in range(6):
                if merged:
                    np.testing.assert_allclose(predict_logits(model, data), expected, atol=1e-5)
                else:
                    torch.testing.assert_close(model(**inputs), beside, rtol=0, atol=1e-5)
        except BaseException as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i < 2,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, wrong[0]
    model.flat = False
    torch.testing.assert_close(model(**inputs), beside, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", list(PAD))
def test_stored_bfloat16_on_padded_batches(
    tiny_models: dict[str, Path], family: str, implementation: str
) -> None:
    inputs = batch(family, LENGTHS)
    inputs["attention_mask"][0, 0, 2] = 0
    half, exact = (build(tiny_models[family], d, ALL[family]) for d in ("bfloat16", "float32"))
    half.base.config._attn_implementation = implementation  # type: ignore[union-attr]
    logits = half(**inputs)
    logits.sum().backward()
    assert 1e-5 < (logits - exact(**inputs)).abs().max() < 0.1
    for parameter in half.chain_parameters().values():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_a_caller_s_autocast_changes_no_precision(tiny_models: dict[str, Path]) -> None:
    model, inputs = build(tiny_models["bert"], "float32", ["query"]), batch("bert", LENGTHS)
    expected = model(**inputs)
    for flat_pass in (True, False):
        model.flat = flat_pass
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-5)


def test_dropout_after_a_padded_pass(tiny_models: dict[str, Path]) -> None:
    model = build(tiny_models["bert"], "float64", ["query"], dropout=0.5)
    inputs, other = batch("bert", LENGTHS), batch("bert", [[9, 7], [8, 8], [3, 9]])
    other["attention_mask"][0, 0, 3] = 0

    def drop() -> None:
        model.lora_dropout([torch.Generator().manual_seed(m) for m in range(3)])

    drop()
    expected = model(**inputs)
    model(**other)
    drop()
    assert torch.equal(model(**inputs), expected)


def test_dropout_around_a_hole_takes_no_token_for_padding(tiny_models: dict[str, Path]) -> None:
    model = build(tiny_models["bert"], "float64", ["query", "value"], dropout=1e-12)
    inputs = batch("bert", [[9, 7], [8, 8], [3, 9]])
    inputs["attention_mask"][:, :, 1] = 0
    plain = model(**inputs)
    model.lora_dropout([torch.Generator().manual_seed(m) for m in range(3)])
    torch.testing.assert_close(model(**inputs), plain, rtol=0, atol=1e-9)
