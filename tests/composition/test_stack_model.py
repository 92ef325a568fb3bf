"""A stack's model gives each task what its adapters and head give alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bayesian_lora.composition.stack_model import (
    build_stack_model,
    stack_state,
    task_predictions,
    updated,
)
from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.models.task_heads import with_tasks
from bayesian_lora.predict import predict_logits
from tests.composition.stacks import LABELS, make_sets, make_stack

FAMILIES = ("bert", "roberta", "distilbert")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("members", [1, 3])
def test_every_task_gets_what_its_own_ensemble_predicts(
    tiny_models: dict[str, Path], family: str, members: int
) -> None:
    """Also through a head of several layers (RoBERTa, DistilBERT)."""
    base = tiny_models[family]
    stack = make_stack(base, members=members)
    model = build_stack_model(stack)
    for task, data in make_sets(base).items():
        found = task_predictions(model, stack, task, data)
        alone = stack.ensemble(task)
        texts = data.examples.texts[0]
        wanted = alone.predict(texts)
        assert found.logits.shape == (members, len(texts), LABELS[task])
        np.testing.assert_allclose(found.logits, wanted.logits, atol=2e-5)
        assert np.ptp(found.logits) > 0.1, "an adapter that does nothing would prove nothing"


def test_one_pass_gives_all_heads(tiny_models: dict[str, Path]) -> None:
    """Through the padded forward too."""
    stack = make_stack(tiny_models["roberta"], members=2)
    model = build_stack_model(stack)
    data = next(iter(make_sets(tiny_models["roberta"]).values()))
    flat = predict_logits(model, data)
    assert flat.shape[-1] == sum(LABELS.values())
    model.flat = False
    np.testing.assert_allclose(predict_logits(model, data), flat, atol=2e-5)


def test_state_and_back(tiny_models: dict[str, Path]) -> None:
    stack = make_stack(tiny_models["bert"], members=2)
    again = updated(stack, stack_state(stack), weights=stack.weights)
    for name, tensor in stack.factors.items():
        torch.testing.assert_close(again.factors[name], tensor, rtol=0, atol=0)
    for task, head in stack.heads.items():
        for name, tensor in head.items():
            torch.testing.assert_close(again.heads[task][name], tensor, rtol=0, atol=0)
    three = {name: torch.cat([t, t[:1]]) for name, t in stack_state(stack).items()}
    assert updated(stack, three).weights.tolist() == [1 / 3] * 3


def test_another_base_is_refused(tiny_models: dict[str, Path]) -> None:
    stack = make_stack(tiny_models["bert"])
    odd = stack.changed(model={**stack.model, "fingerprint": "0" * 64})
    with pytest.raises(InputError, match="same base weights"):
        build_stack_model(odd)
    wider = {name: torch.cat([t, t], dim=1) for name, t in stack.factors.items()}
    with pytest.raises(InputError, match="does not fit"):
        build_stack_model(stack.changed(factors=wider))


def test_a_task_with_a_dot_in_its_name(tiny_models: dict[str, Path]) -> None:
    model = build_huggingface_lora_model(str(tiny_models["bert"]), 2)
    with pytest.raises(ValueError, match="no dot"):
        with_tasks(model, {"a.b": 2})
