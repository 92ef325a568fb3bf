"""`bayesian-lora sequential`: from tasks and options to a growth in a folder."""

from collections.abc import Sequence
from pathlib import Path

from bayesian_lora.composition.growth_report import table
from bayesian_lora.composition.sequential import Growth, grow
from bayesian_lora.composition.stack import StackTask
from bayesian_lora.composition.stack_files import check_writable
from bayesian_lora.data.preparation import check_max_length, length_limit
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.experiment.building import resolve_device
from bayesian_lora.experiment.compose import write_history
from bayesian_lora.experiment.task_sets import find_sources, training_sets
from bayesian_lora.models.sources import ModelSource, load_pretrained
from bayesian_lora.progress import Progress

MAX_LENGTH = 128
"""Tokens, unless the model reads fewer."""


def grow_folder(
    growth: Growth,
    named: Sequence[tuple[str, TaskSpec]],
    out: str | None,
    *,
    max_length: int | None,
    examples: int | None,
    transfer: bool,
    data_dir: str | None,
    device: str,
    progress: Progress | None = None,
) -> Path:
    """Grow the tasks, of a name each, in `out`, or go on with what has grown there; the folder.

    Args:
        max_length: tokens of a text; None is 128, or what the model reads.
        examples: of each task that are trained on or held out; None is all.
        transfer: whether each task is trained alone as well.

    Raises:
        InputError: as `grow`, or data or model that are not to be had.
    """
    progress = progress or Progress()
    place = resolve_device(device)
    folder = Path(out or f"runs/sequential-{'-'.join(name for name, _ in named)}")
    check_writable(folder)
    source, data = find_sources(growth.model, [spec for _, spec in named], data_dir)
    length = _length(source, max_length)
    tasks = [
        StackTask(name, spec.name, spec.label_names, spec.likelihood, length)
        for name, spec in named
    ]
    own = {task.name: task for task in tasks}
    grown = grow(
        growth,
        tasks,
        lambda: training_sets(own, source, data, examples, growth.seed),
        folder=folder,
        alone=transfer,
        device=place,
        progress=progress,
    )
    rows = [
        {"task": task, **row}
        for task, found in grown.report.items()
        for row in found["fit"]["history"]
    ]
    write_history(folder, rows)
    for line in ["", *table(grown.report)]:
        progress.say(line)
    progress.say(f"\nWritten: {folder}\nEvaluate it: bayesian-lora eval {folder}")
    return folder


def _length(source: ModelSource, wanted: int | None) -> int:
    """Tokens of a text: as wanted, if the model reads so many; 128, or what it reads."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, source)
    limit = length_limit(tokenizer, load_pretrained(AutoConfig, source))
    check_max_length(wanted or 0, limit, source.name)
    return wanted or min(MAX_LENGTH, limit)
