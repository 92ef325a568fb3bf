"""What the commands on stacks have in common: from folders and options to fitted stacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesian_lora.composition.fit import Recipe
from bayesian_lora.composition.retrain import Variant, check_variants
from bayesian_lora.composition.retrain import retrain as fit_variants
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_evaluation import evaluate_stack, table
from bayesian_lora.composition.stack_files import read_stack, write_stack
from bayesian_lora.composition.stack_model import load_tokenizer
from bayesian_lora.composition.task_data import TaskData, load_task_data
from bayesian_lora.data.preparation import data_folder
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.setup import resolve_device
from bayesian_lora.progress import Progress
from bayesian_lora.utils.metrics_log import MetricsLog

HELD_OUT = 0.1
"""Of each task's training examples."""
HISTORY = ("chain", "epoch", "trainer/global_step", "lr-Adam", "train/loss", "train/acc")
HISTORY = (*HISTORY, "val/loss", "val/acc")


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

    def data(self, stack: Stack) -> dict[str, TaskData]:
        """Of every task the stack carries."""
        tokenizer, folder = load_tokenizer(stack), data_folder(self.data_dir, "--data-dir")
        return {
            name: load_task_data(
                task,
                tokenizer,
                data_dir=folder,
                train_examples=self.examples,
                validation_share=HELD_OUT,
                seed=self.seed,
            )
            for name, task in stack.tasks.items()
        }


def free_folder(out: str | None, default: Path) -> Path:
    """The folder to write to.

    Raises:
        InputError: it holds something already, or is a file.
    """
    folder = Path(out) if out else default
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already; name another folder with --out")
    return folder


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
    """Read a stack, train it, measure both, write the trained one; its folder.

    Raises:
        InputError: as `retrain`, no stack at `source`, or `out` holds something.
    """
    progress = progress or Progress()
    before = read_stack(Path(source))
    folder = free_folder(out, Path(f"{source.rstrip('/')}-on-{'-'.join(tasks)}"))
    name = folder.name
    variant = Variant(name, tuple(tasks), part, mixing, orthogonality, distillation)
    check_variants(before, [variant])
    recipe, device = training.recipe(), resolve_device(training.device)
    data = training.data(before)
    sets = {task: own.evaluation for task, own in data.items()}
    progress.say(f"Training the stack of {source} on {', '.join(tasks)}")
    for task, own in data.items():
        progress.say(f"  {task}: {len(own.train)} train, {len(own.validation)} held out")
    found = fit_variants(
        before, data, [variant], recipe, seed=training.seed, progress=progress, device=device
    )[name]
    figures = {}
    for when, one in (("before", before), ("after", found.stack)):
        figures[when] = evaluate_stack(one, sets, device=device, progress=progress)
        progress.say(f"\n{when.capitalize()}:")
        for line in table(figures[when]):
            progress.say(line)
    write_stack(folder, found.stack, {"figures": figures})
    log = MetricsLog(folder, HISTORY)
    for row in found.report.history:
        log.log(row)
    log.close()
    progress.say(f"\nWritten: {folder}\nEvaluate it: bayesian-lora eval {folder}")
    return folder
