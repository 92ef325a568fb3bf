"""A run folder → its figures: predictions, `metrics.json`, printed summary.

Shapes: K members, M chains, N examples.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bayesian_lora.assessment import diagrams, evaluation, summary
from bayesian_lora.assessment.ensemble_curve import cumulative
from bayesian_lora.assessment.run_rows import Given, Predicted, rows
from bayesian_lora.config import MAP, Config
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.glue_datasets import load_split
from bayesian_lora.data.preparation import fixed_part
from bayesian_lora.data.tasks import TaskSpec
from bayesian_lora.data.token_cache import default_folder
from bayesian_lora.energy_range import LEAST
from bayesian_lora.ensemble import (
    Ensemble,
    load_model,
    map_ensemble,
    other_starts,
    why_no_other_starts,
)
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.building import resolve_device
from bayesian_lora.experiment.resume import load_own_config
from bayesian_lora.experiment.setup import (
    Setup,
    ask_hub_once,
    data_folder,
    load_training_data,
    task_of,
)
from bayesian_lora.experiment.stored_figures import store_alone, store_figures
from bayesian_lora.models.hf_lora import HuggingFaceLora
from bayesian_lora.models.sources import load_pretrained, resolve_model
from bayesian_lora.predict import Predictions
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import read_starts, read_traces
from bayesian_lora.traces import RAW
from bayesian_lora.utils.files import read_json
from bayesian_lora.utils.lora_params import chain_norm

Figures = dict[str, Any]
STATED = ("name", "step_size", "exactness", "law", "variance_reduction")
"""What a sampler says of itself, from the manifest into `metrics.json`."""
NO_SAMPLING = "no sampling: the members are MAP fits, so there are no chains to judge"
MOST_HELD_OUT = 2000
"""Examples on which temperatures are fitted: a parameter fitted on n raises the NLL of others by
about 1/(2n), .00025 nats here."""
Members = Literal["all", "latest"] | int
Inputs = tuple[TokenisedSet, TokenisedSet | None, HuggingFaceLora]


def evaluate_run(
    root: Path,
    *,
    split: str | None = None,
    members: Members = "all",
    tolerance: float | None = None,
    data_dir: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    setup: Setup | None = None,
) -> Figures:
    """Evaluate a run's ensemble and its warm starts on a split, print and (for all members) store.

    Args:
        root: the run's folder.
        split: of the task; None is the default one.
        members: ``all``, ``latest``, or the first k.
        tolerance: on probabilities, of adaptive prediction (`Ensemble.predict`); None is off.
        data_dir, device: in place of the run's own.
        setup: of the run that has just been made, to spare loading it again.

    Returns:
        The contents of `metrics.json`. Predictions and metrics are stored for all members on all
        inputs only, so that a partial look never replaces the run's figures.

    Raises:
        InputError: no run there, unknown split, k or tolerance out of range, damaged members or
            data.
    """
    began = time.monotonic()
    progress = progress or Progress()
    config = setup.config if setup else load_own_config(root)
    config.data.dir = data_dir or config.data.dir
    config.device = device or config.device
    full = Ensemble.load(root)
    chosen = _choose(full, members)
    chosen.check_tolerance(tolerance)
    task = task_of(config)
    split = split or task.default_split
    progress.say(f"\nFound {len(full)} {_kind(full)} in {root}")
    inputs = _inputs(config, full, split, setup, progress)
    progress.say(f"Evaluating ensemble of {len(chosen)} {_kind(full)} on {split}...")
    given = predicted(root, task, chosen, inputs, tolerance, progress)
    predictions = given.members.on
    figures = {
        "task": task.name,
        "split": split,
        "n": len(predictions),
        **figures_of(given),
        **evaluation.against_truth(predictions),
        "diagnostics": _diagnostics(root, full),
        "parameters": evaluation.parameter_statistics(chain_norm(chosen.state()).numpy()),
        "cost": _cost(root, time.monotonic() - began),
        "own_metrics": list(task.metrics),
        "sample_range": _sample_range(full, chosen),
        **_adaptive(tolerance, predictions),
        **_stated(full.provenance.sampler),
    }
    if len(chosen) == len(full) and tolerance is None:
        store = partial(store_figures, root, split, task.default_split, predictions, figures)
        store_alone(root, store, progress) if setup is None else store()
    for line in _lines(figures, full):
        progress.say(line)
    return figures


def _choose(full: Ensemble, members: Members) -> Ensemble:
    if members == "all":
        return full
    if members == "latest":
        return full.latest()
    if members > len(full):
        raise InputError(
            f"--k {members}: the run has {len(full)} samples; choose --k 1 to {len(full)}"
        )
    return full.subset(members)


def _inputs(
    config: Config, full: Ensemble, split: str, setup: Setup | None, progress: Progress
) -> Inputs:
    """The split and the held-out share as tokens, and the model."""
    task = task_of(config)
    folder, length = data_folder(config), config.data.max_length
    if setup is not None:
        data = setup.evaluation
        if split != task.default_split:
            examples = load_split(task, split, data_dir=folder, notify=progress.say)
            data = TokenisedSet(examples, setup.tokenizer, length, default_folder())
        held = held_out_set(config, setup.raw.validation, setup.tokenizer)
        return data, held, setup.model
    ask_hub_once(task, resolve_model(config.model.name), folder)
    from transformers import AutoTokenizer

    examples = load_split(task, split, data_dir=folder, notify=progress.say)
    held_out = load_training_data(config, task, folder)[1]
    model = load_model(full.provenance, resolve_device(config.device))
    tokenizer = load_pretrained(AutoTokenizer, model.info.source)
    held = held_out_set(config, held_out, tokenizer)
    return TokenisedSet(examples, tokenizer, length, default_folder()), held, model


def held_out_set(config: Config, held_out: Examples | None, tokenizer: Any) -> TokenisedSet | None:
    """What temperatures are fitted on: at most `MOST_HELD_OUT` of the held-out examples."""
    if held_out is None:
        return None
    part = fixed_part(held_out, MOST_HELD_OUT, config.seed)
    return TokenisedSet(part, tokenizer, config.data.max_length, default_folder())


def predicted(
    root: Path,
    task: TaskSpec,
    chosen: Ensemble,
    inputs: Inputs,
    tolerance: float | None,
    progress: Progress,
) -> Given:
    """Predictions of the members and of all the fits that the run keeps."""
    data, held_out, model = inputs
    regression = task.likelihood == "gaussian"
    if regression:
        held_out = None  # no temperature is fitted
    starts, kinds = map_ensemble(root), other_starts(root)
    nothing_sampled = starts.records == chosen.records and tolerance is None

    def shown(
        name: str, of: Ensemble, on: TokenisedSet, settled: float | None = None
    ) -> Predictions:
        progress.start(name, len(of) * len(on))
        return of.predict_set(model, on, settled, progress.more)

    def both(name: str, of: Ensemble, settled: float | None = None) -> Predicted:
        held = None if held_out is None else shown(f"{name}, held out", of, held_out, settled)
        return Predicted(shown(name, of, data, settled), held)

    try:
        members = both("Members", chosen, tolerance)
        own = members if nothing_sampled else both("Warm starts", starts)
        others = {
            kind: own if other.records == starts.records else both("Warm starts", other)
            for kind, other in kinds.items()
        }
    finally:
        progress.end()  # else an interrupted bar keeps the terminal
    return Given(
        task.metrics, regression, members, chosen.chains, own, others, why_no_other_starts(root)
    )


def figures_of(given: Given) -> Figures:
    """The rows, and what is said of the ensemble beside its starts."""
    regression, starts, p = given.regression, given.starts.on, given.members.on
    curve: Figures = {"cumulative": None, "cumulative_reason": evaluation.LEFT_OUT}
    if not evaluation.left_out(p):
        curve = {"cumulative": cumulative(regression, p, len(np.unique(given.chains)))}
    return {
        **rows(given),
        "uncertainty": evaluation.uncertainty(regression, p),
        "calibration": diagrams.calibration_figures(regression, starts, p),
        "selective": diagrams.selective_figures(regression, starts, p),
        **curve,
    }


def _adaptive(tolerance: float | None, p: Predictions) -> Figures:
    """What adaptive prediction was asked for, and the members an input was given on average."""
    if p.members_used is None:
        return {}
    return {"adaptive": {"tolerance": tolerance, "members_used": float(p.members_used.mean())}}


def _kind(full: Ensemble) -> str:
    return "MAP fits" if full.provenance.sampler["name"] == MAP else "LoRA samples"


def _diagnostics(root: Path, full: Ensemble) -> Figures:
    sampler = full.provenance.sampler
    dropped = sampler.get("dropped_chains") or []
    if sampler["name"] != MAP:
        return run_diagnostics(root, dropped)
    from bayesian_lora import diagnostics  # with SciPy's statistics, which are felt

    figures = diagnostics.summarise({}) | {"dropped_chains": dropped, "departures": None}
    figures |= {"t_eff": None, "t_eff_reason": "", "departures_reason": ""}
    return figures | {name: NO_SAMPLING for name in figures if name.endswith("reason")}


def run_diagnostics(root: Path, dropped: list[Figures]) -> Figures:
    """R-hat, ESS and the verdict from the traces of the chains not dropped; T_eff of `run.json`."""
    from bayesian_lora import diagnostics  # with SciPy's statistics, which are felt

    run = read_json(root / "run.json", "run")
    lost = [drop["chain"] for drop in dropped]
    traces, starts = (
        None if given is None else {name: np.delete(x, lost, axis=0) for name, x in given.items()}
        for given in (read_traces(root), read_starts(root))
    )
    judged = diagnostics.summarise(
        traces or {}, starts, verdict_on=lambda name: not name.startswith(RAW)
    )
    figures = judged | {"dropped_chains": dropped, "departures": run.get("departures")}
    if figures["departures"] is None:
        figures["departures_reason"] = f"burn-in has fewer than {2 * LEAST} steps"
    figures["t_eff"] = run.get("t_eff")
    if figures["t_eff"] is None:
        figures["t_eff_reason"] = "fewer than two sampling steps were made, or it overflowed"
    return figures


def _stated(sampler: dict[str, Any]) -> Figures:
    tempered = {name: sampler[name] for name in ("temperature", "tempering")}
    return {**tempered, "sampler": {name: sampler.get(name) for name in STATED}}


def _cost(root: Path, eval_s: float) -> Figures:
    run = read_json(root / "run.json", "run")
    names = ("train_s", "sample_s", "gradient_evaluations", "sampling_gradient_evaluations")
    return {**{name: run.get(name) for name in names}, "eval_s": round(eval_s, 2)}


def _sample_range(full: Ensemble, chosen: Ensemble) -> list[int]:
    """First and last position of the chosen members among all."""
    first = full.records.index(chosen.records[0])
    return [first, first + len(chosen) - 1]


def _lines(figures: Figures, full: Ensemble) -> list[str]:
    sampler = full.provenance.sampler
    notes = [f"Sampler: {sampler['name']} ({sampler['exactness']}), starts: {sampler['starts']}"]
    if sampler.get("law"):
        notes.append(f"Law on a quadratic: {sampler['law']}")
    if sampler["tempering"] not in ("posterior", "none"):
        notes.append(f"Temperature {sampler['temperature']:g}: a {sampler['tempering']} posterior")
    lines = summary.evaluation_lines(figures)
    return [*lines, "", *summary.table_lines(figures), "", *notes, *summary.closing_lines(figures)]
