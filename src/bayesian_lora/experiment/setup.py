"""From a `Config` to everything a run needs, built and checked before any long work.

Shapes: M chains, K members.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayesian_lora.config import Config
from bayesian_lora.data import preparation
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.glue_datasets import get_task, load_split
from bayesian_lora.data.preparation import (
    RawData,
    check_max_length,
    length_limit,
    load_train,
)
from bayesian_lora.data.tasks import TaskSpec, custom_task
from bayesian_lora.data.token_cache import default_folder
from bayesian_lora.experiment.building import (
    build_model,
    chain_seeds,
    make_streams,
    resolve_device,
    start_at_mean,
)
from bayesian_lora.experiment.cells import identity
from bayesian_lora.models.hf_lora import HuggingFaceLora
from bayesian_lora.models.sources import ModelSource, load_pretrained, resolve_model
from bayesian_lora.objective import Objective, prior_groups
from bayesian_lora.posterior import PriorGroup
from bayesian_lora.progress import Progress
from bayesian_lora.sampling import Streams
from bayesian_lora.utils.hub import offline_if_unreachable


@dataclass(frozen=True)
class Prior:
    """Standard deviations of the Gaussian priors of the factors and of the head."""

    std: float
    head_std: float


@dataclass
class Setup:
    """Everything a run needs, built and checked before any long work."""

    config: Config
    raw: RawData
    tokenizer: Any
    model: HuggingFaceLora
    train: TokenisedSet
    validation: TokenisedSet | None
    evaluation: TokenisedSet
    objective: Objective
    streams: Streams
    prior: Prior
    """Resolved; ``prior.std: auto`` stands at the first candidate until it is searched."""

    @property
    def task(self) -> TaskSpec:
        return self.raw.task

    @cached_property
    def fingerprint(self) -> str:
        """Of the frozen weights."""
        return self.model.fingerprint()

    @property
    def groups(self) -> list[PriorGroup]:
        """The model's tensors under their priors."""
        return prior_groups(self.model, self.prior.std, self.prior.head_std)

    def all_rows(self) -> np.ndarray:
        """Every training example for every chain, (M, N)."""
        return np.tile(np.arange(len(self.train)), (self.model.num_chains, 1))

    @property
    def regression(self) -> bool:
        return self.task.likelihood == "gaussian"


def task_of(config: Config) -> TaskSpec:
    """The task a config names: of the registry, or described by its columns.

    Raises:
        InputError: unknown name, or columns that do not describe a task.
    """
    data = config.data
    if not data.text_columns and not data.files:
        return get_task(data.name)
    return custom_task(
        data.name,
        text_columns=data.text_columns,
        label_column=data.label_column,
        label_names=data.label_names,
        files=dict(data.files) or None,
        hub_config=data.hub_config,
        train_split=data.train_split,
        eval_split=data.eval_split,
        regression=data.regression,
    )


def data_folder(config: Config) -> Path | None:
    """`data.dir`, or the environment's BAYESIAN_LORA_DATA, or None (the hub).

    Raises:
        InputError: it is not a folder.
    """
    return preparation.data_folder(config.data.dir)


def load_training_data(
    config: Config, task: TaskSpec, folder: Path | None
) -> tuple[Examples, Examples | None]:
    """What a config trains on, and what it holds out of it."""
    return load_train(
        task,
        data_dir=folder,
        train_examples=config.data.train_examples,
        validation_share=config.data.validation_share,
        seed=config.seed,
    )


def ask_hub_once(task: TaskSpec, source: ModelSource, folder: Path | None) -> None:
    """Where data or model would come from the hub, find out now whether it answers."""
    local_data = task.hub_path is None or (folder is not None and task.local is not None)
    if not (local_data and Path(source.path).is_dir()):
        offline_if_unreachable()


def prepare(config: Config, progress: Progress) -> Setup:
    """Check everything, load data and model, print what they are.

    Raises:
        InputError: anything wrong with the config, the data, the model or their fit.
    """
    task, device, data_dir = task_of(config), resolve_device(config.device), data_folder(config)
    source = resolve_model(config.model.name)
    ask_hub_once(task, source, data_dir)
    from transformers import AutoTokenizer

    progress.say(f"Using device: {device}")
    train, validation = load_training_data(config, task, data_dir)
    evaluation = load_split(task, task.default_split, data_dir=data_dir, notify=progress.say)
    raw = RawData(task, train, validation, evaluation)
    for line in _data_lines(raw):
        progress.say(line)
    progress.say(f"\nBuilding {config.model.name} with LoRA...")
    tokenizer = load_pretrained(AutoTokenizer, source)
    model = build_model(config, source, task.num_labels, device)
    limit = length_limit(tokenizer, model.base.config)
    check_max_length(config.data.max_length, limit, config.model.name)
    length = config.data.max_length
    cache = default_folder()
    train_set = TokenisedSet(train, tokenizer, length, cache)
    held_out = None if validation is None else TokenisedSet(validation, tokenizer, length, cache)
    objective = Objective(model, train_set, task.likelihood, config.train.micro_batch)
    if task.likelihood == "gaussian":
        start_at_mean(model, float(raw.train.labels.mean()))
    std = config.prior.candidates[0] if config.prior.std == "auto" else config.prior.std
    setup = Setup(
        config=config,
        raw=raw,
        tokenizer=tokenizer,
        model=model,
        train=train_set,
        validation=held_out,
        evaluation=TokenisedSet(evaluation, tokenizer, length, cache),
        objective=objective,
        streams=make_streams(config, device),
        prior=Prior(std, config.prior.head_std or std),
    )
    for line in _model_lines(setup):
        progress.say(line)
    return setup


def _data_lines(raw: RawData) -> list[str]:
    task = raw.task
    held = 0 if raw.validation is None else len(raw.validation)
    return [
        f"Dataset: {task.title}",
        f"Task: {task.kind}",
        f"Number of labels: {task.num_labels}",
        f"Examples: {len(raw.train)} train, {held} held out of train, "
        f"{len(raw.evaluation)} {task.default_split}",
    ]


def _model_lines(setup: Setup) -> list[str]:
    batch = setup.config.data.batch_size
    return [
        *setup.model.info.lines(),
        "",
        f"Train batches: {-(-len(setup.train) // batch)}",
        f"Validation batches: {-(-len(setup.evaluation) // batch)}",
        "",
    ]


def run_facts(setup: Setup) -> dict[str, Any]:
    """What `run.json` says of a run before it starts."""
    config = setup.config
    return {
        "settings": identity(config),
        "seed": config.seed,
        "chain_seeds": chain_seeds(config),
        "device": str(setup.model.device),
        "threads": torch.get_num_threads(),
        "data": {"fingerprint": setup.raw.fingerprint(), "sizes": _sizes(setup.raw)},
        "model_fingerprint": setup.fingerprint,
    }


def _sizes(raw: RawData) -> dict[str, int]:
    parts = {"train": raw.train, "validation": raw.validation, "evaluation": raw.evaluation}
    return {name: len(part) for name, part in parts.items() if part is not None}
