"""Sets of several tasks as one, and the batches drawn from them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bayesian_lora.data.joined import JoinedSet, TaskOrder
from bayesian_lora.utils.rng import chain_generators
from tests.composition.stacks import make_sets

SLICES = {"long": slice(0, 2), "third": slice(2, 5)}


@pytest.fixture
def joined(tiny_models: dict[str, Path]) -> JoinedSet:
    return JoinedSet(make_sets(tiny_models["bert"], size=20), SLICES)


def test_examples_and_labels_are_those_of_the_parts(
    tiny_models: dict[str, Path], joined: JoinedSet
) -> None:
    sets = make_sets(tiny_models["bert"], size=20)
    assert len(joined) == 40
    for i, (task, own) in enumerate(sets.items()):
        rows = joined.rows[task]
        assert (joined.task_of[rows] == i).all()
        batch, alone = joined.batch(rows), own.batch(np.arange(len(own)))
        for name, tensor in alone.inputs.items():
            torch.testing.assert_close(batch.inputs[name], tensor)
        assert (batch.labels - SLICES[task].start == alone.labels).all()


def orders(joined: JoinedSet, steps: int) -> TaskOrder:
    tasks = [("long",), ("long", "third"), ("long", "third"), ("third",)]
    mixing = ["alternate", "alternate", "sum", "sum"]
    generators = chain_generators(0, range(4), "order")
    return TaskOrder(joined, tasks, mixing, 8, steps, generators)


def test_a_chain_sees_its_own_tasks_in_turn_or_in_equal_shares(joined: JoinedSet) -> None:
    order = orders(joined, steps=6)
    epoch = order.epoch()
    assert epoch.shape == (4, 48)
    tasks = np.stack([joined.task_of[order.epoch_batch(epoch, n)] for n in range(6)])  # (6, 4, 8)
    assert (tasks[:, 0] == 0).all()
    assert (tasks[:, 3] == 1).all()
    assert (tasks[:, 1] == (np.arange(6) % 2)[:, None]).all(), "one task a batch, in turn"
    assert (tasks[:, 2].sum(1) == 4).all(), "half of each batch"


def test_every_example_comes_before_any_comes_again(joined: JoinedSet) -> None:
    """Steps enough for two and a half times a task's 20 examples."""
    rows = orders(joined, steps=6).epoch()[0]
    assert len(np.unique(rows[:20])) == len(np.unique(rows[20:40])) == 20
    uses = np.bincount(rows, minlength=20)[:20]
    assert uses.min() == 2
    assert uses.max() == 3


def test_a_chain_draws_what_it_would_draw_alone(joined: JoinedSet) -> None:
    together, alone = orders(joined, steps=4), orders(joined, steps=4)
    alone.keep([2])
    for _ in range(2):
        assert (together.epoch()[2] == alone.epoch()[0]).all()


def test_what_is_left_of_equal_shares_goes_round(tiny_models: dict[str, Path]) -> None:
    labels = {"a": 2, "b": 2, "c": 2}
    slices = {task: slice(2 * i, 2 * i + 2) for i, task in enumerate(labels)}
    data = JoinedSet(make_sets(tiny_models["bert"], labels, size=20), slices)
    for size in (8, 7, 2):
        order = TaskOrder(data, [tuple(labels)], ["sum"], size, 3, chain_generators(0, [0], "o"))
        epoch = order.epoch()
        tasks = data.task_of[epoch[0]]
        assert np.bincount(tasks, minlength=3).tolist() == [size] * 3
        for n in range(3):
            own = np.bincount(data.task_of[order.epoch_batch(epoch, n)[0]], minlength=3)
            assert own.max() - own.min() <= 1
