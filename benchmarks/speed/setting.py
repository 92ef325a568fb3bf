"""The work all measurements share: model, batch size, LoRA targets, texts, and the machine.

The model is the packaged encoder with LoRA of rank 8 on query and value, a batch has 32 examples.
"""

import os
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import stratified_subset
from bayesian_lora.data.glue_datasets import get_task, load_split
from bayesian_lora.models.sources import resolve_model

BATCH, RANK, TARGETS = 32, 8, ["query", "value"]
MODEL, LENGTH = "minilm", 128
EVERY = 1_000_000
"""Texts of a split, where all are wanted."""


def load(
    task: str, split: str, examples: int, model: str = MODEL, length: int = LENGTH
) -> TokenisedSet:
    """At most so many texts of a split, tokenised."""
    folder = os.environ.get("BAYESIAN_LORA_DATA")
    whole = load_split(get_task(task), split, data_dir=Path(folder) if folder else None)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model).path)
    part = whole if examples >= len(whole) else stratified_subset(whole, examples, 0)
    return TokenisedSet(part, tokenizer, length)


def machine() -> dict[str, Any]:
    """What the figures depend on; the load says whether the machine was idle."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "load": os.getloadavg()[0],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
