"""Steps of growth and gating: a stack grown task by task, gates over adapters and ensembles."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bayesian_lora.composition.gate_files import write_gated
from bayesian_lora.composition.gate_report import evaluate_gate
from bayesian_lora.composition.gates import GateOptions, train_gate
from bayesian_lora.composition.sequential import Growth, grow
from bayesian_lora.composition.sources import read_source
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_files import write_stack
from bayesian_lora.composition.stacking import stack_sources
from bayesian_lora.composition.task_data import task_spec
from bayesian_lora.experiment.study_context import Context, Figures, recipe_of, run_folder
from bayesian_lora.models.mixing import GateKind


def make_sequential(context: Context, folder: Path, order: Sequence[str]) -> Figures:
    """The tasks grown one after the other, each on columns of its own."""
    config = context.study.config.sequential
    sources = {task: context.source(task) for task in order}
    joint = stack_sources(list(sources.values()))
    data = context.data(joint, config.recipe)
    spec, model = sources[order[0]].spec, context.study.baselines[order[0]].model
    assert spec is not None
    growth = Growth(
        model=model.name,
        recipe=recipe_of(config.recipe),
        rank=spec.rank,
        alpha=spec.alpha,
        target_modules=spec.target_modules,
        seed=context.seed,
        dtype=model.dtype,
    )
    grown = grow(
        growth,
        [joint.tasks[task] for task in order],
        data,
        folder=folder / "grown",
        device=context.device,
        progress=context.progress,
    )
    return {"order": list(order), "tasks": {task: grown.report[task] for task in order}}


def make_gate(context: Context, folder: Path, kind: GateKind, unfrozen: bool) -> Figures:
    """A gate over the gates' stack, trained and measured on the mixture of its tasks."""
    config = context.study.config.gates
    assert config.stack is not None
    options = GateOptions(
        kind=kind,
        temperature=config.temperature,
        top_k=config.top_k,
        balance=0.0 if kind == "arrow" else config.load_balance,
        frozen=not unfrozen,
    )
    return _gated(context, folder, context.stack(config.stack), options)


def make_gated_experts(context: Context, folder: Path, tasks: Sequence[str]) -> Figures:
    """A gate over posterior ensembles, one gate a member, its own posterior sampled if asked."""
    gates, own = context.study.config.gates, context.study.config.experts
    assert own is not None
    sources = [read_source(f"{task}={run_folder(context, f'experts-{task}')}") for task in tasks]
    stack = stack_sources(sources)
    write_stack(folder / "stack", stack)
    options = GateOptions(
        kind=own.kind,
        temperature=gates.temperature,
        top_k=gates.top_k,
        balance=gates.load_balance,
        posterior_steps=own.gate_steps,
        step_size=own.gate_step_size,
    )
    alone = {task: context.evaluate_run(f"experts-{task}", task, stack) for task in tasks}
    first = {task: next(iter(splits.values())) for task, splits in alone.items()}
    return {"ensembles": first, **_gated(context, folder, stack, options)}


def _gated(context: Context, folder: Path, stack: Stack, options: GateOptions) -> Figures:
    config = context.study.config.gates
    data, recipe = context.data(stack, config.recipe), recipe_of(config.recipe)
    if not options.frozen and config.unfrozen_lr is not None:
        recipe = dataclasses.replace(recipe, lr=config.unfrozen_lr)
    gated = train_gate(
        stack,
        data,
        options,
        recipe,
        seed=context.seed,
        progress=context.progress,
        device=context.device,
    )
    write_gated(folder / "gated", gated)
    sets = {task: next(iter(own.values())) for task, own in context.sets(stack).items()}
    own = {name: task_spec(task).metrics for name, task in stack.tasks.items()}
    model = gated.model(device=context.device)
    alone = context.figures[f"stack-{config.stack}"]["alone"]
    return {
        "options": dataclasses.asdict(options),
        "recipe": vars(config.recipe),
        "members": len(stack),
        "alone": {task: next(iter(splits.values())) for task, splits in alone.items()},
        "sizes": {task: len(own.train) for task, own in data.items()},
        "training": gated.report,
        "figures": evaluate_gate(model, gated.stack.weights, sets, own),
    }
