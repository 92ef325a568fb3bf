"""Members are ordinary PEFT adapters: PEFT computes the same from ours, and we from PEFT's.

Shapes: M chains, K members, B examples, C classes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model
from bayesian_lora.models.peft_io import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    read_member,
    read_spec,
    write_member,
)
from bayesian_lora.utils.lora_params import split, stack

FAMILIES = ("bert", "roberta", "distilbert")
TEXTS = [
    "The breakfast was perhaps very good.",
    "Dreadful, although the rooms at the hotel were not remotely unpleasant.",
    "The plot seemed decent.",
]
HEADS = {"distilbert": ["pre_classifier", "classifier"]}
TARGETS = {"distilbert": ["q_lin", "v_lin"]}


def encode(path: Path) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


def peft_inputs(path: Path, family: str) -> dict[str, Tensor]:
    wanted = ("input_ids", "attention_mask", *(["token_type_ids"] if family == "bert" else []))
    return {name: tensor for name, tensor in encode(path).items() if name in wanted}


def randomise(model: HuggingFaceLora, seed: int = 1) -> None:
    """Non-zero factors, so that the adapter matters, and head biases, so that they are stored."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.chain_parameters().values():
            parameter.normal_(0.0, 0.3, generator=generator)


def sequence_classifier(path: Path, num_labels: int) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=num_labels)


def write_all(model: HuggingFaceLora, root: Path) -> list[Path]:
    text = adapter_config(model.info.spec)
    folders = [root / f"member_{m}" for m in range(model.num_chains)]
    for folder, member in zip(folders, split(model.chain_parameters()), strict=True):
        write_member(folder, member, text)
    return folders


def assert_peft_agrees(
    model: HuggingFaceLora, path: Path, family: str, num_labels: int, root: Path
) -> None:
    randomise(model)
    with torch.no_grad():
        ours = model(**encode(path))
        plain = sequence_classifier(path, num_labels).eval()
        for m, folder in enumerate(write_all(model, root)):
            theirs = PeftModel.from_pretrained(sequence_classifier(path, num_labels), folder)
            logits = theirs.eval()(**peft_inputs(path, family)).logits
            torch.testing.assert_close(ours[m], logits, atol=1e-5, rtol=1e-5)
            assert (logits - plain(**peft_inputs(path, family)).logits).abs().max() > 0.1
    assert ours.shape == (model.num_chains, len(TEXTS), num_labels)
    assert (ours[0] - ours[1]).abs().max() > 0.1, "the two members must differ"


@pytest.mark.parametrize("num_labels", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_our_logits(
    tiny_models: dict[str, Path], tmp_path: Path, family: str, num_labels: int
) -> None:
    path = tiny_models[family]
    model = build_huggingface_lora_model(str(path), num_labels, rank=4, alpha=12.0, chains=2)
    assert_peft_agrees(model, path, family, num_labels, tmp_path)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {"target_modules": ["query", "key", "value", "attention.output.dense"]}),
        ("bert", {"target_modules": ["dense"]}),  # the pooler's too
        ("bert", {"target_modules": "query"}),
        ("roberta", {"target_modules": ["dense"]}),  # the head has a layer of this name
        ("distilbert", {"target_modules": ["q_lin", "ffn.lin1"]}),
        ("bert", {"rslora": True, "alpha": 5.0}),
        ("bert", {"rank": 1, "alpha": 0.75}),
    ],
)
def test_peft_gives_our_logits_for_other_adapters(
    tiny_models: dict[str, Path], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    path = tiny_models[family]
    model = build_huggingface_lora_model(str(path), 2, chains=2, **{"rank": 3, **options})
    assert_peft_agrees(model, path, family, 2, tmp_path)


def test_auto_peft_finds_the_base_of_a_member(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_models["bert"]
    model = build_huggingface_lora_model(str(path), 3)
    randomise(model)
    (folder,) = write_all(model, tmp_path)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    with torch.no_grad():
        logits = theirs(**encode(path)).logits
        torch.testing.assert_close(model(**encode(path))[0], logits, atol=1e-5, rtol=1e-5)


def test_a_pooler_the_checkpoint_lacks_goes_with_the_head(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """BERT saved by masked-language training has no pooler: a member must carry its own."""
    path = tmp_path / "masked_lm"
    config = BertConfig.from_pretrained(tiny_models["bert"])
    BertForMaskedLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_models["bert"]).save_pretrained(path)

    model = build_huggingface_lora_model(str(path), 2, chains=2)

    assert set(model.info.spec.head_modules) == {"classifier", "bert.pooler.dense"}
    assert "bert.pooler.dense.weight" in model.chain_parameters()
    pooler = model.chain_parameters()["bert.pooler.dense.weight"]
    assert (pooler[0] != pooler[1]).any()
    assert model.info.head_parameters == 32 * 32 + 32 + 2 * 32 + 2
    assert_peft_agrees(model, path, "bert", 2, tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_trained_by_peft_gives_its_logits_here(
    tiny_models: dict[str, Path], tmp_path: Path, family: str, rslora: bool
) -> None:
    path = tiny_models[family]
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules=TARGETS.get(family, ["query", "value"]),
        modules_to_save=list(HEADS.get(family, ["classifier"])),  # PEFT lengthens it
    )
    theirs = get_peft_model(sequence_classifier(path, 3), config)
    inputs = peft_inputs(path, family)
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        theirs(**inputs, labels=torch.tensor([0, 2, 1])).loss.backward()
        optimiser.step()
    theirs.save_pretrained(str(tmp_path))
    spec = read_spec(tmp_path)
    model = build_huggingface_lora_model(
        spec.base,
        3,
        rank=spec.rank,
        alpha=spec.alpha,
        target_modules=spec.target_modules,
        rslora=spec.rslora,
    )

    model.load_chains(stack([read_member(tmp_path)] * 2))

    assert spec.scaling == 12 / (2 if rslora else 4)
    assert model.num_chains == 2
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits
        ours = model(**encode(path))
    torch.testing.assert_close(ours[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def member_folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    model = build_huggingface_lora_model(str(tiny_models["bert"]), 2)
    randomise(model)
    (folder,) = write_all(model, tmp_path)
    return folder


def test_writing_and_reading_back_is_exact(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = build_huggingface_lora_model(
        str(tiny_models["bert"]), 2, rank=3, alpha=0.1, dropout=0.25, rslora=True
    )
    randomise(model)
    (member,) = split(model.chain_parameters())

    weights = write_member(tmp_path / "a" / "b", member, adapter_config(model.info.spec))

    folder = tmp_path / "a" / "b"
    assert weights == (folder / WEIGHTS_FILE).read_bytes()
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert read_spec(folder) == model.info.spec
    back = read_member(folder)
    assert back.keys() == member.keys()
    assert all(torch.equal(back[name], member[name]) for name in member)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_says_what_is_stored(tiny_models: dict[str, Path], family: str) -> None:
    spec = build_huggingface_lora_model(str(tiny_models[family]), 2).info.spec
    text = adapter_config(spec)
    assert text == adapter_config(spec), "written alike every time"
    config = json.loads(text)
    assert (config["peft_type"], config["task_type"]) == ("LORA", "SEQ_CLS")
    assert (config["r"], config["lora_alpha"], config["bias"]) == (8, 16, "none")
    assert config["modules_to_save"] == HEADS.get(family, ["classifier"])
    assert sorted(config["target_modules"]) == TARGETS.get(family, ["query", "value"])
    assert config["base_model_name_or_path"] == str(tiny_models[family])


def test_missing_member_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{CONFIG_FILE}: not found"):
        read_spec(tmp_path)
    with pytest.raises(InputError, match=rf"{WEIGHTS_FILE}: member file missing"):
        read_member(tmp_path)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_half,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
    ],
)
def test_damaged_weights_are_refused(member_folder: Path, damage: Callable[[Path], Any]) -> None:
    damage(member_folder / WEIGHTS_FILE)
    with pytest.raises(InputError, match=rf"{WEIGHTS_FILE}: member file damaged"):
        read_member(member_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is not LORA"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"rank_pattern": {"layer.0": 2}}, "ranks that differ"),
        ({"layers_to_transform": [0]}, "choice of layers"),
        ({"exclude_modules": ["layer.0.attention.self.query"]}, "excluded layers"),
        ({"layer_replication": [[0, 1]]}, "repeated layers"),
        ({"init_lora_weights": "pissa"}, "a start that changes the base"),
        ({"target_modules": ".*(query|value)"}, "pattern"),
        ({"target_modules": None}, "needs numbers r and lora_alpha and a list target_modules"),
        ({"r": None}, "needs numbers r"),
        ({"r": "eight"}, "needs numbers r"),
        ({"lora_alpha": "much"}, "needs numbers r"),
    ],
)
def test_adapters_other_than_plain_lora_are_refused(
    member_folder: Path, changes: dict[str, Any], message: str
) -> None:
    path = member_folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message) as caught:
        read_spec(member_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"LORA"', "\x00"])
def test_a_damaged_config_is_refused(member_folder: Path, text: str) -> None:
    (member_folder / CONFIG_FILE).write_text(text)
    with pytest.raises(InputError, match=CONFIG_FILE):
        read_spec(member_folder)


def test_foreign_tensor_names_are_refused(member_folder: Path) -> None:
    path = member_folder / WEIGHTS_FILE
    save_file(load_file(path) | {"model.bias": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"'model\.bias' does not follow PEFT's naming"):
        read_member(member_folder)
