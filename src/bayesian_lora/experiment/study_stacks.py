"""Steps over stacks: stacked in every way, trained further, compared, drift measured."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora.composition.fitting import fit_weights, reweighted
from bayesian_lora.composition.merging import compress, merge
from bayesian_lora.composition.retrain import Variant, retrain
from bayesian_lora.composition.similarity import adapter_of, compare, drift
from bayesian_lora.composition.sources import Source
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_files import read_stack, write_stack
from bayesian_lora.composition.stacking import stack_sources
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.preparation import fixed_part
from bayesian_lora.data.token_cache import default_folder
from bayesian_lora.experiment.study_context import (
    Context,
    Figures,
    recipe_of,
)
from bayesian_lora.experiment.study_schema import RecipeConfig, StackingConfig, VariantConfig

Way = tuple[str, str, Stack]
"""Its title, what is to be said of it, the stack."""


def make_stack(
    context: Context, folder: Path, tasks: Sequence[str], recipe: RecipeConfig
) -> Figures:
    """The tasks' adapters stacked in every way, each measured on all tasks."""
    sources = [context.source(task) for task in tasks]
    found = {}
    for name, (title, note, stack) in _ways(context, sources, recipe).items():
        write_stack(folder / name, stack)
        found[name] = {
            "title": title,
            "note": note,
            "rank": stack.spec.rank,
            "weights": {part.name: part.weight for part in stack.parts},
            "figures": context.evaluate(stack),
        }
    exact = read_stack(folder / "exact")
    alone = {task: context.evaluate_run(f"baseline-{task}", task, exact) for task in tasks}
    ranks = {s.name: s.spec.rank if s.spec else None for s in sources}
    return {"alone": alone, "ranks": ranks, "ways": found}


def _ways(context: Context, sources: Sequence[Source], recipe: RecipeConfig) -> dict[str, Way]:
    config = context.study.config.stacking
    exact = stack_sources(sources)
    ways: dict[str, Way] = {
        "exact": ("stacked exactly", "", exact),
        "original": (
            "stacked at the original's scaling",
            "",
            stack_sources(sources, scaling="original"),
        ),
        "fitted": _fitted(context, exact, config, recipe),
    }
    if config.compress_rank is not None and config.compress_rank < exact.spec.rank:
        low = compress(exact, config.compress_rank)
        ways["svd"] = (f"exact, then SVD to rank {low.spec.rank}", _error(low), low)
    for method in config.merging:
        merged = merge(sources, method, config.density, seed=context.seed)
        title = f"{method.upper().replace('_', '-')}, density {config.density:g}"
        ways[method] = (title, _error(merged), merged)
    return ways


def _fitted(context: Context, exact: Stack, config: StackingConfig, recipe: RecipeConfig) -> Way:
    """Weights fitted on examples held out of what the adapters were fitted on."""
    data = context.data(exact, recipe)
    sets = {
        task: TokenisedSet(
            fixed_part(own.validation.examples, config.fit_examples, context.seed),
            context.tokenizer(exact),
            exact.tasks[task].max_length,
            default_folder(),
        )
        for task, own in data.items()
    }
    found = fit_weights(exact, sets, device=context.device, progress=context.progress)
    stack = reweighted(exact, found.weights, found.facts())
    weights = ", ".join(
        f"{part.name} {weight:.2f}"
        for part, weight in zip(stack.parts, found.weights.tolist(), strict=True)
    )
    sizes = ", ".join(f"{n} of {task}" for task, n in found.examples.items())
    return "exact, weights fitted", f"weights {weights}, fitted on {sizes} held out of train", stack


def _error(stack: Stack) -> str:
    error = stack.facts["error"]["overall"]
    return f"relative error of the truncation {error:.3f}"


def make_further(context: Context, folder: Path, name: str) -> Figures:
    """A stack trained further in every way, each measured on all its tasks."""
    config, stack = context.study.config.further, context.stack(name)
    data = context.data(stack, config.recipe)
    variants = [_variant(label, own) for label, own in config.variants.items()]
    done = retrain(
        stack,
        data,
        variants,
        recipe_of(config.recipe),
        seed=context.seed,
        progress=context.progress,
        device=context.device,
    )
    rows = {}
    for label, found in done.items():
        write_stack(folder / label, found.stack)
        rows[label] = {
            "what": describe(config.variants[label], tuple(stack.tasks)),
            "tasks": list(config.variants[label].tasks),
            "figures": context.evaluate(found.stack),
            "history": _mean_history(found.report.history),
            "best_epoch": found.report.best_epoch,
        }
    before = context.figures[f"stack-{name}"]
    return {
        "alone": before["alone"],
        "before": before["ways"]["exact"]["figures"],
        "sizes": {task: len(own.train) for task, own in data.items()},
        "recipe": vars(config.recipe),
        "variants": rows,
    }


def _variant(name: str, config: VariantConfig) -> Variant:
    return Variant(
        name,
        tuple(config.tasks),
        part=config.part,
        mixing=config.mixing,
        orthogonality=config.orthogonality,
        distillation=config.distillation,
    )


def describe(variant: VariantConfig, carried: Sequence[str]) -> str:
    """A variant in words."""
    words = ["all columns" if variant.part is None else f"{variant.part}'s columns"]
    words.append(f"and head on {variant.tasks[0]}" if len(variant.tasks) == 1 else "and heads on ")
    if len(variant.tasks) > 1:
        which = "all tasks" if set(variant.tasks) == set(carried) else " and ".join(variant.tasks)
        how = "batches in turn" if variant.mixing == "alternate" else "losses summed"
        words[-1] += f"{which}, {how}"
    if variant.orthogonality:
        words.append(f"with orthogonality {variant.orthogonality:g}")
    if variant.distillation:
        words.append(f"with distillation {variant.distillation:g} from the single adapters")
    return " ".join(words)


def _mean_history(rows: Sequence[Mapping[str, Any]]) -> list[Figures]:
    """Epoch by epoch, means over a variant's chains (one, unless the stack is an ensemble)."""
    epochs: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        epochs.setdefault(row["epoch"], []).append(row)
    names = [name for name in (rows[0] if rows else ()) if name not in ("epoch", "chain")]
    return [
        {"epoch": epoch, **{name: float(np.mean([row[name] for row in own])) for name in names}}
        for epoch, own in epochs.items()
    ]


def make_similarity(context: Context, folder: Path, tasks: Sequence[str]) -> Figures:
    """The baselines pair by pair, beside random subspaces and random LoRAs."""
    adapters = [adapter_of(context.source(task)) for task in tasks]
    return {"comparison": compare(adapters, seed=context.seed)}


def make_drift(context: Context, folder: Path, name: str) -> Figures:
    """How far every variant moved from the stack it began as, whole and part by part."""
    stack = context.stack(name)
    variants = context.figures[f"further-{name}"]["variants"]
    return {
        "variants": {
            label: _drift_figures(
                drift(
                    stack,
                    read_stack(context.folder(f"further-{name}") / label),
                    seed=context.seed,
                )
            )
            for label in variants
        }
    }


def _drift_figures(found: Mapping[str, Any]) -> Figures:
    """Of a drift what holds for all modules together; modules are left to `similarity`."""
    parts: dict[str, Callable[[str], Any]] = {
        "own": lambda part: found["parts"][part]["whole"],
        "before": lambda part: found["against"][part]["before"]["whole"],
        "after": lambda part: found["against"][part]["after"]["whole"],
    }
    return {
        "names": [found["whole"][side] for side in ("first", "second")],
        "whole": found["whole"]["whole"],
        "kinds": found["whole"]["kinds"],
        "parts": {
            part: {when: read(part) for when, read in parts.items()} for part in found["parts"]
        },
    }
