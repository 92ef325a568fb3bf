"""The pure parts of `benchmarks/speed`: ratios, the count of useful products, its command line."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bayesian_lora.models.hf_lora import build_huggingface_lora_model

FOLDER = Path(__file__).parents[1] / "benchmarks" / "speed"
COMMANDS = [
    *("train", "chains", "predict", "adaptive", "precision", "memory", "startup", "growth"),
    *("profile", "gpu", "plot"),
]
NEEDED = {"adaptive": ["--ensemble", "run"], "precision": ["--ensemble", "run"], "plot": ["file"]}


@pytest.fixture(scope="module")
def speed() -> Iterator[ModuleType]:
    """The script's front; its modules import one another as siblings, as when it runs."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("speed_front", FOLDER / "__main__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        for name in set(sys.modules) - before:
            if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


@pytest.fixture
def part(speed: ModuleType) -> Any:
    """A module of the script by name."""
    return importlib.import_module


def test_ratios_pair_the_rounds(part: Any) -> None:
    """A round twice as slow for both changes no ratio; medians of each alone would."""
    rounds = part("rounds")
    found = rounds.spread(rounds.ratios([4.0, 2.0, 6.0], [2.0, 1.0, 2.0]))
    assert (found.median, found.smallest, found.largest) == (2.0, 2.0, 3.0)
    assert found.format(2) == "2.00 (2.00–3.00)"
    with pytest.raises(ValueError):
        rounds.ratios([1.0], [1.0, 2.0])


def test_cases_alternate_after_a_warming_round(part: Any) -> None:
    order: list[str] = []

    class Case:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self) -> float:
            order.append(self.name)
            return float(len(order))

    class Warmed(Case):
        def warm(self) -> None:
            order.append("warm")

    rates = part("rounds").alternate({"a": Case("a"), "b": Warmed("b")}, 2)
    assert order == ["a", "warm", "a", "b", "a", "b"]
    assert rates == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_table_has_ours_over_each_row(part: Any) -> None:
    rates = {"ours": [6.0, 6.0], "theirs": [2.0, 3.0]}
    rows = part("rounds").table(rates, ["ours"])
    assert rows[-1] == "| theirs | 2.5 (2.0–3.0) | 2.50 (2.00–3.00) |"
    assert rows[0].count("|") == rows[1].count("|") == rows[-1].count("|")
    rates["ours, half"] = [9.0, 9.0]
    (line,) = part("rounds").sides(rates, ["ours", "ours, half"], {"all": ["theirs"]})
    assert line.endswith("ours, half against theirs: 3.75 (3.00–4.50)")


TARGETS = [
    ["query", "value"],
    ["key"],
    ["query", "key", "value", "attention.output.dense"],
]


@pytest.mark.parametrize("targets", TARGETS, ids=lambda names: "-".join(names))
@pytest.mark.parametrize(("family", "chains"), [("bert", 1), ("bert", 3), ("roberta", 2)])
def test_useful_operations_are_those_of_a_step_without_padding(
    part: Any, tiny_models: dict[str, Path], family: str, chains: int, targets: list[str]
) -> None:
    """Sequences of one length leave nothing to pad: what is counted is all that is done."""
    model = build_huggingface_lora_model(
        str(tiny_models[family]), 3, rank=2, chains=chains, target_modules=targets
    )
    ids = torch.randint(5, 40, (chains, 4, 9), generator=torch.Generator().manual_seed(0))

    def in_place(_: Any, a: torch.Size, b: torch.Size, **_options: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    def pointwise(x: torch.Size, weight: torch.Size, *_: Any, **_options: Any) -> int:
        return 2 * x.numel() * weight[0]

    known: dict[Any, Any] = {torch.ops.aten.addmm_: in_place}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        known[torch.ops.mkldnn._linear_pointwise] = pointwise
    with FlopCounterMode(display=False, custom_mapping=known) as counted:
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).sum().backward()
    found = part("products").operations(model, np.full((chains, 4), 9))
    assert found == counted.get_total_flops()


def test_peak_shapes_are_the_frozen_products_of_all_tokens(
    part: Any, tiny_models: dict[str, Path]
) -> None:
    """Two layers of width 32 and 64: per token the first layer whole, of the last key and value."""
    model = build_huggingface_lora_model(
        str(tiny_models["bert"]), 2, rank=2, target_modules=["query", "value"]
    )
    products = part("products")
    shapes = products.plain_shapes(model, np.array([[5, 3, 9]]))
    by_size = {(p.inner, p.outer): n for p, n in shapes.items()}
    assert all(p.rows == 17 for p in shapes)
    # Forward 4 + 2, 1 and 1; backward the first layer's output, the last one's key and value,
    # and the other way round through the wide layers.
    assert by_size == {(32, 32): 4 + 2 + 1 + 2, (32, 64): 1 + 1, (64, 32): 1 + 1}
    peak = products.Peak(shapes, torch.float32)
    assert 0 < peak() == peak.plain <= peak.fastest


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(
    speed: ModuleType, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        speed.main([name, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert f"python benchmarks/speed {name}" in text.partition("examples:")[2]
    given = speed.build_parser().parse_args([name, *NEEDED.get(name, [])])
    assert callable(given.run)


def test_an_event_of_a_step_is_told_by_its_place_shapes_and_name(part: Any) -> None:
    profiling = part("profiling")

    def category(name: str, *above: str, shapes: Any = ()) -> str:
        event: Any = None
        for own in (*above, name):
            event = SimpleNamespace(name=own, cpu_parent=event, input_shapes=shapes)
        return profiling.category(event)

    optimiser, gradient = "Optimizer.step#SGLD.step", profiling.GRADIENT
    rank = profiling.RANK
    assert category("aten::mm", shapes=[[700, 384], [384, 384]]) == "matrix products"
    assert category("mkldnn::_linear_pointwise") == "matrix products"
    assert category("aten::mm", shapes=[[700, 384], [384, rank]]) == "LoRA products"
    assert category("aten::bmm", profiling.STEP, optimiser, gradient) == "attention"
    assert category("aten::add_", profiling.STEP, optimiser) == "sampler or optimiser"
    assert category("aten::add_", "Optimizer.step#AdamW.step") == "sampler or optimiser"
    assert category("AddmmBackward0") == category(profiling.STEP) == profiling.REST


def test_numbers_below_one_are_refused(speed: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        speed.build_parser().parse_args(["train", "--rounds", "0"])
    assert "0: at least 1" in capsys.readouterr().err


def test_the_figure_draws_the_last_points_of_each_command(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def record(command: str, series: str, values: list[float]) -> str:
        points = [{"series": series, "x": x, "values": values} for x in (1, 8)]
        common = {"arguments": {"task": "sst2"}, "texts": 872}
        return json.dumps({"command": command, "points": points, **common})

    lines = [record("chains", "first", [1.0]), record("chains", "ours, float32", [2.0, 3.0])]
    lines += [record("predict", "set_adapter", [4.0]), json.dumps({"command": "train"})]
    path, target = tmp_path / "speed.jsonl", tmp_path / "speed.svg"
    path.write_text("\n".join(lines) + "\n")
    speed.main(["plot", str(path), "--out", str(target)])
    found = importlib.import_module("plot").latest([path])
    assert list(found) == ["chains", "predict"]
    assert {p["series"] for p in found["chains"]["points"]} == {"ours, float32"}
    assert target.read_text().startswith("<?xml")
    path.write_text(lines[-1])
    with pytest.raises(SystemExit, match="no points"):
        speed.main(["plot", str(path)])
