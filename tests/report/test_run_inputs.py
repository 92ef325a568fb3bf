"""Other sets beside the task's, and single inputs with their texts."""

import copy
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from bayesian_lora import metrics
from bayesian_lora.manifest import write_manifest
from bayesian_lora.member_files import MemberRecord
from bayesian_lora.predict import Predictions
from bayesian_lora.report.page import Chart, Missing, Table, Text
from bayesian_lora.report.run_calibration import calibration, selective
from bayesian_lora.report.run_files import RunFiles, read_run
from bayesian_lora.report.run_inputs import LISTED, LONGEST, Texts, entropy_chart, inputs, shifted
from bayesian_lora.utils.files import read_npz, write_npz
from tests.report.finished_runs import CHAINS, EXAMPLES, HEAD, LABELS, MEMBERS

TEXTS = Texts({i: (f"text {i}",) for i in range(EXAMPLES)})


def tables(files: RunFiles, texts: Texts = TEXTS) -> list[Table]:
    return [block for block in inputs(files, texts).blocks if isinstance(block, Table)]


def test_histograms_hold_every_input(run_files: RunFiles) -> None:
    own, other = run_files.predictions["validation"], run_files.predictions["shifted"]
    found = entropy_chart("validation", own, {"shifted": other})
    for trace, p in zip(found.figure["data"], (own, other), strict=True):
        assert sum(trace["y"]) == pytest.approx(1, abs=1e-3)
        entropy = metrics.uncertainty_per_example(p.logits, p.weights)["predictive_entropy"]
        mean = np.dot(trace["x"], trace["y"])
        assert mean == pytest.approx(entropy.mean(), abs=np.log(2) / 30)
        assert f"{trace['name']} {entropy.mean():.3f}" in found.text


def test_certain_and_utterly_uncertain_inputs_are_in_the_outer_bins() -> None:
    logits = np.array([[[40.0, -40.0], [0.0, 0.0]]])
    p = Predictions(logits, np.zeros(2, int), np.ones(1), np.arange(2))
    shares = entropy_chart("s", p, {}).figure["data"][0]["y"]
    assert shares[0] == shares[-1] == 0.5


def test_scores_of_a_foreign_set(run_files: RunFiles) -> None:
    blocks = shifted(run_files).blocks
    table, precision = (b for b in blocks if isinstance(b, Table) and "telling" in b.caption)
    assert table.caption == "AUROC: telling shifted (400 inputs) from validation (400)"
    assert list(table.columns)[1:4] == ["posterior", "MAP", "deep ensemble"]
    assert table.rows[0][0].text == "predictive entropy"
    assert table.rows[0][1].text == "0.7100 ± 0.0200"
    assert table.rows[0][-1].text == "+0.0310 ± 0.0100"
    assert "By chance the AUROC is 0.5." in table.note
    assert precision.rows[0][-1].text == "+0.0200 ± 0.0200"
    assert "By chance the AUPR is 0.500." in precision.note


@pytest.mark.parametrize(
    ("auroc", "words"),
    [
        (0.71, "is higher on shifted than on validation: AUROC 0.710 ± 0.020"),
        (0.53, "is not shown to tell shifted from validation"),
        (0.4, "is lower on shifted than on validation"),
    ],
)
def test_the_words_on_a_foreign_set_follow_its_auroc(
    run_files: RunFiles, auroc: float, words: str
) -> None:
    other = copy.deepcopy(dict(run_files.others["shifted"]))
    other["ood"]["scores"]["predictive_entropy"] = {"auroc": auroc, "auroc_se": 0.02}
    first = shifted(dataclasses.replace(run_files, others={"shifted": other})).blocks[0]
    assert isinstance(first, Text)
    assert words in first.text


def test_few_inputs_are_but_a_hint(run_files: RunFiles) -> None:
    other = copy.deepcopy(dict(run_files.others["shifted"]))
    other["ood"]["outside_n"] = 3
    first = shifted(dataclasses.replace(run_files, others={"shifted": other})).blocks[0]
    assert isinstance(first, Text)
    assert first.text.endswith("rests on 3 inputs of one of them: a hint.")


def test_where_nothing_was_sampled_no_posterior_is_spoken_of(run_files: RunFiles) -> None:
    manifest = {**run_files.manifest, "sampler": {"name": "map"}}
    files = dataclasses.replace(run_files, manifest=manifest)
    said = [b.text for b in shifted(files).blocks if isinstance(b, Text)]
    assert said[0].startswith("The deep ensemble's predictive entropy")
    tables = [b for b in shifted(files).blocks if isinstance(b, Table) and "telling" in b.caption]
    assert [list(t.columns)[1:] for t in tables] == [
        ["deep ensemble", "MAP", "deep ensemble less MAP"]
    ] * 2
    for section in (calibration(files), selective(files)):
        charts = [b for b in section.blocks if isinstance(b, Chart)]
        names = {trace["name"] for trace in charts[0].figure["data"]}
        assert "deep ensemble" in names
        assert "posterior ensemble" not in names


def test_a_set_of_other_labels_says_why_it_has_no_accuracy(run_files: RunFiles) -> None:
    other = copy.deepcopy(dict(run_files.others["shifted"]))
    other["ood"]["labelled"] = False
    other["ensemble"] = {"accuracy": None, "accuracy_reason": "other label space: sports"}
    blocks = shifted(dataclasses.replace(run_files, others={"shifted": other})).blocks
    assert Missing("Accuracy on shifted", "other label space: sports") in blocks


def test_figures_of_a_set_that_are_an_earlier_ensembles_are_not_shown(
    run_folder: Path, tmp_path: Path
) -> None:
    """The run was extended to twice the members, and evaluated again on its default split."""
    root = Path(shutil.copytree(run_folder, tmp_path / "run"))
    own = root / "predictions" / "validation.npz"
    p = read_npz(own)
    more = {"logits": np.tile(p["logits"], (2, 1, 1)), "weights": np.tile(p["weights"] / 2, 2)}
    write_npz(own, {**p, **more})
    write_manifest(root, HEAD, [MemberRecord("", k % CHAINS, k, k) for k in range(2 * MEMBERS)])
    (block,) = shifted(read_run(root)).blocks
    assert isinstance(block, Missing)
    assert block.what == "shifted"
    assert "predictions of 20 members, the run has 40; store it anew with" in block.reason


def test_one_set_of_an_earlier_ensemble_leaves_the_others_as_they_are(
    run_files: RunFiles,
) -> None:
    files = dataclasses.replace(
        run_files,
        others={**run_files.others, "old": run_files.others["shifted"]},
        missing={"predictions of old": "of 5 members"},
    )
    found = list(shifted(files).blocks)
    found.remove(Missing("old", "of 5 members"))
    assert found == shifted(run_files).blocks


def test_no_other_set_says_how_to_get_one(run_files: RunFiles) -> None:
    found = shifted(dataclasses.replace(run_files, others={})).blocks
    assert len(found) == 1
    assert isinstance(found[0], Missing)
    assert "--ood" in found[0].reason


def test_the_most_uncertain_come_first(run_files: RunFiles) -> None:
    p = run_files.predictions["validation"]
    entropy = metrics.uncertainty_per_example(p.logits, p.weights)["predictive_entropy"]
    shown = [int(row[0].text) for row in tables(run_files)[0].rows]
    assert shown == [int(p.example_id[i]) for i in np.argsort(-entropy)[:LISTED]]
    assert [row[1].text for row in tables(run_files)[0].rows] == [f"text {i}" for i in shown]


def test_the_confidently_wrong_are_wrong_and_confident(run_files: RunFiles) -> None:
    p, table = run_files.predictions["validation"], tables(run_files)[1]
    wrong = p.probs.argmax(1) != p.labels
    assert table.caption.endswith(f"of {wrong.sum()} that are wrong")
    label, predicted, sure = (
        list(table.columns).index(name) for name in ("Label", "Predicted", "Probability")
    )
    assert all(row[label].text != row[predicted].text for row in table.rows)
    assert {row[label].text for row in table.rows} <= set(LABELS)
    shown = [float(row[sure].text) for row in table.rows]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == pytest.approx(p.probs.max(1)[wrong].max(), abs=5e-4)


def test_texts_are_found_by_the_examples_number(run_files: RunFiles) -> None:
    p = run_files.predictions["validation"]
    moved = dataclasses.replace(p, example_id=p.example_id + 1000)
    files = dataclasses.replace(run_files, predictions={"validation": moved})
    texts = Texts({1000 + i: (f"first {i}", f"second {i}") for i in range(EXAMPLES)})
    table = tables(files, texts)[0]
    assert list(table.columns)[1:3] == ["Text", "Second text"]
    number = int(table.rows[0][0].text) - 1000
    assert [c.text for c in table.rows[0][1:3]] == [f"first {number}", f"second {number}"]
    assert "no example of this number" in tables(files, TEXTS)[0].missing[0]


def test_without_data_the_figures_stay_and_the_reason_is_said(run_files: RunFiles) -> None:
    blocks = inputs(run_files, Texts({}, "no data folder")).blocks
    assert isinstance(blocks[-1], Missing)
    assert blocks[-1].reason == "no data folder"
    assert isinstance(blocks[0], Table)
    assert "Text" not in blocks[0].columns
    assert len(blocks[0].rows) == LISTED


def test_long_texts_are_cut(run_files: RunFiles) -> None:
    long = Texts(dict.fromkeys(range(EXAMPLES), ("word\n" * 1000,)))
    shown = tables(run_files, long)[0].rows[0][1]
    assert len(shown.text) <= LONGEST
    assert shown.text.endswith("…")
    assert "\n" not in shown.text
    assert shown.long


def test_one_member_has_no_mutual_information(run_files: RunFiles) -> None:
    p = run_files.predictions["validation"]
    one = Predictions(p.logits[:1], p.labels, np.ones(1), p.example_id)
    found = tables(dataclasses.replace(run_files, predictions={"validation": one}))[0]
    assert found.rows[0][-1].text == "not available"
    assert found.missing == ["one member cannot disagree"]


def test_a_regression_lists_spread_and_error(run_files: RunFiles) -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(5, 40, 1))
    labels = np.zeros(40, np.float32)
    labels[7] = 50
    p = Predictions(means, labels, np.full(5, 0.2), np.arange(40), noise_std=np.full(5, 0.3))
    task = {**run_files.manifest["task"], "likelihood": "gaussian"}
    files = dataclasses.replace(
        run_files, predictions={"validation": p}, manifest={**run_files.manifest, "task": task}
    )
    uncertain, wrong = tables(files)
    sd = np.sqrt(0.3**2 + means[..., 0].var(axis=0))
    assert int(uncertain.rows[0][0].text) == sd.argmax()
    assert float(uncertain.rows[0][-2].text) == pytest.approx(sd.max(), abs=5e-4)
    assert int(wrong.rows[0][0].text) == 7


def test_predictions_that_cannot_be_read_say_why(run_files: RunFiles) -> None:
    files = dataclasses.replace(
        run_files, predictions={}, missing={"predictions of validation": "it is broken"}
    )
    block = inputs(files, TEXTS).blocks[0]
    assert isinstance(block, Missing)
    assert block.reason == "it is broken"
    assert not any(isinstance(b, Chart) for b in shifted(files).blocks)
