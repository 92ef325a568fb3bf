"""Warm starts: taken from another run's folder (`train.starts_from`), and stored in a run's own.

Shapes: M chains.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.config import Config
from bayesian_lora.ensemble import Ensemble, map_ensemble, other_starts, why_no_other_starts
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.setup import Setup
from bayesian_lora.kept_fits import FitKind
from bayesian_lora.manifest import Alternatives, read_whole_manifest
from bayesian_lora.member_files import MemberRecord, write_folder
from bayesian_lora.utils.files import read_json
from bayesian_lora.utils.lora_params import split
from bayesian_lora.warm_start import WarmStart

NOTHING_HELD_OUT = (
    "nothing is held out of train (data.validation_share=0), so no epoch is known to be the best"
)
NO_EPOCH = "no epoch has ended (train.epochs=0)"
Members = list[tuple[Mapping[str, Tensor], MemberRecord]]


@dataclass(frozen=True)
class Given:
    """Warm starts of another run, that run's `run.json`, and its fits of the other kind."""

    fits: Ensemble
    run: dict[str, Any]
    kind: FitKind | None
    others: dict[str, Ensemble]
    reason: str | None


@dataclass(frozen=True)
class StartsOf:
    """What warm starts are to be stored with: the step (M,) that each is of, the kind, and the
    fits of the other kind, or the reason why there are none.
    """

    steps: list[int]
    kind: FitKind | None
    others: dict[str, Members] = field(default_factory=dict)
    reason: str | None = None


def find_starts(config: Config) -> Given | None:
    """The warm starts a config names; None if it names none.

    Of a run that keeps both kinds of fits, those that `train.early_stopping` asks for.

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
    _, _, _, alternatives = read_whole_manifest(root)
    both, kind = other_starts(root), alternatives.starts_are
    asked: FitKind = "early_stopped" if config.train.early_stopping else "last"
    if kind is not None and asked in both:
        starts, kind = both[asked], asked
    others = {name: fits for name, fits in both.items() if name != kind}
    facts = read_json(root / "run.json", "run")
    return Given(starts, facts, kind, others, why_no_other_starts(root))


def check_starts(setup: Setup, given: Given) -> None:
    """They belong to this model, data and prior.

    Raises:
        InputError: they do not; the difference is named.
    """
    old, config, run = given.fits.provenance, setup.config, given.run
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


def fitted(warm: WarmStart, alive: Sequence[int]) -> StartsOf:
    """Of a warm start that is over."""
    if warm.other is None:
        reason = NOTHING_HELD_OUT if warm.validation is None else NO_EPOCH
        return StartsOf(warm.steps, warm.kind, {}, reason)
    tensors = dict(warm.other.tensors)
    log_noise = tensors.pop("log_noise", None)
    noise = None if log_noise is None else log_noise.cpu().double().exp()
    members = as_members(tensors, noise, alive, 0, warm.other.steps)
    return StartsOf(warm.steps, warm.kind, {warm.other.kind: members})


def taken_over(given: Given, alive: Sequence[int]) -> StartsOf:
    """Of another run's warm starts, its fits of the other kind among them."""
    others: dict[str, Members] = {}
    for kind, fits in given.others.items():
        rows = zip(fits.members, fits.records, alive, strict=False)
        others[kind] = [(x, dataclasses.replace(r, chain=number)) for x, r, number in rows]
    steps = [record.step for record in given.fits.records]
    return StartsOf(steps, given.kind, others, given.reason)


def as_members(
    tensors: Mapping[str, Tensor],
    noise_std: Tensor | None,
    alive: Sequence[int],
    draw: int,
    steps: Sequence[int],
) -> Members:
    """(M, …) tensors → members with their records, which have no path yet.

    `alive`: the chains' numbers; of one fit for all chains the first.
    """
    members = split(tensors)
    noise = [None] * len(members) if noise_std is None else noise_std.tolist()
    return [
        (member, MemberRecord("", chain=number, draw=draw, step=step, noise_std=std))
        for member, number, step, std in zip(members, alive, steps, noise, strict=False)
    ]


def write_starts(
    root: Path, own: Members, of: StartsOf, config_text: str
) -> tuple[list[MemberRecord], Alternatives]:
    """``map/chain_…`` and, of the other kind, ``map/last/chain_…`` or ``map/early_stopped/…``.

    Raises:
        InputError: a tensor that is not finite.
    """

    def write(folder: Path, members: Members) -> list[MemberRecord]:
        return [
            write_folder(root, folder / f"chain_{r.chain}", member, config_text, r)
            for member, r in members
        ]

    records = write(root / "map", own)
    others = {kind: write(root / "map" / kind, rows) for kind, rows in of.others.items()}
    return records, Alternatives(of.kind, others, of.reason)
