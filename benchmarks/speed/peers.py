"""The ways to train with PEFT, as cases, and as PEFT's users run them.

In train mode with PEFT's default `lora_dropout=0`, the base encoder's own dropout (.1) active as
HuggingFace has it; batches padded to their longest text; texts tokenised beforehand. i.i.d.
batches but in HF `Trainer`, which goes in epochs.
"""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from rounds import Case
from setting import BATCH, MODEL, RANK, TARGETS
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.models.sources import resolve_model

LR = 1e-6


def peft_model(members: int = 1) -> Any:
    """PEFT's model with `members` adapters named m0, m1, …"""
    base = AutoModelForSequenceClassification.from_pretrained(resolve_model(MODEL).path)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS
    )
    model = get_peft_model(base, config, adapter_name="m0")
    for k in range(1, members):
        model.add_adapter(f"m{k}", config)
    return model


def features(data: TokenisedSet) -> list[dict[str, Any]]:
    """What a HuggingFace data set gives a collator."""
    rows: list[dict[str, Any]] = []
    for i, label in enumerate(data.examples.labels):
        inputs = data.batch(np.array([i])).inputs
        rows.append({name: x[0].tolist() for name, x in inputs.items()} | {"labels": int(label)})
    return rows


def collator() -> DataCollatorWithPadding:
    return DataCollatorWithPadding(AutoTokenizer.from_pretrained(resolve_model(MODEL).path))


def autocast(half: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


class PeftLoops:
    """The loop of PEFT's own examples (AdamW), for some models in turn; examples over all."""

    def __init__(
        self, data: TokenisedSet, models: Sequence[Any], half: bool, steps: int, seed: int = 0
    ) -> None:
        self.models = [model.train() for model in models]
        self.optimizers = [
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
            for model in models
        ]
        self.rows, self.collate = features(data), collator()
        self.half, self.steps = half, steps
        self.rng = np.random.default_rng(seed)

    def step(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        chosen = self.rng.integers(0, len(self.rows), BATCH)
        batch = self.collate([self.rows[i] for i in chosen])
        with autocast(self.half):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def __call__(self) -> float:
        began = time.perf_counter()
        for _ in range(self.steps):
            for model, optimizer in zip(self.models, self.optimizers, strict=True):
                self.step(model, optimizer)
        spent = time.perf_counter() - began
        return self.steps * len(self.models) * BATCH / spent


def peft_loop(data: TokenisedSet, half: bool, steps: int) -> PeftLoops:
    return PeftLoops(data, [peft_model()], half, steps)


class _Clock(TrainerCallback):
    """From the end of the first step to the end of the last: what comes before is start-up."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_args: Any, **_options: Any) -> None:
        self.times.append(time.perf_counter())


def mega_batch(data: TokenisedSet) -> int:
    """Batches that `group_by_length` sorts together, the longest first."""
    return max(1, min(len(data) // (4 * BATCH), 50))


def hf_trainer(data: TokenisedSet, half: bool, steps: int, by_length: bool, folder: str) -> Case:
    """HF `Trainer`: with its defaults, or with batches of like length (which are not i.i.d.).

    Grouped batches go from long to short through a mega-batch: only whole ones are typical.
    """
    rows, collate, seeds = features(data), collator(), itertools.count()

    def case() -> float:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps + 1,
            learning_rate=LR,
            bf16=half,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="group_by_length" if by_length else "random",
            seed=next(seeds),  # other batches in every round
        )
        clock = _Clock()
        # A model of its own: every Trainer wraps its model's forward pass once more.
        trainer = Trainer(
            peft_model(),
            arguments,
            collate,
            rows,  # type: ignore[arg-type]
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return steps * BATCH / (clock.times[-1] - clock.times[0])

    return case


def posteriors_sgld(data: TokenisedSet, steps: int) -> Case | None:
    """SGLD of the `posteriors` package on the same LoRA model; None if it is not installed."""
    try:
        import posteriors
    except ImportError:
        return None
    model, rows, collate = peft_model().train(), features(data), collator()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def log_posterior(parameters: dict[str, torch.Tensor], batch: Any) -> Any:
        out = torch.func.functional_call(model, parameters, kwargs=dict(batch))
        prior = sum(p.square().sum() for p in parameters.values()) / (2 * 0.1**2 * len(rows))
        return -out.loss - prior, torch.empty(0)

    package: Any = posteriors
    transform = package.sgmcmc.sgld.build(log_posterior, lr=1e-9)
    start = {name: p.detach().clone() for name, p in trained.items()}
    state, rng = [transform.init(start)], np.random.default_rng(0)

    def case() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            batch = collate([rows[i] for i in rng.integers(0, len(rows), BATCH)])
            state[0], _ = transform.update(state[0], batch)
        return steps * BATCH / (time.perf_counter() - began)

    return case
