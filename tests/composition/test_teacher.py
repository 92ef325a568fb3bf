"""What a stack is distilled from: the single adapters' mean probabilities.

Shapes: K members, N examples, C_t classes of task t.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesian_lora.composition.retrain import part_states, teacher_log_probs
from bayesian_lora.composition.stack import Part, Stack
from bayesian_lora.composition.stack_model import build_stack_model
from bayesian_lora.data.joined import JoinedSet
from bayesian_lora.predict import predict_logits
from tests.composition.stacks import make_sets, make_stack


@pytest.fixture
def stack(tiny_models: dict[str, Path]) -> Stack:
    """Two adapters of one task, one of the other; the second member weighs nothing."""
    made = make_stack(tiny_models["bert"], {"long": 2, "third": 1}, members=2)
    parts = (
        Part("a", "", (0, 1), task="long"),
        Part("b", "", (1, 2), task="long"),
        Part("c", "", (2, 3), task="third"),
    )
    return made.changed(parts=parts, weights=np.array([1.0, 0.0]))


def test_a_task_of_two_adapters_is_taught_by_the_mean_of_both(
    tiny_models: dict[str, Path], stack: Stack
) -> None:
    model = build_stack_model(stack)
    data = JoinedSet(make_sets(tiny_models["bert"], size=8), model.slices)
    found = np.exp(teacher_log_probs(model, stack, data))
    states = part_states(stack)

    def alone(name: str, task: str) -> Tensor:
        model.load_chains(states[name])
        logits = torch.from_numpy(predict_logits(model, data))[0, :, model.slices[task]]
        return logits.double().softmax(-1)

    a, b, c = alone("a", "long"), alone("b", "long"), alone("c", "third")
    assert (a - b).abs().max() > 0.01
    np.testing.assert_allclose(found[:, model.slices["long"]], (a + b) / 2, atol=1e-6)
    np.testing.assert_allclose(found[:, model.slices["third"]], c, atol=1e-6)
