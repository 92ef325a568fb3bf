"""What `speed.py` times: ours and its peers, each a function that works a while and gives a rate.

Shapes: M chains, K members. The model is the packaged encoder with LoRA of rank 8 on query and
value, batches have 32 examples, and nobody drops out.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.models.hf_lora import HuggingFaceLora, Precision, build_huggingface_lora_model
from bayesian_lora.models.sources import resolve_model
from bayesian_lora.objective import Objective
from bayesian_lora.predict import predict_logits
from bayesian_lora.samplers import SGLD
from bayesian_lora.utils.rng import chain_generators

BATCH, RANK, TARGETS = 32, 8, ["query", "value"]
Case = Callable[[], float]
"""Works for some steps; examples (times chains or members) a second."""


def wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def our_model(
    chains: int, dtype: Precision, name: str = "minilm", device: str = "cpu"
) -> HuggingFaceLora:
    model = build_huggingface_lora_model(
        name, 2, rank=RANK, chains=chains, target_modules=TARGETS, dtype=dtype, device=device
    )
    with torch.no_grad():  # B = 0 at the start would make every member the same
        for layer in model.lora_layers().values():
            for row, rng in zip(layer.lora_B, chain_generators(1, range(chains), "b"), strict=True):
                row.copy_(torch.empty(row.shape).normal_(0, 0.02, generator=rng))
    return model


def our_steps(
    data: TokenisedSet, chains: int, dtype: Precision, steps: int, model: Any = None
) -> Case:
    """SGLD steps, batch and noise included; examples are summed over chains."""
    model = model or our_model(chains, dtype)
    objective = Objective(model, data, "categorical")
    order = BatchOrder(len(data), BATCH, chain_generators(0, range(chains), "batches"))
    sampler = SGLD(
        model.chain_parameters().values(),
        step_size=1e-6,
        num_examples=len(data),
        prior_std=0.1,
        chain_dim=0,
        generators=chain_generators(0, range(chains), "noise", model.device),
    )

    def case() -> float:
        wait(model.device)
        began = time.perf_counter()
        for _ in range(steps):
            sampler.step(objective.closure(order.iid()))
        wait(model.device)
        return chains * steps * BATCH / (time.perf_counter() - began)

    return case


def peft_model(members: int = 1) -> Any:
    """PEFT's model with `members` adapters named m0, m1, …"""
    base = AutoModelForSequenceClassification.from_pretrained(resolve_model("minilm").path)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS
    )
    model = get_peft_model(base, config, adapter_name="m0")
    for k in range(1, members):
        model.add_adapter(f"m{k}", config)
    return model


def features(data: TokenisedSet) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, label in enumerate(data.examples.labels):
        inputs = data.batch(np.array([i])).inputs
        rows.append({name: x[0].tolist() for name, x in inputs.items()} | {"labels": int(label)})
    return rows


def collator() -> DataCollatorWithPadding:
    return DataCollatorWithPadding(AutoTokenizer.from_pretrained(resolve_model("minilm").path))


def autocast(half: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


def peft_loop(data: TokenisedSet, half: bool, steps: int) -> Case:
    """The loop of PEFT's own examples: batches padded to their longest text, AdamW."""
    model, rows, collate = peft_model().train(), features(data), collator()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    rng = np.random.default_rng(0)

    def case() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            batch = collate([rows[i] for i in rng.integers(0, len(rows), BATCH)])
            with autocast(half):
                loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return steps * BATCH / (time.perf_counter() - began)

    return case


class _Clock(TrainerCallback):
    """From the end of the first step to the end of the last: what comes before is start-up."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_args: Any, **_options: Any) -> None:
        self.times.append(time.perf_counter())


def hf_trainer(data: TokenisedSet, half: bool, steps: int, by_length: bool, folder: str) -> Case:
    """HF `Trainer`: with its defaults, or with batches of like length (which are not i.i.d.)."""
    model, rows, collate = peft_model(), features(data), collator()

    def case() -> float:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps + 1,
            learning_rate=1e-6,
            bf16=half,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="group_by_length" if by_length else "random",
            seed=int(time.time()),  # other batches in every round
        )
        clock = _Clock()
        Trainer(
            model,
            arguments,
            collate,
            rows,
            callbacks=[clock],  # type: ignore[arg-type]
        ).train()
        return steps * BATCH / (clock.times[-1] - clock.times[0])

    return case


def posteriors_sgld(data: TokenisedSet, steps: int) -> Case | None:
    """SGLD of the `posteriors` package on the same LoRA model; None if it is not installed."""
    try:
        import posteriors  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    model, rows, collate = peft_model().train(), features(data), collator()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def log_posterior(parameters: dict[str, torch.Tensor], batch: Any) -> Any:
        out = torch.func.functional_call(model, parameters, kwargs=dict(batch))
        prior = sum(p.square().sum() for p in parameters.values()) / (2 * 0.1**2 * len(rows))
        return -out.loss - prior, torch.empty(0)

    transform = posteriors.sgmcmc.sgld.build(log_posterior, lr=1e-9)
    start = {name: p.detach().clone() for name, p in trained.items()}
    state, rng = [transform.init(start)], np.random.default_rng(0)

    def case() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            batch = collate([rows[i] for i in rng.integers(0, len(rows), BATCH)])
            state[0], _ = transform.update(state[0], batch)
        return steps * BATCH / (time.perf_counter() - began)

    return case


def our_prediction(data: TokenisedSet, members: int, dtype: Precision) -> Case:
    model = our_model(members, dtype)

    def case() -> float:
        began = time.perf_counter()
        predict_logits(model, data)
        return members * len(data) / (time.perf_counter() - began)

    return case


def peft_prediction(data: TokenisedSet, members: int, half: bool, by_length: bool) -> Case:
    """`set_adapter` for each member, then all batches: in the set's order or sorted by length."""
    model, batches = peft_model(members).eval(), _batches(data, by_length)

    def case() -> float:
        began = time.perf_counter()
        with torch.inference_mode(), autocast(half):
            for k in range(members):
                model.set_adapter(f"m{k}")
                for batch in batches:
                    model(**batch)
        return members * len(data) / (time.perf_counter() - began)

    return case


def peft_mixed_batch(data: TokenisedSet, members: int) -> Case:
    """All members in one batch: every text `members` times, each with its `adapter_names`."""
    model, batches = peft_model(members).eval(), _batches(data, by_length=True)

    def case() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                size = len(batch["input_ids"])
                names = [f"m{k}" for k in range(members) for _ in range(size)]
                many = {name: x.repeat(members, *[1] * (x.ndim - 1)) for name, x in batch.items()}
                model(**many, adapter_names=names)
        return members * len(data) / (time.perf_counter() - began)

    return case


def _batches(data: TokenisedSet, by_length: bool) -> list[dict[str, torch.Tensor]]:
    rows, collate = features(data), collator()
    order: Iterable[int] = np.argsort(-data.lengths) if by_length else range(len(rows))
    ordered = [{k: v for k, v in rows[i].items() if k != "labels"} for i in order]
    return [dict(collate(ordered[i : i + BATCH])) for i in range(0, len(rows), BATCH)]
