"""Is the posterior worth it? Samplers beside the simple baselines, over tasks and seeds: one table.

    python benchmarks/posterior_against_baselines.py
    python benchmarks/posterior_against_baselines.py --only mrpc --seeds 1 --dry-run
    python benchmarks/posterior_against_baselines.py --samplers sgld sghmc+vr asgld
    python benchmarks/posterior_against_baselines.py --quick

MAP of the last epoch and early-stopped, the deep ensemble of either; SGLD and other samplers from
the very same fits, about 1,000 chain-steps of 32 examples each; all of them temperature-scaled too.
Needs the `offline` extra and local data (BAYESIAN_LORA_DATA), `--quick` and `synthetic` no data.
Finished runs are kept and stopped ones go on: the same command given again ends what it began.
`+vr` is a sampler with control variates: twice the gradients a step, and a larger step at the same
bias. The other sampler by default is sghmc's BAOAB splitting with them: on quadratics its law has
no discretisation error, so that minibatch noise alone limits the step, and that they reduce.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from baselines_modes import mode_lines
from baselines_plan import (
    TASKS,
    Cell,
    Sizes,
    check_inputs,
    donor,
    finished,
    found_prior,
    make_plan,
    work_of,
)
from baselines_table import NOTES, Figures, Runs, sampler_lines, table, verdicts

from bayesian_lora.config import Config
from bayesian_lora.data.batching import BatchOrder
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.evaluate import evaluate_run
from bayesian_lora.experiment.setup import prepare
from bayesian_lora.experiment.train import train
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import git_commit
from bayesian_lora.utils.files import write_atomic
from bayesian_lora.utils.text_table import aligned

SAMPLERS = ("sgld", "sghmc+vr")
USUAL = tuple(task for task in TASKS if task != "synthetic")
QUIET = Progress(quiet=True)
TABLE, FOLDER = "table.md", Path("runs/baselines")
MEASURED = 3
QUICK = (
    *("data.train_examples=96", "data.batch_size=8", "data.max_length=16", "model.lora.rank=2"),
    *("train.epochs=2", "prior.std=auto", "prior.candidates=[0.2,0.4]", "sampler.burn_in=4"),
    *("sampler.thin=4", "sampler.num_samples=16", "sampler.trace_every=1"),
)


def step_seconds(config: Config) -> float:
    """Seconds of one gradient step of all chains at once; the first ones warm up."""
    setup = prepare(config, QUIET)
    chains = setup.streams.probe[: setup.model.num_chains]  # one while a shared fit is made
    order = BatchOrder(len(setup.train), config.data.batch_size, chains)
    spent = []
    for _ in range(MEASURED + 1):
        closure = setup.objective.closure(order.iid())
        began = time.perf_counter()
        closure()
        spent.append(time.perf_counter() - began)
    return sum(spent[1:]) / MEASURED


def plan_lines(cells: Sequence[Cell], sizes: dict[str, Sizes], measure: bool) -> list[str]:
    """A line a run: its chain-steps, gradient steps, whether it is done; and the time in all.

    Args:
        measure: make a few gradient steps of each task that has runs to be made.
    """
    rows = [["run", "chain-steps", "fit", "search", "sampling", "looking", "state"]]
    seconds, each, left = 0.0, dict[str, float](), 0
    for cell in cells:
        work, config = work_of(cell, sizes[cell.task]), cell.resolved()
        done = config is not None and finished(cell.folder, config) is not None
        begun = (cell.folder / "run.json").is_file()
        state = "finished" if done else "goes on" if begun else "to be made"
        parts = (work.chain_steps, work.fit, work.search, work.sampling, work.looking)
        rows.append([cell.name, *(f"{round(part):,}" for part in parts), state])
        if not done:
            left += work.chain_steps
            if measure and cell.task not in each:
                each[cell.task] = step_seconds(cell.config)
            seconds += work.total * each.get(cell.task, 0.0)
    lines = [*aligned(rows), "Columns fit to looking: gradient steps of all chains at once."]
    lines.append(f"To be made: {left:,} chain-steps of sampling")
    if measure and left:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in each.items())
        lines.append(f"Seconds a gradient step, measured: {shown}")
        lines.append(f"Estimate for what is not finished: {seconds / 3600:.2f} hours")
    elif left:
        lines.append("Time: not measured; --measure makes a few gradient steps and says")
    return lines


def make_runs(cells: Sequence[Cell], progress: Progress) -> list[str]:
    """Make every run that is not finished; one line for each that failed."""
    failed = []
    for number, cell in enumerate(cells, start=1):
        title = f"[{number}/{len(cells)}] {cell.name}"
        try:
            config = cell.resolved()
            if config is None:
                raise InputError(f"its prior was to be found by {cell.prior_from}, which has none")
            if finished(cell.folder, config) is not None:
                progress.say(f"{title}: already done")
                continue
            progress.say(f"\n{title}")
            lent = donor(cell)
            config.train.starts_from = None if lent is None else str(lent)
            train(config, progress)
        except InputError as error:
            failed.append(f"{cell.name} failed: {error}")
            progress.say(failed[-1])
    return failed


def collect(
    cells: Sequence[Cell],
) -> tuple[Mapping[str, Runs], Mapping[str, Mapping[str, Sequence[Path]]], list[str]]:
    """By task and sampler the metrics and the folders of the seeds that all samplers have finished;
    the others.
    """
    found: dict[str, dict[str, list[Figures]]] = {}
    folders: dict[str, dict[str, list[Path]]] = {}
    absent = []
    samplers = list(dict.fromkeys(cell.sampler for cell in cells))
    seeds: dict[tuple[str, int], dict[str, tuple[Figures, Path]]] = {}
    for cell in cells:
        config = cell.resolved()
        metrics = None if config is None else finished(cell.folder, config)
        if metrics is None:
            absent.append(cell.name)
        else:
            seeds.setdefault((cell.task, cell.seed), {})[cell.sampler] = (metrics, cell.folder)
    for (task, _), by_sampler in seeds.items():
        if len(by_sampler) == len(samplers):
            runs = found.setdefault(task, {name: [] for name in samplers})
            roots = folders.setdefault(task, {name: [] for name in samplers})
            for name in samplers:
                runs[name].append(by_sampler[name][0])
                roots[name].append(by_sampler[name][1])
    return found, folders, absent


def report(cells: Sequence[Cell], command: str) -> str:
    """Markdown: the command, a table and its targets for each task, what is missing."""
    found, folders, absent = collect(cells)
    parts = [f"`{command}` (commit {git_commit() or 'unknown'})", NOTES]
    for task, runs in found.items():
        first = next(iter(runs.values()))
        n, seeds = first[0]["n"], len(first)
        priors = ", ".join(_prior(c) for c in cells if c.task == task and not c.starts_from)
        words = f"**{task}**: {n} examples evaluated, seeds: {seeds}, prior sd of each: {priors}"
        parts += [words, "\n".join(table(runs)), "\n".join(sampler_lines(runs))]
        parts.append("\n".join(verdicts(task, runs)))
        parts.append("\n".join(mode_lines(folders[task])))
    if absent:
        parts.append(f"Not finished, and their seeds left out: {'; '.join(absent)}")
    return "\n\n".join(parts) + "\n"


def _prior(cell: Cell) -> str:
    config = cell.resolved()
    std = None if config is None else config.prior.std
    std = found_prior(cell.folder) if std == "auto" else std
    return "not searched yet" if std is None else f"{std:g}"


def compare(args: argparse.Namespace, command: str) -> int:
    """What the command line asks for; the number of runs that failed.

    Raises:
        InputError: wrong input; nothing has been made or written.
    """
    if args.quick and args.only:
        raise InputError(f"--quick --only {' '.join(args.only)}: a toy has one task; name one")
    tasks = ["synthetic"] if args.quick else args.only or USUAL
    out: Path = args.out or (FOLDER.with_name("baselines_quick") if args.quick else FOLDER)
    encoder = out / "encoder"
    toy = (f"model.name={encoder}", *QUICK) if args.quick else ()
    cells = make_plan(tasks, args.samplers, out, args.seeds, [*toy, *args.set])
    sizes = check_inputs(cells)
    measure = args.measure or not args.dry_run
    if measure and args.quick and any(cell.config.model.name == str(encoder) for cell in cells):
        make_toy(encoder)
    for line in plan_lines(cells, sizes, measure):
        print(line, flush=True)
    if args.dry_run:
        return 0
    if args.evaluate:
        evaluate_again(cells)
    failed = make_runs(cells, Progress())
    text = report(cells, command)
    write_atomic(out / TABLE, text)
    print(f"\n{text}\nTable: {out / TABLE}")
    return len(failed)


def make_toy(folder: Path) -> None:
    """A one-layer encoder of width 8 with fixed random weights, unless it is there."""
    if not (folder / "config.json").is_file():
        import reliability

        reliability.smallest_model(folder)


def evaluate_again(cells: Sequence[Cell]) -> None:
    """Figures of every finished run, by the evaluation as it is now."""
    for cell in cells:
        config = cell.resolved()
        if config is not None and finished(cell.folder, config) is not None:
            evaluate_run(cell.folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 after an error or a failed run, 130 after Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, metavar="S", help="so many of each task")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), metavar="NAME[+vr]")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {FOLDER}")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, make nothing")
    parser.add_argument("--measure", action="store_true", help="of a dry run: time a few steps")
    parser.add_argument("--evaluate", action="store_true", help="evaluate finished runs anew")
    parser.add_argument("--quick", action="store_true", help="a toy of it all, under a minute")
    command = shlex.join(["python", "benchmarks/posterior_against_baselines.py", *given])
    try:
        return 1 if compare(parser.parse_args(given), command) else 0
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped; go on with: {command}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
