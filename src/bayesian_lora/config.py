"""A YAML file and overrides to one validated `Config`, and the messages for wrong input.

A config is a YAML file plus ``key=value`` overrides. The schema is a tree of pydantic
dataclasses read through OmegaConf, which names the nearest key for a misspelt one.
"""

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bayesian_lora.config_checks import MAP, SAMPLERS, check_consistency, without_idle
from bayesian_lora.config_schema import Config, SamplerConfig
from bayesian_lora.errors import InputError

__all__ = [
    "MAP",
    "SAMPLERS",
    "Config",
    "SamplerConfig",
    "build_config",
    "dump_config",
    "dump_run_config",
    "load_config",
    "load_run_config",
    "read_mapping",
    "validated",
    "value_of",
]

Schema = TypeVar("Schema")

DEEPEST, LARGEST, REFERENCES = 20, 2**63, 20
"""Brackets within brackets, whole numbers, and ``${…}`` or ``*name`` (each may double what is
read): the schema needs 4, a seed's and none; beyond them a file can only do harm.
"""
# OmegaConf raises TypeError where a list meets a mapping.
_WRONG = (OmegaConfBaseException, TypeError, ValueError, OverflowError, RecursionError)
_SECTION = {
    "Config": "",
    "DataConfig": "data.",
    "LoraConfig": "model.lora.",
    "ModelConfig": "model.",
    "PriorConfig": "prior.",
    "TrainConfig": "train.",
    "SamplerConfig": "sampler.",
    "OutputConfig": "output.",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, validate.

    Raises:
        InputError: missing file, broken YAML, unknown key (the nearest is named), wrong type,
            value out of range, or keys that contradict each other.
    """
    path = Path(path)
    config = build_config(read_mapping(path), overrides, source=str(path))
    if config.output.dir is None:
        config.output.dir = str(Path("runs") / path.stem)
    return config


def read_mapping(path: Path) -> DictConfig:
    """A YAML file whose top is a mapping, read without harm; errors as in `load_config`."""
    if not path.is_file():
        raise InputError(f"config {str(path)!r} not found: give the path of a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
        _require_shallow(text)
        raw = OmegaConf.load(io.StringIO(text))
    except Exception as error:  # constructors of tags raise whatever their text leads to
        raise InputError(f"{path}: not a readable YAML file: {_one_line(error)}") from error
    if not isinstance(raw, DictConfig):
        raise InputError(f"{path}: a config is a mapping of keys to values, found a list")
    return raw


def _require_shallow(text: str) -> None:
    """Raises ValueError for nesting that would overflow the stack of YAML's parser in C, which
    ends the process, and for aliases that would grow without end; its events are read one by one.
    """
    depth, aliases = 0, 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST}")
        if aliases > REFERENCES:
            raise ValueError(f"more than {REFERENCES} aliases (*name); write values")


def build_config(
    raw: DictConfig | dict[str, Any], overrides: Sequence[str] = (), *, source: str = "config"
) -> Config:
    """Validate a mapping and its overrides against the schema; errors as in `load_config`."""
    config = validated(Config, raw, overrides, source)
    config.sampler = without_idle(config.sampler)
    check_consistency(config)
    return config


def validated(
    schema: type[Schema],
    raw: DictConfig | dict[str, Any],
    overrides: Sequence[str],
    source: str,
) -> Schema:
    """A mapping and its overrides as the schema's dataclasses; errors as in `load_config`."""
    _check_tree(_plain(raw), source)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), raw)
    except _WRONG as error:
        raise InputError(f"{source}: {_explain(error)}") from error
    for item in overrides:
        merged = _override(merged, item)
    if str(_plain(merged)).count("${") > REFERENCES:
        raise InputError(f"{source}: has more than {REFERENCES} references ${{…}}; write values")
    try:
        config = OmegaConf.to_object(merged)
    except _WRONG as error:
        raise InputError(f"{source}: {_explain(error)}") from error
    assert isinstance(config, schema)
    _check_tree(dataclasses.asdict(config), source)  # type: ignore[call-overload]
    return config


def _plain(tree: Any) -> Any:
    return OmegaConf.to_container(tree) if isinstance(tree, DictConfig) else tree


def _check_tree(value: Any, source: str, key: str = "") -> None:
    """Refuse what no key may have: whole numbers without end, and code from the hub."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_tree(name, source, f"a key of {key}" if key else "a key")
            if str(name).rpartition(".")[2] == "trust_remote_code":
                raise InputError(
                    f"{source}: {key}{name}: code that comes with a model or a data set is never "
                    "executed, so there is no such key: leave it out, and use an architecture that "
                    "transformers has"
                )
            _check_tree(item, source, f"{key}{name}.")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_tree(item, source, key)
    elif isinstance(value, int) and not -LARGEST < value < LARGEST:
        raise InputError(f"{source}: {key.rstrip('.')}: a whole number beyond ±2^63")


def _override(merged: Any, item: str) -> Any:
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override {item!r}: write key=value, such as sampler.chains=2")
    if "\\" in key:  # OmegaConf takes \= for part of the key, and reads another value
        raise InputError(f"override {item[:80]!r}: a key has no backslash; write key=value")
    if key.count(".") + key.count("[") > DEEPEST:
        raise InputError(f"override {item!r}: the key has more than {DEEPEST} parts")
    try:
        _require_shallow(value)
        given = OmegaConf.from_dotlist([item])
    except OmegaConfBaseException as error:
        raise InputError(f"override {item!r}: {_explain(error)}") from error
    except Exception as error:  # constructors of tags raise whatever their text leads to
        why = f"the value is not YAML: {_one_line(error)}"
        if isinstance(error, IndexError) and {"[", "]"} & {*key}:
            why = "the key has unpaired brackets"
        raise InputError(f"override {item!r}: {why}") from error
    _check_tree(_plain(given), f"override {item!r}")
    try:
        return OmegaConf.merge(merged, given)
    except _WRONG as error:
        raise InputError(f"override {item!r}: {_explain(error)}") from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(dataclasses.replace(config)))


SEAL = "# sha256 of the lines above: "


def dump_run_config(config: Config) -> str:
    """`dump_config` for a run's folder: its last line is a checksum, `output.overwrite` is off."""
    output = dataclasses.replace(config.output, overwrite=False)
    text = dump_config(dataclasses.replace(config, output=output))
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def load_run_config(root: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a run's folder.

    Raises:
        InputError: as `load_config`, or it has been changed since the run wrote it.
    """
    path = Path(root) / "config.yaml"
    try:
        config = load_config(path)
    except InputError as error:
        raise InputError(f"{error}; restore the file, as the run wrote it") from error
    config = load_config(path, overrides) if overrides else config
    text, seal, digest = path.read_text(encoding="utf-8").rpartition(SEAL)
    if seal and digest.strip() != hashlib.sha256(text.encode()).hexdigest():
        raise InputError(
            f"{path}: changed since the run wrote it (its checksum differs); restore it, or take "
            "its last line out if the change is yours"
        )
    if not seal and "compare" not in (yaml.safe_load(digest) or {}):
        raise InputError(f"{path}: damaged, its end is missing; restore the file")
    return config


def value_of(config: Config, key: str) -> Any:
    """The value under a dotted key, None where there is none."""
    return OmegaConf.select(OmegaConf.structured(dataclasses.replace(config)), key)


def _explain(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        section = _SECTION.get(error.title, "")
        key = section + ".".join(str(part) for part in first["loc"] if not _is_branch(part))
        words = first["msg"].removeprefix("Value error, ").lower()
        return " ".join(f"{key}={first['input']!r}: {words}".split())
    if isinstance(error, TypeError):
        return "a list stands where a mapping is wanted, such as data.files={train: train.csv}"
    key = " ".join(str(getattr(error, "full_key", None) or "").split())
    text = _one_line(error)
    return text if not key or f"'{key}'" in text else f"{key}: {text}"


def _is_branch(part: int | str) -> bool:
    """Pydantic appends the union's branch ('constrained-float') to the location."""
    return isinstance(part, str) and ("-" in part or part in {"float", "int", "str"})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())
