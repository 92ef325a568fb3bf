"""Options that several commands have are one option: name, type, help, and defaults."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from bayesian_lora.cli import main as cli
from bayesian_lora.cli.options import in_options
from bayesian_lora.composition.gate_files import write_gated
from bayesian_lora.composition.gates import Gated, GateOptions
from bayesian_lora.composition.stack_files import write_stack
from bayesian_lora.errors import InputError
from bayesian_lora.experiment import task_sets
from tests.composition.adapters import write_run
from tests.composition.stacks import make_stack

ON_STACKS = ("stack", "retrain", "gate", "sequential", "similarity")
SHARED = ("examples", "epochs", "lr", "batch_size", "prior_std", "data_dir", "device", "seed")
SAME_DEFAULT = set(SHARED) - {"epochs", "lr"}  # which suit what is fitted


def parameters(command: str) -> Iterator[Any]:
    commands: Any = typer.main.get_command(cli.app)
    return iter(commands.commands[command].params)


@pytest.mark.parametrize("name", SHARED)
def test_an_option_is_called_and_described_alike(name: str) -> None:
    found = [p for command in ON_STACKS for p in parameters(command) if p.name == name]
    assert len(found) > 1
    assert len({(tuple(p.opts), p.help, p.metavar) for p in found}) == 1
    assert len({str(p.default) for p in found}) == 1 or name not in SAME_DEFAULT


@pytest.mark.parametrize("command", ON_STACKS)
def test_every_option_says_what_it_is(command: str) -> None:
    names = []
    for parameter in parameters(command):
        names += parameter.opts
        assert parameter.help, parameter.name
    assert "--batch" not in names


def test_mistakes_are_told_in_the_commands_options() -> None:
    @in_options
    def command(top_k: int, data_dir: str, max_length: int) -> None:
        raise InputError(
            "top_k=3, my_top_k=2, runs/top_k=1: data.max_length=9 and data.dir; rank=2"
        )

    with pytest.raises(InputError) as error:
        command(3, "", 9)
    assert str(error.value) == (
        "--top-k=3, my_top_k=2, runs/top_k=1: --max-length=9 and --data-dir; rank=2"
    )


@pytest.fixture
def commands(tiny_models: dict[str, Path], tmp_path: Path) -> dict[str, list[str]]:
    """Arguments of commands that may need the hub."""
    base = tiny_models["bert"]
    stack = make_stack(base, labels={"first": 2, "second": 2})
    tasks = {n: dataclasses.replace(task, data="synthetic") for n, task in stack.tasks.items()}
    stack = stack.changed(tasks=tasks)
    write_stack(tmp_path / "stack", stack)
    write_gated(tmp_path / "gated", Gated(stack, GateOptions("arrow"), {}))
    adapters = [
        str(write_run(tmp_path / name, base, "synthetic", seed) / "map" / "chain_0")
        for seed, name in enumerate(("one", "two"))
    ]
    return {
        "retrain": [str(tmp_path / "stack"), "--on", "first"],
        "gate": [str(tmp_path / "stack")],
        "eval": [str(tmp_path / "gated")],
        "stack": [*adapters, "--fit", "16", "--out", str(tmp_path / "out")],
        "sequential": ["synthetic", "--model", str(base), "--out", str(tmp_path / "out")],
    }


@pytest.mark.parametrize("command", ["retrain", "gate", "eval", "stack", "sequential"])
def test_the_hub_is_asked_before_anything_waits_for_it(
    command: str,
    commands: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def asked(*_: object) -> None:
        raise ConnectionError("asked")

    monkeypatch.setattr(task_sets, "ask_hub_once", asked)
    with pytest.raises(SystemExit):
        cli.main([command, *commands[command]])
    assert capsys.readouterr().err == "Error: asked\n"
