"""Ours, as cases: SGLD steps and predictions.

Shapes: M chains, K members, B examples of a chain's batch.
"""

import time
from typing import Any

import numpy as np
import torch
from setting import BATCH, MODEL, RANK, TARGETS

from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.models.hf_lora import HuggingFaceLora, Precision, build_huggingface_lora_model
from bayesian_lora.objective import Objective
from bayesian_lora.predict import predict_logits
from bayesian_lora.samplers import SGLD
from bayesian_lora.utils.rng import chain_generators


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def our_model(
    chains: int, dtype: Precision, name: str = MODEL, device: str = "cpu"
) -> HuggingFaceLora:
    model = build_huggingface_lora_model(
        name, 2, rank=RANK, chains=chains, target_modules=TARGETS, dtype=dtype, device=device
    )
    with torch.no_grad():  # B = 0 at the start would make every member the same
        for layer in model.lora_layers().values():
            for row, rng in zip(layer.lora_B, chain_generators(1, range(chains), "b"), strict=True):
                row.copy_(torch.empty(row.shape).normal_(0, 0.02, generator=rng))
    return model


def our_sampler(model: HuggingFaceLora, data: TokenisedSet) -> SGLD:
    return SGLD(
        model.chain_parameters().values(),
        step_size=1e-6,
        num_examples=len(data),
        prior_std=0.1,
        chain_dim=0,
        generators=chain_generators(0, range(model.num_chains), "noise", model.device),
    )


class OurSteps:
    """SGLD steps, each with the drawing of its batch and its noise; examples over all chains.

    `lengths` are the tokens of each sequence of the last call's steps, (M, B) a step.
    """

    def __init__(self, data: TokenisedSet, model: HuggingFaceLora, steps: int) -> None:
        self.data, self.model, self.steps = data, model, steps
        self.objective = Objective(model, data, "categorical")
        streams = chain_generators(0, range(model.num_chains), "batches")
        self.order = BatchOrder(len(data), BATCH, streams)
        self.sampler = our_sampler(model, data)
        self.lengths: list[np.ndarray] = []

    def __call__(self) -> float:
        rows: list[np.ndarray] = []
        wait(self.model.device)
        began = time.perf_counter()
        for _ in range(self.steps):
            rows.append(self.order.iid())
            self.sampler.step(self.objective.closure(rows[-1]))
        wait(self.model.device)
        rate = sum(batch.size for batch in rows) / (time.perf_counter() - began)
        self.lengths = [self.data.lengths[batch] for batch in rows]
        return rate


def our_steps(data: TokenisedSet, chains: int, dtype: Precision, steps: int) -> OurSteps:
    """`steps` of one chain's, divided among the chains: as many examples whatever M."""
    return OurSteps(data, our_model(chains, dtype), max(1, steps // chains))


class Prediction:
    """K members on a set; texts a second, times members. `work(k)` predicts with the first k."""

    def __init__(self, members: int, texts: int, work: Any, one: Any = None) -> None:
        self.members, self.texts, self.work, self.one = members, texts, work, one or work

    def __call__(self) -> float:
        began = time.perf_counter()
        self.work(self.members)
        return self.members * self.texts / (time.perf_counter() - began)

    def warm(self) -> None:
        """One member passes through every kernel and shape."""
        self.one(1)


def our_prediction(data: TokenisedSet, members: int, dtype: Precision) -> Prediction:
    model, alone = our_model(members, dtype), our_model(1, dtype)

    def work(_members: int) -> None:
        predict_logits(model, data)

    def one(_members: int) -> None:
        predict_logits(alone, data)

    return Prediction(members, len(data), work, one)
