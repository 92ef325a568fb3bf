"""The schema of a run: every key, its default, its range, and the messages for wrong input.

A config is a YAML file plus ``key=value`` overrides. The schema is a tree of pydantic
dataclasses read through OmegaConf, which names the nearest key for a misspelt one.
"""

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from pydantic.dataclasses import dataclass

from bayesian_lora.errors import InputError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]

SAMPLERS = ("sgld",)
PLANNED_SAMPLERS = (
    "psgld",
    "asgld",
    "sam_sgld",
    "sam_sgld_rank1",
    "sghmc",
    "sgnht",
    "csgld",
)


@dataclass
class DataConfig:
    """What is learnt from; columns, names and files are for data sets outside the registry."""

    name: str = "synthetic"
    dir: str | None = None
    batch_size: Count = 32
    max_length: Annotated[int, Field(ge=4)] = 128
    train_examples: Annotated[int, Field(ge=2)] | None = None
    validation_share: Share = 0.1
    files: dict[str, str] = field(default_factory=dict)
    hub_config: str | None = None
    text_columns: list[str] = field(default_factory=list)
    label_column: str = "label"
    label_names: list[str] = field(default_factory=list)
    regression: bool = False
    train_split: str = "train"
    eval_split: str = "validation"


@dataclass
class LoraConfig:
    """The adapter: ``target_modules: auto`` is query and value under the family's names."""

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Share = 0.1
    target_modules: list[str] | str = "auto"
    rslora: bool = False


@dataclass
class ModelConfig:
    """``name``: a hub id, a local folder, or ``minilm`` (the packaged encoder)."""

    name: str = "minilm"
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class PriorConfig:
    """Gaussian prior of every sampled parameter; ``head_std`` defaults to ``std``."""

    std: Positive = 0.1
    head_std: Positive | None = None


@dataclass
class TrainConfig:
    """The warm start: AdamW on U/N with warm-up and linear decay."""

    epochs: Annotated[int, Field(ge=0)] = 10
    lr: Positive = 1e-3
    warmup_share: Share = 0.06
    starts: Literal["independent", "shared"] = "independent"
    jitter: Annotated[float, Field(ge=0)] = 0.01
    early_stopping: bool = False
    patience: Count | None = None
    micro_batch: Count | None = None


@dataclass
class SamplerConfig:
    """Steps are optimiser steps of every chain; ``num_samples`` counts over all chains."""

    name: str = "sgld"
    step_size: Positive = 5e-4
    burn_in: Annotated[int, Field(ge=0)] = 1000
    burn_in_step_size: Positive | None = None
    thin: Count = 200
    num_samples: Count = 20
    chains: Count = 4
    temperature: Annotated[float, Field(ge=0)] = 1.0
    trace_every: Count | None = None


@dataclass
class OutputConfig:
    """``dir`` defaults to ``runs/<name of the config file>``."""

    dir: str | None = None
    overwrite: bool = False


@dataclass
class Config:
    """One run, whole."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


# OmegaConf raises TypeError where a list meets a mapping.
_WRONG = (OmegaConfBaseException, pydantic.ValidationError, TypeError)
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
    if not path.is_file():
        raise InputError(f"config {str(path)!r} not found: give the path of a YAML file")
    try:
        raw = OmegaConf.load(io.StringIO(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: not a readable YAML file: {_one_line(error)}") from error
    if not isinstance(raw, DictConfig):
        raise InputError(f"{path}: a config is a mapping of keys to values, found a list")
    config = build_config(raw, overrides, source=str(path))
    if config.output.dir is None:
        config.output.dir = str(Path("runs") / path.stem)
    return config


def build_config(
    raw: DictConfig | dict[str, Any], overrides: Sequence[str] = (), *, source: str = "config"
) -> Config:
    """Validate a mapping and its overrides against the schema; errors as in `load_config`."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), raw)
    except _WRONG as error:
        raise InputError(f"{source}: {_explain(error)}") from error
    for item in overrides:
        merged = _override(merged, item)
    try:
        config = OmegaConf.to_object(merged)
    except _WRONG as error:
        raise InputError(f"{source}: {_explain(error)}") from error
    assert isinstance(config, Config)
    _check_consistency(config)
    return config


def _override(merged: Any, item: str) -> Any:
    key, equals, _ = item.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override {item!r}: write key=value, such as sampler.chains=2")
    try:
        return OmegaConf.merge(merged, OmegaConf.from_dotlist([item]))
    except _WRONG as error:
        raise InputError(f"override {item!r}: {_explain(error)}") from error
    except IndexError as error:  # OmegaConf's own, of keys such as "[a"
        raise InputError(f"override {item!r}: the key has unpaired brackets") from error
    except yaml.YAMLError as error:
        raise InputError(f"override {item!r}: the value is not YAML: {_one_line(error)}") from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(dataclasses.replace(config)))


def value_of(config: Config, key: str) -> Any:
    """The value under a dotted key, None where there is none."""
    return OmegaConf.select(OmegaConf.structured(dataclasses.replace(config)), key)


def _check_consistency(config: Config) -> None:
    sampler, data, train = config.sampler, config.data, config.train
    if sampler.name in PLANNED_SAMPLERS:
        raise InputError(
            f"sampler.name={sampler.name}: not in this version yet; "
            f"available: {', '.join(SAMPLERS)} (set sampler.name=sgld)"
        )
    if sampler.name not in SAMPLERS:
        raise InputError(
            f"sampler.name={sampler.name}: unknown sampler; known: "
            f"{', '.join(SAMPLERS)} (to come: {', '.join(PLANNED_SAMPLERS)})"
        )
    if sampler.num_samples % sampler.chains:
        nearest = -(-sampler.num_samples // sampler.chains) * sampler.chains
        raise InputError(
            f"sampler.num_samples={sampler.num_samples} is the total over all chains and must be "
            f"a multiple of sampler.chains={sampler.chains}: set sampler.num_samples={nearest}"
        )
    if train.early_stopping and data.validation_share == 0:
        raise InputError(
            "train.early_stopping=true needs data held out of train: set data.validation_share=0.1"
        )
    if train.patience is not None and not train.early_stopping:
        raise InputError(
            f"train.patience={train.patience} acts only with early stopping: "
            "set train.early_stopping=true or leave train.patience out"
        )
    targets = config.model.lora.target_modules
    if targets == [] or (isinstance(targets, str) and targets != "auto"):
        raise InputError(
            f"model.lora.target_modules={targets!r}: give 'auto' or a list such as [query, value]"
        )


def _explain(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        section = _SECTION.get(error.title, "")
        key = section + ".".join(str(part) for part in first["loc"] if not _is_branch(part))
        return " ".join(f"{key}={first['input']!r}: {first['msg'].lower()}".split())
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
