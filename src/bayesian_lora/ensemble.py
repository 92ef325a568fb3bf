"""An ensemble of adapters: members, weights, provenance; stored as ordinary PEFT folders.

Shapes: K members, M chains, N examples, C classes.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.adaptive import adaptive_logits
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import unlabelled
from bayesian_lora.errors import InputError
from bayesian_lora.member_files import (
    MemberRecord,
    MemberWriter,
    PackReader,
    parse_record,
    read_verified,
)
from bayesian_lora.models.hf_lora import HuggingFaceLora, LoraSpec, build_huggingface_lora_model
from bayesian_lora.models.peft_io import adapter_config, write_member
from bayesian_lora.models.sources import load_pretrained, resolve_model
from bayesian_lora.predict import Predictions, predict_logits
from bayesian_lora.utils.files import read_json, write_json
from bayesian_lora.utils.lora_params import stack

MANIFEST = "ensemble.json"
FORMAT = 1
_NUMBER = (int, float)
_KINDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "model": {"name": str, "fingerprint": str, "dtype": str, "num_labels": int, "max_length": int},
    "task": {"name": str, "likelihood": str},
    "lora": {
        "rank": int,
        "alpha": _NUMBER,
        "dropout": _NUMBER,
        "target_modules": list,
        "head_modules": list,
    },
    "sampler": {"name": str, "temperature": _NUMBER, "tempering": str, "starts": str},
}
"""What evaluation reads of a manifest's head, by section."""


@dataclass(frozen=True)
class Provenance:
    """What the members belong to and how they came about; the head of `ensemble.json`.

    model: name, base (public id), fingerprint of the frozen weights, num_labels, max_length,
    dtype; task: name, label_names, likelihood; sampler: name, step_size, temperature, t_eff,
    exactness, chains, starts, num_examples, prior.
    """

    model: dict[str, Any]
    task: dict[str, Any]
    lora: dict[str, Any]
    sampler: dict[str, Any]

    @property
    def spec(self) -> LoraSpec:
        values = dict(self.lora)
        for name in ("target_modules", "head_modules"):
            values[name] = tuple(values[name])
        return LoraSpec(**values)


class Ensemble:
    """Weighted members; iterating gives each member's tensors by name.

    `Ensemble.load(folder)` reads and verifies, `.predict(texts)` gives `Predictions`,
    `.subset(k)` the first k members (spread evenly over chains), `.save(folder)` writes.
    """

    def __init__(
        self,
        provenance: Provenance,
        records: Sequence[MemberRecord],
        members: Sequence[Mapping[str, Tensor]],
    ) -> None:
        if not members:
            raise InputError("an ensemble needs at least one member, found none")
        self.provenance = provenance
        self.records = list(records)
        self.members = list(members)
        self._model: HuggingFaceLora | None = None
        self._tokenizer: Any = None

    @classmethod
    def load(cls, folder: str | Path) -> "Ensemble":
        """Read a run's or a saved ensemble; every member is checked against its sha256.

        Raises:
            InputError: no ensemble there, or a member missing, damaged, or not finite (named).
        """
        root = Path(folder)
        provenance, records = read_manifest(root)
        packs = PackReader(root)
        members = [read_verified(root, record, packs) for record in records]
        if not members:
            raise InputError(f"{root / MANIFEST}: lists no members yet; let the run collect some")
        return cls(provenance, records, members)

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return iter(self.members)

    @property
    def weights(self) -> np.ndarray:
        """(K,) summing to 1."""
        weights = np.array([record.weight for record in self.records])
        return weights / weights.sum()

    @property
    def noise_std(self) -> np.ndarray | None:
        """(K,) of the Gaussian likelihood, None for classification."""
        values = [record.noise_std for record in self.records]
        return None if None in values else np.array(values, dtype=np.float64)

    def state(self) -> dict[str, Tensor]:
        """The members stacked, tensors (K, …)."""
        return stack(self.members)

    def subset(self, k: int) -> "Ensemble":
        """The first k members in the order of draws, so evenly spread over chains.

        Raises:
            InputError: k below 1 or above the number of members.
        """
        if not 1 <= k <= len(self):
            raise InputError(
                f"k={k}: this ensemble has {len(self)} members; choose 1 to {len(self)}"
            )
        return Ensemble(self.provenance, self.records[:k], self.members[:k])

    def latest(self) -> "Ensemble":
        """The last member alone."""
        return Ensemble(self.provenance, self.records[-1:], self.members[-1:])

    def save(self, folder: str | Path) -> None:
        """Write members and manifest into a new folder.

        Raises:
            InputError: the folder already holds an ensemble.
        """
        root = Path(folder)
        if (root / MANIFEST).exists():
            raise InputError(f"{root}: already holds an ensemble; choose another folder")
        writer = MemberWriter(root, adapter_config(self.provenance.spec), len(self))
        for record, member in zip(self.records, self.members, strict=True):
            writer.add(member, record)
        writer.flush()
        write_manifest(root, self.provenance, writer.records)

    def export(self, index: int, folder: str | Path) -> None:
        """One member as a PEFT folder (also from packed files)."""
        write_member(Path(folder), self.members[index], adapter_config(self.provenance.spec))

    def predict(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> Predictions:
        """Logits of all members on raw texts or pairs of texts; labels are −1 (unknown).

        Raises:
            InputError: no texts or something else among them, or the base model is not to be had or
                not the one sampled on.
        """
        examples = unlabelled(texts)
        model, tokenizer = self._loaded()
        data = TokenisedSet(examples, tokenizer, self.provenance.model["max_length"])
        return self.predict_set(model, data)

    def predict_set(
        self, model: HuggingFaceLora, data: TokenisedSet, tolerance: float | None = None
    ) -> Predictions:
        """Predictions on a tokenised set, with the members put into `model`'s chain dimension.

        With a `tolerance` an input gets no more members once its probabilities have settled
        to within it (`adaptive_logits`); `.members_used` says how many it got.

        Raises:
            InputError: the members do not fit the model, or a tolerance outside (0, 1).
        """
        try:
            model.load_chains(self.state())
        except ValueError as error:
            raise InputError(f"the members do not fit the model: {error}") from error
        if tolerance is None:
            logits, used = predict_logits(model, data), None
        else:
            logits, used = adaptive_logits(model, data, self.weights, tolerance)
        return Predictions(
            logits,
            data.examples.labels,
            self.weights,
            data.examples.ids,
            self.noise_std,
            data.examples.true_probs,
            used,
        )

    def _loaded(self) -> tuple[HuggingFaceLora, Any]:
        if self._model is None:
            from transformers import AutoTokenizer

            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._model = load_model(self.provenance, device)
            self._tokenizer = load_pretrained(AutoTokenizer, self._model.info.source)
        return self._model, self._tokenizer


def load_model(provenance: Provenance, device: torch.device | str = "cpu") -> HuggingFaceLora:
    """The base model of an ensemble with its adapters' shape.

    Raises:
        InputError: the frozen weights are not those the members were sampled on.
    """
    spec, given = provenance.spec, provenance.model
    model = build_huggingface_lora_model(
        resolve_model(given["name"]),
        given["num_labels"],
        rank=spec.rank,
        alpha=spec.alpha,
        dropout=spec.dropout,
        target_modules=spec.target_modules,
        rslora=spec.rslora,
        device=device,
        dtype=given["dtype"],
    )
    found = model.fingerprint()
    if found != given["fingerprint"]:
        raise InputError(
            f"base model {given['name']!r} has fingerprint {found[:12]}…, the members were sampled "
            f"on {given['fingerprint'][:12]}…: give the same base weights"
        )
    return model


def write_manifest(root: Path, provenance: Provenance, records: Sequence[MemberRecord]) -> None:
    """`ensemble.json`: provenance and the member list."""
    head = dataclasses.asdict(provenance)
    rows = [dataclasses.asdict(record) for record in records]
    write_json(root / MANIFEST, {"format": FORMAT, **head, "members": rows})


def read_manifest(root: Path) -> tuple[Provenance, list[MemberRecord]]:
    """Undo `write_manifest`.

    Raises:
        InputError: not there, damaged, or of a later format.
    """
    path = root / MANIFEST
    value = read_json(path, "ensemble")
    if value.get("format") != FORMAT:
        raise InputError(f"{path}: format {value.get('format')!r}, this version reads {FORMAT}")
    try:
        for section, kinds in _KINDS.items():
            for name, kind in kinds.items():
                if not isinstance(value[section][name], kind):
                    raise TypeError(f"{section}.{name} is {value[section][name]!r}")
        names = [field.name for field in dataclasses.fields(Provenance)]
        provenance = Provenance(**{name: value[name] for name in names})
        records = [parse_record(row) for row in value["members"]]
        _ = provenance.spec
    except KeyError as error:
        raise InputError(f"{path}: damaged, {error} is missing; restore the file") from error
    except TypeError as error:
        raise InputError(f"{path}: damaged, {error}; restore the file") from error
    return provenance, records


def map_ensemble(root: Path) -> Ensemble:
    """The warm starts of a run, equally weighted: a deep ensemble of LoRA adapters.

    Raises:
        InputError: as `Ensemble.load`.
    """
    provenance, _ = read_manifest(root)
    path = root / "map" / "members.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [parse_record(json.loads(line)) for line in lines]
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found, so the run has no warm starts yet") from error
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error})") from error
    return Ensemble(
        provenance, records, [read_verified(root, r, PackReader(root)) for r in records]
    )
