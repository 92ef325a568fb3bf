"""Small growths for tests: tasks of the embedded sentences, a recipe of a few steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora.composition.column_files import Grown
from bayesian_lora.composition.fit import Recipe
from bayesian_lora.composition.sequential import Growth, grow
from bayesian_lora.composition.stack import StackTask
from tests.composition.stacks import make_data

CLASSES = {"one": 2, "two": 3, "three": 2}
RECIPE = Recipe(epochs=2, batch_size=16, lr=0.05)
QUERY_KEY_VALUE = {
    "bert": ("query", "key", "value"),
    "roberta": ("query", "key", "value"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
}


def task(name: str) -> StackTask:
    """Of the embedded sentences, with labels of its own number of classes."""
    labels = tuple(f"{name}{c}" for c in range(CLASSES[name]))
    return StackTask(name, "synthetic", labels, "categorical", 32)


def growth(base: Path, **options: Any) -> Growth:
    targets = QUERY_KEY_VALUE[base.name]
    return Growth(str(base), **{"recipe": RECIPE, "target_modules": targets, **options})


def grown(
    base: Path, names: Sequence[str] = tuple(CLASSES), *, of: Growth | None = None, **options: Any
) -> Grown:
    """The tasks grown in this order."""
    data = make_data(base, CLASSES)
    return grow(of or growth(base), [task(n) for n in names], data, **{"alone": False, **options})


def same(a: Any, b: Any) -> bool:
    """Whether two growths carry the same tensors and predictions, bit for bit."""
    tensors = [
        {**x.stack.factors, **{(t, n): h[n] for t, h in x.stack.heads.items() for n in h}}
        for x in (a, b)
    ]
    return (
        tensors[0].keys() == tensors[1].keys()
        and all(t.equal(tensors[1][n]) for n, t in tensors[0].items())
        and all(np.array_equal(x, b.logits[n]) for n, x in a.logits.items())
    )
