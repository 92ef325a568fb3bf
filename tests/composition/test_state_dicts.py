"""State dicts in PEFT's naming are read as PEFT writes them; anything else is named and refused.

Shapes: R rank, D widths, C classes.
"""

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from bayesian_lora.composition.state_dicts import check_adapter, head_outputs, read_tensors
from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.models.peft_io import PREFIX, read_member
from tests.fuzzing import budgets, damaged_bytes, outcome, search

A, B = "net.query.lora_A", "net.query.lora_B"
SPEC = LoraSpec(2, 4.0, 0.0, ("query",), False, ("classifier",), "base")


def tensors() -> dict[str, Tensor]:
    """An adapter under our names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {A: (2, 3), B: (5, 2), "classifier.weight": (4, 6), "classifier.bias": (4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plain(member: dict[str, Tensor], lora: str = ".weight", head: str = "", prefix: str = PREFIX):
    """Under PEFT's names: after ``lora_A`` comes `lora`, after ``classifier`` `head`."""
    renamed = {n: n + lora if "lora" in n else n.replace(".", f"{head}.", 1) for n in member}
    return {prefix + new: member[old] for old, new in renamed.items()}


@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["prefix", "none"])
@pytest.mark.parametrize(
    ("lora", "head"),
    [
        (".weight", ""),
        (".default.weight", ".modules_to_save.default"),
        (".sst2.weight", ".modules_to_save.sst2"),
        (".weight", ".modules_to_save"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ".pth"])
def test_every_way_of_naming_is_read(
    tmp_path: Path, prefix: str, lora: str, head: str, suffix: str
) -> None:
    path = tmp_path / f"adapter{suffix}"
    state = plain(tensors(), lora, head, prefix)
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    found = read_tensors(path)
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


def test_a_whole_models_state_gives_what_peft_saves(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Frozen weights and the head's original stay behind."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny_models["roberta"], num_labels=3)
    config = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights="gaussian"
    )
    model = get_peft_model(base, config)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pt")
    torch.save(get_peft_model_state_dict(model), tmp_path / "adapter.pt")
    model.save_pretrained(str(tmp_path / "folder"))
    wanted = read_member(tmp_path / "folder")
    assert "classifier.out_proj.weight" in wanted
    for name in ("whole.pt", "checkpoint.pt", "adapter.pt", "folder/adapter_model.safetensors"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == wanted.keys(), name
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
    assert head_outputs(wanted) == 3


def test_frozen_weights_are_not_taken_for_a_head(tmp_path: Path) -> None:
    """Of a whole model whose adapter has no head."""
    factors = {name: tensor for name, tensor in tensors().items() if "lora" in name}
    frozen = {"net.query.base_layer.weight": torch.ones(5, 3), "net.words.weight": torch.ones(9, 3)}
    torch.save(plain(factors, ".default.weight") | frozen, tmp_path / "whole.pt")
    assert read_tensors(tmp_path / "whole.pt").keys() == factors.keys()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_becomes_single(
    tmp_path: Path, given: torch.dtype, kept: torch.dtype
) -> None:
    state = {name: tensor.to(given) for name, tensor in plain(tensors()).items()}
    save_file(state, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {kept}
    assert torch.equal(found[A], tensors()[A].to(given).to(kept))


class Payload:
    """Unpickled, it makes the sentinel."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_code_in_a_file_is_not_run(tmp_path: Path, suffix: str) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / f"a{suffix}"
    torch.save({**plain(tensors()), "payload": Payload(sentinel)}, path)
    with pytest.raises(InputError, match="code is never unpickled; save the state dict alone"):
        read_tensors(path)
    path.write_bytes(pickle.dumps(Payload(sentinel)))
    with pytest.raises(InputError) as caught:
        read_tensors(path)
    assert "weights_only" not in str(caught.value), "no advice to load it unsafely"
    assert not sentinel.exists()
    pickle.loads(path.read_bytes())
    assert sentinel.exists(), "the payload works where pickles are trusted"


@pytest.mark.parametrize("archive", [True, False])
def test_a_class_of_endless_name_is_refused_at_once(tmp_path: Path, archive: bool) -> None:
    """By torch's own check of a name of 100,000 characters it would take a minute."""
    path = tmp_path / "a.pt"
    torch.save(plain(tensors()), path, _use_new_zipfile_serialization=archive)
    read_tensors(path)
    named = b"c" + b"m" * 100_000 + b"\nname\n."
    if archive:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", b"\x80\x02" + named)
            file.writestr("a/version", b"3\n")
    else:
        content = path.read_bytes()
        # Behind magic number, version and facts of the system comes the state.
        file = io.BytesIO(content)
        for _ in range(3):
            list(pickletools.genops(file))
        path.write_bytes(content[: file.tell()] + b"\x80\x02" + named)
    assert "name of 100005 characters" in outcome(lambda: read_tensors(path))


@budgets(1_000)
@pytest.mark.parametrize("kind", ["safetensors", "archive", "old pickle"])
def test_any_bytes_are_read_or_refused(tmp_path: Path, kind: str, examples: int) -> None:
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_file(plain(tensors()), path)
    else:
        torch.save(plain(tensors()), path, _use_new_zipfile_serialization=kind == "archive")
    content = path.read_bytes()

    def read(damaged: bytes) -> None:
        path.write_bytes(damaged)
        check_adapter(read_tensors(path), None, str(path))

    assert search(damaged_bytes(content), read, examples)["refused"] > examples / 8


DAMAGED: dict[str, tuple[Any, str]] = {
    "no LoRA": (
        {"net.query.weight": torch.ones(2, 2)},
        r"no tensor follows PEFT's naming \(….lora_A.weight and ….lora_B.weight; the first is "
        r"'net.query.weight'\)",
    ),
    "other naming": (
        {
            "net.query.lora_down.weight": torch.ones(2, 3),
            "net.query.lora_up.weight": torch.ones(3, 2),
        },
        r"no tensor follows PEFT's naming",
    ),
    "bare parameters": (tensors(), r"no tensor follows PEFT's naming"),
    "empty": ({}, r"no tensor follows PEFT's naming .*'nothing'"),
    "two adapters": (
        plain(tensors(), ".one.weight") | plain(tensors(), ".two.weight"),
        r"holds the adapters one, two; save them one by one",
    ),
    "integers": (
        plain({name: tensor.to(torch.int8) for name, tensor in tensors().items()}),
        r"net.query.lora_A holds int8, not real numbers; .* without quantisation",
    ),
    "a list": ([torch.ones(2)], r"no state dict, which maps names to tensors"),
    "numbers": ({"a": 1}, r"no state dict, which maps names to tensors"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_no_adapter_is_refused(tmp_path: Path, case: str) -> None:
    state, message = DAMAGED[case]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=message) as caught:
        read_tensors(tmp_path / "a.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'a.pt'}: ")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_missing_and_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(InputError, match=r"weights missing; restore them"):
        read_tensors(path)
    torch.save(plain(tensors()), path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"damaged") as caught:
        read_tensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


UNFIT: dict[str, tuple[dict[str, Tensor], LoraSpec | None, str]] = {
    "NaN": ({A: torch.full((2, 3), float("nan"))}, None, r"here: net.query.lora_A is not finite"),
    "NaN in the head": (
        {"classifier.bias": torch.full((4,), float("inf"))},
        None,
        r"here: classifier.bias is not finite",
    ),
    "ranks": ({A: torch.ones(3, 3)}, None, r"lora_A \(3, 3\) and .*lora_B \(5, 2\) are not"),
    "dimensions": ({A: torch.ones(2, 3, 1)}, None, r"are not \(R, D_in\) and \(D_out, R\)"),
    "DoRA": (
        {"net.query.lora_magnitude_vector": torch.ones(3)},
        None,
        r"lora_magnitude_vector is neither a LoRA factor .* only plain LoRA",
    ),
    "config's rank": (
        {A: torch.ones(1, 3), B: torch.ones(5, 1)},
        SPEC,
        r"lora_A has rank 1, its config says 2",
    ),
    "config's targets": (
        {"net.key.lora_A": torch.ones(2, 3), "net.key.lora_B": torch.ones(3, 2)},
        SPEC,
        r"net.key.lora_A is none of the config's target_modules \(query\)",
    ),
    "trained embeddings": (
        {"net.words.weight": torch.ones(9, 3)},
        SPEC,
        r"net.words.weight is neither a LoRA factor .* nor part of the head",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_tensors_that_make_no_adapter_are_named(case: str) -> None:
    changed, spec, message = UNFIT[case]
    check_adapter(tensors(), spec, "here")
    with pytest.raises(InputError, match=message):
        check_adapter(tensors() | changed, spec, "here")


@pytest.mark.parametrize("missing", [A, B])
def test_a_factor_without_its_fellow_is_named(missing: str) -> None:
    rest = {name: tensor for name, tensor in tensors().items() if name != missing}
    with pytest.raises(InputError, match=rf"here: damaged, {missing} is missing"):
        check_adapter(rest, None, "here")
