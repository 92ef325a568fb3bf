"""Which steps a study has, in the order in which they are made, and what each depends on."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch.nn import ModuleDict

from bayesian_lora.config import Config
from bayesian_lora.data.glue_datasets import TASKS
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.building import resolve_device
from bayesian_lora.experiment.cells import settings_of
from bayesian_lora.experiment.setup import data_folder, task_of
from bayesian_lora.experiment.study_config import Study
from bayesian_lora.experiment.study_context import Context, Step
from bayesian_lora.experiment.study_growth import make_gate, make_gated_experts, make_sequential
from bayesian_lora.experiment.study_runs import (
    make_baseline,
    make_experts,
    make_rank,
    rank_config,
)
from bayesian_lora.experiment.study_stacks import (
    make_drift,
    make_further,
    make_similarity,
    make_stack,
)

__all__ = ["Context", "Step", "plan_steps"]

ELSEWHERE = ("data.dir", "device")
"""Keys that say where a run finds things, not what it is."""


def plan_steps(study: Study) -> list[Step]:
    """The steps of a study, each after those it needs.

    Raises:
        InputError: an error in a run's config, which is named, or baselines that cannot be stacked.
    """
    _check_baselines(study)
    return [
        *_baselines(study),
        *_stacks(study),
        *_further(study),
        *_similarity(study),
        *_sequential(study),
        *_gates(study),
        *_experts(study),
        *_ranks(study),
    ]


def _check_baselines(study: Study) -> None:
    """What can be known before anything is trained."""
    models = {config.model.name for config in study.baselines.values()}
    if len(models) > 1:
        raise InputError(
            f"the baselines are on {', '.join(sorted(models))}: stacks need one base model; set "
            "baselines.model.name"
        )
    for task, config in study.baselines.items():
        try:
            spec = task_of(config)
            resolve_device(config.device)
            data_folder(config)
        except InputError as error:
            raise InputError(f"tasks.{task}: {error}") from error
        if spec.likelihood != "categorical" or spec.name not in TASKS:
            raise InputError(
                f"tasks.{task}: {spec.name} is a regression or a data set of your own; a study "
                f"stacks classifications of the registry: {', '.join(TASKS)}"
            )
        if hasattr(ModuleDict(), task):
            raise InputError(
                f"tasks.{task}: {task!r} is a word that PyTorch's modules use; name it otherwise"
            )


def _baselines(study: Study) -> list[Step]:
    return [
        Step(
            f"baseline-{task}",
            f"baseline of {task}",
            _run_settings(config),
            lambda context, _, task=task: make_baseline(context, task),
            resumes=True,
        )
        for task, config in study.baselines.items()
    ]


def _stacks(study: Study) -> list[Step]:
    recipe = study.config.further.recipe
    return [
        Step(
            f"stack-{name}",
            f"stack {name}: {', '.join(tasks)} stacked without training",
            _settings(study, "stacking") | {"tasks": tasks, "held_out": _held_out(recipe)},
            partial(make_stack, tasks=tasks, recipe=recipe),
            _needs("baseline", tasks),
        )
        for name, tasks in study.config.stacks.items()
    ]


def _further(study: Study) -> list[Step]:
    config = study.config.further
    if config.stack is None or not config.variants:
        return []
    name = config.stack
    further = Step(
        f"further-{name}",
        f"stack {name} trained further, {len(config.variants)} variants at once",
        _settings(study, "further"),
        partial(make_further, name=name),
        (f"stack-{name}",),
    )
    drift = Step(
        f"drift-{name}",
        f"drift of stack {name} from its parts",
        {"seed": study.config.seed},
        partial(make_drift, name=name),
        (f"stack-{name}", f"further-{name}"),
    )
    return [further, drift]


def _similarity(study: Study) -> list[Step]:
    tasks = list(study.config.tasks)
    if len(tasks) < 2:
        return []
    return [
        Step(
            "similarity",
            f"similarity of {', '.join(tasks)}",
            {"seed": study.config.seed},
            partial(make_similarity, tasks=tasks),
            _needs("baseline", tasks),
        )
    ]


def _sequential(study: Study) -> list[Step]:
    order = study.config.sequential.order
    if not order:
        return []
    return [
        Step(
            "sequential",
            f"sequential growth: {', then '.join(order)}",
            _settings(study, "sequential"),
            partial(make_sequential, order=order),
            _needs("baseline", order),
            resumes=True,
        )
    ]


def _gates(study: Study) -> list[Step]:
    config = study.config.gates
    if config.stack is None:
        return []
    frozen = [(kind, False) for kind in config.kinds]
    chosen = [*frozen, *((kind, True) for kind in config.unfrozen)]
    return [
        Step(
            f"gate-{kind}{'_unfrozen' if unfrozen else ''}",
            f"gate per {kind} over stack {config.stack}, adapters "
            f"{'trained with it' if unfrozen else 'frozen'}",
            _gate_settings(study) | {"kind": kind, "unfrozen": unfrozen},
            partial(make_gate, kind=kind, unfrozen=unfrozen),  # type: ignore[arg-type]
            (f"stack-{config.stack}",),
        )
        for kind, unfrozen in chosen
    ]


def _gate_settings(study: Study) -> dict[str, Any]:
    """Without the list of kinds: one more is no change to the others."""
    found = _settings(study, "gates")
    kept = {k: v for k, v in found["gates"].items() if k not in ("kinds", "unfrozen")}
    return {**found, "gates": kept}


def _experts(study: Study) -> list[Step]:
    config, gates = study.config.experts, study.config.gates
    if config is None or gates.stack is None:
        return []
    tasks = study.config.stacks[gates.stack]
    found = []
    for task in tasks:
        try:
            run = study.run_config(task, study.root, config.run)
        except InputError as error:
            raise InputError(f"experts.run: {error}") from error
        found.append(
            Step(
                f"experts-{task}",
                f"posterior ensemble of {task} from its baseline",
                _run_settings(run),
                lambda context, _, task=task: make_experts(context, task),
                (f"baseline-{task}",),
                resumes=True,
            )
        )
    gated = Step(
        "ensemblegate-ensembles",
        f"gate per {config.kind} over posterior ensembles",
        _gate_settings(study) | {"experts": study.keys["experts"]},
        partial(make_gated_experts, tasks=tasks),
        (*_needs("experts", tasks), f"stack-{gates.stack}"),
    )
    return [*found, gated]


def _ranks(study: Study) -> list[Step]:
    config = study.config.rank_study
    if config.task is None:
        return []
    found = []
    for rank in config.ranks:
        try:
            run = rank_config(study, rank)
        except InputError as error:
            raise InputError(f"rank_study.run: {error}") from error
        found.append(
            Step(
                f"rank-{rank}",
                f"rank study: {config.task} at rank {rank}, {config.chains} fits",
                _run_settings(run),
                lambda context, _, run=run: make_rank(context, run),
                resumes=True,
            )
        )
    return found


def _settings(study: Study, section: str) -> dict[str, Any]:
    """A section of the config, the seed, and how much is evaluated on."""
    return {name: study.keys[name] for name in (section, "seed", "evaluation")}


def _held_out(recipe: Any) -> dict[str, Any]:
    """What the share held out of train depends on."""
    return {"train_examples": recipe.train_examples}


def _run_settings(config: Config) -> Mapping[str, Any]:
    """Without defaults, so that a key that is added later changes nothing."""
    usual, own = settings_of(Config()), settings_of(config).items()
    return {k: v for k, v in own if k not in ELSEWHERE and v != usual.get(k)}


def _needs(kind: str, tasks: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{kind}-{task}" for task in tasks)
