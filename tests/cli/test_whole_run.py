"""Whole runs through the command line, of five kinds: what is on disk, in the figures, on screen.

Shapes: M chains, K members, N examples, C classes.
"""

import contextlib
import csv
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.special import logsumexp, softmax
from scipy.stats import norm, rankdata
from sklearn.metrics import accuracy_score, log_loss

from bayesian_lora.cli.main import main
from bayesian_lora.data.synthetic import generate
from bayesian_lora.experiment.phases import INITIAL_SIZE

M, K, THIN, BURN_IN, BATCH, TRACE_EVERY = 2, 6, 4, 3, 8, 2
DRAWS = K // M
SMALL: dict[str, Any] = {
    "data": {"name": "synthetic", "train_examples": 60, "batch_size": BATCH, "max_length": 48},
    "model": {"lora": {"rank": 2, "alpha": 4.0}},
    "prior": {"std": 0.3},
    "train": {"epochs": 2, "lr": 5.0e-3},
    "sampler": {"burn_in": BURN_IN, "thin": THIN, "num_samples": K, "chains": M},
}
SMALL["sampler"] |= {"step_size": 1.0e-3, "trace_every": TRACE_EVERY}
CLASSES = ["worse", "alike", "better"]


@dataclass
class Case:
    """One finished run."""

    family: str
    model: Path
    folder: Path
    printed: str
    texts: list[list[str]]
    labels: list[Any]
    num_labels: int
    split: str = "validation"

    @property
    def regression(self) -> bool:
        return self.num_labels == 1

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text(), parse_constant=pytest.fail)

    def lines(self, name: str) -> list[dict[str, Any]]:
        text = (self.folder / name).read_text()
        return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]

    def predictions(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "predictions" / f"{self.split}.npz") as archive:
            return dict(archive)


def write_pairs(path: Path, split: str, size: int, regression: bool) -> tuple[list, list]:
    """A CSV of sentence pairs whose label follows the two sentences' true probabilities."""
    data = generate(split, size=2 * size)
    assert data.true_probs is not None
    p = data.true_probs[:, 1]
    texts = [data.texts[0][:size], data.texts[0][size:]]
    gap = p[:size] - p[size:]
    names = [CLASSES[0 if g < -0.2 else 2 if g > 0.2 else 1] for g in gap]
    labels = [round(2.5 + 2.5 * g, 3) for g in gap] if regression else names
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["first", "second", "score"], *zip(*texts, labels)])  # noqa: B905
    return texts, labels if regression else [CLASSES.index(name) for name in names]


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert", "regression", "pairs"])
def case(
    request: pytest.FixtureRequest,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    root = tmp_path_factory.mktemp("case")
    kind: str = request.param
    family = {"regression": "bert", "pairs": "roberta"}.get(kind, kind)
    config, folder = root / "small.yaml", root / "run"
    config.write_text(yaml.safe_dump(SMALL))
    keys = [f"model.name={tiny_models[family]}", f"output.dir={folder}"]
    if kind in tiny_models:
        data = generate("validation")
        texts, labels, classes, split = list(data.texts), data.labels.tolist(), 2, "validation"
    else:
        numeric, split = kind == "regression", "dev"
        write_pairs(root / "train.csv", "train", 60, numeric)
        texts, labels = write_pairs(root / "dev.csv", "validation", 30, numeric)
        classes = 1 if numeric else len(CLASSES)
        files = f"train: {root}/train.csv, dev: {root}/dev.csv"
        keys += ["data.name=mine", f"data.files={{{files}}}", "data.eval_split=dev"]
        keys += ["data.text_columns=[first,second]", "data.label_column=score"]
        keys += ["data.regression=true" if numeric else f"data.label_names=[{','.join(CLASSES)}]"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        main(["train", str(config), *keys])
    assert ended.value.code == 0
    out = printed.getvalue()
    return Case(family, tiny_models[family], folder, out, texts, labels, classes, split)


def test_the_folder_holds_what_the_contract_lists(case: Case) -> None:
    found = {p.relative_to(case.folder).as_posix() for p in case.folder.rglob("*") if p.is_file()}
    folders = ("map", "map/early_stopped")
    members = [f"{folder}/chain_{m}" for folder in folders for m in range(M)]
    members += [f"samples/sample_{k:04d}" for k in range(1, 7)]
    files = {
        f"{m}/{n}" for m in members for n in ("adapter_config.json", "adapter_model.safetensors")
    }
    files |= {"config.yaml", "run.json", "members.jsonl", "ensemble.json"}
    files |= {"log.jsonl", "metrics.csv"}
    files |= {"traces/part_00001.npz", "traces/starts.npz", "metrics.json"}
    files |= {f"checkpoint/{name}.safetensors" for name in ("newest", "previous")}
    assert found == files | {f"predictions/{case.split}.npz"}


def test_run_json_says_how_the_run_came_about(case: Case) -> None:
    run = case.json("run.json")
    assert (run["status"], run["seed"], run["device"], run["members"]) == ("finished", 0, "cpu", K)
    wanted = {"versions", "data", "git_commit", "wall_s", "train_s", "sample_s", "started", "ended"}
    assert wanted <= run.keys()
    assert set(run["data"]["fingerprint"]) == {"train", "validation", "evaluation"}
    assert run["data"]["sizes"] == {"train": 54, "validation": 6, "evaluation": len(case.labels)}
    assert run["versions"]["torch"] == torch.__version__


def test_the_log_has_a_line_a_step(case: Case) -> None:
    lines = case.lines("log.jsonl")
    steps = {"map": 2 * 7, "burn_in": BURN_IN, "sampling": THIN * DRAWS}
    assert [(x["phase"], x["step"]) for x in lines] == [
        (phase, i) for phase, total in steps.items() for i in range(1, total + 1)
    ]
    for line in lines:
        assert {"phase", "step", "loss", "lr", "examples_per_s"} <= line.keys()
        assert len(line["loss"]) == M
        assert ("accuracy" in line) != case.regression
    heats = [x["t_eff"] for x in lines if x["phase"] == "sampling" and "t_eff" in x]
    assert np.array(heats).shape == (THIN * DRAWS - 1, M)
    assert (np.array(heats) > 1).all()
    assert case.json("run.json")["t_eff"] == pytest.approx(np.mean(heats[-1]))


def test_members_are_listed_draw_by_draw(case: Case) -> None:
    rows = case.lines("members.jsonl")
    keys = {"path", "chain", "draw", "step", "weight", "sha256", "noise_std"}
    for i, row in enumerate(rows):
        assert keys <= row.keys()
        assert row["path"] == f"samples/sample_{i + 1:04d}"
        draw, chain = divmod(i, M)
        assert (row["draw"], row["chain"]) == (draw, chain)
        assert row["step"] == BURN_IN + THIN * (draw + 1)
        assert row["weight"] == 1.0
        assert (row["noise_std"] is not None) == case.regression
        weights = (case.folder / row["path"] / "adapter_model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == row["sha256"]
    assert len(rows) == K
    noise = [[row["noise_std"] for row in rows if row["chain"] == m] for m in range(M)]
    manifest = case.json("ensemble.json")
    fitted = [row["noise_std"] for row in manifest["starts"]]
    assert noise == [[std] * DRAWS for std in fitted], "the noise scale belongs to the chain"
    assert len(set(fitted)) == (M if case.regression else 1)
    assert manifest["members"] == rows
    sampler = manifest["sampler"]
    assert (sampler["name"], sampler["temperature"]) == ("sgld", 1.0)
    assert (sampler["tempering"], sampler["starts"]) == ("posterior", "independent")
    assert sampler["exactness"]
    assert sampler["t_eff"] == case.json("run.json")["t_eff"]


def test_any_member_is_an_adapter_that_peft_loads(case: Case) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(case.model)
    few = [column[:7] for column in case.texts]
    inputs = tokenizer(*few, truncation=True, max_length=48, padding=True, return_tensors="pt")
    stored = case.predictions()["logits"]
    for k in (0, K - 1):
        base = AutoModelForSequenceClassification.from_pretrained(
            case.model, num_labels=case.num_labels
        )
        folder = case.folder / "samples" / f"sample_{k + 1:04d}"
        model = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            logits = model(**inputs).logits.numpy()
        np.testing.assert_allclose(logits, stored[k, :7], atol=1e-5)


def test_traces_are_chains_by_rows_of_finite_numbers(case: Case) -> None:
    with np.load(case.folder / "traces" / "part_00001.npz") as archive:
        traces = dict(archive)
    with np.load(case.folder / "traces" / "starts.npz") as archive:
        starts = dict(archive)
    rows = THIN * DRAWS // TRACE_EVERY
    assert {name: x.shape for name, x in traces.items()} == dict.fromkeys(traces, (M, rows))
    assert {name: x.shape for name, x in starts.items()} == dict.fromkeys(traces, (M,))
    probe = "probe_mean[0]" if case.regression else "probe_logprob[0]"
    assert {"log_posterior", probe, "delta_w_projection[0]"} <= traces.keys()
    assert all(np.isfinite(x).all() for x in traces.values())
    assert all(np.ptp(x, axis=1).min() > 0 for x in traces.values()), "a chain stood still"


def test_predictions_hold_every_members_logits(case: Case) -> None:
    arrays, n = case.predictions(), len(case.labels)
    assert arrays["logits"].shape == (K, n, case.num_labels)
    np.testing.assert_allclose(arrays["labels"], case.labels, rtol=1e-6)
    np.testing.assert_array_equal(arrays["example_id"], np.arange(n))
    np.testing.assert_allclose(arrays["weights"], np.full(K, 1 / K))
    assert ("noise_std" in arrays) == case.regression
    if case.regression:
        rows = case.lines("members.jsonl")
        np.testing.assert_array_equal(arrays["noise_std"], [row["noise_std"] for row in rows])


def own_figures(case: Case, members: list[int]) -> dict[str, float]:
    """The mixture's figures, computed without this package."""
    arrays = case.predictions()
    logits, y = arrays["logits"][members].astype(np.float64), arrays["labels"]
    if case.regression:
        means, std = logits[..., 0], arrays["noise_std"][members]
        density = norm.logpdf(y[None], means, std[:, None])
        return {
            "nll": -float((logsumexp(density, axis=0) - np.log(len(members))).mean()),
            "pearson": np.corrcoef(means.mean(0), y)[0, 1],
            "spearman": np.corrcoef(rankdata(means.mean(0)), rankdata(y))[0, 1],
            "rmse": float(np.sqrt(np.mean((means.mean(0) - y) ** 2))),
        }
    p = softmax(logits, axis=-1).mean(0)
    top, right = p.max(1), p.argmax(1) == y
    bins = np.minimum((top * 15).astype(int), 14)
    gaps = [abs(top[bins == b].sum() - right[bins == b].sum()) for b in range(15)]
    return {
        "accuracy": float(accuracy_score(y, p.argmax(1))),
        "nll": float(log_loss(y, p, labels=range(case.num_labels))),
        "brier": float(np.square(p - np.eye(case.num_labels)[y]).sum(1).mean()),
        "ece": sum(gaps) / len(y),
    }


def test_metrics_agree_with_an_independent_computation(case: Case) -> None:
    found, expected = case.json("metrics.json"), own_figures(case, list(range(K)))
    assert {name: found["ensemble"][name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found["ensemble"]["k"] == K
    alone = [own_figures(case, [k]) for k in range(K)]
    for name in expected:
        values = [row[name] for row in alone]
        wanted = {"mean": np.mean(values), "sd": np.std(values, ddof=1)}
        spread = {key: found["single"][name][key] for key in wanted}
        assert spread == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    if not case.regression:
        arrays = case.predictions()
        of_logits = softmax(arrays["logits"].astype(np.float64).mean(0), axis=-1)
        averaged = log_loss(arrays["labels"], of_logits, labels=range(case.num_labels))
        assert abs(averaged - expected["nll"]) > 1e-6  # so the two ways can be told apart


def test_norms_are_those_of_the_stored_tensors(case: Case) -> None:
    from safetensors.numpy import load_file

    files = sorted(case.folder.glob("samples/*/adapter_model.safetensors"))
    tensors = [np.concatenate([x.ravel() for x in load_file(f).values()]) for f in files]
    norms = [np.linalg.norm(x.astype(np.float64)) for x in tensors]
    expected = {"norm_mean": np.mean(norms), "norm_std": np.std(norms)}
    expected["norm_cv"] = expected["norm_std"] / expected["norm_mean"]
    found = case.json("metrics.json")["parameters"]
    assert found.pop("num_samples") == K
    assert found == pytest.approx(expected, rel=1e-5)


def nulls_without_reason(value: Any, where: str = "") -> list[str]:
    if isinstance(value, list):
        return [x for i, v in enumerate(value) for x in nulls_without_reason(v, f"{where}[{i}]")]
    if not isinstance(value, dict):
        return []
    bare = [
        f"{where}.{key}"
        for key, v in value.items()
        if v is None and not value.get("reason") and not value.get(f"{key}_reason")
    ]
    return bare + [x for k, v in value.items() for x in nulls_without_reason(v, f"{where}.{k}")]


def test_metrics_have_the_contracts_keys_and_a_reason_beside_every_null(case: Case) -> None:
    found = case.json("metrics.json")
    keys = {"task", "split", "n", "map", "map_ensemble", "map_temperature_scaled", "single"}
    keys |= {"ensemble", "uncertainty", "diagnostics", "parameters", "cost"}
    keys |= {"map_last", "map_early_stopped", "standard_errors", "calibration", "selective"}
    keys |= {"cumulative"}
    assert keys <= found.keys()
    assert nulls_without_reason(found) == []
    assert found["n"] == len(case.labels)
    shared = {"accuracy", "nll", "ece", "brier"}
    own = {"pearson", "spearman"} if case.regression else set()
    for name in ("map", "single"):
        assert shared | own <= found[name].keys()
        assert all({"mean", "sd"} <= figure.keys() for figure in found[name].values())
    assert all("mcse" in figure for figure in found["single"].values())
    more = {"crps", "coverage_0.9"} if case.regression else {"adaptive_ece", "aurc"}
    for name in ("map", "map_last", "map_early_stopped", "map_ensemble", "single", "ensemble"):
        assert more <= found[name].keys()
        assert {"nll", *more} <= found["standard_errors"][name].keys()
        assert found["standard_errors"][name]["nll"] > 0
    assert found["cumulative"]["k"] == list(range(1, K + 1))
    assert found["cumulative"]["nll"][-1] == pytest.approx(found["ensemble"]["nll"], rel=1e-9)
    assert shared | own <= found["map_ensemble"].keys()
    assert shared | {"temperature"} <= found["map_temperature_scaled"].keys()
    parts = {"predictive_entropy", "expected_entropy", "mutual_information"}
    assert parts <= found["uncertainty"].keys()
    diagnostics = {"rhat_max", "ess_bulk_min", "ess_tail_min", "quantities", "start_dispersion"}
    assert diagnostics | {"t_eff", "verdict", "reason"} <= found["diagnostics"].keys()
    assert {"train_s", "sample_s", "eval_s", "gradient_evaluations"} <= found["cost"].keys()
    assert ("truth" in found) == (found["task"] == "synthetic")


def test_the_first_step_waits_for_few_examples(case: Case) -> None:
    found = re.search(
        r"\nInitial loss: .*\n\(on (\d+) of (\d+) held-out examples\)\n", case.printed
    )
    assert found is not None
    seen, there = map(int, found.groups())
    assert seen == min(there, INITIAL_SIZE)


def test_the_seeds_lines_are_printed_with_true_values(case: Case) -> None:
    from transformers import AutoModelForSequenceClassification

    found, n = case.json("metrics.json"), len(case.labels)
    base = AutoModelForSequenceClassification.from_pretrained(case.model)
    own = base.base_model.num_parameters()
    lora = 2 * 2 * 2 * (32 + 32)  # layers, targets, rank, widths in and out
    lines = [
        "Using device: cpu",
        f"Number of labels: {case.num_labels}",
        f"Building {case.model} with LoRA...",
        "LoRA Model Info:",
        f"  - LoRA parameters: {lora:,}",
        f"  - Base parameters: {own:,}",
        f"  - LoRA ratio: {lora / own:.2%}",
        "Train batches: 7",
        f"Validation batches: {-(-n // BATCH)}",
        "Initial evaluation:",
        "Sampling with sgld...",
        f"Burn-in phase: {BURN_IN} steps",
        f"Collecting {K} samples (thinning: {THIN})",
        *(f"Saved sample {k}/{K}: {case.folder}/samples/sample_{k:04d}" for k in range(1, K + 1)),
        f"Found {K} LoRA samples in {case.folder}",
        f"Evaluating ensemble of {K} LoRA samples on {case.split}...",
        "LoRA Analysis:",
        f"  - Number of samples: {K}",
        f"  - Sample range: 0 - {K - 1}",
        "LoRA Parameter Statistics:",
        f"  - Parameter norm mean: {found['parameters']['norm_mean']:.4f}",
        f"  - Parameter norm std: {found['parameters']['norm_std']:.4f}",
        f"  - Parameter norm CV: {found['parameters']['norm_cv']:.4f}",
    ]
    printed = case.printed.splitlines()
    positions = [printed.index(line) for line in lines]
    assert positions == sorted(positions)
    assert printed[1].startswith("Dataset: ")
    assert printed[2].startswith("Task: ")
    ensemble = found["ensemble"]
    accuracy = f"Acc: {ensemble['accuracy']:.1%}" if not case.regression else "Pearson: "
    start = f"LoRA Ensemble@{K} — {accuracy}"
    headline = next(line for line in printed if line.startswith(start))
    assert headline.endswith(f" | NLL: {ensemble['nll']:.4f}")
    own_names = ("pearson", "spearman") if case.regression else ("accuracy",)
    metrics = {name: round(ensemble[name], 4) for name in own_names}
    assert f"Dataset metrics: {metrics}" in printed


def test_epoch_lines_give_the_logged_losses(case: Case) -> None:
    losses = [x["loss"] for x in case.lines("log.jsonl") if x["phase"] == "map"]
    sizes = np.array([8, 8, 8, 8, 8, 8, 6]) / 54
    pattern = r"Epoch (\d)/2: Train loss: (\S+), Val loss: (\S+?)(?:, accuracy: (\S+))?"
    epochs = [m for line in case.printed.splitlines() if (m := re.fullmatch(pattern, line))]
    assert [m[1] for m in epochs] == ["1", "2"]
    for e, match in enumerate(epochs):
        expected = float((np.array(losses[7 * e : 7 * e + 7]).mean(1) * sizes).sum())
        assert float(match[2]) == pytest.approx(expected, abs=6e-5)
        assert (match[4] is None) == case.regression
