"""An ensemble of adapters: members, weights, provenance; stored as ordinary PEFT folders.

Shapes: K members, M chains, N examples, C classes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.adaptive import adaptive_logits, check_tolerance
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import unlabelled
from bayesian_lora.errors import InputError
from bayesian_lora.manifest import (
    MANIFEST,
    Provenance,
    read_manifest,
    read_whole_manifest,
    write_manifest,
)
from bayesian_lora.member_files import MemberRecord, MemberWriter, PackReader, read_verified
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model
from bayesian_lora.models.peft_io import adapter_config, write_member
from bayesian_lora.models.sources import load_pretrained, resolve_model
from bayesian_lora.predict import Predictions, predict_logits
from bayesian_lora.utils.lora_params import stack


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
        if not 0 < sum(record.weight for record in records) < float("inf"):
            raise InputError("the members' weights do not sum to a positive number")
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
        provenance, records, _ = read_manifest(root)
        if not records:
            raise InputError(f"{root / MANIFEST}: lists no members yet; let the run collect some")
        return cls(provenance, records, read_members(root, records))

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

    @property
    def chains(self) -> np.ndarray:
        """(K,) the number of each member's chain."""
        return np.array([record.chain for record in self.records])

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

    def check_tolerance(self, tolerance: float | None) -> None:
        """Whether these members can predict with this `tolerance`; None always.

        Raises:
            InputError: as `adaptive.check_tolerance`, or a regression, which has no probabilities.
        """
        if tolerance is None:
            return
        if self.noise_std is not None:
            raise InputError(
                f"tolerance={tolerance}: a regression has no probabilities; leave it out"
            )
        check_tolerance(tolerance, self.chains)

    def predict(
        self,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        *,
        tolerance: float | None = None,
    ) -> Predictions:
        """Logits of all members on raw texts or pairs of texts; labels are −1 (unknown).

        With a `tolerance`, such as 0.01, a text gets no more members once its probabilities have
        settled to within it: quicker, and as near as `adaptive` says. `.probs` is then what to
        read, `.members_used` how many members each text got.

        Raises:
            InputError: no texts or something else among them, or the base model is not to be had or
                not the one sampled on, or as `check_tolerance`.
        """
        self.check_tolerance(tolerance)
        examples = unlabelled(texts)
        model, tokenizer = self._loaded()
        data = TokenisedSet(examples, tokenizer, self.provenance.model["max_length"])
        return self.predict_set(model, data, tolerance)

    def predict_set(
        self,
        model: HuggingFaceLora,
        data: TokenisedSet,
        tolerance: float | None = None,
        on_done: Callable[[int], None] = lambda _: None,
    ) -> Predictions:
        """Predictions on a tokenised set, with the members put into `model`'s chain dimension.

        With a `tolerance` an input gets no more members once its probabilities have settled
        to within it (`adaptive_logits`); `.members_used` says how many it got. `on_done` is told
        how many of the K·N answers came; with a tolerance, of none.

        Raises:
            InputError: the members do not fit the model, or as `check_tolerance`.
        """
        self.check_tolerance(tolerance)
        try:
            model.load_chains(self.state())
        except ValueError as error:
            raise InputError(f"the members do not fit the model: {error}") from error
        if tolerance is None:
            logits, used = predict_logits(model, data, on_done=on_done), None
        else:
            logits, used = adaptive_logits(model, data, self.weights, self.chains, tolerance)
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


def map_ensemble(root: Path) -> Ensemble:
    """The warm starts of a run, equally weighted: a deep ensemble of LoRA adapters.

    Raises:
        InputError: as `Ensemble.load`.
    """
    provenance, _, starts = read_manifest(root)
    if not starts:
        raise InputError(f"{root / MANIFEST}: the run has no warm starts yet; let it fit them")
    return Ensemble(provenance, starts, read_members(root, starts))


def other_starts(root: Path) -> dict[str, Ensemble]:
    """A run's fits by kind, ``last`` and ``early_stopped``: one of them its warm starts.

    ``last`` alone where no other was stored, nothing for a run of a version that did not say which
    its warm starts are; `why_no_other_starts` has the reason.

    Raises:
        InputError: as `map_ensemble`.
    """
    provenance, _, starts, alternatives = read_whole_manifest(root)
    if alternatives.starts_are is None:
        return {}
    listed = {alternatives.starts_are: starts, **alternatives.records}
    return {k: Ensemble(provenance, r, read_members(root, r)) for k, r in listed.items() if r}


def why_no_other_starts(root: Path) -> str | None:
    """Why `other_starts` has not both kinds; None if it has.

    Raises:
        InputError: as `map_ensemble`.
    """
    _, _, _, alternatives = read_whole_manifest(root)
    if alternatives.starts_are is None:
        return "the run stored one fit a chain, and not of which epoch"
    return alternatives.reason


def read_members(root: Path, records: Sequence[MemberRecord]) -> list[dict[str, Tensor]]:
    """The tensors of each, verified, all of one shape.

    Raises:
        InputError: a member missing, damaged, not finite, or of other tensors than most (named).
    """
    packs = PackReader(root)
    members = [read_verified(root, record, packs) for record in records]
    shapes = [tuple((n, tuple(t.shape)) for n, t in sorted(m.items())) for m in members]
    usual = Counter(shapes).most_common(1)[0][0] if shapes else ()
    for record, found in zip(records, shapes, strict=True):
        if found != usual:
            odd = sorted({name for name, _ in set(found) ^ set(usual)})
            raise InputError(
                f"{root / record.path}: a member of another shape than the others ({odd[0]}); "
                "it belongs to another run; restore the one that was written here"
            )
    return members
