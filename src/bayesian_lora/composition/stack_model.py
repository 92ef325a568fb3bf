"""A stack as one model: the shared factors in the encoder, every task's head on it.

Shapes: K members, M chains, N examples, C_t classes of task t.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.composition.stack import Stack
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.models.sources import ModelSource, load_pretrained, resolve_model
from bayesian_lora.models.task_heads import TaskModel, with_tasks
from bayesian_lora.predict import Predictions, predict_logits


def load_tokenizer(stack: Stack) -> Any:
    """The base model's.

    Raises:
        InputError: the base model is not to be had.
    """
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, resolve_model(stack.model["name"]))


def build_stack_model(
    stack: Stack, *, device: torch.device | str = "cpu", source: ModelSource | None = None
) -> TaskModel:
    """The base model with the stack's K members in the chain dimension.

    Raises:
        InputError: the base is not to be had, is not the one the adapters were made on, or the
            stack's tensors do not fit it.
    """
    spec, given = stack.spec, stack.model
    first = next(iter(stack.tasks.values()))
    model = build_huggingface_lora_model(
        source or resolve_model(given["name"]),
        first.num_labels,
        rank=spec.rank,
        alpha=spec.alpha,
        target_modules=spec.target_modules,
        rslora=spec.rslora,
        device=device,
        dtype=given["dtype"],
    )
    fingerprint = given.get("fingerprint")
    if fingerprint is not None and model.fingerprint() != fingerprint:
        raise InputError(
            f"base model {given['name']!r} has fingerprint {model.fingerprint()[:12]}…, the "
            f"adapters were made on {fingerprint[:12]}…: give the same base weights"
        )
    tasks = {name: task.num_labels for name, task in stack.tasks.items()}
    found = with_tasks(model, tasks)
    try:
        found.load_chains(stack_state(stack))
    except ValueError as error:
        raise InputError(f"the stack does not fit {given['name']!r}: {error}") from error
    return found


def stack_state(stack: Stack) -> dict[str, Tensor]:
    """Factors and all heads (K, …) under the names of a `TaskModel`."""
    heads = {
        _with_task(name, task): tensor
        for task, head in stack.heads.items()
        for name, tensor in head.items()
    }
    return {**stack.factors, **heads}


def updated(
    stack: Stack,
    state: Mapping[str, Tensor],
    *,
    weights: np.ndarray | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Stack:
    """Undo `stack_state`: the stack with these tensors, whose K may be another.

    weights: (K,), equal for all where left out; facts: in place of the stack's own.
    """
    own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
    members = next(iter(own.values())).shape[0]
    return stack.changed(
        factors={name: own[name] for name in stack.factors},
        heads={
            task: {name: own[_with_task(name, task)] for name in head}
            for task, head in stack.heads.items()
        },
        weights=np.full(members, 1 / members) if weights is None else weights,
        facts=stack.facts if facts is None else facts,
    )


def _with_task(name: str, task: str) -> str:
    """``classifier.weight`` → ``classifier.tasks.sst2.weight``."""
    module, _, kind = name.rpartition(".")
    return f"{module}.tasks.{task}.{kind}"


def task_predictions(
    model: TaskModel, stack: Stack, task: str, data: TokenisedSet, **options: Any
) -> Predictions:
    """One task's predictions: its slice of the logits, as if no other head were there.

    options: of `predict_logits`.
    """
    logits = predict_logits(model, data, **options)[..., model.slices[task]]
    return Predictions(
        np.ascontiguousarray(logits),
        data.examples.labels,
        stack.weights,
        data.examples.ids,
        true_probs=data.examples.true_probs,
    )
