"""The runs of the baseline comparison: one `Config` each, what is done of them, what is left to do.

Shapes: M chains, K members, N examples, B batch.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesian_lora.config import MAP, Config, load_config, load_run_config
from bayesian_lora.config_schema import SamplerConfig
from bayesian_lora.data.glue_datasets import load_split
from bayesian_lora.data.preparation import PROBE_SIZE, SUBSET_SIZE
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.cells import settings_of
from bayesian_lora.experiment.resume import find_earlier
from bayesian_lora.experiment.samplers import TRACES_A_DRAW
from bayesian_lora.experiment.setup import (
    data_folder,
    load_training_data,
    resolve_device,
    task_of,
)
from bayesian_lora.samplers.schedules import (
    CYCLE_STEPS,
    EXPLORE_FRACTION,
    Cycle,
    CycleThinning,
    Thinning,
)
from bayesian_lora.utils.files import read_json

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS: dict[str, tuple[str, int]] = {
    "mrpc": ("benchmark_mrpc.yaml", 3),
    "cola": ("benchmark_cola.yaml", 2),
    "sst2": ("benchmark_sst2.yaml", 2),
    "synthetic": ("demo.yaml", 2),
}
"""By name: the config, and how many seeds."""
EVERY: tuple[str, ...] = ("train.early_stopping=true", "sampler.step_size=auto")
"""What makes a cell of any config: both states of a fit are kept, and T = 1 is held to."""
OWN: dict[str, tuple[str, ...]] = {
    "sghmc": ("sampler.integrator=baoab",),
    "csgld": ("sampler.cycle_steps=40", "sampler.burn_in=40", "sampler.thin=20"),
}
REDUCED = "vr"
FORWARD = 1 / 3
"""A forward pass in gradient steps."""


@dataclass(frozen=True)
class Cell:
    """One run. `starts_from`: the runs of its seed before it, any of whose fits are its own;
    `prior_from`: the run whose search has found its prior.
    """

    task: str
    seed: int
    sampler: str
    folder: Path
    config: Config
    starts_from: tuple[Path, ...]
    prior_from: Path | None

    @property
    def name(self) -> str:
        return f"{self.task}, seed {self.seed}, {self.sampler}"

    def resolved(self) -> Config | None:
        """The run's config; None as long as its prior is still to be searched."""
        config = copy.deepcopy(self.config)
        if config.prior.std == "auto" and self.prior_from is not None:
            if (found := found_prior(self.prior_from)) is None:
                return None
            config.prior.std = found
        return config


@dataclass(frozen=True)
class Sizes:
    """Examples fitted and evaluated on."""

    train: int
    evaluation: int


@dataclass(frozen=True)
class Work:
    """What a run costs in gradient steps of its M chains at once, B examples each; and the
    chain-steps of its sampling, M a step.
    """

    fit: float
    search: float
    sampling: float
    looking: float
    chain_steps: int

    @property
    def total(self) -> float:
        return self.fit + self.search + self.sampling + self.looking


def make_plan(
    tasks: Sequence[str],
    samplers: Sequence[str],
    out: Path,
    seeds: int | None = None,
    overrides: Sequence[str] = (),
) -> list[Cell]:
    """Every run, in the order in which they are made, each config validated.

    Args:
        tasks: of `TASKS`.
        samplers: names of the family; ``+vr`` adds control variates, as in ``sghmc+vr``.
        out: the runs lie in ``<out>/<task>/seed_<seed>/<sampler>``.
        seeds: so many of each task, in place of its own number.
        overrides: ``key=value`` for all runs.

    Raises:
        InputError: an unknown task or sampler, one given twice, wrong keys, or keys without which
            the comparison is none; nothing has been loaded or written.
    """
    for what, given in (("task", tasks), ("sampler", samplers)):
        if not given or len(set(given)) < len(given):
            raise InputError(f"{what}s {', '.join(given) or 'none'}: name one or more, each once")
    if unknown := [name for name in tasks if name not in TASKS]:
        raise InputError(f"task {unknown[0]!r} is not one of {', '.join(TASKS)}: choose of these")
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds {seeds}: a comparison needs one seed or more; give 1 or 3")
    cells: list[Cell] = []
    for task in tasks:
        file, usual = TASKS[task]
        for seed in range(usual if seeds is None else seeds):
            first = out / task / "seed_0" / samplers[0]
            for number, sampler in enumerate(samplers):
                own = [*EVERY, *sampler_keys(sampler), *overrides, f"seed={seed}"]
                folder = out / task / f"seed_{seed}" / sampler
                config = load_config(CONFIGS / file, [*own, f"output.dir={folder}"])
                _check_comparable(config)
                before = tuple(folder.with_name(name) for name in samplers[:number])
                searched = first if seed or number else None
                cells.append(Cell(task, seed, sampler, folder, config, before, searched))
    return cells


def sampler_keys(sampler: str) -> list[str]:
    """The keys of a sampler's name. Raises InputError on ``map``, which draws nothing."""
    name, plus, suffix = sampler.partition("+")
    if plus and suffix != REDUCED:
        raise InputError(f"sampler {sampler!r}: after + stands {REDUCED}, as in {name}+{REDUCED}")
    if name == MAP:
        raise InputError(f"sampler {sampler!r} draws nothing: MAP stands in the table anyway")
    reduced = [f"sampler.variance_reduction={'true' if plus else 'false'}"]
    return [f"sampler.name={name}", *OWN.get(name, ()), *reduced]


def _check_comparable(config: Config) -> None:
    if not config.train.early_stopping:
        raise InputError(
            "train.early_stopping=false: samplers start from the early-stopped fits here, and the "
            "last epoch's stand beside them; leave the key out"
        )
    if config.train.starts == "shared":
        raise InputError(
            "train.starts=shared: the deep ensemble needs fits of their own; leave the key out"
        )
    if config.train.starts_from is not None:
        raise InputError(
            f"train.starts_from={config.train.starts_from}: every seed has fits of its own; leave "
            "the key out"
        )
    if config.output.overwrite:
        raise InputError("output.overwrite=true: finished runs are kept; name another --out")


def check_inputs(cells: Sequence[Cell]) -> dict[str, Sizes]:
    """The tasks' sizes, after a look at everything that could stop a run before its first step.

    Raises:
        InputError: no such device, no data, or a folder that holds something else.
    """
    sizes: dict[str, Sizes] = {}
    for cell in cells:
        if (config := cell.resolved()) is not None:
            finished(cell.folder, config)
        if cell.task not in sizes:
            resolve_device(cell.config.device)
            sizes[cell.task] = _sizes(cell.config)
    return sizes


def _sizes(config: Config) -> Sizes:
    task, folder = task_of(config), data_folder(config)
    train, _ = load_training_data(config, task, folder)
    return Sizes(len(train), len(load_split(task, task.default_split, data_dir=folder)))


def finished(folder: Path, config: Config) -> dict[str, Any] | None:
    """The `metrics.json` of this very run, None where it is still to be made or to be ended.

    Raises:
        InputError: the folder holds something else.
    """
    if (folder / "run.json").is_file() and (folder / "metrics.json").is_file():
        done = read_json(folder / "run.json", "run").get("status") == "finished"
        if done and settings_of(load_run_config(folder)) == settings_of(config):
            return read_json(folder / "metrics.json", "metrics")
    find_earlier(config)
    return None


def donor(cell: Cell) -> Path | None:
    """A run of the cell's seed whose fits are whole."""
    for folder in cell.starts_from:
        fits = list(folder.glob("map/chain_*/adapter_model.safetensors"))
        if len(fits) == cell.config.sampler.chains and (folder / "ensemble.json").is_file():
            return folder
    return None


def found_prior(folder: Path) -> float | None:
    """What a run's search has found; None before its end, or if it made none."""
    if not (folder / "run.json").is_file():
        return None
    search = read_json(folder / "run.json", "run").get("prior_search")
    return None if search is None else float(search["std"])


def sampling_steps(s: SamplerConfig) -> int:
    """Steps of burn-in and collection."""
    draws = s.num_samples // s.chains
    if s.name != "csgld":
        return s.burn_in + Thinning(s.thin, draws).steps
    share = EXPLORE_FRACTION if s.explore_fraction is None else s.explore_fraction
    return (
        s.burn_in + CycleThinning(Cycle(s.cycle_steps or CYCLE_STEPS, share), s.thin, draws).steps
    )


def work_of(cell: Cell, sizes: Sizes) -> Work:
    """What the run costs if nothing of it is done and an earlier run of its seed lends its fits."""
    config, s = cell.config, cell.config.sampler
    batch = min(config.data.batch_size, sizes.train)
    epoch = -(-sizes.train // batch)
    steps = sampling_steps(s)
    a_step = (2 if s.variance_reduction else 1) * (2 if s.name.startswith("sam_") else 1)
    searches = config.prior.std == "auto" and cell.prior_from is None
    share = len(config.prior.candidates) / s.chains
    rows = steps / (s.trace_every or max(1, s.thin // TRACES_A_DRAW))
    looked_at = (s.num_samples + s.chains) * sizes.evaluation / s.chains
    return Work(
        fit=0 if cell.starts_from else config.train.epochs * epoch,
        search=config.train.epochs * epoch * share if searches else 0,
        sampling=steps * a_step + (epoch if s.variance_reduction else 0),
        looking=FORWARD * (rows * (PROBE_SIZE + SUBSET_SIZE) + looked_at) / batch,
        chain_steps=s.chains * steps,
    )
