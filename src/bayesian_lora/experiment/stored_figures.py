"""What an evaluation leaves in a run's folder: the predictions of a set, and its figures.

Shapes: K members, N examples.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora.errors import InputError
from bayesian_lora.predict import Predictions
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import RunFolder
from bayesian_lora.utils.files import read_json
from bayesian_lora.utils.lock import locked

Figures = dict[str, Any]


def store_figures(
    root: Path, split: str, usual: str, predictions: Predictions, figures: Figures
) -> None:
    """`predictions/<split>.npz`, then its metrics. What is known of the same ensemble on the same
    set as a shifted one (``ood``) stays.
    """
    folder = RunFolder(root)
    folder.write_predictions(split, {**_arrays(predictions), "split": np.array(split)})
    path = folder.metrics_path(split, usual)
    folder.write_metrics(split, usual, {**_still_known(path, figures), **figures})


def store_alone(root: Path, store: Callable[[], None], progress: Progress) -> None:
    """Never beside a process that writes the run: its own figures come later and stay."""
    try:
        with locked(root):
            store()
    except InputError as error:
        progress.say(f"Not stored: {error}")


def _arrays(p: Predictions) -> dict[str, np.ndarray]:
    arrays = {
        "logits": p.logits,
        "labels": p.labels,
        "weights": p.weights,
        "example_id": p.example_id,
    }
    return arrays if p.noise_std is None else {**arrays, "noise_std": p.noise_std}


def _still_known(path: Path, figures: Figures) -> Figures:
    if not path.is_file():
        return {}
    try:
        earlier = read_json(path, "metrics")
    except InputError:  # damaged, and about to be replaced
        return {}
    same = earlier.get("ensemble") == figures["ensemble"]
    return {"ood": earlier["ood"]} if same and "ood" in earlier else {}
