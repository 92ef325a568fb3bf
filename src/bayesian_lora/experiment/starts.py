"""Warm starts taken from another run's folder (`train.starts_from`).

Shapes: M chains.
"""

from pathlib import Path
from typing import Any

import torch

from bayesian_lora.config import Config
from bayesian_lora.ensemble import Ensemble, map_ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.setup import Setup
from bayesian_lora.utils.files import read_json


def find_starts(config: Config) -> tuple[Ensemble, dict[str, Any]] | None:
    """The warm starts a config names and their run's facts; None if it names none.

    Raises:
        InputError: no complete warm starts there, or fewer or more than this run has chains.
    """
    if config.train.starts_from is None:
        return None
    root = Path(config.train.starts_from)
    where = f"train.starts_from={root}"
    if not (root / "map").is_dir() or not (root / "ensemble.json").is_file():
        raise InputError(f"{where}: no run with warm starts there; name a run's folder")
    starts = map_ensemble(root)
    wanted = 1 if config.train.starts == "shared" else config.sampler.chains
    if len(starts) != wanted:
        raise InputError(
            f"{where}: it has {len(starts)} warm starts, this run wants {wanted}; "
            f"set sampler.chains={len(starts)}, or fit new ones by leaving it out"
        )
    return starts, read_json(root / "run.json", "run")


def check_starts(setup: Setup, starts: Ensemble, run: dict[str, Any]) -> None:
    """They belong to this model, data and prior.

    Raises:
        InputError: they do not; the difference is named.
    """
    old, config = starts.provenance, setup.config
    prior = old.sampler.get("prior", {})
    pairs: dict[str, tuple[Any, Any]] = {
        "the base model's weights": (run.get("model_fingerprint"), setup.fingerprint),
        "the adapter": (old.spec, setup.model.info.spec),
        "data.max_length": (old.model["max_length"], config.data.max_length),
        "model.dtype": (old.model["dtype"], config.model.dtype),
        "the training data": (_data_of(run), setup.raw.train.fingerprint()),
    }
    if config.prior.std != "auto":
        pairs["prior.std"] = (prior.get("std"), config.prior.std)
    if config.prior.std != "auto" or config.prior.head_std is not None:
        head = config.prior.head_std or config.prior.std
        pairs["prior.head_std"] = (prior.get("head_std"), head)
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise InputError(
                f"train.starts_from={config.train.starts_from}: {what} differs from this run's: "
                f"{theirs} there, {ours} here; leave it out to fit new warm starts"
            )


def _data_of(run: dict[str, Any]) -> Any:
    try:
        return run["data"]["fingerprint"]["train"]
    except (KeyError, TypeError):
        return None


def place_starts(setup: Setup, starts: Ensemble) -> None:
    """Put them into the model's chains, with the noise scale of a Gaussian likelihood."""
    setup.model.load_chains(starts.state())
    log_noise = setup.objective.log_noise
    if log_noise is not None and starts.noise_std is not None:
        with torch.no_grad():
            log_noise.copy_(torch.from_numpy(starts.noise_std).log())
