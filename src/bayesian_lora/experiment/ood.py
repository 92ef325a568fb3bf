"""A run on a set that it was not trained on: does its uncertainty tell the two apart?

Shapes: K members, M warm starts, N examples.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora.assessment import evaluation
from bayesian_lora.assessment.ood_table import KINDS, ood_lines
from bayesian_lora.assessment.stored import load_predictions
from bayesian_lora.config import MAP, Config
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.glue_datasets import load_split
from bayesian_lora.data.shifted import Shifted, load_shifted
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.data.token_cache import default_folder
from bayesian_lora.ensemble import Ensemble, load_model, map_ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.building import resolve_device
from bayesian_lora.experiment.evaluate import (
    evaluate_run,
    figures_of,
    held_out_set,
    predicted,
)
from bayesian_lora.experiment.resume import load_own_config
from bayesian_lora.experiment.setup import (
    ask_hub_once,
    data_folder,
    load_training_data,
    task_of,
)
from bayesian_lora.experiment.stored_figures import store_alone, store_figures
from bayesian_lora.models.sources import load_pretrained, resolve_model
from bayesian_lora.predict import Predictions
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import RunFolder
from bayesian_lora.scores.ood_scores import ood_figures, scores_of
from bayesian_lora.utils.files import read_json
from bayesian_lora.utils.hub import offline_if_unreachable

Figures = dict[str, Any]
COMMON = ("accuracy", "nll", "ece", "brier")


@dataclass(frozen=True)
class _Sets:
    """What is told from what: `inside` is a split of the task."""

    config: Config
    task: TaskSpec
    folder: Path | None
    against: str
    inside: Examples
    outside: Shifted
    shared: int

    @property
    def own_split(self) -> bool:
        """Whether `outside` is a split of the task as well."""
        return self.outside.name in self.task.splits


def evaluate_ood(
    root: Path,
    name: str,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Figures:
    """Evaluate a run on a shifted or foreign set, print and store the figures.

    Args:
        root: the run's folder.
        name: of the set, or a file (`load_shifted`).
        split: of the task, from which the set is to be told; None is the default one. Where the
            run has no predictions on it yet, it is evaluated first.
        data_dir, device: in place of the run's own.

    Returns:
        The contents of `metrics.<set>.json`: as `evaluate_run` stores them of a split of the task;
        of another set the rows of figures (null with the reason where its labels are not the
        task's), and in both cases ``ood``: AUROC and AUPR of each uncertainty score of the ensemble
        (``scores``), of the warm starts (``map``, their mean) and of these as an ensemble
        (``map_ensemble``), with standard errors, and the paired ``differences``
        (`ood_scores.ood_figures`). The ensemble's predictions on the set are stored too.

    Raises:
        InputError: no run there, a regression, an unknown set or one that the task cannot read, a
            set whose texts are all in the split, or damaged members, predictions or data.
    """
    began = time.monotonic()
    progress = progress or Progress()
    sets = _sets(root, name, split, data_dir, device, progress)
    own = sets.own_split
    for part in (sets.against, sets.outside.name) if own else (sets.against,):
        if not (root / "predictions" / f"{part}.npz").is_file():
            evaluate_run(root, split=part, data_dir=data_dir, device=device, progress=progress)
    progress.say(
        f"\nTelling {sets.outside.name} ({len(sets.outside.examples)} examples) from "
        f"{sets.against} ({len(sets.inside)})..."
    )
    inside = _stored(root, sets.against, sets.inside)
    outside = _stored(root, sets.outside.name, sets.outside.examples) if own else None
    figures, outside = _figures(root, sets, inside, outside, progress)
    figures["ood"] = {"set": str(sets.outside.file or name), **figures["ood"]}
    if not own:
        figures["cost"] = {"eval_s": round(time.monotonic() - began, 2)}
    called, usual = sets.outside.name, sets.task.default_split
    store_alone(root, partial(store_figures, root, called, usual, outside, figures), progress)
    for line in ood_lines(figures, sampled=sets.config.sampler.name != MAP):
        progress.say(line)
    return figures


def _sets(
    root: Path,
    name: str,
    split: str | None,
    data_dir: str | None,
    device: str | None,
    progress: Progress,
) -> _Sets:
    config = load_own_config(root)
    config.data.dir = data_dir or config.data.dir
    config.device = device or config.device
    task, folder = task_of(config), data_folder(config)
    if task.likelihood == "gaussian":
        raise InputError(
            f"ood {name!r}: {task.name} is a regression, and the scores are entropies of classes: "
            "name the run of a classification"
        )
    ask_hub_once(task, resolve_model(config.model.name), folder)
    if folder is None and name not in task.splits and not Path(name).is_file():
        offline_if_unreachable()  # another task's data would come from there
    outside = _named(root, load_shifted(task, name, folder, progress.say), progress)
    against = split or task.default_split
    inside = load_split(task, against, data_dir=folder, notify=progress.say)
    shared = count_shared(name, outside.examples, inside, f"split {against} of {task.name}")
    return _Sets(config, task, folder, against, inside, outside, shared)


def _named(root: Path, outside: Shifted, progress: Progress) -> Shifted:
    """With a number after its name where that stands for another file: whose figures stay."""
    if outside.file is None:
        return outside
    names = chain([outside.name], (f"{outside.name}_{i}" for i in count(2)))
    name = next(name for name in names if _set_of(root, name) in (None, outside.file))
    if name != outside.name:
        progress.say(f"{outside.file} is stored as {name}: {outside.name} is another file's")
    return replace(outside, name=name)


def _set_of(root: Path, name: str) -> Path | None:
    """The file whose figures stand under a name; None where there are none to be read."""
    try:
        return Path(read_json(root / f"metrics.{name}.json", "metrics")["ood"]["set"]).resolve()
    except (InputError, LookupError, TypeError):
        return None


def count_shared(name: str, outside: Examples, inside: Examples, where: str) -> int:
    """How many of the set's texts (or pairs) are also inside.

    Raises:
        InputError: all of them: nothing is left to be told apart.
    """
    known = set(zip(*inside.texts, strict=True))
    shared = sum(texts in known for texts in zip(*outside.texts, strict=True))
    if shared == len(outside):
        raise InputError(
            f"ood {name!r}: all its {shared} texts are in {where}, the very set that it is to be "
            "told from; name another set"
        )
    return shared


def _stored(root: Path, split: str, examples: Examples) -> Predictions:
    """The ensemble's predictions on a split, of the examples that the split has now.

    Raises:
        InputError: damaged, or of other examples.
    """
    p = load_predictions(root, split)
    same = np.array_equal(p.example_id, examples.ids) and np.array_equal(p.labels, examples.labels)
    if not same:
        raise InputError(
            f"{root / 'predictions' / split}.npz: of other examples than split {split} has now; "
            f"use the data it was made with, or evaluate anew with 'bayesian-lora eval {root} "
            f"--split {split}'"
        )
    return p


def _figures(
    root: Path,
    sets: _Sets,
    inside: Predictions,
    outside: Predictions | None,
    progress: Progress,
) -> tuple[Figures, Predictions]:
    """What is stored but for the cost, and the ensemble's predictions outside."""
    full, starts = Ensemble.load(root), map_ensemble(root)
    model = load_model(full.provenance, resolve_device(sets.config.device))
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, model.info.source)

    def tokenised(examples: Examples) -> TokenisedSet:
        return TokenisedSet(examples, tokenizer, sets.config.data.max_length, default_folder())

    foreign, task = tokenised(sets.outside.examples), sets.task
    nothing_sampled = starts.records == full.records
    start_out = None
    if sets.own_split:
        figures = _read_figures(root, sets)
    elif sets.outside.labelled:
        held = load_training_data(sets.config, task, sets.folder)[1]
        held_out = held_out_set(sets.config, held, tokenizer)
        given = predicted(root, task, full, (foreign, held_out, model), None, progress)
        outside, start_out = given.members.on, given.starts.on
        figures = figures_of(given) | evaluation.against_truth(outside)
    else:
        outside = full.predict_set(model, foreign)
        figures = _without_labels(task.metrics, sets.outside.why, len(full))
        figures["uncertainty"] = evaluation.uncertainty(False, outside)
    assert outside is not None
    if nothing_sampled:
        pairs = (inside, outside), (inside, outside)
    else:
        start_in = starts.predict_set(model, tokenised(sets.inside))
        if start_out is None:
            start_out = starts.predict_set(model, foreign)
        pairs = (inside, outside), (start_in, start_out)
    facts = {"task": task.name, "split": sets.outside.name, "n": len(outside)}
    ood = {"own_metrics": list(task.metrics), "ood": _ood(sets, *pairs)}
    return {**facts, **figures, **ood}, outside


def _read_figures(root: Path, sets: _Sets) -> Figures:
    path = RunFolder(root).metrics_path(sets.outside.name, sets.task.default_split)
    return read_json(path, "metrics")


Pair = tuple[Predictions, Predictions]


def _ood(sets: _Sets, members: Pair, starts: Pair) -> Figures:
    """Of the ensemble and of the warm starts, each inside and outside."""

    def scores(pair: Pair) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        first, second = (scores_of(p.logits, p.weights) for p in pair)
        return first, second

    alone = zip(*(evaluation.alone(p) for p in starts), strict=True)
    kinds = {
        "ensemble": [scores(members)],
        "map": [scores(pair) for pair in alone],
        "map_ensemble": [scores(starts)],
    }
    found = ood_figures(kinds, np.random.default_rng(sets.config.seed))
    models = found.pop("models")
    return {
        "against": sets.against,
        "labelled": sets.outside.labelled,
        "shared": sets.shared,
        **found,
        **{key: models["ensemble" if key == "scores" else key] for key in KINDS},
    }


def _without_labels(own: Sequence[str], why: str, k: int) -> Figures:
    """The rows of a set whose labels are not the task's: every figure null, with the reason."""
    names = dict.fromkeys((*COMMON, *own))
    spread = {name: {"mean": None, "sd": None, "reason": why} for name in names}
    row = names | {f"{name}_reason": why for name in names}
    return {
        "map": spread,
        "map_ensemble": row,
        "map_temperature_scaled": {**row, "temperature": None, "temperature_reason": why},
        "single": spread,
        "ensemble": {**row, "k": k},
    }
