"""The schema of a run: every key, its default and its range, as a tree of pydantic dataclasses."""

import math
from dataclasses import field
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _positive_or_auto(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ValueError("input should be greater than 0, or auto")
    return number


# Any to OmegaConf, which would refuse 1 and 1e-4 for a union of float and a word.
PositiveOrAuto = Annotated[Any, pydantic.BeforeValidator(_positive_or_auto)]


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
    """Gaussian prior of every sampled parameter; ``head_std`` defaults to ``std``.

    ``std: auto`` takes the candidate whose fit has the lowest NLL on data held out of train.
    """

    std: PositiveOrAuto = 0.1
    head_std: Positive | None = None
    candidates: list[Positive] = field(default_factory=lambda: [0.03, 0.05, 0.1, 0.2, 0.4])


@dataclass
class TrainConfig:
    """The warm start: Adam on U/N with warm-up, then linear decay or a learning rate that each
    chain's plateaus of the held-out loss lower (``plateau_factor``, ``plateau_patience`` epochs).

    ``starts_from`` takes the warm starts of another run's folder instead of fitting new ones: of
    its two kinds of fits the one that ``early_stopping`` asks for;
    ``init_seed`` draws the initial factors, and nothing else, from a seed of their own, so that
    runs of several tasks begin at the same ones.
    """

    epochs: Annotated[int, Field(ge=0)] = 10
    lr: Positive = 1e-3
    warmup_share: Share = 0.06
    schedule: Literal["linear", "plateau"] = "linear"
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    plateau_patience: Annotated[int, Field(ge=0)] = 1
    init_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    starts: Literal["independent", "shared"] = "independent"
    jitter: NonNegative = 0.01
    early_stopping: bool = False
    patience: Count | None = None
    micro_batch: Count | None = None
    starts_from: str | None = None


@dataclass
class SamplerConfig:
    """Steps are optimiser steps of every chain; ``num_samples`` counts over all chains.

    ``name: map`` draws nothing: the members are the warm starts, one a chain, and of the other
    keys only ``chains`` and ``on_nonfinite`` count.

    ``step_size: auto`` keeps the relative bias of the stiffest direction's variance at ``bias``.
    ``on_nonfinite: drop`` goes on without a chain whose loss or gradient is not finite.
    From ``rho`` on: keys of single samplers (`SAMPLERS`).
    """

    name: str = "sgld"
    step_size: PositiveOrAuto = 5e-4
    bias: Annotated[float, Field(gt=0, lt=1)] = 0.1
    variance_reduction: bool = False
    burn_in: Annotated[int, Field(ge=0)] = 1000
    burn_in_step_size: Positive | None = None
    thin: Count = 200
    num_samples: Count = 20
    chains: Count = 4
    temperature: NonNegative = 1.0
    trace_every: Count | None = None
    on_nonfinite: Literal["stop", "drop"] = "stop"
    rho: NonNegative | None = None
    sigma_dir: Annotated[float, Field(gt=-1, allow_inf_nan=False)] | None = None
    u_mode: Literal["frozen", "cross_chain", "current"] | None = None
    lambd: Positive | None = None
    a: NonNegative | None = None
    anneal: bool | None = None
    beta1: Share | None = None
    beta2: Share | None = None
    friction: Annotated[float, Field(gt=0, le=1)] | None = None
    integrator: Literal["euler", "baoab"] | None = None
    thermostat_rate: Positive | None = None
    cycle_steps: Annotated[int, Field(ge=2)] | None = None
    explore_fraction: Share | None = None


@dataclass
class OutputConfig:
    """``dir`` defaults to ``runs/<name of the config file>``.

    A checkpoint is written after the step that follows ``checkpoint_seconds``; 0 is every step.
    """

    dir: str | None = None
    overwrite: bool = False
    checkpoint_seconds: NonNegative = 60.0


@dataclass
class Config:
    """One run, whole. ``compare`` names keys and the values `bayesian-lora compare` gives them.

    ``track`` sends what stands in `metrics.csv` to a tracker as well.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    track: Literal["wandb", "tensorboard", "trackio", "mlflow"] | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    compare: dict[str, list[Any]] = field(default_factory=dict)
