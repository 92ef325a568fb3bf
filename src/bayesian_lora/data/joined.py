"""The sets of several tasks as one, whose labels count through all tasks' classes.

Shapes: N examples of all sets, B examples of a chain's batch, M chains.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples


class JoinedSet(TokenisedSet):
    """Tokenised sets one behind the other; texts are not kept.

    Args:
        sets: by task, each classified.
        slices: each task's classes among all; a label moves by its task's start.

    `task_of` (N,) is the number of each example's task, `rows` the examples of each.
    """

    def __init__(self, sets: Mapping[str, TokenisedSet], slices: Mapping[str, slice]) -> None:
        given = list(sets.values())
        self.names = tuple(sets)
        self.lengths = np.concatenate([data.lengths for data in given])
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        columns = set.intersection(*(set(data._columns) for data in given))
        self._columns = {
            name: np.concatenate([data._columns[name] for data in given])
            for name in sorted(columns)
        }
        self._pad = given[0]._pad
        labels = [sets[t].examples.labels + (slices[t].start or 0) for t in sets]
        sizes = [len(data) for data in given]
        whole = np.concatenate(labels).astype(np.int64)
        self.examples = Examples((), whole, np.arange(len(whole)))
        self.labels = torch.from_numpy(whole)
        self.task_of = np.repeat(np.arange(len(given)), sizes)
        ends = np.cumsum(sizes)
        self.rows = {
            name: np.arange(end - size, end)
            for name, size, end in zip(sets, sizes, ends, strict=True)
        }


class TaskOrder:
    """Which rows each chain sees, of the tasks it is fitted to; as `BatchOrder`, by epochs.

    Every batch of a chain is of one task, in turn (``alternate``), or has an equal share of each
    (``sum``: the mean over such a batch is the mean of the tasks' losses; examples that are left
    over when shares are equal go to the tasks in turn).

    Args:
        data: of all tasks.
        tasks: of each chain.
        mixing: of each chain.
        batch_size: examples in a chain's batch.
        steps: batches in an epoch, the same for all chains.
        generators: one a chain.
    """

    def __init__(
        self,
        data: JoinedSet,
        tasks: Sequence[Sequence[str]],
        mixing: Sequence[str],
        batch_size: int,
        steps: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        self.data, self.batch_size, self.batches_per_epoch = data, batch_size, steps
        self.tasks, self.mixing = [tuple(t) for t in tasks], list(mixing)
        self.generators = list(generators)

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these chains alone."""
        self.tasks = [self.tasks[m] for m in kept]
        self.mixing = [self.mixing[m] for m in kept]
        self.generators = [self.generators[m] for m in kept]

    def epoch(self) -> np.ndarray:
        """(M, steps·B) rows, batch by batch."""
        return np.stack([self._chain(m) for m in range(len(self.tasks))])

    def epoch_batch(self, epoch: np.ndarray, number: int) -> np.ndarray:
        """Batch `number` of an epoch, (M, B)."""
        return epoch[:, number * self.batch_size : (number + 1) * self.batch_size]

    def _chain(self, m: int) -> np.ndarray:
        tasks, steps, size = self.tasks[m], self.batches_per_epoch, self.batch_size
        if self.mixing[m] == "sum":
            shares = _shares(size, steps, len(tasks))
            owner = np.repeat(np.tile(np.arange(len(tasks)), steps), shares.reshape(-1))
            mixed = np.empty(steps * size, dtype=np.int64)
            for i, task in enumerate(tasks):
                mixed[owner == i] = self._draw(task, int(shares[:, i].sum()), m)
            return mixed
        out = np.empty((steps, size), dtype=np.int64)
        for i, task in enumerate(tasks):
            turns = out[i :: len(tasks)]
            turns[:] = self._draw(task, turns.size, m).reshape(turns.shape)
        return out.reshape(-1)

    def _draw(self, task: str, count: int, m: int) -> np.ndarray:
        """`count` rows of a task: whole permutations one behind the other, cut to length."""
        own = self.data.rows[task]
        times = -(-count // len(own))
        order = [torch.randperm(len(own), generator=self.generators[m]) for _ in range(times)]
        return own[torch.cat(order).numpy()[:count]] if times else own[:0]


def _shares(size: int, steps: int, tasks: int) -> np.ndarray:
    """(steps, T): how many of a batch's `size` examples are of each task."""
    left = np.arange(tasks) < size % tasks
    # From batch to batch they go on where they ended.
    turned = [np.roll(left, step * (size % tasks)) for step in range(steps)]
    return size // tasks + np.stack(turned).astype(int)
