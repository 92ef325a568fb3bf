"""Stored ensembles: what adaptive prediction saves and costs, and what bfloat16 changes."""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
from options import Figures, add_examples, add_rounds, command
from rounds import Case, alternate, ratios, spread
from setting import EVERY, load

from bayesian_lora.assessment.evaluation import evaluate
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.glue_datasets import get_task
from bayesian_lora.ensemble import Ensemble, load_model
from bayesian_lora.models.hf_lora import HuggingFaceLora
from bayesian_lora.predict import Predictions

WITHIN = 0.01
FIGURES = ("accuracy", "nll", "ece")


def add(commands: Any) -> None:
    run = "--ensemble runs/experiment_sst2_minilm_sgld"
    parser = command(commands, "adaptive", adaptive, [run, f"{run} --tolerance 0.01 --rounds 7"])
    parser.add_argument("--ensemble", required=True, metavar="RUN", help="a run's folder")
    tolerances = [0.005, 0.01, 0.02]
    parser.add_argument("--tolerance", type=float, nargs="+", default=tolerances)
    add_examples(parser, EVERY, "the evaluation split")
    add_rounds(parser)

    parser = command(commands, "precision", precision, [run])
    parser.add_argument("--ensemble", required=True, metavar="RUN", help="a run's folder")
    add_examples(parser, EVERY, "the evaluation split")


def _opened(given: argparse.Namespace) -> tuple[Ensemble, TokenisedSet]:
    """The members, and the texts their task is evaluated on."""
    ensemble = Ensemble.load(given.ensemble)
    own = ensemble.provenance
    task = get_task(own.task["name"])
    name, length = own.model["name"], own.model["max_length"]
    data = load(task.name, task.default_split, given.examples, name, length)
    print(f"{task.name} {task.default_split}: {len(data)} texts, {len(ensemble)} members")
    return ensemble, data


def adaptive(given: argparse.Namespace) -> Figures:
    """Members used by adaptive prediction, and its error against all members of a stored run."""
    ensemble, data = _opened(given)
    model = load_model(ensemble.provenance)
    found: dict[float | None, Predictions] = {}

    def case(tolerance: float | None) -> Case:
        def predict() -> float:
            began = time.perf_counter()
            found[tolerance] = ensemble.predict_set(model, data, tolerance)
            return len(ensemble) * len(data) / (time.perf_counter() - began)

        return predict

    cases = {str(t): case(t) for t in (None, *given.tolerance)}
    rates = alternate(cases, given.rounds)
    print(f"\n| tolerance | members used | fewer by | within it | within {WITHIN} | largest error "
          "| time of all over its time |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    rows: list[Figures] = []
    for tolerance in given.tolerance:
        error = np.abs(found[tolerance].probs - found[None].probs).max(1)
        used = found[tolerance].members_used
        assert used is not None
        row = {
            "tolerance": tolerance,
            "members_used": float(used.mean()),
            "within_tolerance": float((error <= tolerance).mean()),
            "within": float((error <= WITHIN).mean()),
            "largest_error": float(error.max()),
        }
        rows.append(row)
        faster = spread(ratios(rates[str(tolerance)], rates["None"])).format(2)
        print(
            f"| {tolerance} | {row['members_used']:.1f} of {len(ensemble)} | "
            f"{len(ensemble) / row['members_used']:.2f} × | {row['within_tolerance']:.1%} | "
            f"{row['within']:.1%} | {row['largest_error']:.4f} | {faster} |"
        )
    return {"members": len(ensemble), "rates": rates, "rows": rows}


def precision(given: argparse.Namespace) -> Figures:
    """The same stored members evaluated in float32 and in bfloat16: logits, probabilities, NLL."""
    ensemble, data = _opened(given)
    own = ensemble.provenance
    predictions: dict[str, Predictions] = {}
    for dtype in ("float32", "bfloat16"):
        as_stored = dataclasses.replace(own, model=own.model | {"dtype": dtype})
        model: HuggingFaceLora = load_model(as_stored)
        predictions[dtype] = ensemble.predict_set(model, data)
    single, half = predictions.values()
    gaps = {
        "logits": np.abs(half.logits - single.logits),
        "ensemble probabilities": np.abs(half.probs - single.probs),
    }
    print("\n| bfloat16 − float32 | largest | mean |\n|---|---|---|")
    for name, gap in gaps.items():
        print(f"| {name} | {gap.max():.5f} | {gap.mean():.6f} |")
    print("\n| ensemble | " + " | ".join(FIGURES) + " |\n" + "|---" * (1 + len(FIGURES)) + "|")
    figures = {name: evaluate((), False, p) for name, p in predictions.items()}
    for name, row in figures.items():
        print(f"| {name} | " + " | ".join(f"{row[figure]:.5f}" for figure in FIGURES) + " |")
    summary = {n: {"largest": float(g.max()), "mean": float(g.mean())} for n, g in gaps.items()}
    return {"members": len(ensemble), "differences": summary, "figures": figures}
