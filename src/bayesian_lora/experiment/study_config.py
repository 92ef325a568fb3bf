"""A study's YAML file and overrides to one validated `StudyConfig`.

Read as a run's config is: `key=value` overrides, the nearest key named for a misspelt one.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bayesian_lora.config import Config, load_config, read_mapping, validated
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.cells import as_text
from bayesian_lora.experiment.study_schema import StudyConfig


@dataclasses.dataclass(frozen=True)
class Study:
    """A validated study: its config, its folder, and each baseline's run."""

    config: StudyConfig
    root: Path
    baselines: Mapping[str, Config]
    sources: Mapping[str, str]
    """Each baseline's config file."""
    keys: Mapping[str, Any]
    """The config as plain values."""

    def run_config(self, task: str, folder: Path, *changes: Mapping[str, Any]) -> Config:
        """A task's baseline with keys changed, the last change winning, for a run in a folder."""
        told = [item for change in changes for item in _as_overrides(change)]
        overrides = [*_common(self.config), *told]
        config = load_config(self.sources[task], overrides)
        config.output.dir = str(folder)
        told_here = any(item.startswith("train.init_seed=") for item in overrides)
        if self.config.starts is not None and not told_here:
            apart = 1 + list(self.config.tasks).index(task)
            shared = self.config.starts == "shared"
            config.train.init_seed = (self.config.seed + (0 if shared else apart)) % 2**63
        return config


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study's YAML file, apply ``key=value`` overrides, validate it and its baselines.

    Raises:
        InputError: missing file, broken YAML, unknown key, a value out of range, a task or stack
            that is named but not there, or an error in a baseline's config.
    """
    path = Path(path)
    config = validated(StudyConfig, read_mapping(path), overrides, str(path))
    root = Path(config.output.dir or Path("runs") / path.stem)
    if not config.tasks:
        raise InputError(f"{path}: tasks is empty; name each task's config: tasks: {{sst2: …}}")
    sources = {task: str(path.parent / name) for task, name in config.tasks.items()}
    keys = dataclasses.asdict(config)  # type: ignore[call-overload]
    study = Study(config, root, {}, sources, keys)
    _check_names(config)
    baselines = {}
    for task in config.tasks:
        try:
            baselines[task] = study.run_config(task, root)
        except InputError as error:
            raise InputError(f"tasks.{task}: {error}") from error
        if not baselines[task].data.validation_share:
            raise InputError(
                f"tasks.{task}: data.validation_share=0: further training and gates need what its "
                "baseline held out; set 0.1"
            )
    return dataclasses.replace(study, baselines=baselines)


def _common(config: StudyConfig) -> list[str]:
    """What every run of the study is told."""
    told = {"seed": config.seed, "device": config.device}
    if config.data.dir is not None:
        told["data.dir"] = config.data.dir
    return _as_overrides({**told, **config.baselines})


def _as_overrides(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A nested mapping as ``key=value``."""
    found: list[str] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _as_overrides(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={as_text(value)}")
    return found


def _check_names(config: StudyConfig) -> None:
    """Names are folders' names; every task and stack that a section names is one of the study's."""
    for name in (*config.tasks, *config.stacks, *config.further.variants):
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise InputError(
                f"{name!r} cannot name a task, stack or variant: use letters, digits, _"
            )
    named = {f"stacks.{name}": tasks for name, tasks in config.stacks.items()}
    named["sequential.order"] = config.sequential.order
    named["rank_study.task"] = [config.rank_study.task] if config.rank_study.task else []
    for where, tasks in named.items():
        _check_known(where, tasks, config.tasks, "tasks")
        if where.startswith("stacks.") and len(tasks) < 2:
            raise InputError(f"{where}: {', '.join(tasks) or 'no task'}; a stack needs two or more")
    for where in ("further", "gates"):
        stack = getattr(config, where).stack
        _check_known(f"{where}.stack", [stack] if stack else [], config.stacks, "stacks")
    for what, many in (
        ("gates.kinds", config.gates.kinds),
        ("gates.unfrozen", config.gates.unfrozen),
        ("rank_study.ranks", config.rank_study.ranks),
    ):
        if len(set(many)) < len(many):
            raise InputError(f"{what}: {', '.join(map(str, many))} has one twice; leave one out")
    experts = len(config.stacks.get(config.gates.stack or "", ()))
    if experts and (config.gates.top_k or 1) > experts:
        raise InputError(
            f"gates.top_k={config.gates.top_k}: the stack has {experts} experts; choose 1 to "
            f"{experts}, or null for all"
        )
    if config.experts is not None and config.gates.stack is None:
        raise InputError("experts: gates over ensembles need gates.stack; name one of the stacks")
    if config.further.stack is not None:
        carried = config.stacks[config.further.stack]
        for name, variant in config.further.variants.items():
            where = f"further.variants.{name}"
            for names in (variant.tasks, [variant.part] if variant.part else []):
                _check_known(where, names, carried, "the stack's tasks")
            if not variant.tasks:
                raise InputError(f"{where}: tasks is empty; choose from {', '.join(carried)}")


def _check_known(
    where: str, names: Sequence[str], known: Mapping[str, Any] | Sequence[str], what: str
) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"{where}: {name!r} is none of {what} ({', '.join(known)})")
    if len(set(names)) < len(names):
        raise InputError(f"{where}: {', '.join(names)} names one twice; leave one out")
