"""The ways to predict with K adapters of PEFT, as cases; batches of 32, collated beforehand."""

from collections.abc import Iterable

import numpy as np
import torch
from ours import Prediction
from peers import autocast, collator, features, peft_model
from setting import BATCH

from bayesian_lora.data.batching import TokenisedSet


def peft_prediction(data: TokenisedSet, members: int, half: bool, by_length: bool) -> Prediction:
    """`set_adapter` for each member, then all batches: in the set's order or sorted by length."""
    model, batches = peft_model(members).eval(), _batches(data, by_length)

    def work(members: int) -> None:
        with torch.inference_mode(), autocast(half):
            for k in range(members):
                model.set_adapter(f"m{k}")
                for batch in batches:
                    model(**batch)

    return Prediction(members, len(data), work)


def peft_mixed_batch(data: TokenisedSet, members: int) -> Prediction:
    """All members in one batch: every text `members` times, each with its `adapter_names`."""
    model, batches = peft_model(members).eval(), _batches(data, by_length=True)

    def work(members: int) -> None:
        with torch.inference_mode():
            for batch in batches:
                size = len(batch["input_ids"])
                names = [f"m{k}" for k in range(members) for _ in range(size)]
                many = {name: x.repeat(members, *[1] * (x.ndim - 1)) for name, x in batch.items()}
                model(**many, adapter_names=names)

    return Prediction(members, len(data), work)


def _batches(data: TokenisedSet, by_length: bool) -> list[dict[str, torch.Tensor]]:
    rows, collate = features(data), collator()
    order: Iterable[int] = np.argsort(-data.lengths) if by_length else range(len(rows))
    ordered = [{k: v for k, v in rows[i].items() if k != "labels"} for i in order]
    return [dict(collate(ordered[i : i + BATCH])) for i in range(0, len(rows), BATCH)]
