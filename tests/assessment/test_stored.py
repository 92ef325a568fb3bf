"""Stored predictions read back: what is whole, and one clear line for all that is not.

Shapes: K members, N examples, C classes.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayesian_lora.assessment import evaluation
from bayesian_lora.assessment.stored import load_predictions
from bayesian_lora.errors import InputError
from bayesian_lora.manifest import write_manifest
from bayesian_lora.member_files import MemberRecord
from bayesian_lora.predict import Predictions
from bayesian_lora.utils.files import read_json, write_json, write_npz

from ..run_files import HEAD  # noqa: TID252 (tests have no package name to import by)
from .predictors import classifiers, gaussians

K, N = 4, 30
Arrays = dict[str, Any]
Change = Callable[[Arrays], Any]


def arrays_of(p: Predictions) -> Arrays:
    names = ("logits", "labels", "weights", "example_id", "noise_std")
    return {n: np.array(x) for n in names if (x := getattr(p, n)) is not None}


def store(root: Path, p: Predictions, split: str, name: str, regression: bool = False) -> None:
    """As an evaluation does, but for what nobody reads."""
    figures = evaluation.evaluate((), regression, p)
    write_npz(root / "predictions" / f"{split}.npz", {**arrays_of(p), "split": np.array(split)})
    value = {"split": split, "n": len(p), "ensemble": {"nll": figures["nll"]}}
    write_json(root / name, value)


def members(root: Path, k: int, likelihood: str = "categorical") -> None:
    head = dataclasses.replace(HEAD, task={**HEAD.task, "likelihood": likelihood})
    records = [MemberRecord(f"samples/{i}", i % 2, i // 2, i) for i in range(k)]
    write_manifest(root, head, records, records[:2])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    members(tmp_path, K)
    store(tmp_path, classifiers(K, N), "validation", "metrics.json")
    store(tmp_path, classifiers(K, N + 5), "shifted", "metrics.shifted.json")
    return tmp_path


def change(run: Path, split: str, alter: Change) -> None:
    """Store the predictions again, altered."""
    path = run / "predictions" / f"{split}.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    alter(arrays)
    write_npz(path, arrays)


def refused(run: Path, split: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        load_predictions(run, split)
    message = str(error.value)
    assert message.isprintable(), "one line"
    assert "bayesian-lora eval" in message or "restore" in message
    return message


@pytest.mark.parametrize("split", [None, "validation", "shifted"])
def test_what_was_stored_comes_back(run: Path, split: str | None) -> None:
    p, wanted = load_predictions(run, split), classifiers(K, N + 5 * (split == "shifted"))
    for name, x in arrays_of(wanted).items():
        np.testing.assert_array_equal(getattr(p, name), x)
    assert (p.num_members, p.noise_std, p.true_probs) == (K, None, None)


def test_scores_come_back_with_their_noise(tmp_path: Path) -> None:
    members(tmp_path, K, "gaussian")
    store(tmp_path, gaussians(K, N), "dev", "metrics.json", regression=True)
    np.testing.assert_array_equal(load_predictions(tmp_path).noise_std, gaussians(K).noise_std)
    change(tmp_path, "dev", lambda a: a.pop("noise_std"))
    assert "without noise_std" in refused(tmp_path)
    store(tmp_path, gaussians(K, N), "dev", "metrics.json", regression=True)
    change(tmp_path, "dev", lambda a: a["noise_std"].__setitem__(1, 0.0))
    assert "noise_std 0 is not above 0" in refused(tmp_path)


def test_files_of_older_versions_have_no_split_in_them(run: Path) -> None:
    change(run, "validation", lambda a: a.pop("split"))
    assert len(load_predictions(run)) == N


ALTERED: list[tuple[Change, list[str]]] = [
    (lambda a: a["logits"].__setitem__((1, 7, 0), np.nan), ["1 of 240", "logits", "(1, 7, 0)"]),
    (lambda a: a["logits"].__setitem__((2, slice(None), 1), np.inf), ["30 of 240", "infinite"]),
    (lambda a: a["weights"].__setitem__(0, np.nan), ["weights", "NaN"]),
    (lambda a: a["weights"].__setitem__(0, 0.5), ["weights", "sum 1.25"]),
    (lambda a: a.update(weights=np.array([1.5, -0.5, 0.0, 0.0])), ["weights", "-0.5"]),
    (lambda a: a.pop("labels"), ["no labels"]),
    (lambda a: a.update(labels=a["labels"][:-1]), ["labels (29,)", "30 examples"]),
    (lambda a: a.update(labels=a["labels"] + 7), ["labels", "outside 0..1"]),
    (lambda a: a.update(labels=a["labels"].astype("U4")), ["labels", "<U4"]),
    (lambda a: a["example_id"].__setitem__(3, 4), ["example_id", "twice"]),
    (lambda a: a.update(logits=a["logits"][0]), ["logits (30, 2)", "(K, N, C)"]),
    (lambda a: a.update(logits=a["logits"][:, :0]), ["(4, 0, 2)", "(K, N, C)"]),
    (lambda a: a.update(noise_std=np.ones(K)), ["with noise_std", "categorical"]),
    (lambda a: a.update(split=np.array("shifted")), ["'shifted'", "not 'validation'"]),
    (lambda a: a.update(logits=a["logits"][::-1] * 1.1), ["NLL", "another run or split"]),
]


@pytest.mark.parametrize(("alter", "parts"), ALTERED, ids=[" ".join(p) for _, p in ALTERED])
def test_a_damaged_file_is_one_clear_line(run: Path, alter: Change, parts: list[str]) -> None:
    change(run, "validation", alter)
    message = refused(run)
    assert "validation.npz" in message
    for part in parts:
        assert part in message
    assert len(load_predictions(run, "shifted")) == N + 5


def test_predictions_of_another_split_are_refused(run: Path) -> None:
    """Also where they do not say of which they are, by their number or by their figures."""
    folder = run / "predictions"
    (folder / "validation.npz").write_bytes((folder / "shifted.npz").read_bytes())
    assert "holds predictions of split 'shifted'" in refused(run)
    change(run, "validation", lambda a: a.pop("split"))
    assert re.search("on 35 examples, 30 of split validation", refused(run))
    other = {**arrays_of(classifiers(K, N, seed=9))}
    write_npz(folder / "validation.npz", other)
    assert "predictions of another run or split" in refused(run)


def test_another_number_of_members_is_refused(run: Path) -> None:
    members(run, K + 2)
    assert "of 4 members, the run has 6" in refused(run)


def test_what_is_not_there_says_how_to_get_it(run: Path, tmp_path: Path) -> None:
    message = refused(run, "mismatched")
    assert "not evaluated on 'mismatched'" in message
    assert f"eval {run} --split mismatched" in message
    (run / "predictions" / "shifted.npz").unlink()
    assert f"eval {run} --split shifted" in refused(run, "shifted")
    path = run / "metrics.shifted.json"
    write_json(path, {**read_json(path, "metrics"), "ood": {"set": "a/shifted.csv"}})
    assert f"eval {run} --ood a/shifted.csv" in refused(run, "shifted")
    (run / "metrics.json").unlink()
    assert "evaluate first" in refused(run)
    assert "metrics.json" in refused(tmp_path / "nowhere")


def test_damaged_figures_and_archives_are_named(run: Path) -> None:
    path = run / "predictions" / "validation.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "validation.npz: missing or damaged" in refused(run)
    path.write_bytes(whole)
    write_json(run / "metrics.json", {"split": "validation"})
    assert "n or split is missing" in refused(run)


def test_a_set_without_labels_has_no_figures_to_agree_with(run: Path) -> None:
    p = classifiers(K, N)
    unknown = {**arrays_of(p), "labels": np.full(N, -1)}
    write_npz(run / "predictions" / "ag_news.npz", unknown)
    row = {"nll": None, "nll_reason": "other label space"}
    write_json(run / "metrics.ag_news.json", {"split": "ag_news", "n": N, "ensemble": row})
    assert set(load_predictions(run, "ag_news").labels) == {-1}
