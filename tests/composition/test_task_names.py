"""Names of tasks that a model's heads cannot have are refused where a stack is read."""

import dataclasses
from pathlib import Path

import pytest

from bayesian_lora.composition.stack_files import read_stack, write_stack
from bayesian_lora.errors import InputError
from bayesian_lora.models.task_heads import is_reserved
from tests.composition.stacks import make_stack


@pytest.mark.parametrize("name", ["train", "keys", "forward", "pop"])
def test_words_of_torch_s_containers_are_reserved(name: str) -> None:
    assert is_reserved(name)
    assert not is_reserved(f"{name}-task")


def test_a_stack_with_such_a_task_is_damaged(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    stack = make_stack(tiny_models["bert"])
    names = {"long": "train", "third": "third"}
    renamed = stack.changed(
        tasks={names[n]: dataclasses.replace(t, name=names[n]) for n, t in stack.tasks.items()},
        heads={names[n]: head for n, head in stack.heads.items()},
        parts=tuple(dataclasses.replace(p, task=names[p.task or ""]) for p in stack.parts),
    )
    write_stack(tmp_path / "stack", renamed)
    with pytest.raises(InputError, match="task 'train'"):
        read_stack(tmp_path / "stack")
