"""Small stacks and data of two tasks, for tests: the synthetic sentences under other labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bayesian_lora.composition.stack import Part, Stack, StackTask
from bayesian_lora.composition.task_data import TaskData
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.glue_datasets import get_task
from bayesian_lora.data.synthetic import generate
from bayesian_lora.models.hf_lora import build_huggingface_lora_model

LABELS = {"long": 2, "third": 3}
"""Tasks: whether a sentence is long; how many words it has, modulo 3."""


def make_stack(
    base: Path,
    ranks: Mapping[str, int] | None = None,
    members: int = 1,
    labels: Mapping[str, int] = LABELS,
    seed: int = 0,
) -> Stack:
    """Random adapters, one of each task, stacked; B is not zero."""
    ranks = ranks or dict.fromkeys(labels, 1)
    rank = sum(ranks.values())
    model = build_huggingface_lora_model(
        str(base), 2, rank=rank, alpha=float(rank), chains=members, target_modules=targets(base)
    )
    draw = torch.Generator().manual_seed(seed)
    factors = {
        n: _normal(p, 0.3, draw) for n, p in model.chain_parameters().items() if "lora_" in n
    }
    parts, start = [], 0
    for task, own in ranks.items():
        parts.append(Part(task, f"random {task}", (start, start + own), task=task))
        start += own
    return Stack(
        model={
            "name": str(base),
            "base": model.info.spec.base,
            "fingerprint": model.fingerprint(),
            "dtype": "float32",
        },
        spec=model.info.spec,
        tasks={
            t: StackTask(t, t, tuple(f"{t}{c}" for c in range(n)), "categorical", 32)
            for t, n in labels.items()
        },
        parts=tuple(parts),
        factors=factors,
        heads={t: _head(base, n, members, draw) for t, n in labels.items()},
        weights=np.full(members, 1 / members),
        facts={"kind": "exact"},
    )


def targets(base: Path) -> list[str]:
    return ["q_lin", "v_lin"] if "distil" in base.name else ["query", "value"]


def _head(base: Path, labels: int, members: int, draw: torch.Generator) -> dict[str, Tensor]:
    model = build_huggingface_lora_model(str(base), labels, rank=1, chains=members)
    own = model.chain_parameters()
    return {n: _normal(p, 0.5, draw) for n, p in own.items() if "lora_" not in n}


def _normal(like: Tensor, std: float, draw: torch.Generator) -> Tensor:
    return torch.empty_like(like.detach()).normal_(0, std, generator=draw)


def make_sets(base: Path, labels: Mapping[str, int] = LABELS, size: int = 48) -> dict[str, Any]:
    """{task: TokenisedSet} of different sentences."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    sentences = generate("train", size=size * len(labels)).texts[0]
    found = {}
    for i, (task, classes) in enumerate(labels.items()):
        own = sentences[i * size : (i + 1) * size]
        words = np.array([len(text.split()) for text in own])
        wanted = words > np.median(words) if classes == 2 else words % classes
        examples = Examples((own,), wanted.astype(np.int64), np.arange(size))
        found[task] = TokenisedSet(examples, tokenizer, 32)
    return found


def make_data(
    base: Path, labels: Mapping[str, int] = LABELS, size: int = 48
) -> dict[str, TaskData]:
    """{task: TaskData}; held out and evaluated are the sentences trained on."""
    spec = get_task("synthetic")
    return {
        task: TaskData(spec, own, own, {"validation": own})
        for task, own in make_sets(base, labels, size).items()
    }
