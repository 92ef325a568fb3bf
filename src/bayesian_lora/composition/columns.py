"""Columns of a stack's factors: appended for a new task, masked for an old one, compared.

Shapes: K members, R rank, r columns of one task, D widths.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.composition.stack import Part, Stack
from bayesian_lora.composition.subspaces import (
    SIDES,
    Pair,
    compare_updates,
    decompose,
    figures,
)

Form = Literal["sliced", "zeroed"]


def part_of(stack: Stack, task: str) -> Part:
    """The columns that came with a task."""
    return next(part for part in stack.parts if part.task == task)


def appended(stack: Stack, new: Stack) -> Stack:
    """The stack with another's columns behind its own, and its task; both of one scale s.

    The new columns change no update where their B is zero; s stays, so that α grows with the rank.
    """
    start, scaling = stack.spec.rank, stack.spec.scaling
    assert new.spec.scaling == scaling
    rank = start + new.spec.rank
    moved = [
        dataclasses.replace(p, columns=(p.columns[0] + start, p.columns[1] + start))
        for p in new.parts
    ]
    return stack.changed(
        spec=dataclasses.replace(stack.spec, rank=rank, alpha=scaling * rank),
        tasks={**stack.tasks, **new.tasks},
        parts=(*stack.parts, *moved),
        factors={
            name: torch.cat([tensor, new.factors[name]], dim=column_axis(name))
            for name, tensor in stack.factors.items()
        },
        heads={**stack.heads, **new.heads},
    )


def masked(stack: Stack, task: str, form: Form = "sliced") -> Stack:
    """The stack as a task knew it: without the columns that came after its own.

    Args:
        form: ``sliced`` takes the later columns away, and the other tasks with them, so that the
            result is bit for bit what was trained; ``zeroed`` keeps every shape and every task
            and sets the later columns to zero, which gives the same function to rounding.

    Raises:
        KeyError: a task the stack does not carry.
    """
    own, scaling = stack.tasks[task], stack.spec.scaling
    stop = part_of(stack, task).columns[1]
    if form == "zeroed":
        return stack.changed(factors=_zeroed(stack.factors, stop))
    return stack.changed(
        spec=dataclasses.replace(stack.spec, rank=stop, alpha=scaling * stop),
        tasks={task: own},
        parts=tuple(part for part in stack.parts if part.columns[1] <= stop),
        factors={name: columns_of(name, t, (0, stop)) for name, t in stack.factors.items()},
        heads={task: stack.heads[task]},
    )


def columns_of(name: str, tensor: Tensor, columns: tuple[int, int]) -> Tensor:
    """Columns [start, stop) of a factor (K, …), an own copy laid out as any other tensor is."""
    start, stop = columns
    part = tensor.narrow(column_axis(name), start, stop - start)
    # Odd strides may lead a matrix product down another path, to other last bits.
    return part.clone(memory_format=torch.contiguous_format)


def column_axis(name: str) -> int:
    """Where a factor (K, …) has its columns: A (K, R, D_in), B (K, D_out, R)."""
    return 1 if name.endswith(".lora_A") else 2


def is_factor(name: str) -> bool:
    """Whether a tensor is a factor, by its name."""
    return name.endswith((".lora_A", ".lora_B"))


def own_part(stack: Stack, task: str) -> Stack:
    """A task's own columns and head as a stack of that task alone, of the same scale."""
    part, scaling = part_of(stack, task), stack.spec.scaling
    start, stop = part.columns
    rank = stop - start
    return stack.changed(
        spec=dataclasses.replace(stack.spec, rank=rank, alpha=scaling * rank),
        tasks={task: stack.tasks[task]},
        parts=(dataclasses.replace(part, columns=(0, rank)),),
        factors={n: columns_of(n, t, part.columns) for n, t in stack.factors.items()},
        heads={task: stack.heads[task]},
    )


def check_frozen(before: Stack, after: Stack, stop: int) -> None:
    """Raises AssertionError where one of the first `stop` columns is not what it was.

    Figures taken with other columns than those that are kept would belong to no adapter.
    """
    for name, tensor in before.factors.items():
        then, now = (columns_of(name, t, (0, stop)) for t in (tensor, after.factors[name]))
        assert then.equal(now), f"{name}: a frozen column has moved"


def parameters(stack: Stack, task: str) -> dict[str, int]:
    """Numbers that a task added to each member: in its ``columns``, in its ``head``."""
    own = own_part(stack, task)
    return {
        "columns": sum(tensor[0].numel() for tensor in own.factors.values()),
        "head": sum(tensor[0].numel() for tensor in own.heads[task].values()),
    }


def _zeroed(factors: Mapping[str, Tensor], stop: int) -> dict[str, Tensor]:
    found = {}
    for name, tensor in factors.items():
        found[name] = tensor.clone()
        axis = column_axis(name)
        found[name].narrow(axis, stop, tensor.shape[axis] - stop).zero_()
    return found


def angles(stack: Stack, task: str) -> list[dict[str, Any]]:
    """How a task's columns lie to those of each earlier task, from the factors alone.

    Returns:
        A row for each earlier part: ``against``, its name; ``modules``: per module the
        `subspaces.figures` of the two updates of all K members (cosine of the updates, φ and
        principal angles of their left and right subspaces); ``mean``: of all modules together.
        Beside them ``random``: what updates in random position give, of the cosines the root mean
        square, of φ the mean. A figure of an update that is zero is None.
    """
    own = part_of(stack, task)
    earlier = [part for part in stack.parts if part.columns[1] <= own.columns[0]]
    rows = []
    for part in earlier:
        pairs = {m: _pairs(stack, m, part, own) for m in stack.layers}
        each = {m: {**figures(found), "random": _random(found)} for m, found in pairs.items()}
        every = [pair for found in pairs.values() for pair in found]
        mean = {**figures(every), "random": _random(every)}
        rows.append({"against": part.name, "mean": mean, "modules": each})
    return rows


def _pairs(stack: Stack, module: str, first: Part, second: Part) -> list[Pair]:
    """The updates of two parts at a module, one pair a member."""
    a_name, b_name = f"{module}.lora_A", f"{module}.lora_B"
    updates = []
    for part in (first, second):
        a = columns_of(a_name, stack.factors[a_name], part.columns)
        b = columns_of(b_name, stack.factors[b_name], part.columns)
        updates.append([decompose(x, y, stack.spec.scaling) for x, y in zip(a, b, strict=True)])
    return [compare_updates(x, y) for x, y in zip(*updates, strict=True)]


def _random(pairs: list[Pair]) -> dict[str, float | None]:
    """What `subspaces.figures` gives for updates of these norms and ranks in random position.

    A cosine at one module has mean 0 and variance 1/(D_out·D_in), so the root mean square of
    ``cosine``, of all as one vector, and of ``cosine_mean`` follow; of φ it is the mean.
    """
    sizes = np.array([pair.widths[0] * pair.widths[1] for pair in pairs], dtype=np.float64)
    norms = np.array([pair.norms for pair in pairs])
    whole = float(np.sqrt(np.square(norms).sum(0)).prod())
    inner = float(np.sqrt((np.square(norms.prod(1)) / sizes).sum()))
    defined = [pair for pair in pairs if pair.defined]
    own = np.array([pair.widths[0] * pair.widths[1] for pair in defined], dtype=np.float64)
    phi = [[max(pair.ranks) / pair.widths[side] for pair in defined] for side in range(len(SIDES))]
    return {
        "cosine": inner / whole if whole > 0 else None,
        "cosine_mean": float(np.sqrt((1 / own).sum()) / len(own)) if defined else None,
        **{f"phi_{n}": float(np.mean(x)) if x else None for n, x in zip(SIDES, phi, strict=True)},
    }
