"""Examples/s of the warm start against a plain PEFT loop with dynamic padding.

    BAYESIAN_LORA_DATA=… python benchmarks/warm_start_throughput.py [--task sst2] [--rounds 5]

Same model (packaged encoder, r = 8 on query and value, LoRA dropout .1), same batches of 32 in
random order, same precision (float32), AdamW; rounds alternate, the medians and their ratio are
printed. Run it alone: two OpenMP programs slow each other.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.data.examples import stratified_subset
from bayesian_lora.data.glue_datasets import get_task, load_split
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.models.sources import resolve_model
from bayesian_lora.objective import Objective, prior_groups
from bayesian_lora.utils.rng import chain_generators
from bayesian_lora.warm_start import WarmStart

BATCH, RANK, LR, DROPOUT = 32, 8, 1e-3, 0.1


def ours(data: TokenisedSet, num_labels: int, chains: int) -> float:
    """Examples/s summed over chains."""
    model = build_huggingface_lora_model(
        "minilm", num_labels, rank=RANK, dropout=DROPOUT, chains=chains
    )
    streams = [chain_generators(0, range(chains), name) for name in ("order", "dropout")]
    objective = Objective(model, data, "categorical")
    order = BatchOrder(len(data), BATCH, streams[0])
    groups = prior_groups(model, 0.1, None)
    warm = WarmStart(objective, groups, order, epochs=1, lr=LR, dropout=streams[1])
    began = time.perf_counter()
    warm.run(lambda _: None, lambda _: None)
    return chains * len(data) / (time.perf_counter() - began)


def peft(data: TokenisedSet, num_labels: int) -> float:
    """The loop of PEFT's own examples: shuffled batches padded to their longest text."""
    path = resolve_model("minilm").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=num_labels)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=DROPOUT,
        target_modules=["query", "value"],
    )
    model = get_peft_model(base, config).train()
    rows = [
        {**{name: row.tolist() for name, row in features(data, i).items()}, "labels": int(y)}
        for i, y in enumerate(data.examples.labels)
    ]
    loader = DataLoader(
        rows,  # type: ignore[arg-type]
        BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LR)
    began = time.perf_counter()
    for batch in loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return len(data) / (time.perf_counter() - began)


def features(data: TokenisedSet, row: int) -> dict[str, torch.Tensor]:
    inputs = data.batch(np.array([row])).inputs
    return {name: tensor[0] for name, tensor in inputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--examples", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args()
    folder = os.environ.get("BAYESIAN_LORA_DATA")
    task = get_task(given.task)
    train = load_split(task, "train", data_dir=Path(folder) if folder else None)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm").path)
    data = TokenisedSet(stratified_subset(train, given.examples, 0), tokenizer, 128)
    results: dict[str, list[float]] = {}
    for round_number in range(given.rounds):
        results.setdefault("peft", []).append(peft(data, task.num_labels))
        for chains in given.chains:
            rate = ours(data, task.num_labels, chains)
            results.setdefault(f"ours, {chains} chains", []).append(rate)
        print(f"round {round_number + 1}: " + str({k: round(v[-1], 1) for k, v in results.items()}))
    reference = statistics.median(results["peft"])
    for name, rates in results.items():
        middle = statistics.median(rates)
        print(
            f"{name:<16} {middle:7.1f} examples/s (median; {min(rates):.1f} to {max(rates):.1f}), "
            f"{middle / reference:.2f}× the PEFT loop"
        )


if __name__ == "__main__":
    main()
