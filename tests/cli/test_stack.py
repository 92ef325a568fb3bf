"""`bayesian-lora stack` as a person calls it: help, mistakes, what it makes and what it says.

Shapes: K members, R rank.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bayesian_lora.cli import main as cli
from bayesian_lora.composition.sources import read_source
from bayesian_lora.composition.stack_files import read_stack
from tests.composition.adapters import stacked_update, update_of, write_peft, write_run

Call = Callable[..., tuple[object, str, str]]
QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command's status, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["stack", *map(str, arguments)])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def root(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``sst2``, ``cola`` (3 members each), ``other`` (of RoBERTa) and a folder ``theirs``."""
    root = tmp_path_factory.mktemp("adapters")
    write_run(root / "sst2", tiny_models["bert"], "sst2", 1, chains=3, rank=1)
    write_run(root / "cola", tiny_models["bert"], "cola", 2, chains=3, rslora=True)
    write_run(root / "other", tiny_models["roberta"], "cola", 3)
    write_peft(root / "theirs", tiny_models["bert"], "mnli", 4, alpha=8.0)
    return root


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working folder, where nothing lies yet."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def singles(root: Path) -> list[Path]:
    return [root / "sst2" / "map" / "chain_0", root / "cola" / "map" / "chain_1"]


def test_help_has_examples(call: Call) -> None:
    code, printed, _ = call("--help")
    assert code == 0
    text = " ".join(printed.split())
    assert "Examples: bayesian-lora stack runs/sst2/map/chain_0 runs/cola/map/chain_0" in text
    for option in ("--weights", "--scaling", "--members", "--rank", "--merge", "--fit", "--out"):
        assert option in text


def test_a_stack_is_made_and_described(call: Call, root: Path, here: Path) -> None:
    one, two = singles(root)
    code, printed, error = call(one, f"mine={two}", "--weights", "0.75,-0.5")
    assert (code, error) == (0, "")
    folder = Path("runs/stack-sst2-mine")
    lines = [line.rstrip() for line in printed.splitlines()]
    assert lines == [
        f"Stack of 2 adapters in {folder} (exact): rank 3, scale 1, on query, value",
        f"  sst2  column 1, weight 0.75, from {one}",
        f"  mine  columns 2–3, weight -0.5, from {two}",
        f"  task sst2: 2 classes of sst2, in {folder}/tasks/sst2",
        f"  task mine: 2 classes of cola, in {folder}/tasks/mine",
        f"Evaluate it: bayesian-lora eval {folder}",
    ]
    found = read_stack(here / folder)
    sources = [read_source(str(path)) for path in (one, two)]
    wanted = 0.75 * update_of(sources[0], QUERY) - 0.5 * update_of(sources[1], QUERY)
    torch.testing.assert_close(stacked_update(found, QUERY), wanted, atol=1e-5, rtol=1e-5)


def test_the_original_scaling_is_named(call: Call, root: Path, here: Path) -> None:
    one = singles(root)[0]
    code, printed, _ = call(one, root / "sst2" / "map" / "chain_1", "--scaling", "original")
    assert code == 0
    assert "Stack of 2 adapters in runs/stack-sst2-sst2-2 (original): rank 2, scale 1.5" in printed
    assert "weight 0.5" in printed
    assert read_stack(here / "runs/stack-sst2-sst2-2").facts["kind"] == "original"


@pytest.mark.parametrize(("members", "count"), [("paired", 3), ("crossed", 9)])
def test_ensembles_are_stacked(
    call: Call, root: Path, here: Path, members: str, count: int
) -> None:
    runs = (root / "sst2", root / "cola")
    code, printed, _ = call(*runs, root / "theirs", "--members", members, "--out", here / "out")
    assert code == 0
    assert f"  {count} members\n" in printed
    found = read_stack(here / "out")
    assert len(found) == count
    assert list(found.tasks) == ["sst2", "cola", "theirs"]
    assert found.tasks["theirs"].num_labels == 3


def test_a_stack_is_cut_to_a_rank_with_its_error(call: Call, root: Path, here: Path) -> None:
    code, printed, _ = call(*singles(root), "--rank", 2, "--out", here / "out")
    assert code == 0
    found = read_stack(here / "out")
    assert found.spec.rank == 2
    lost = found.facts["error"]["overall"]
    assert 0 < lost < 1
    assert f"cut to rank 2: relative error of the update {lost:.2%}" in printed
    assert "sst2  in all columns, weight 1" in printed


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_adapters_are_merged(call: Call, root: Path, here: Path, method: str) -> None:
    out = here / "out"
    code, printed, _ = call(*singles(root), "--merge", method, "--density", 0.5, "--out", out)
    assert code == 0
    assert f"({method})" in printed
    found = read_stack(out)
    assert (found.facts["kind"], found.facts["density"]) == (method, 0.5)


def test_weights_are_fitted_on_a_few_examples(
    call: Call, tiny_models: dict[str, Path], here: Path
) -> None:
    """On the task that the program brings along."""
    folders = [
        write_run(here / name, tiny_models["bert"], "synthetic", seed) / "map" / "chain_0"
        for seed, name in enumerate(("one", "two"))
    ]
    _, _, error = call(*folders, "--fit", 1)
    assert "task 'synthetic': --fit=1: 1 examples asked for" in error
    code, printed, error = call(*folders, "--fit", 16, "--out", here / "out")
    assert (code, error) == (0, "")
    assert "Fitted on 16 examples a task: mean NLL" in printed
    found = read_stack(here / "out")
    assert found.facts["kind"] == "fitted"
    assert [part.weight for part in found.parts] == found.facts["weights"]
    assert all(part.weight != 1.0 for part in found.parts)
    before, after = (found.facts[f"nll_{when}"] for when in ("before", "after"))
    assert sum(after.values()) < sum(before.values())


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("{one}",), "1 adapter given: a stack joins at least two"),
    (("{one}", "{nothing}"), "nothing: not found; name a PEFT folder"),
    (("{one}", "{other}"), "adapters of different base models cannot be stacked"),
    (("{one}", "{two}", "--weights", "1"), "1 weights for 2 adapters"),
    (("{one}", "{two}", "--weights", "1,x"), "--weights 1,x: numbers with commas"),
    (("{one}", "{two}", "--weights", "1,nan"), "weight nan: a weight is a finite number"),
    (("{one}", "{two}", "--weights", "1,1", "--fit", "4"), "--weights and --fit exclude"),
    (("{one}", "{two}", "--merge", "ties", "--fit", "4"), "--fit finds the weights of a stack"),
    (("{one}", "{two}", "--scaling", "original", "--fit", "4"), "--scaling original and --fit"),
    (("{one}", "{two}", "--scaling", "original"), "--scaling=original: 'cola' is rank-stabilised"),
    (("{one}", "{two}", "--merge", "tise"), "method 'tise' is unknown: did you mean ties?"),
    (("{one}", "{two}", "--rank", "99"), "--rank=99: the stack has rank 3"),
    (("{one}", "{two}", "--density", "0.5"), "--density: it acts with --merge alone; leave it out"),
    (("{one}", "{two}", "--data-dir", "."), "--data-dir: it acts with --fit alone; leave it out"),
    (("{one}", "{two}", "--device", "cpu"), "--device: it acts with --fit alone; leave it out"),
    (("{one}", "{two}", "--fit", "4", "--device", "tpu"), "--device='tpu': choose auto, cpu"),
    (("a.b={one}", "{two}"), "'a.b' cannot name an adapter"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[m[1][:30] for m in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(
    call: Call, root: Path, here: Path, arguments: tuple[str, ...], message: str
) -> None:
    one, two = singles(root)
    places = {"one": one, "two": two, "other": root / "other", "nothing": root / "nothing"}
    code, printed, error = call(*(text.format(**places) for text in arguments))
    assert (code, printed) == (2, "")
    assert error.startswith("Error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(here.iterdir()) == []


def test_a_factor_that_is_not_finite_is_named(call: Call, root: Path, here: Path) -> None:
    weights = load_file(root / "theirs" / "adapter_model.safetensors")
    key = f"base_model.model.{QUERY}.lora_A.weight"
    weights[key][0, 0] = float("nan")
    (here / "broken").mkdir()
    save_file(weights, here / "broken" / "adapter_model.safetensors")
    config = (root / "theirs" / "adapter_config.json").read_text()
    (here / "broken" / "adapter_config.json").write_text(config)
    code, _, error = call(singles(root)[0], here / "broken")
    assert code == 2
    assert f"{QUERY}.lora_A is not finite" in error
    assert sorted(path.name for path in here.iterdir()) == ["broken"]


def test_a_folder_that_holds_something_is_refused_first(call: Call, root: Path, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    code, _, error = call(root / "nothing", root / "nothing", "--out", here / "out")
    assert code == 2
    assert f"{here / 'out'}: already holds notes.txt; name another folder" in error


def test_a_place_that_cannot_be_written_to_is_refused_first(
    call: Call, root: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != here)
    code, _, error = call(root / "nothing", root / "nothing", "--out", here / "new" / "out")
    assert code == 2
    assert f"{here} cannot be written to; name another folder with --out" in error


def test_stack_json_says_how_it_was_made(call: Call, root: Path, here: Path) -> None:
    one, two = singles(root)
    call(one, two, "--out", here / "out")
    value = json.loads((here / "out" / "stack.json").read_text())
    assert value["facts"]["ranks"] == [1, 2]
    assert value["facts"]["scales"] == pytest.approx([3.0, 3.0 / 2**0.5])
    assert [part["source"] for part in value["parts"]] == [str(one), str(two)]
