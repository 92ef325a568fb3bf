"""Steps that are runs: baselines, short posteriors from them, one task at several ranks."""

import csv
from collections.abc import Mapping
from pathlib import Path

from bayesian_lora.composition.sources import Source, read_source
from bayesian_lora.config import Config
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.experiment.run_metrics import EPOCH, OWN, split_names
from bayesian_lora.experiment.setup import task_of
from bayesian_lora.experiment.study_config import Study
from bayesian_lora.experiment.study_context import Context, Figures, run_folder
from bayesian_lora.experiment.train import train
from bayesian_lora.utils.files import read_json
from bayesian_lora.utils.metrics_log import NAME as METRICS_CSV

KEPT = ("train/loss", "train/acc")


def make_baseline(context: Context, task: str) -> Figures:
    """A task's single adapter: a run, and its figures under the seed's names."""
    root = _run(context, f"baseline-{task}", context.study.baselines[task])
    config, source = context.study.baselines[task], context.source(task)
    spec = task_of(config)
    by_split = _by_split(root, spec)
    history, last = _history(root)
    return {
        **_adapter(config, source),
        "title": spec.title,
        "sizes": _sizes(root, by_split),
        "splits": {split: {**m["ensemble"], "n": m["n"]} for split, m in by_split.items()},
        "logged": _logged(history, last, list(by_split)),
        "history": history,
        "seconds": read_json(root / "run.json", "run")["wall_s"],
    }


def make_experts(context: Context, task: str) -> Figures:
    """Draws from a task's posterior that begin at its baseline."""
    name, own = f"experts-{task}", context.study.config.experts
    assert own is not None
    baseline = run_folder(context, f"baseline-{task}")
    config = context.study.run_config(task, run_folder(context, name), own.run)
    config.train.starts_from = str(baseline)
    root = _run(context, name, config)
    metrics = read_json(root / "metrics.json", "metrics")
    kept = ("map", "single", "ensemble", "uncertainty", "diagnostics", "sampler")
    return {"seconds": _seconds(root), "n": metrics["n"], **{key: metrics[key] for key in kept}}


def make_rank(context: Context, config: Config) -> Figures:
    """One rank of the rank study: mean and spread over independent fits."""
    root = _run(context, f"rank-{config.model.lora.rank}", config)
    metrics = read_json(root / "metrics.json", "metrics")
    source = read_source(str(root))
    return {
        **_adapter(config, source),
        "task": metrics["task"],
        "title": task_of(config).title,
        "fits": len(source),
        "n": metrics["n"],
        "split": metrics["split"],
        "single": metrics["single"],
        "ensemble": metrics["ensemble"],
        "sizes": _sizes(root, {metrics["split"]: metrics}),
        "seconds": _seconds(root),
    }


def rank_config(study: Study, rank: int) -> Config:
    """The rank study's run at a rank; α grows with it, so that the scale α/r stays."""
    own = study.config.rank_study
    assert own.task is not None
    lora = study.baselines[own.task].model.lora
    changes = {
        "sampler": {"name": "map", "chains": own.chains},
        "model": {"lora": {"rank": rank, "alpha": lora.alpha / lora.rank * rank}},
    }
    return study.run_config(own.task, study.root, own.run, changes)


def _run(context: Context, step: str, config: Config) -> Path:
    """Make a step's run, or go on with it."""
    config.output.dir = str(run_folder(context, step))
    return train(config, context.progress)


def _seconds(root: Path) -> float:
    return read_json(root / "run.json", "run")["wall_s"]


def _adapter(config: Config, source: Source) -> Figures:
    """What an adapter is: base, rank, modules, numbers that are trained."""
    assert source.spec is not None
    local = Path(config.model.name).is_dir()  # a path says nothing on another machine
    return {
        "model": Path(config.model.name).name if local else config.model.name,
        "rank": source.spec.rank,
        "alpha": source.spec.alpha,
        "modules": sorted({module.rpartition(".")[2] for module in source.widths}),
        "parameters": sum(tensor.numel() for tensor in source.members[0].values()),
    }


def _by_split(root: Path, spec: TaskSpec) -> dict[str, Figures]:
    """`metrics.json` of every split the run was evaluated on, the default one first."""
    found = {spec.default_split: read_json(root / "metrics.json", "metrics")}
    for split in spec.splits:
        if (root / f"metrics.{split}.json").is_file():
            found[split] = read_json(root / f"metrics.{split}.json", "metrics")
    return found


def _sizes(root: Path, by_split: Mapping[str, Figures]) -> Figures:
    sizes = read_json(root / "run.json", "run")["data"]["sizes"]
    return {
        "train": sizes["train"],
        "validation": sizes.get("validation", 0),
        "evaluation": {split: m["n"] for split, m in by_split.items()},
    }


def _history(root: Path) -> tuple[list[Figures], Figures]:
    """The epochs of `metrics.csv` (means of the chains), and its last row, the evaluation."""
    with (root / METRICS_CSV).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [
        {name: _number(row[name]) for name in (*EPOCH, "val/loss", "val/acc")}
        for row in rows
        if row["chain"] == "mean"
    ]
    last = next((row for row in reversed(rows) if row["chain"] == "ensemble"), {})
    return epochs, {name: _number(text) for name, text in last.items() if "/" in name}


def _number(text: str) -> float | None:
    return float(text) if text else None


def _logged(history: list[Figures], last: Figures, splits: list[str]) -> Figures:
    """The seed's quantities: train/… of the epoch that was kept, val/… of every split."""
    found: Figures = {}
    known = [row for row in history if row["val/loss"] is not None]
    if history:
        kept = min(known, key=lambda row: row["val/loss"]) if known else history[-1]
        found |= {name: kept[name] for name in KEPT}
    for before, behind in split_names(splits).values():
        for name in ("loss", "acc", *OWN):
            key = f"{before}{name}{behind}"
            if last.get(key) is not None:
                found[key] = last[key]
    return found
