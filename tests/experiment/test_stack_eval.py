"""A stack's folder evaluated on every task it carries: what is printed, stored, refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_files import read_stack, write_stack
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.stack_eval import chosen_splits, evaluate_folder
from bayesian_lora.metrics import classification_metrics, ensemble_log_probs
from bayesian_lora.progress import Progress
from bayesian_lora.utils.files import read_json, read_npz
from tests.composition.stacks import make_stack

QUIET = Progress(quiet=True)
SPLITS = {"validation", "shifted"}


def stack_of(base: Path, data: dict[str, str], members: int = 1) -> Stack:
    """{task: the registry's name of its data}."""
    stack = make_stack(base, members=members, labels=dict.fromkeys(data, 2))
    tasks = {n: dataclasses.replace(stack.tasks[n], data=data[n], max_length=64) for n in data}
    return stack.changed(tasks=tasks)


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """Two heads for the synthetic sentences, two members."""
    stack = stack_of(tiny_models["bert"], {"one": "synthetic", "two": "synthetic"}, members=2)
    write_stack(tmp_path / "stack", stack)
    return tmp_path / "stack"


def test_every_task_on_every_split_is_printed_and_stored(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = evaluate_folder(folder, device="cpu", progress=Progress(terminal=False))
    printed = capsys.readouterr().out.splitlines()
    assert {task: set(splits) for task, splits in value["tasks"].items()} == {
        "one": SPLITS,
        "two": SPLITS,
    }
    assert (value["k"], value["stack"]) == (2, {"kind": "exact", "parts": ["one", "two"]})
    assert read_json(folder / "metrics.json", "metrics") == json.loads(json.dumps(value))
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in printed}
    header = printed.index(next(line for line in printed if line.startswith("task")))
    assert printed[header].split()[:4] == ["task", "split", "n", "accuracy"]
    for task in ("one", "two"):
        for split in SPLITS:
            own = value["tasks"][task][split]
            assert rows[task, split][:2] == [str(own["n"]), f"{own['accuracy']:.4f}"]
            kept = read_npz(folder / "predictions" / f"{task}.{split}.npz")
            log_probs = ensemble_log_probs(kept["logits"], kept["weights"])
            figures = classification_metrics(log_probs, kept["labels"])
            assert figures["nll"] == own["nll"]
            assert kept["logits"].shape == (2, own["n"], 2)
    one, two = (read_npz(folder / "predictions" / f"{t}.shifted.npz") for t in ("one", "two"))
    assert not np.array_equal(one["logits"], two["logits"])
    assert len(read_stack(folder)) == 2  # what is stored beside it leaves the stack whole


def test_one_split_leaves_the_figures_of_all(folder: Path) -> None:
    value = evaluate_folder(folder, split="shifted", device="cpu", progress=QUIET)
    assert {task: list(splits) for task, splits in value["tasks"].items()} == {
        "one": ["shifted"],
        "two": ["shifted"],
    }
    assert (folder / "metrics.shifted.json").is_file()
    assert not (folder / "metrics.json").exists()


def test_a_split_is_evaluated_on_the_tasks_that_have_it(tiny_models: dict[str, Path]) -> None:
    stack = stack_of(tiny_models["bert"], {"one": "synthetic", "grammar": "cola"})
    assert chosen_splits(stack, "shifted") == {"one": ["shifted"]}
    assert chosen_splits(stack, "validation") == {"one": ["validation"], "grammar": ["validation"]}
    assert chosen_splits(stack, None) == {"one": None, "grammar": None}


def test_a_split_no_task_has_is_answered_with_theirs(folder: Path) -> None:
    with pytest.raises(InputError) as error:
        evaluate_folder(folder, split="matched", device="cpu", progress=QUIET)
    assert str(error.value) == (
        "split 'matched': no task of this stack has it; choose of one: train, validation, "
        "shifted; two: train, validation, shifted"
    )


def test_missing_data_is_named_and_nothing_written(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BAYESIAN_LORA_DATA", raising=False)
    stack = stack_of(tiny_models["bert"], {"grammar": "cola", "one": "synthetic"})
    write_stack(tmp_path / "stack", stack)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "empty").mkdir()
    for data_dir, words in (
        (str(tmp_path / "nowhere"), "is not a folder"),
        (str(tmp_path / "empty"), "CoLA"),
        (None, "set data.dir or BAYESIAN_LORA_DATA"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate_folder(tmp_path / "stack", data_dir=data_dir, device="cpu", progress=QUIET)
    (tmp_path / "empty").rmdir()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_stack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stack\.json: not found"):
        evaluate_folder(tmp_path, progress=QUIET)


def test_real_tasks_have_their_own_figures(
    tiny_models: dict[str, Path], tmp_path: Path, real_data: Path
) -> None:
    stack = stack_of(tiny_models["bert"], {"grammar": "cola", "mood": "sst2"})
    write_stack(tmp_path / "stack", stack)
    value = evaluate_folder(
        tmp_path / "stack", data_dir=str(real_data), device="cpu", progress=QUIET
    )
    figures = {task: splits["validation"] for task, splits in value["tasks"].items()}
    assert figures["mood"]["n"] == 872
    assert {"accuracy", "nll", "ece", "brier", "mcc"} <= figures["grammar"].keys()
    assert "mcc" not in figures["mood"]
