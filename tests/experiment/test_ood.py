"""A finished run on sets it was not trained on: figures, files, and what is refused.

Shapes: K members, M warm starts, N examples.
"""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bayesian_lora.assessment.stored import load_predictions
from bayesian_lora.cli import ood as command
from bayesian_lora.config import dump_run_config, load_config
from bayesian_lora.data.synthetic import generate
from bayesian_lora.ensemble import Ensemble, map_ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.evaluate import evaluate_run
from bayesian_lora.experiment.ood import evaluate_ood
from bayesian_lora.experiment.train import train
from bayesian_lora.metrics import ensemble_probs, uncertainty_per_example
from bayesian_lora.progress import Progress
from bayesian_lora.scores.ood_scores import ONE_MEMBER, SCORES
from bayesian_lora.utils.files import write_json

from .small_runs import SMALL, K, small_run

STARTS = 2


@pytest.fixture(scope="module")
def finished(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tiny_models["bert"], tmp_path_factory.mktemp("ood"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Said(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str = "") -> None:
        self.lines.append(line)


def write(path: Path, rows: list[list[str]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def reviews(path: Path, n: int = 40, label: str = "label") -> str:
    """Sentences of the shifted split, labelled or not."""
    found = generate("shifted", size=n)
    rows = zip(found.texts[0], map(str, found.labels), strict=True)
    return write(path, [["text", label], *map(list, rows)])


def stored(run: Path, name: str) -> dict[str, Any]:
    value = json.loads((run / f"metrics.{name}.json").read_text(), parse_constant=pytest.fail)
    del value["checksum"]
    return value


@pytest.fixture(scope="module")
def on_shifted(finished: Path) -> tuple[Path, dict[str, Any], list[str]]:
    run = Path(shutil.copytree(finished, finished.parent / "shifted"))
    said = Said()
    return run, evaluate_ood(run, "shifted", progress=said), said.lines


def test_a_split_of_the_task_has_all_figures_of_eval_and_the_scores(
    on_shifted: tuple[Path, dict[str, Any], list[str]],
) -> None:
    run, figures, _ = on_shifted
    assert stored(run, "shifted") == figures
    assert (figures["split"], figures["n"]) == ("shifted", 600)
    assert {"diagnostics", "truth", "standard_errors"} <= figures.keys()
    ood = figures["ood"]
    assert (ood["against"], ood["inside_n"], ood["outside_n"]) == ("validation", 600, 600)
    assert (ood["labelled"], ood["shared"], ood["base_rate"]) == (True, 0, 0.5)


def test_scores_are_those_of_the_stored_predictions(
    on_shifted: tuple[Path, dict[str, Any], list[str]],
) -> None:
    run, figures, _ = on_shifted
    pair = [load_predictions(run, split) for split in ("validation", "shifted")]
    truth = np.repeat([0, 1], 600)
    by_hand = [uncertainty_per_example(p.logits, p.weights) for p in pair]
    for score in SCORES[:3]:
        values = np.concatenate([scores[score] for scores in by_hand])
        found = figures["ood"]["scores"][score]
        assert found["auroc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-9)
        assert 0 < found["auroc_se"] < 0.05
    top = np.concatenate([ensemble_probs(p.logits, p.weights).max(1) for p in pair])
    found = figures["ood"]["scores"]["max_probability"]["auroc"]
    assert found == pytest.approx(roc_auc_score(truth, -top), abs=1e-9)


def test_warm_starts_stand_beside_the_posterior(
    on_shifted: tuple[Path, dict[str, Any], list[str]],
) -> None:
    _, figures, lines = on_shifted
    ood = figures["ood"]
    assert ood["map"]["mutual_information"]["auroc_reason"] == ONE_MEMBER
    assert ood["map_ensemble"]["mutual_information"]["auroc"] is not None
    assert ood["map"]["predictive_entropy"]["auroc_sd"] > 0
    difference = ood["differences"]["ensemble-map"]["predictive_entropy"]
    first, other = (ood[kind]["predictive_entropy"]["auroc"] for kind in ("scores", "map"))
    assert difference["auroc"] == pytest.approx(first - other)
    assert difference["auroc_se"] > 0
    shown = f"{first:.4f} ± {ood['scores']['predictive_entropy']['auroc_se']:.4f}"
    assert any(shown.replace(" 0.", " .") in line for line in lines)


def test_warm_starts_are_predicted_with_as_they_stand(run: Path, tmp_path: Path) -> None:
    path = reviews(tmp_path / "mine.csv")
    ood = evaluate_ood(run, path, progress=Said())["ood"]
    starts, texts = map_ensemble(run), generate("shifted", size=40).texts[0]
    assert len(starts) == STARTS
    inside = generate("validation").texts[0]
    areas = []
    for x, y in zip(starts.predict(inside).logits, starts.predict(texts).logits, strict=True):
        scores = [uncertainty_per_example(z[None], [1.0])["predictive_entropy"] for z in (x, y)]
        areas.append(roc_auc_score(np.repeat([0, 1], [600, 40]), np.concatenate(scores)))
    assert ood["map"]["predictive_entropy"]["auroc"] == pytest.approx(np.mean(areas), abs=1e-4)


def test_a_file_of_the_tasks_labels_has_accuracy_and_predictions(run: Path, tmp_path: Path) -> None:
    figures = evaluate_ood(run, reviews(tmp_path / "mine.csv"), progress=Said())
    assert stored(run, "mine") == figures
    p = load_predictions(run, "mine")
    assert p.logits.shape == (K, 40, 2)
    np.testing.assert_array_equal(p.labels, generate("shifted", size=40).labels)
    hit = (p.probs.argmax(1) == p.labels).mean()
    assert figures["ensemble"]["accuracy"] == pytest.approx(hit)
    assert figures["ensemble"]["k"] == K
    assert figures["map_temperature_scaled"]["temperature"] > 0
    alone = Ensemble.load(run).predict(generate("shifted", size=40).texts[0])
    np.testing.assert_allclose(p.logits, alone.logits, atol=1e-4)


def test_a_set_of_other_labels_has_scores_but_no_accuracy(run: Path, tmp_path: Path) -> None:
    path = reviews(tmp_path / "bare.csv", label="stars")
    other = Path(path).read_text().replace("stars", "label").replace(",1\n", ",joy\n")
    Path(path).write_text(other)
    said = Said()
    figures = evaluate_ood(run, path, progress=said)
    assert stored(run, "bare") == figures
    reason = figures["ensemble"]["accuracy_reason"]
    assert reason.startswith("other label space than synthetic's: ")
    for name in ("accuracy", "nll", "ece", "brier"):
        assert figures["ensemble"][name] is None
        assert figures["map"][name] == {"mean": None, "sd": None, "reason": reason}
    assert figures["uncertainty"]["predictive_entropy"] > 0
    assert figures["ood"]["scores"]["max_probability"]["auroc"] is not None
    assert (load_predictions(run, "bare").labels == -1).all()
    assert any(f"Accuracy on bare is not available: {reason}" in line for line in said.lines)


def test_a_run_that_was_not_evaluated_is_evaluated_first(run: Path, tmp_path: Path) -> None:
    (run / "metrics.json").unlink()
    (run / "predictions" / "validation.npz").unlink()
    evaluate_ood(run, reviews(tmp_path / "mine.csv"), progress=Said())
    assert (run / "metrics.json").is_file()
    assert load_predictions(run).num_members == K


def test_it_can_be_told_from_another_split(
    on_shifted: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(on_shifted[0], tmp_path / "run"))
    figures = evaluate_ood(run, "validation", split="shifted", progress=Said())
    assert figures["ood"]["against"] == "shifted"
    assert json.loads((run / "metrics.json").read_text())["ood"] == figures["ood"]
    assert load_predictions(run).num_members == K


def test_evaluating_the_same_ensemble_again_keeps_what_was_told(
    on_shifted: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(on_shifted[0], tmp_path / "run"))
    path = run / "metrics.shifted.json"
    told = json.loads(path.read_text())["ood"]
    assert "ood" not in evaluate_run(run, split="shifted", progress=Said())
    assert json.loads(path.read_text())["ood"] == told
    other = json.loads(path.read_text())
    other["ensemble"]["nll"] += 0.1
    write_json(path, other)
    evaluate_run(run, split="shifted", progress=Said())
    assert "ood" not in json.loads(path.read_text()), "it was another ensemble's"


def before(run: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime for p in run.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["validation", "copy"])
def test_the_very_set_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    if name == "copy":
        rows = [["text"], *([text] for text in generate("validation").texts[0][:30])]
        name = write(tmp_path / "copy.csv", rows)
    there = before(run)
    with pytest.raises(InputError, match=r"are in split validation of synthetic, the very set"):
        evaluate_ood(run, name, progress=Said())
    assert before(run) == there


def test_texts_that_are_in_both_are_counted(run: Path, tmp_path: Path) -> None:
    path = Path(reviews(tmp_path / "mine.csv"))
    with path.open("a", newline="") as file:
        csv.writer(file).writerow([generate("validation").texts[0][3], "1"])
    said = Said()
    assert evaluate_ood(run, str(path), progress=said)["ood"]["shared"] == 1
    assert "1 of the 41 texts of mine are in validation" in said.lines


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shifte", "did you mean shifted"),
        ("mnli", "has 2 texts an example"),
        ("nowhere.csv", "no such file"),
    ],
)
def test_mistakes_are_told_before_any_work(name: str, message: str, run: Path) -> None:
    there = before(run)
    with pytest.raises(InputError, match=message):
        evaluate_ood(run, name, progress=Said())
    assert before(run) == there


def test_predictions_of_other_examples_are_refused(run: Path, tmp_path: Path) -> None:
    path = run / "predictions" / "validation.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["example_id"] = arrays["example_id"] + 1
    np.savez(path, **arrays)
    with pytest.raises(InputError, match="of other examples than split validation has now"):
        evaluate_ood(run, reviews(tmp_path / "mine.csv"), progress=Said())
    assert not (run / "metrics.mine.json").exists()


def test_two_files_of_one_name_keep_their_figures_each(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both were given by the same words, from two folders."""
    said = Said()
    for n, folder in ((30, "a"), (20, "b"), (31, "a"), (21, "b")):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        reviews(Path("mine.csv"), n)
        evaluate_ood(run, "mine.csv", progress=said)
    first, other = stored(run, "mine"), stored(run, "mine_2")
    assert [(f["split"], f["n"]) for f in (first, other)] == [("mine", 31), ("mine_2", 21)]
    assert [f["ood"]["set"] for f in (first, other)] == [
        str((tmp_path / folder / "mine.csv").resolve()) for folder in "ab"
    ]
    assert [len(load_predictions(run, name)) for name in ("mine", "mine_2")] == [31, 21]
    assert len(list(run.glob("metrics.mine*"))) == 2
    assert any(line.endswith("is stored as mine_2: mine is another file's") for line in said.lines)


def test_a_single_example_outside_has_no_standard_error(run: Path, tmp_path: Path) -> None:
    path = reviews(tmp_path / "one.csv", 1)
    row = evaluate_ood(run, path, progress=Said())["ood"]["scores"]["predictive_entropy"]
    assert row["auroc"] is not None
    assert row["auroc_se"] is None
    assert "one example" in row["auroc_se_reason"]


def test_the_command_prints_the_scores(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = {"k": None, "single": False, "tolerance": None}
    path = reviews(tmp_path / "mine.csv")
    command.evaluate_ood(run, path, split=None, chosen=nothing, data_dir=None, device="cpu")
    assert "AUROC (0.5 tells nothing), mine against validation" in capsys.readouterr().out


def test_a_run_without_sampling_is_its_own_deep_ensemble(finished: Path, tmp_path: Path) -> None:
    config = load_config(
        finished.parent / "small.yaml",
        ["sampler.name=map", "sampler.num_samples=2", f"output.dir={tmp_path / 'map'}"],
    )
    train(config)
    path = reviews(tmp_path / "mine.csv")
    said = Said()
    ood = evaluate_ood(tmp_path / "map", path, progress=said)["ood"]
    heads = [line for line in said.lines if "mine against validation" in line]
    assert len(heads) == 2
    for head in heads:
        assert re.split(r"\s{2,}", head)[1:] == ["deep ensemble", "MAP (mean)", "ensemble − MAP"]
    assert ood["scores"] == ood["map_ensemble"]
    difference = ood["differences"]["ensemble-map_ensemble"]["predictive_entropy"]
    assert (difference["auroc"], difference["auroc_se"]) == (0, None)


def test_a_regression_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(SMALL.format(model=tiny_models["bert"], folder=tmp_path))
    config = dump_run_config(load_config(small, ["data.name=stsb"]))
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="stsb is a regression, and the scores are entropies of"):
        evaluate_ood(tmp_path, "mrpc", progress=Said())


REAL = """\
data: {{name: {task}, dir: {data}, train_examples: 40, batch_size: 8, max_length: 32}}
model: {{name: {model}, lora: {{rank: 2, alpha: 4.0}}}}
prior: {{std: 0.3}}
train: {{epochs: 1, lr: 5.0e-3}}
sampler: {{step_size: 1.0e-3, burn_in: 2, thin: 2, num_samples: 2, chains: 1}}
output: {{dir: {folder}}}
"""
FEW = 60


def shortened(real: Path, folder: Path, names: tuple[str, ...]) -> None:
    """The first rows of some files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (real / name).open(newline="", encoding="utf-8") as file:
            if name.endswith(".tsv"):
                lines = [file.readline() for _ in range(FEW + 1)]
                (folder / name).write_text("".join(lines), encoding="utf-8")
                continue
            rows = [row for _, row in zip(range(FEW + 1), csv.reader(file), strict=False)]
        write(folder / name, rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "name", "labelled", "files"),
    [
        (
            "sst2",
            "uci",
            True,
            (
                "glue/SST-2/train.tsv",
                "glue/SST-2/dev.tsv",
                "uci_sentiment/amazon_cells_labelled.tsv",
                "uci_sentiment/imdb_labelled.tsv",
                "uci_sentiment/yelp_labelled.tsv",
            ),
        ),
        ("imdb", "ag_news", False, ("imdb/train.csv", "imdb/test.csv", "ag_news/test.csv")),
        (
            "mnli",
            "mismatched",
            True,
            (
                "glue/MNLI/train.tsv",
                "glue/MNLI/dev_matched.tsv",
                "glue/MNLI/dev_mismatched_1k_tokenised.tsv",
            ),
        ),
    ],
)
def test_real_data(
    task: str,
    name: str,
    labelled: bool,
    files: tuple[str, ...],
    real_data: Path,
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    shortened(real_data, tmp_path / "data", files)
    config = tmp_path / "small.yaml"
    run = tmp_path / "run"
    places = {"data": tmp_path / "data", "model": tiny_models["bert"], "folder": run}
    config.write_text(REAL.format(task=task, **places))
    train(load_config(config))
    figures = evaluate_ood(run, name, progress=Said())
    assert stored(run, name) == figures
    assert figures["ood"]["labelled"] is labelled
    assert (figures["ensemble"]["accuracy"] is not None) is labelled
    row = figures["ood"]["scores"]["mutual_information"]
    assert 0 <= row["auroc"] <= 1
    assert 0 < row["auroc_se"] < 0.2
