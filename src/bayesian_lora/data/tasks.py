"""What a task is, and tasks made of a data set that is not in the registry.

Shapes: C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bayesian_lora.data.local_files import LocalLayout
from bayesian_lora.errors import InputError


@dataclass(frozen=True)
class TaskSpec:
    """What a task is and where its splits lie.

    text_columns, label_column: the columns' names on the hub (1 or 2 texts);
    label_names: the C classes in the order of their numbers, () for regression;
    likelihood: "categorical" or "gaussian"; metrics: the task's own, beside the common ones;
    hub_path, hub_config: the arguments of `datasets.load_dataset`, hub_path None if embedded;
    splits: our name of a split -> the hub's; default_split: the one evaluated;
    label_range: (lowest, highest) score of a bounded regression;
    local: the layout in a data folder; files: split -> the user's own file.
    """

    name: str
    title: str
    kind: str
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    likelihood: Literal["categorical", "gaussian"]
    metrics: tuple[str, ...]
    hub_path: str | None
    hub_config: str | None
    splits: Mapping[str, str]
    default_split: str
    label_range: tuple[float, float] | None = None
    local: LocalLayout | None = None
    files: Mapping[str, Path] | None = None

    @property
    def num_labels(self) -> int:
        """C, or 1 for regression: the width of the model's head."""
        return len(self.label_names) or 1


def custom_task(
    name: str,
    *,
    text_columns: Sequence[str],
    label_column: str,
    label_names: Sequence[str],
    files: Mapping[str, str | Path] | None = None,
    hub_config: str | None = None,
    train_split: str = "train",
    eval_split: str = "validation",
    regression: bool = False,
) -> TaskSpec:
    """A task from any data set that `datasets` loads by `name`, or from files {split: path}.

    Labels are stored as the names in label_names or as their numbers 0..C-1; with regression as
    real numbers. The training split is called "train" here whatever its name at the source.

    Raises InputError when the arguments do not describe a task.
    """
    _check_labels(label_names, regression)
    if len(text_columns) not in (1, 2):
        raise InputError(f"data.text_columns {list(text_columns)}: must name 1 or 2 columns")
    if eval_split in ("train", train_split):
        raise InputError(f"data.eval_split {eval_split!r}: must differ from the training split")
    paths = {split: Path(path) for split, path in (files or {}).items()}
    missing = [split for split in (train_split, eval_split) if split not in paths]
    if paths and missing:
        raise InputError(
            f"data.files has {', '.join(paths)}: it needs a file for {' and '.join(missing)} too"
        )
    others = {split: split for split in paths if split not in ("train", train_split)}
    return TaskSpec(
        name=name,
        title=name,
        kind="regression" if regression else "classification",
        text_columns=tuple(text_columns),
        label_column=label_column,
        label_names=tuple(label_names),
        likelihood="gaussian" if regression else "categorical",
        metrics=("pearson", "spearman") if regression else ("accuracy",),
        hub_path=None if paths else name,
        hub_config=hub_config,
        splits={"train": train_split, eval_split: eval_split} | others,
        default_split=eval_split,
        files=paths or None,
    )


def _check_labels(label_names: Sequence[str], regression: bool) -> None:
    if regression and label_names:
        raise InputError(f"data.label_names {list(label_names)}: leave it out for a regression")
    if not regression and not 2 <= len(set(label_names)) == len(label_names):
        raise InputError(
            f"data.label_names {list(label_names)}: a classification needs at least 2 different "
            "class names, in the order of their numbers (or set data.regression=true)"
        )
