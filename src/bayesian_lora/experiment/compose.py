"""What the commands on stacks have in common: from folders and options to fitted stacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesian_lora.composition.column_files import is_grown
from bayesian_lora.composition.fit import Recipe
from bayesian_lora.composition.fitting import fit_weights, reweighted
from bayesian_lora.composition.retrain import Variant, check_variants
from bayesian_lora.composition.retrain import retrain as fit_variants
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_evaluation import TaskFigures, evaluate_stack, table
from bayesian_lora.composition.stack_files import check_free, read_stack, write_stack
from bayesian_lora.composition.stack_model import load_tokenizer
from bayesian_lora.composition.task_data import TaskData, task_spec
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.token_cache import default_folder
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.building import resolve_device
from bayesian_lora.experiment.run_metrics import EPOCH
from bayesian_lora.experiment.task_sets import (
    Sets,
    find_sources,
    load_sets,
    raw_training,
    training_sets,
)
from bayesian_lora.progress import Progress
from bayesian_lora.utils.files import write_json
from bayesian_lora.utils.metrics_log import MetricsLog

METRICS_FILE = "retrain_metrics.json"
HISTORY = ("chain", *EPOCH, "val/loss", "val/acc")


@dataclass(frozen=True)
class Training:
    """The options of a command that trains: data, recipe, machine."""

    examples: int | None
    epochs: int
    lr: float
    batch_size: int
    prior_std: float
    data_dir: str | None
    device: str
    seed: int

    def recipe(self) -> Recipe:
        return Recipe(self.epochs, self.batch_size, self.lr, prior_std=self.prior_std)

    def data(
        self, stack: Stack, tasks: Sequence[str], progress: Progress
    ) -> tuple[dict[str, TaskData], Sets]:
        """What these tasks are trained on, told in a line each; what all tasks are evaluated on."""
        trained = {name: stack.tasks[name] for name in tasks}
        specs = [task_spec(task) for task in stack.tasks.values()]
        source, folder = find_sources(stack.model["name"], specs, self.data_dir)
        data = training_sets(trained, source, folder, self.examples, self.seed)
        others = dict.fromkeys(name for name in stack.tasks if name not in trained)
        sets = load_sets(stack, others, self.data_dir) if others else {}
        for task, own in data.items():
            progress.say(f"  {task}: {len(own.train)} train, {len(own.validation)} held out")
        sets |= {name: dict(own.evaluation) for name, own in data.items()}
        return data, {name: sets[name] for name in stack.tasks}


def read_ordinary(source: str) -> Stack:
    """A stack whose parts act side by side, to be trained further or gated.

    Raises:
        InputError: no stack there, or a growth: its columns were fitted on top of earlier ones.
    """
    if is_grown(Path(source)):
        raise InputError(
            f"{source}: a sequential growth, whose columns build on one another; stack its tasks' "
            "folders (tasks/…) instead"
        )
    return read_stack(Path(source))


def free_folder(out: str | None, default: str) -> Path:
    """The folder to write to.

    Raises:
        InputError: it cannot be written to, or holds something already.
    """
    check_free(out or default, beside=())
    return Path(out or default)


def retrain_folder(
    source: str,
    out: str | None,
    *,
    tasks: Sequence[str],
    part: str | None,
    mixing: Any,
    orthogonality: float,
    distillation: float,
    training: Training,
    progress: Progress | None = None,
) -> Path:
    """Read a stack, train it, write it, measure both; the new folder.

    Raises:
        InputError: as `retrain`, no stack at `source`, or `out` holds something.
    """
    progress = progress or Progress()
    before = read_ordinary(source)
    variant = Variant("stack", tuple(tasks), part, mixing, orthogonality, distillation)
    check_variants(before, [variant])
    folder = free_folder(out, f"{source.rstrip('/')}-on-{'-'.join(tasks)}")
    recipe, device = training.recipe(), resolve_device(training.device)
    progress.say(f"Training the stack of {source} on {', '.join(tasks)}")
    data, sets = training.data(before, tasks, progress)

    def measure(when: str, stack: Stack) -> TaskFigures:
        figures = evaluate_stack(stack, sets, device=device, progress=progress)
        progress.say(f"\n{when}:")
        for line in table(figures):
            progress.say(line)
        return figures

    figures = {"before": measure("Before", before)}
    found = fit_variants(
        before, data, [variant], recipe, seed=training.seed, progress=progress, device=device
    )[variant.name]
    write_stack(folder, found.stack)  # before it is measured: an interrupt leaves the fit
    write_history(folder, found.report.history)
    figures["after"] = measure("After", found.stack)
    write_json(folder / METRICS_FILE, figures)
    progress.say(f"\nWritten: {folder}\nEvaluate it: bayesian-lora eval {folder}")
    return folder


def fitted_on(
    stack: Stack, count: int, *, data_dir: str | None, device: str, seed: int, progress: Progress
) -> Stack:
    """The stack at the weights that suit `count` training examples of each task best.

    Raises:
        InputError: as `raw_training` and `fit_weights`.
    """
    place = resolve_device(device)
    specs = [task_spec(task) for task in stack.tasks.values()]
    _, folder = find_sources(stack.model["name"], specs, data_dir)
    few = raw_training(stack.tasks, folder, count, seed, said_as="fit", held_out=0.0)
    tokenizer, cache = load_tokenizer(stack), default_folder()
    sets = {
        name: TokenisedSet(own, tokenizer, stack.tasks[name].max_length, cache)
        for name, (own, _) in few.items()
    }
    fitted = fit_weights(stack, sets, device=place, progress=progress)
    progress.say(
        f"Fitted on {count} examples a task: mean NLL {fitted.loss_before:.4f} at weights 1, "
        f"{fitted.loss_after:.4f} at those found (the same examples)"
    )
    return reweighted(stack, fitted.weights, fitted.facts())


def write_history(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """`metrics.csv`: a row an epoch and chain; of several fits each row's ``task`` comes first."""
    first = ("task",) if any("task" in row for row in rows) else ()
    log = MetricsLog(folder, (*first, *HISTORY))
    for row in rows:
        log.log(row)
    log.close()
