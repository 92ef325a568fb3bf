"""The parts of a stack as experts: whose column is whose, and what cannot be gated.

Shapes: R rank.
"""

import torch

from bayesian_lora.composition.stack import Stack
from bayesian_lora.errors import InputError


def experts_of(stack: Stack, top_k: int | None = None) -> list[int]:
    """Of each of the factors' R columns the number of the part it belongs to.

    Raises:
        InputError: parts that cannot be gated (fewer than two, without a task or columns of their
            own), tasks without a part, regressions, top-k out of range, tensors not finite.
    """
    parts, rank = stack.parts, stack.spec.rank
    if len(parts) < 2:
        raise InputError(f"a gate chooses among adapters and the stack has {len(parts)}; stack two")
    if scored := [t.name for t in stack.tasks.values() if t.likelihood != "categorical"]:
        raise InputError(f"task {scored[0]!r} is a regression; only classifications are gated")
    if nameless := [part.name for part in parts if part.task not in stack.tasks]:
        raise InputError(
            f"part {nameless[0]!r} belongs to none of the tasks {', '.join(stack.tasks)}, so its "
            "weight would say nothing of the task; stack the adapters anew with 'bayesian-lora "
            "stack', which makes each a task"
        )
    tasks = {part.task for part in parts}
    if lone := [task for task in stack.tasks if task not in tasks]:
        raise InputError(
            f"task {lone[0]!r} has no adapter in the stack to gate; stack the adapters anew, with "
            "one of it or without the task"
        )
    columns = [-1] * rank
    for number, part in enumerate(parts):
        start, stop = part.columns
        inside = 0 <= start < stop <= rank
        if not inside or any(owner != -1 for owner in columns[start:stop]):
            raise InputError(
                f"part {part.name!r} has no columns of its own ({start} to {stop} of {rank}), so "
                "it cannot be weighted; gate the stack before it is compressed or merged"
            )
        columns[start:stop] = [number] * (stop - start)
    if -1 in columns:
        raise InputError(f"column {columns.index(-1)} of {rank} belongs to no part; stack anew")
    if top_k is not None and not 1 <= top_k <= len(parts):
        raise InputError(
            f"top_k={top_k}: the stack has {len(parts)} experts; choose 1 to {len(parts)}"
        )
    heads = {f"{task}: {n}": t for task, head in stack.heads.items() for n, t in head.items()}
    for name, tensor in {**stack.factors, **heads}.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} is not finite; stack adapters that are whole")
    return columns


def alike(stack: Stack) -> list[list[str]]:
    """Tasks of one data set, which no gate can tell apart: their texts are the same."""
    found: dict[str, list[str]] = {}
    for name, task in stack.tasks.items():
        found.setdefault(task.data, []).append(name)
    return [names for names in found.values() if len(names) > 1]
