"""A gated stack saved and loaded predicts the same; what is missing or damaged is named."""

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from bayesian_lora.composition.gate_files import GATE_FILE, is_gated, load_gated, write_gated
from bayesian_lora.composition.gated_model import gated_model
from bayesian_lora.composition.gates import Gated, GateOptions
from bayesian_lora.composition.stack_files import STACK_FILE, read_stack, write_stack
from bayesian_lora.errors import InputError
from bayesian_lora.models.mixing import GateKind
from bayesian_lora.predict import predict_logits
from tests.composition.stacks import make_sets, make_stack
from tests.composition.test_gated_model import decided


def make_gated(base: Path, kind: GateKind = "token", members: int = 2) -> Gated:
    stack = make_stack(base, {"long": 1, "third": 2}, members=members)
    options = GateOptions(kind, temperature=0.5, top_k=1)
    model = decided(gated_model(stack, kind))
    state = {n: p.detach() for n, p in model.chain_parameters().items() if n.startswith("gate.")}
    return Gated(stack, options, state, {"kind": kind, "trained": True})


@pytest.mark.parametrize("kind", get_args(GateKind))
@pytest.mark.parametrize("members", [1, 3])
def test_a_loaded_gate_predicts_the_same(
    tiny_models: dict[str, Path], tmp_path: Path, kind: GateKind, members: int
) -> None:
    base = tiny_models["roberta"]
    gated, data = make_gated(base, kind, members), make_sets(base)["long"]
    write_gated(tmp_path / "gated", gated, {"figures": {"a": 1}})
    found = load_gated(tmp_path / "gated")
    assert found.options == gated.options
    assert found.report == gated.report
    logits = predict_logits(found.model(), data)
    assert logits.shape == (members, len(data), 5)
    assert (logits == predict_logits(gated.model(), data)).all()
    assert np.ptp(logits) > 0.1
    assert is_gated(tmp_path / "gated")
    assert len(read_stack(tmp_path / "gated")) == members, "it is an ordinary stack too"


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    write_gated(tmp_path / "gated", make_gated(tiny_models["bert"]))
    return tmp_path / "gated"


def test_a_gate_without_its_experts_is_refused(folder: Path) -> None:
    (folder / STACK_FILE).unlink()
    with pytest.raises(InputError, match="a gate without its experts"):
        load_gated(folder)
    (folder / GATE_FILE).unlink()
    with pytest.raises(InputError, match="no gated stack there"):
        load_gated(folder)


def test_missing_experts_are_named(folder: Path) -> None:
    shutil.rmtree(folder / "tasks" / "third")
    with pytest.raises(InputError, match="third"):
        load_gated(folder)


def test_a_missing_or_damaged_gate_is_named(folder: Path) -> None:
    content = (folder / GATE_FILE).read_bytes()
    (folder / GATE_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"gate\.safetensors: damaged, its sha256"):
        load_gated(folder)
    (folder / GATE_FILE).unlink()
    with pytest.raises(InputError, match=r"gate\.safetensors: cannot be read"):
        load_gated(folder)


def test_a_stack_without_a_gate_is_told(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    write_stack(tmp_path / "plain", make_stack(tiny_models["bert"]))
    with pytest.raises(InputError, match="a stack without a gate"):
        load_gated(tmp_path / "plain")


def change(folder: Path, **fields: object) -> None:
    """In the gate's section, by somebody who takes the checksum out."""
    value = json.loads((folder / STACK_FILE).read_text())
    del value["checksum"]
    value["gate"] |= fields
    (folder / STACK_FILE).write_text(json.dumps(value))


def test_other_experts_are_refused(folder: Path) -> None:
    change(folder, experts=["long", "third", "more"])
    with pytest.raises(InputError, match="a gate over long, third, more, and the stack has"):
        load_gated(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"options": {"kind": "none"}}, "kind='none'"),
        ({"options": {"kinds": "token"}}, "gate section is damaged"),
        ({"format": 9}, "format is 9"),
        ({"report": 3}, "gate section is damaged"),
        ({"options": {"kind": "token", "top_k": 3}}, "top_k=3"),
    ],
)
def test_a_changed_section_is_refused(folder: Path, fields: dict[str, object], words: str) -> None:
    change(folder, **fields)
    with pytest.raises(InputError, match=words):
        load_gated(folder)


def test_a_gate_of_another_kind_does_not_fit(folder: Path) -> None:
    change(folder, options={"kind": "sequence"})
    with pytest.raises(InputError, match="the gate does not fit its stack"):
        load_gated(folder).model()


def test_nothing_is_written_of_a_gate_that_is_not_whole(
    tiny_models: dict[str, Path], tmp_path: Path, folder: Path
) -> None:
    gated = make_gated(tiny_models["bert"])
    nan = Gated(gated.stack, gated.options, {n: t * torch.nan for n, t in gated.state.items()})
    with pytest.raises(InputError, match="not finite"):
        write_gated(tmp_path / "nan", nan)
    factors = {n: t * torch.nan for n, t in gated.stack.factors.items()}
    broken = Gated(gated.stack.changed(factors=factors), gated.options, gated.state)
    with pytest.raises(InputError, match="not finite"):
        write_gated(tmp_path / "nan", broken)
    assert not (tmp_path / "nan").exists()
    before = (folder / STACK_FILE).read_bytes()
    with pytest.raises(InputError, match="already holds"):
        write_gated(folder, gated)
    assert (folder / STACK_FILE).read_bytes() == before
