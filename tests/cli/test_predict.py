"""`bayesian-lora predict`: what a user pipes through it, and what goes wrong on the way.

Shapes: K members, N texts.
"""

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayesian_lora.ensemble import Ensemble
from tests.cli.predict_calls import Called, call_predict, refused, rows, save_ensemble


@pytest.fixture(scope="module")
def saved(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random members of a task on one text, called as one of the registry."""
    return save_ensemble(tiny_models, tmp_path_factory.mktemp("predict") / "one", "sst2")


@pytest.fixture(scope="module")
def pairs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a task on two texts."""
    return save_ensemble(tiny_models, tmp_path_factory.mktemp("predict") / "two", "mrpc")


@pytest.fixture(scope="module")
def numbers(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a regression; its second output is not read."""
    return save_ensemble(
        tiny_models, tmp_path_factory.mktemp("predict") / "sts", "scores", noise=0.5
    )


@pytest.fixture
def call(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Called]:
    return partial(call_predict, capfdbinary, monkeypatch)


def test_texts_as_arguments_are_answered_as_in_python(saved: Path, call: Any) -> None:
    texts = ["the food was good", "it was bad"]
    status, out, err = call(saved, *texts)
    assert (status, err) == (0, "")
    p = Ensemble.load(saved).predict(texts)
    found = rows(out)
    assert [row["text"] for row in found] == texts
    assert [row["label"] for row in found] == [("negative", "positive")[c] for c in p.predicted]
    for name, values in (
        ("probability", p.confidence),
        ("entropy", p.uncertainty["predictive_entropy"]),
        ("mutual_information", p.uncertainty["mutual_information"]),
    ):
        np.testing.assert_allclose([row[name] for row in found], values, rtol=1e-4, atol=1e-6)
    assert {row["abstain"] for row in found} == {None}


def test_standard_input_is_a_text_a_line(saved: Path, call: Any) -> None:
    text = "the food was good\r\n\nit was b\u00e4d\n"
    status, out, err = call(saved, "--batch", 2, stdin=text.encode())
    assert status == 0
    assert [row["text"] for row in rows(out)] == ["the food was good", "", "it was b\u00e4d"]
    assert [row.get("reason") for row in rows(out)] == [None, "empty text", None]
    assert err == "Empty, so without a label: 1 of 3 texts.\n"
    same = call(saved, "--input", "-", "--batch", 1, stdin=text.encode())
    found = [[row["probability"] for row in rows(o)] for o in (out, same[1])]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert call(saved, stdin=b"") == (0, "", "The input holds no text, so there is no answer.\n")


def test_a_dash_is_standard_input_and_no_text(saved: Path, call: Any) -> None:
    status, out, err = call(saved, "-", "--no-text", stdin=b"one\ntwo\n")
    assert (status, out, err) == call(saved, "--no-text", stdin=b"one\ntwo\n")
    assert len(rows(out)) == 2
    status, out, _ = call(saved, "-", "--input-format", "csv", stdin=b"text\none\n")
    assert (status, len(rows(out))) == (0, 1)


def test_a_file_is_no_text(saved: Path, call: Any, tmp_path: Path) -> None:
    """Answered as a text, its name would get a label like any other."""
    path = tmp_path / "reviews.csv"
    assert call(saved, path)[0] == 0, "it does not exist"
    path.write_text("text\none\n")
    assert refused(call(saved, path), f"{path} is a file, not a text: read it with --input {path}")


def test_csv_in_csv_out(saved: Path, call: Any, tmp_path: Path) -> None:
    wanted = ['a "good" one, with food', "two\nlines", ""]
    source, out = tmp_path / "in.csv", tmp_path / "new" / "out.csv"
    with source.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "review", "label"), *((7, t, "x") for t in wanted)])
    options = ("--input", source, "--text", "review", "--keep", "id", "--keep", "gold=label")
    status, printed, err = call(saved, *options, "--out", out, "--abstain-above", 0.0)
    assert (status, printed) == (0, "")
    assert err.splitlines()[-1] == f"3 answers in {out}"
    with out.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [
        *("id", "gold", "text", "label", "probability"),
        *("probabilities.negative", "probabilities.positive"),
        *("entropy", "mutual_information", "abstain", "reason"),
    ]
    assert [(row["id"], row["gold"], row["text"]) for row in found] == [
        ("7", "x", t) for t in wanted
    ]
    assert {row["abstain"] for row in found} == {"true"}
    both = [float(found[0][f"probabilities.{name}"]) for name in ("negative", "positive")]
    assert sum(both) == pytest.approx(1, abs=1e-6)
    again = call(saved, *options, "--out", out)
    assert refused(again, "exists already; name another file, or replace it with --overwrite")
    assert call(saved, *options, "--out", out, "--overwrite")[0] == 0
    assert [path.name for path in out.parent.iterdir()] == ["out.csv"]


def test_json_lines_in_and_texts_left_out(saved: Path, call: Any) -> None:
    lines = b'{"sentence": "good food", "id": [1]}\n\n{"sentence": "bad", "id": null}\n'
    options = ("--input-format", "jsonl", "--keep", "id", "--no-text")
    status, out, _ = call(saved, *options, stdin=lines)
    assert status == 0
    assert [row["id"] for row in rows(out)] == [[1], None]
    assert all(list(row)[:2] == ["id", "label"] for row in rows(out))


def test_pairs_of_texts(pairs: Path, call: Any, tmp_path: Path) -> None:
    first, second = "the food was good", "it was bad"
    p = Ensemble.load(pairs).predict([(first, second)])
    table = f'sentence2,sentence1\n"{second}","{first}"\n'.encode()
    path = tmp_path / "in.csv"
    path.write_bytes(table)
    for called in (
        call(pairs, first, second),
        call(pairs, stdin=f"{first}\t{second}\n".encode()),
        call(pairs, "--input", path),
        call(pairs, "--input", path, "--text", "sentence1", "--pair", "sentence2"),
    ):
        status, out, _ = called
        (row,) = rows(out)
        assert (status, row["text"], row["pair"]) == (0, first, second)
        assert row["probability"] == pytest.approx(float(p.confidence[0]), abs=1e-5)
    assert refused(call(pairs, first), "1 texts given, mrpc reads pairs of them")
    assert refused(call(pairs, stdin=b"alone\n"), "standard input:1: 1 texts between tabs")
    assert refused(call(pairs, "--input", path, "--text", "a"), "name the second's column")


def test_a_regression_gives_numbers(numbers: Path, call: Any) -> None:
    p = Ensemble.load(numbers).predict(["the food was good"])
    assert p.sd is not None
    status, out, _ = call(numbers, "the food was good", "--abstain-above", 0.1)
    (row,) = rows(out)
    assert status == 0
    assert row["mean"] == pytest.approx(p.predicted[0], abs=1e-5)
    assert row["sd"] == pytest.approx(p.sd[0], abs=1e-5)
    assert row["lower"] < row["mean"] < row["upper"]
    assert row["abstain"] is True
    assert "label" not in row
    target = call(numbers, "x", "--target-risk", 0.1)
    assert refused(target, "a regression has no wrong labels; use --abstain-above")
    score = call(numbers, "x", "--abstain-above", 1, "--score", "max_probability")
    assert refused(score, "a regression has no classes; --abstain-above acts on its sd")


def test_one_member_says_what_it_cannot_tell(saved: Path, call: Any) -> None:
    status, out, err = call(saved, "good food", "--k", 1)
    assert (status, rows(out)[0]["mutual_information"]) == (0, None)
    assert err.startswith("mutual_information is null: one member alone")


def test_a_damaged_line_is_named_and_what_came_before_stays(
    saved: Path, call: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    damaged = b"good\nbad\n\xff\nfood\n"
    status, printed, err = call(saved, "--batch", 2, stdin=damaged)
    assert (status, [row["text"] for row in rows(printed)]) == (2, ["good", "bad"])
    assert err.startswith("Error: standard input:3: not UTF-8")
    status, _, err = call(saved, "--out", out, stdin=damaged)
    part = tmp_path / "out.jsonl.part"
    assert (status, [path.name for path in tmp_path.iterdir()]) == (2, [part.name])
    assert [row["text"] for row in rows(part.read_text())] == ["good", "bad"]
    assert err.splitlines()[0] == f"Stopped; the answers before it are in {part}"
    assert refused(call(saved, "good", "--out", out), "was left by a call that stopped")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x", "--abstain-above", "-1"], "--abstain-above=-1.0: a threshold is a number from 0"),
        (["x", "--abstain-above", "nan"], "--abstain-above=nan: a threshold"),
        (["x", "--abstain-above", "1", "--target-risk", ".1"], "exclude each other"),
        (["x", "--tolerance", ".1", "--target-risk", ".1"], "exclude each other"),
        (["x", "--abstain-above", "1", "--score", "wit"], "choose predictive_entropy, mutual"),
        (["x", "--score", "max_probability"], "--score: it acts with --abstain-above and"),
        (["x", "--confidence", ".9"], "--confidence: it acts with --target-risk alone"),
        (["x", "--overwrite"], "--overwrite: it acts with --out alone"),
        (["x", "--text", "a"], "--text: it acts on an input, not on texts given as arguments"),
        (["x", "--input", "a.csv"], "--input a.csv: texts are given as arguments"),
        (["x", "--format", "xml"], "--format xml: choose jsonl or csv"),
        (["x", "--target-risk", ".1"], "has no metrics.json"),
        (["x", "--target-risk", "1.5"], "--target-risk=1.5: a share of wrong labels"),
        (["x", "--target-risk", ".1", "--confidence", "1"], "--confidence=1.0: from 0"),
        (["--input", "no.csv"], "--input no.csv: no such file"),
        (["--input", "."], "--input .: a folder; name a file in it"),
        (["--input", "in.parquet"], ".parquet is not read piece by piece; give .jsonl"),
        (["--input", "in.txt", "--keep", "id"], "in.txt: lines of text have no columns"),
        (["--keep", "id"], "standard input: has it columns, for --text, --pair and --keep?"),
        (["--input-format", "xml"], "--input-format xml: choose lines, jsonl, csv, tsv"),
        (
            ["--input", "in.csv"],
            "in.csv:1: no column sentence or text; name the texts' with --text",
        ),
        (["--input", "in.csv", "--text", "a", "--keep", "b"], "in.csv:1: no column 'b'"),
    ],
)
def test_mistakes_are_one_line_and_load_no_model(
    saved: Path,
    call: Any,
    options: Sequence[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in.csv", "in.txt", "in.parquet"):
        Path(name).write_text("a\nb\n")
    monkeypatch.setattr("bayesian_lora.experiment.predicting.load_model", pytest.fail)
    assert refused(call(saved, *options), message)


def test_help_shows_examples(call: Any) -> None:
    status, out, _ = call("--help")
    assert status == 0
    assert "Examples: bayesian-lora predict runs/demo" in " ".join(out.split())
