"""`bayesian-lora similarity` as a person calls it: files in, tables, JSON and heat maps out."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bayesian_lora.cli import main as cli
from bayesian_lora.composition.stack import Part, Stack, StackTask
from bayesian_lora.composition.stack_files import write_stack
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.utils.files import read_json

MODULES = tuple(
    f"bert.encoder.layer.{n}.attention.self.{kind}" for n in (0, 1) for kind in ("key", "query")
)
WIDTH = 16
Call = Callable[..., tuple[object, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command's status, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["similarity", *map(str, arguments)])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def factors(seed: int, rank: int = 2) -> dict[str, Tensor]:
    own = torch.Generator().manual_seed(seed)
    state = {}
    for module in MODULES:
        state[f"{module}.lora_A"] = torch.randn(rank, WIDTH, generator=own)
        state[f"{module}.lora_B"] = torch.randn(WIDTH, rank, generator=own)
    return state


def peft(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"base_model.model.{name}.weight": tensor for name, tensor in state.items()}


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """A PEFT folder, a .safetensors and a .pt of one base."""
    folder = tmp_path / "one"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["key", "query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(peft(factors(0)), folder / "adapter_model.safetensors")
    save_file(peft(factors(1)), tmp_path / "two.safetensors")
    torch.save(peft(factors(2, rank=1)), tmp_path / "three.pt")
    return [folder, tmp_path / "two.safetensors", tmp_path / "three.pt"]


def stack_at(folder: Path, shift: float = 0.0) -> Path:
    state = {name: (tensor + shift)[None] for name, tensor in factors(7).items()}
    spec = LoraSpec(2, 2.0, 0.0, ("key", "query"), False, ("classifier",), "tiny")
    head = {"classifier.weight": torch.ones(1, 2, WIDTH), "classifier.bias": torch.zeros(1, 2)}
    task = StackTask("sst2", "sst2", ("negative", "positive"), "categorical", 16)
    model = {"name": "tiny", "base": "tiny", "fingerprint": "f" * 64, "dtype": "float32"}
    parts = (Part("sst2", "a", (0, 1), task="sst2"), Part("cola", "b", (1, 2)))
    stack = Stack(model, spec, {"sst2": task}, parts, state, {"sst2": head}, np.ones(1), {})
    write_stack(folder, stack)
    return folder


def test_help_has_examples(call: Call) -> None:
    code, printed, _ = call("--help")
    assert code == 0
    text = " ".join(printed.split())
    assert "Examples: bayesian-lora similarity runs/sst2" in text
    assert "--members" in text


def test_a_comparison_from_files_to_pictures(
    adapters: list[Path], call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, printed, err = call(*adapters, "--ranks", "1", "--out", out)
    assert (code, err) == (0, "")
    found = read_json(out / "similarity.json", "comparison")
    assert [a["name"] for a in found["adapters"]] == ["one", "two", "three"]
    assert [a["norm"] is None for a in found["adapters"]] == [False, True, True]
    lines = printed.splitlines()
    for pair in found["pairs"]:
        at = lines.index(f"{pair['first']} and {pair['second']}")
        table = lines[at + 1 :]
        for group, name in (
            (pair["whole"], "all modules"),
            (pair["kinds"][0], "key"),
            (pair["layers"][1], "layer 1"),
        ):
            row = next(line for line in table if line.strip().startswith(name))
            cells = row.strip().removeprefix(name).split()
            assert cells[0] == str(group["modules"])
            assert float(cells[1]) == pytest.approx(group["cosine"], abs=5e-5)
            assert float(cells[2]) == pytest.approx(group["control"]["cosine"]["mean"], abs=5e-5)
            assert cells[3] == "±"
            assert f"{group['baseline_left']:.4f}" in cells
    assert "factor-wise cosines" in printed
    assert "depends on the gauge" in printed
    pictures = sorted(path.name for path in out.glob("*.png"))
    layers = [f"{pair['first']}-{pair['second']}-layers.png" for pair in found["pairs"]]
    assert pictures == sorted(["pairs.png", *layers])
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert lines[-1] == f"Written: {out / 'similarity.json'} and {len(pictures)} heat maps"


def test_grids_have_pictures_of_their_own(adapters: list[Path], call: Call, tmp_path: Path) -> None:
    code, _, err = call(*adapters[:2], "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == [f"one-two-{n}.png" for n in ("layers", "phi-left", "phi-right", "phi")]


def test_without_a_folder_nothing_is_written(
    adapters: list[Path], call: Call, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, printed, _ = call(*adapters[:2])
    assert code == 0
    assert "Written" not in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_the_same_path_twice_is_the_same_adapter(adapters: list[Path], call: Call) -> None:
    code, printed, _ = call(adapters[0], adapters[0])
    assert code == 0
    assert "one and one-2" in printed
    row = next(line for line in printed.splitlines() if "all modules" in line)
    assert row.split()[3] == "1.0000"


def test_names_and_a_stack_beside_an_adapter(
    adapters: list[Path], call: Call, tmp_path: Path
) -> None:
    folder = stack_at(tmp_path / "stack")
    code, printed, err = call(f"mine={adapters[0]}", folder, f"named={folder}")
    assert (code, err) == (0, "")
    for title in ("mine and stack", "mine and named", "stack and named"):
        assert title in printed.splitlines()


def test_a_path_may_have_an_equals_sign(adapters: list[Path], call: Call, tmp_path: Path) -> None:
    """Of a stack too: the first one divides name and path, unless the whole is a path."""
    folder = stack_at(tmp_path / "seed=1")
    code, printed, err = call(adapters[0], folder, f"named={folder}")
    assert (code, err) == (0, "")
    for title in ("one and seed=1", "one and named", "seed=1 and named"):
        assert title in printed.splitlines()


def test_drift_of_a_stack(call: Call, tmp_path: Path) -> None:
    before, after = stack_at(tmp_path / "before"), stack_at(tmp_path / "after", shift=0.3)
    out = tmp_path / "drift"
    code, printed, err = call(before, after, "--drift", "--ranks", "1", "--out", out)
    assert (code, err) == (0, "")
    found = read_json(out / "similarity.json", "comparison")
    lines = printed.splitlines()
    at = lines.index("the whole stack, before and after")
    assert lines[at + 1].split()[-3] == "change"
    row = lines[at + 2]
    assert f"{found['whole']['whole']['relative_change']:.4f}" in row.split()
    assert "sst2, its columns before and after" in lines
    assert "cola and the stack after" in lines
    assert sorted(found["parts"]) == sorted(found["against"]) == ["cola", "sst2"]
    assert (out / "stack-before-stack-after-layers.png").is_file()
    assert (out / "sst2-sst2-after-layers.png").is_file()


def test_drift_needs_two_stacks(adapters: list[Path], call: Call, tmp_path: Path) -> None:
    code, _, err = call(adapters[0], stack_at(tmp_path / "stack"), "--drift")
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one"], "one alone: a comparison needs at least two adapters; name another one"),
        (["one", "two.safetensors", "--members", "some"], "give first or all"),
        (
            ["one", "two.safetensors", "--out", "three.pt"],
            "three.pt is a file; name another folder",
        ),
        (["one", "two.safetensors", "--out", "one"], "one: already holds adapter_config.json"),
        (["one", "one", "--drift", "--members", "all"], "--members: it acts on nothing with"),
        (["one", "--drift"], "--drift with 1 arguments: give two stacks"),
        (["one", "absent"], "absent"),
        (["one", "noise.safetensors"], "noise"),
        (["one", "nan.safetensors"], f"{MODULES[0]}.lora_A"),
        (["one", "wide.safetensors"], "compare adapters of one base model"),
        (["one", "other.safetensors"], "no module in common"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: list[str],
    words: str,
    adapters: list[Path],
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    state = factors(3)
    save_file({"embedding": torch.ones(2)}, "noise.safetensors")
    save_file(
        peft(state | {f"{MODULES[0]}.lora_A": torch.full((2, WIDTH), torch.nan)}),
        "nan.safetensors",
    )
    wide = {n: torch.cat([x, x], 1) if n.endswith("A") else x for n, x in state.items()}
    save_file(peft(wide), "wide.safetensors")
    other = {re.sub("encoder", "decoder", n): x for n, x in state.items()}
    save_file(peft(other), "other.safetensors")
    before = sorted(tmp_path.rglob("*"))
    options = [] if "--out" in arguments else ["--out", "new"]
    code, printed, err = call(*arguments, *options)
    assert (code, printed) == (2, "")
    assert err.count("\n") == 1
    assert words in err
    assert sorted(tmp_path.rglob("*")) == before
