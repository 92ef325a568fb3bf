"""Experiment trackers by name, through accelerate; nothing here waits for a network.

Nothing of accelerate or of a tracker's package is imported before a tracker is opened.
"""

import http.client
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bayesian_lora.errors import InputError

PROJECT = "bayesian-lora"
PACKAGES = {
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
}
"""The package of each tracker; any one of several will do."""
WANDB_SERVER, HUB = "https://api.wandb.ai", "https://huggingface.co"
TIMEOUT_S = 3.0


class Tracker(Protocol):
    """What is used of accelerate's `GeneralTracker`."""

    def start(self) -> None: ...
    def store_init_configuration(self, values: dict[str, Any]) -> None: ...
    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...
    def finish(self) -> None: ...


def check_tracker(name: str | None) -> None:
    """Whether a tracker can be opened here, before any long work; None always.

    Raises:
        InputError: unknown, or its package is not installed.
    """
    if name is None:
        return
    if name not in PACKAGES:
        raise InputError(f"track={name}: unknown tracker; choose one of {', '.join(PACKAGES)}")
    if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
        raise InputError(
            f"track={name}: the package {name} is not installed; pip install {name}, or leave "
            "track out (metrics.csv is always written)"
        )


def open_tracker(
    name: str, folder: Path, run_name: str, config: Mapping[str, Any] | None = None
) -> Tracker:
    """A started tracker of the project ``bayesian-lora`` that knows a run's config.

    Where a server that wandb, trackio or mlflow would send to does not answer, the tracker records
    on this machine instead: wandb in `folder` (`wandb sync` sends it later), mlflow too, trackio
    where it always does. Tensorboard's files stand below `folder`.

    Args:
        name: wandb, tensorboard, trackio or mlflow.
        folder: of the run.
        run_name: its name there.
        config: plain values by name, nested or not.

    Raises:
        InputError: as `check_tracker`.
    """
    check_tracker(name)
    from accelerate import PartialState, tracking

    PartialState()  # without it accelerate's trackers cannot write their own log
    _stay_offline(name, folder)
    if name == "tensorboard":
        # Its way to store a config is a second, empty run beside the run.
        tracker: Tracker = tracking.TensorBoardTracker(run_name, folder / name)
        tracker.start()
        return tracker
    if name == "wandb":
        tracker = tracking.WandBTracker(PROJECT, name=run_name, dir=str(folder))
    elif name == "trackio":
        tracker = tracking.TrackioTracker(PROJECT, name=run_name)
    else:
        tracker = tracking.MLflowTracker(PROJECT, run_name=run_name)
    tracker.start()
    tracker.store_init_configuration(_flat(config or {}))
    return tracker


def answers(url: str) -> bool:
    """Whether a server answers at all, through whatever proxy is set, within seconds."""
    try:
        urllib.request.urlopen(url, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:  # an answer, if no page
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def _stay_offline(name: str, folder: Path) -> None:
    """Where a tracker's server does not answer, tell its package to record on this machine."""
    given = os.environ
    servers = {
        "wandb": None if "WANDB_MODE" in given else given.get("WANDB_BASE_URL", WANDB_SERVER),
        "trackio": given.get("HF_ENDPOINT", HUB) if "TRACKIO_SPACE_ID" in given else None,
        "mlflow": given.get("MLFLOW_TRACKING_URI"),
    }
    server = servers.get(name)
    if server is None or not server.startswith("http") or answers(server):
        return
    if name == "wandb":
        given["WANDB_MODE"] = "offline"
    elif name == "mlflow":
        given["MLFLOW_TRACKING_URI"] = (folder / "mlruns").resolve().as_uri()
    else:
        del given["TRACKIO_SPACE_ID"]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names; what is no plain value as its text."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            found[f"{prefix}{name}"] = value if plain else str(value)
    return found
