"""Deep ensembles of both kinds of fits that a run keeps, as they are and with one temperature.

The temperature is fitted to the ensemble's own probabilities on the held-out data (pooled, then
scaled: Rahaman & Thiery 2021). Shapes: M fits, N examples, C classes.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from baselines_table import Figure

from bayesian_lora.assessment import evaluation
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.glue_datasets import load_split
from bayesian_lora.ensemble import load_model, other_starts
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.resume import load_own_config
from bayesian_lora.experiment.setup import (
    data_folder,
    load_training_data,
    resolve_device,
    task_of,
)
from bayesian_lora.metrics import classification_metrics, ensemble_log_probs
from bayesian_lora.models.sources import load_pretrained
from bayesian_lora.predict import Predictions

SHOWN = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
TITLES = {"last": "the last epoch's fits", "early_stopped": "the early-stopped fits"}
Rows = dict[str, dict[str, Any]]


def pooled(p: Predictions) -> Predictions:
    """The mixture as one member: logits (1, N, C), its log-probabilities."""
    logits = ensemble_log_probs(p.logits, p.weights)[None]
    return dataclasses.replace(p, logits=logits, weights=np.ones(1))


def with_one_temperature(p: Predictions, held_out: Predictions) -> tuple[Predictions, float]:
    """The mixture (N, C) scaled by the temperature that fits it best on held-out data."""
    scaled = evaluation.scale(False, pooled(p), pooled(held_out))
    assert not isinstance(scaled, str)
    return scaled[0], scaled[1][0]


def ensembles_of(root: Path) -> Rows:
    """Of one run, by kind and with ``, scaled``, accuracy, NLL, ECE and the temperature.

    Raises:
        InputError: the run keeps no fits of both kinds, or held nothing out.
    """
    from transformers import AutoTokenizer

    kept = other_starts(root)
    config = load_own_config(root)
    task, folder = task_of(config), data_folder(config)
    held_out = load_training_data(config, task, folder)[1]
    if set(kept) != set(TITLES) or held_out is None:
        raise InputError(f"{root}: keeps no fits of both kinds; fit with validation_share above 0")
    model = load_model(kept["last"].provenance, resolve_device(config.device))
    tokenizer = load_pretrained(AutoTokenizer, model.info.source)
    split = load_split(task, task.default_split, data_dir=folder)
    on, held = (TokenisedSet(x, tokenizer, config.data.max_length) for x in (split, held_out))
    rows: Rows = {}
    for kind, title in TITLES.items():
        p, fitted_to = (kept[kind].predict_set(model, data) for data in (on, held))
        scaled, temperature = with_one_temperature(p, fitted_to)
        for name, of in ((title, p), (f"{title}, scaled", scaled)):
            found = classification_metrics(ensemble_log_probs(of.logits, of.weights), of.labels)
            rows[name] = {metric: found[metric] for metric in SHOWN}
        rows[f"{title}, scaled"]["temperature"] = temperature
    return rows


def ensemble_lines(roots: Sequence[Path]) -> list[str]:
    """A line an ensemble: means over the seeds' runs, and standard errors over seeds."""
    each = [ensembles_of(root) for root in roots]
    lines = []
    for name in each[0]:
        shown = []
        for metric, title in {**SHOWN, "temperature": "temperature"}.items():
            if metric in each[0][name]:
                values = [rows[name][metric] for rows in each]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
                shown.append(f"{title} {Figure(statistics.fmean(values), error)}")
        lines.append(f"- deep ensemble of {name}: {', '.join(shown)}")
    return lines
