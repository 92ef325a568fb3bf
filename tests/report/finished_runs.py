"""Folders of finished runs and comparisons as a report reads them, of numbers drawn in the test.

Shapes: M = 4 chains, T = 100 rows, K = 20 members, N = 400 examples, C = 2 classes.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora import diagnostics, metrics
from bayesian_lora.config import build_config, dump_run_config
from bayesian_lora.data.synthetic import generate
from bayesian_lora.manifest import Provenance, write_manifest
from bayesian_lora.member_files import MemberRecord
from bayesian_lora.report.run_files import RunFiles
from bayesian_lora.utils.files import append_json_line, write_atomic, write_json, write_npz

CHAINS, ROWS, MEMBERS, EXAMPLES = 4, 100, 20, 400
LAYERS = tuple(f"bert.encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in "qv")
LABELS = ["negative", "positive"]
HEAD = Provenance(
    model={
        **{"name": "minilm", "base": "all-MiniLM-L6-v2", "fingerprint": "f", "dtype": "float32"},
        **{"num_labels": 2, "max_length": 64},
    },
    task={"name": "synthetic", "label_names": LABELS, "likelihood": "categorical"},
    lora={
        **{"rank": 8, "alpha": 16.0, "dropout": 0.1, "target_modules": ["query", "value"]},
        **{"head_modules": ["classifier"], "rslora": False, "base": "all-MiniLM-L6-v2"},
    },
    sampler={
        **{"name": "sgld", "exactness": "exact as h → 0", "law": None, "temperature": 1.0},
        **{"tempering": "posterior", "chains": CHAINS, "starts": "independent"},
        "prior": {"std": 0.3, "head_std": 0.3},
    },
)
Figures = dict[str, Any]


def traces(rng: np.random.Generator, stuck: bool = True) -> dict[str, np.ndarray]:
    """(M, T) by quantity; with `stuck` one of them sits at another place in every chain."""
    names = ["log_posterior", *(f"probe_logprob[{i}]" for i in range(4))]
    names += [*(f"delta_w_norm[{layer}]" for layer in LAYERS), "raw[norm]", "raw[0]"]
    found = {name: rng.normal(size=(CHAINS, ROWS)) for name in names}
    if stuck:
        found["probe_logprob[2]"] += np.arange(CHAINS)[:, None] * 3.0
    found["log_posterior"] = found["log_posterior"] * 8 - 390
    return found


def predictions(rng: np.random.Generator, sharp: float = 1.5) -> dict[str, np.ndarray]:
    """Logits (K, N, C) of members that err alike and labels they mostly get right."""
    signal = rng.normal(size=EXAMPLES) * sharp
    labels = (rng.random(EXAMPLES) < 1 / (1 + np.exp(-signal))).astype(np.int64)
    logit = signal * 1.4 + rng.normal(size=(MEMBERS, EXAMPLES)) * 0.5
    return {
        "logits": np.stack([-logit / 2, logit / 2], axis=-1).astype(np.float32),
        "labels": labels,
        "weights": np.full(MEMBERS, 1 / MEMBERS),
        "example_id": np.arange(EXAMPLES),
    }


def reliability(p: np.ndarray, labels: np.ndarray) -> dict[str, list[float | int | None]]:
    """Fifteen bins of the top label; an empty one has no figures."""
    confidence, right = p.max(1), p.argmax(1) == labels
    place = np.minimum((confidence * 15).astype(int), 14)
    found: dict[str, list[float | int | None]] = {"confidence": [], "accuracy": [], "count": []}
    for i in range(15):
        inside = place == i
        n = int(inside.sum())
        found["count"].append(n)
        found["confidence"].append(float(confidence[inside].mean()) if n else None)
        found["accuracy"].append(float(right[inside].mean()) if n else None)
    return found


def metrics_of(p: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> Figures:
    """`metrics.json` as an evaluation writes it."""
    probs = metrics.ensemble_probs(p["logits"], p["weights"])
    one = metrics.softmax(p["logits"][0])
    ensemble, start = (metrics.classification_metrics(np.log(x), p["labels"]) for x in (probs, one))
    ensemble |= {"aurc": 0.08, "brier_reliability": 0.004, "brier_resolution": 0.1}
    ensemble |= {"brier_uncertainty": 0.5, "brier_within_bin": 0.001}
    spread = {n: {"mean": x, "sd": 0.01} for n, x in start.items()}
    single = {n: {"mean": x, "sd": 0.01, "mcse": 0.002} for n, x in start.items()}
    error = {"accuracy": 0.018, "nll": 0.02, "ece": 0.012, "brier": 0.01}
    coverage = [i / 100 for i in range(1, 101)]
    ks = [1, 2, 5, 10, 20]
    return {
        **{"task": "synthetic", "split": "validation", "n": EXAMPLES, "own_metrics": []},
        **{"map": spread, "map_last": spread, "map_early_stopped": None},
        "map_early_stopped_reason": "no data were held out",
        "map_temperature_scaled": {**start, "nll": float(str(start["nll"])) - 0.01},
        **{"map_ensemble": start, "single": single, "ensemble": {**ensemble, "k": MEMBERS}},
        "standard_errors": {
            **{"replicates": 200, "over": "examples"},
            **dict.fromkeys(("map", "map_ensemble", "map_temperature_scaled", "ensemble"), error),
            "differences": {
                f"ensemble-{b}": {"accuracy": 0.01, "nll": 0.004, "ece": 0.008, "brier": 0.004}
                for b in ("map", "map_ensemble", "map_temperature_scaled")
            },
        },
        "calibration": {
            "bins": 15,
            "expected_ece": {"mean": 0.03, "sd": 0.008},
            "reliability": {
                name: reliability(x, p["labels"]) for name, x in (("map", one), ("ensemble", probs))
            },
        },
        "selective": {
            "score": "predictive_entropy",
            "coverage": coverage,
            "risk": {"map": [0.25 * c for c in coverage], "ensemble": [0.22 * c for c in coverage]},
            "accuracy_at": {"0.5": 0.95, "0.8": 0.9, "0.9": 0.86, "0.95": 0.84},
            "accuracy_at_se": {"0.5": 0.015, "0.8": 0.012},
            "map_accuracy_at": {"0.5": 0.94, "0.8": 0.88, "0.9": 0.84, "0.95": 0.82},
        },
        "cumulative": {
            "k": ks,
            "accuracy": [0.75, 0.76, 0.77, 0.77, 0.78],
            "nll": [0.55, 0.53, 0.51, 0.5, 0.5],
            "ece": [0.06, 0.05, 0.04, 0.04, 0.04],
            "enough": {"k": 10, "reason": "the NLL of the first 10 is within one standard error"},
        },
        "uncertainty": metrics.uncertainty(p["logits"], p["weights"]),
        "diagnostics": {
            **diagnostics.summarise(found, verdict_on=lambda n: not n.startswith("raw[")),
            **{"t_eff": 1.02, "dropped_chains": []},
        },
        **{"temperature": 1.0, "tempering": "posterior", "sampler": {"name": "sgld"}},
        "cost": {"train_s": 61.5, "sample_s": 36.6, "eval_s": 4.0, "gradient_evaluations": 165},
    }


def write_run(root: Path, *, old: bool = False, shifted: bool = True) -> Figures:
    """A finished run's folder; `old`: metrics.json as it was before standard errors came.

    Returns what stands in `metrics.json`.
    """
    rng = np.random.default_rng(3)
    p, found = predictions(rng), traces(rng)
    m = metrics_of(p, found)
    if old:
        for name in ("standard_errors", "calibration", "selective", "cumulative"):
            del m[name]
    config = build_config({"data": {"name": "synthetic"}, "output": {"dir": str(root)}})
    write_atomic(root / "config.yaml", dump_run_config(config))
    write_json(root / "metrics.json", m)
    write_npz(root / "predictions" / "validation.npz", p)
    write_npz(root / "traces" / "part_00001.npz", found)
    if shifted:
        score = {"auroc": 0.71, "auroc_se": 0.02, "aupr": 0.66, "aupr_se": 0.03}
        names = ("predictive_entropy", "mutual_information", "max_probability")
        ood = {"against": "validation", "inside_n": EXAMPLES, "outside_n": EXAMPLES}
        ood |= {name: dict.fromkeys(names, score) for name in ("scores", "map", "map_ensemble")}
        gap = {"auroc": 0.031, "auroc_se": 0.01, "aupr": 0.02, "aupr_se": 0.02}
        ood |= {"differences": {"ensemble-map": dict.fromkeys(names, gap)}, "base_rate": 0.5}
        other = predictions(rng, sharp=0.7)
        shown = metrics_of(other, found) | {"split": "shifted", "ood": ood}
        write_json(root / "metrics.shifted.json", shown)
        write_npz(root / "predictions" / "shifted.npz", other)
    write_json(root / "run.json", run_of(generate("validation", seed=0).fingerprint()))
    write_manifest(root, HEAD, [MemberRecord("", k % CHAINS, k, k) for k in range(MEMBERS)])
    append_json_line(root / "log.jsonl", {"phase": "sampling", "step": 25, "loss": [0.4] * 4})
    return m


def run_of(fingerprint: str) -> Figures:
    """`run.json`."""
    return {
        **{"status": "finished", "started": "2026-01-01T00:00:00Z", "seed": 0, "device": "cpu"},
        **{"versions": {"python": "3.11", "torch": "2.13"}, "git_commit": "0" * 40, "wall_s": 99.0},
        "data": {"fingerprint": {"evaluation": fingerprint}, "sizes": {"evaluation": 600}},
        "account": {"step_size": 0.002, "t_eff": 1.1, "auto": False},
        "milestones": [
            {
                **{"step": 1000, "rows": 100, "chains": CHAINS, "ess_min": 40.5, "mcse": 0.2},
                **{"ess_median": 80.2, "ess_per_step": 0.04, "quantity": "log_posterior"},
                "undefined": 0,
            }
        ],
    }


def write_comparison(root: Path) -> None:
    """Two finished cells and one that failed."""
    from bayesian_lora.experiment import comparison_table

    entries = []
    for name in ("sgld", "psgld"):
        m = write_run(root / f"sampler={name}", shifted=False)
        m["sampler"] = {"step_size": 1e-3, "exactness": "exact as h → 0"}
        run = run_of("")
        figures = comparison_table.figures_of(m, run)
        entries.append({**_entry(name), "status": "finished", **figures})
    entries.append({**_entry("sghmc"), "status": "failed", "error": "it went wrong <&>"})
    record = {"axes": {"sampler.name": ["sgld", "psgld", "sghmc"]}, "config": {}, "cells": entries}
    write_json(root / "comparison.json", record)


def _entry(name: str) -> Figures:
    folder = f"sampler={name}"
    return {
        **{"name": folder, "folder": folder, "overrides": [f"sampler.name={name}"]},
        **{"error": None, "warm_start": folder, "starts_from": None},
    }


def changed(files: RunFiles, **parts: Any) -> RunFiles:
    return dataclasses.replace(files, metrics={**copy.deepcopy(dict(files.metrics)), **parts})


def with_nll(files: RunFiles, nll: float) -> RunFiles:
    return changed(files, ensemble={**files.metrics["ensemble"], "nll": nll})


def scaled_nll(files: RunFiles) -> float:
    return float(files.metrics["map_temperature_scaled"]["nll"])
