"""The cells of a comparison: one `Config` for each combination of the values some keys are given.

Nothing here loads torch, so that a mistake in a command is answered at once.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesian_lora.config import SAMPLERS, Config, load_config
from bayesian_lora.errors import InputError

Settings = dict[str, Any]
Axes = dict[str, list[str]]

NOT_AXES = ("output", "track", "compare", "train.starts_from")
FREE = ("data.dir", "model.name", "device", "sampler.num_samples", "sampler.on_nonfinite")
NAME_LENGTH = 120
QUOTED = re.compile(r"'(?:''|[^'])*'" + r'|"(?:\\.|[^"\\])*"', re.DOTALL)
HOW = (
    "give a key several values, such as sampler.name=sgld,psgld, or the config a section such as "
    "compare: {sampler.name: [sgld, psgld]}"
)


@dataclass(frozen=True)
class Cell:
    """One run: its name (also its folder's), the ``key=value`` it differs by, its config."""

    name: str
    overrides: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Plan:
    """A comparison, whole and validated: its folder, its axes and their product."""

    root: Path
    overwrite: bool
    axes: Axes
    cells: list[Cell]

    def common(self) -> Settings:
        """What all cells have in common, key by key, without where it is written."""
        settings = settings_of(self.cells[0].config)
        settings["train.starts_from"] = self.cells[0].config.train.starts_from
        return {key: value for key, value in settings.items() if not _below(key, self.axes)}


def make_plan(config_path: str | Path, arguments: Sequence[str] = ()) -> Plan:
    """Read a config and the command's arguments, and validate every cell.

    Args:
        config_path: a YAML file, itself a valid config.
        arguments: ``key=value`` for all cells and ``key=v1,v2`` for axes. Axes replace the
            config's ``compare:`` section; without any the section holds, and one value for a key
            of the section keeps that value alone.

    Raises:
        InputError: no axis, or an error in a cell, which is named; nothing has been written.
    """
    axes, overrides = read_arguments(arguments)
    if not axes:
        section = load_config(config_path, overrides).compare
        axes = {key: [as_text(value) for value in values] for key, values in section.items()}
        given = dict(_key_and_value(item) for item in overrides)
        axes |= {key: [given[key]] for key in axes if key in given}
    if not axes:
        raise InputError(f"{config_path}: nothing to compare: {HOW}")
    _check_axes(axes)
    combinations = [
        tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]
    cells = []
    for name, own in zip(cell_names(combinations), combinations, strict=True):
        try:
            config = load_config(config_path, [*overrides, *own])
        except InputError as error:
            raise InputError(f"cell {','.join(own)}: {error}") from error
        config.compare = {}
        cells.append(Cell(name, own, config))
    _check_distinct(cells)
    output = cells[0].config.output
    assert output.dir is not None
    return Plan(Path(output.dir), output.overwrite, axes, cells)


def read_arguments(arguments: Sequence[str]) -> tuple[Axes, list[str]]:
    """``key=v1,v2`` are axes, ``key=value`` overrides; both in their order.

    Raises:
        InputError: an empty value among several, or a key given twice of which one is an axis.
    """
    axes: Axes = {}
    overrides: list[str] = []
    for item in arguments:
        key, text = _key_and_value(item)
        values = [value.strip() for value in split_values(text)]
        if len(values) == 1:
            overrides.append(item)
        elif not all(values):
            raise InputError(f"{item!r}: an empty value between commas; write key=v1,v2")
        elif key in axes:
            raise InputError(f"{item!r}: {key} is given twice; put all its values in one list")
        else:
            axes[key] = values
    for item in overrides:
        if (key := _key_and_value(item)[0]) in axes:
            raise InputError(
                f"{item!r}: {key} also varies over {', '.join(axes[key])}; keep one of the two"
            )
    return axes, overrides


def split_values(text: str) -> list[str]:
    """Split at the commas outside of brackets, braces and quotes; joined by commas it is `text`.

    As in YAML, a quotation mark counts where a value begins: ``it's,fine`` are two values.
    """
    parts, depth, previous, i = [""], 0, ",", 0
    while i < len(text):
        opens = previous in "[{,:" if depth else previous == ","
        quoted = QUOTED.match(text, i) if opens else None
        token = quoted[0] if quoted else text[i]
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth = max(0, depth - 1)
        if token == "," and not depth:
            parts.append("")
        else:
            parts[-1] += token
        previous = previous if token.isspace() else token[-1]
        i += len(token)
    return parts


def as_text(value: Any) -> str:
    """A value of the config's section as it would stand on the command line."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII):
        reserved = value.lower() in {"true", "false", "null", "yes", "no", "on", "off"}
        return json.dumps(value) if reserved else value
    return json.dumps(value, ensure_ascii=False, default=str)


def cell_names(combinations: Sequence[Sequence[str]]) -> list[str]:
    """Names that any file system takes: ``sampler.name=psgld,model.lora.rank=8``, numbered where
    two would be one.
    """
    names = []
    for items in combinations:
        safe = [re.sub(r"[^\w.=+-]+", "_", item, flags=re.ASCII) for item in items]
        name = ",".join(item.replace("=_", "=").rstrip("_") for item in safe)
        names.append(name[:NAME_LENGTH].rstrip("."))
    count = Counter(name.casefold() for name in names)
    return [
        name if count[name.casefold()] == 1 else f"{name}~{i}" for i, name in enumerate(names, 1)
    ]


def settings_of(config: Config) -> Settings:
    """Every key that makes a run what it is: dotted, without ``output``, ``track``, ``compare``,
    ``train.starts_from``, which says only where an equal warm start lies, and keys of samplers
    other than the run's.
    """
    flat = _flatten(dataclasses.asdict(config))  # type: ignore[call-overload]
    own = SAMPLERS.get(config.sampler.name, ())
    idle = [f"sampler.{key}" for keys in SAMPLERS.values() for key in keys if key not in own]
    return {k: v for k, v in flat.items() if not _below(k, NOT_AXES) and k not in idle}


def identity(config: Config) -> str:
    """A digest of `settings_of` without what may change in a run that goes on.

    Defaults are left out, so that a key that is added later changes nothing.
    """
    usual = settings_of(Config())
    settings = {k: v for k, v in settings_of(config).items() if k not in FREE and v != usual.get(k)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def start_of(config: Config) -> Settings:
    """The settings that a warm start depends on: all but the sampler's, of which only chains."""
    settings = settings_of(config).items()
    return {k: v for k, v in settings if not k.startswith("sampler.") or k == "sampler.chains"}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One phrase for each key whose values differ."""
    keys = dict.fromkeys([*old, *new])
    return [
        f"{key}: {_shown(old, key)} there, {_shown(new, key)} here"
        for key in keys
        if key not in old or key not in new or old[key] != new[key]
    ]


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "nothing"
    value = values[key]
    return value if isinstance(value, str) else as_text(value)


def _key_and_value(item: str) -> tuple[str, str]:
    key, _, value = item.partition("=")
    return key.strip(), value


def _below(key: str, roots: Sequence[str] | Mapping[str, Any]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def _flatten(value: Any, prefix: str = "") -> Settings:
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    parts = [_flatten(v, f"{prefix}{k}.") for k, v in value.items()]
    return {key: v for part in parts for key, v in part.items()}


def _check_axes(axes: Axes) -> None:
    for key, values in axes.items():
        if _below(key, NOT_AXES):
            raise InputError(
                f"{key}={','.join(values)}: a comparison does not vary {key}; every cell has its "
                "own folder and shares warm starts where it can"
            )
        if not values:
            raise InputError(f"compare: {key} has no values: {HOW}")


def _check_distinct(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        twin = seen.setdefault(json.dumps(settings_of(cell.config), default=str), cell)
        if twin is not cell:
            raise InputError(
                f"cells {','.join(twin.overrides)} and {','.join(cell.overrides)} are the same "
                "run: leave one out"
            )
