"""Warm starts of a tiny model, set up and watched; in float64.

Shapes: M chains, N training examples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.synthetic import generate
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.objective import Objective, prior_groups
from bayesian_lora.utils.rng import chain_generators
from bayesian_lora.warm_start import EpochReport, StepReport, WarmStart

N, BATCH, HELD_OUT = 24, 10, 9  # batches of 10, 10 and 4
PER_EPOCH = 3


@dataclass
class Fit:
    """A warm start set up, and what it reported."""

    warm: WarmStart
    steps: list[StepReport] = field(default_factory=list)
    epochs: list[EpochReport] = field(default_factory=list)

    def run(self, on_step: Callable[[StepReport], None] = lambda _: None) -> "Fit":
        def both(report: StepReport) -> None:
            self.steps.append(report)
            on_step(report)

        self.warm.run(both, self.epochs.append)
        return self

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {**self.warm.objective.model.chain_parameters()}
        noise = {} if (x := self.warm.objective.log_noise) is None else {"log_noise": x}
        return {n: tensor.detach().clone() for n, tensor in (found | noise).items()}


SetUp = Callable[..., Fit]


def set_up_in(folder: Path) -> SetUp:
    """Chains of a model in a folder, by their global numbers, so that some can be fitted alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenised(examples: Examples, regression: bool) -> TokenisedSet:
        if regression:
            labels = np.array([len(text) / 20 for text in examples.texts[0]], dtype=np.float32)
            examples = Examples(examples.texts, labels, examples.ids)
        return TokenisedSet(examples, tokenizer, 64)

    def build(
        numbers: list[int], *, regression: bool = False, validate: bool = True, **options: Any
    ) -> Fit:
        model = build_huggingface_lora_model(
            str(folder),
            1 if regression else 2,
            rank=2,
            dropout=0.2,
            chains=len(numbers),
            generators=chain_generators(0, numbers, "init"),
            dtype="float64",
        )
        train = tokenised(generate("train", size=N), regression)
        validation = tokenised(generate("validation", size=HELD_OUT), regression)
        objective = Objective(model, train, "gaussian" if regression else "categorical")
        options.setdefault("dropout", chain_generators(0, numbers, "dropout"))
        batch_size = options.pop("batch_size", BATCH)
        warm = WarmStart(
            objective,
            prior_groups(model, 0.2, 0.5),
            BatchOrder(N, batch_size, chain_generators(0, numbers, "order")),
            validation=validation if validate else None,
            **{"epochs": 3, "lr": 0.02, **options},
        )
        return Fit(warm)

    return build


def script_scores(fit: Fit, losses: list[list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Epoch e's validation losses (M,) are losses[e]."""
    left = iter(losses)
    monkeypatch.setattr(
        fit.warm.objective,
        "score",
        lambda _: (torch.tensor(next(left), dtype=torch.float64), None),
    )


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=name)
