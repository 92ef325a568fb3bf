"""Sections of a run's report: what was sampled, by what, and what it cost."""

from collections.abc import Mapping
from typing import Any

from bayesian_lora.report.page import Block, Cell, Code, Missing, Section, Table, Text, cell
from bayesian_lora.report.run_files import RunFiles

Figures = Mapping[str, Any]

SAMPLER = {
    "name": "Sampler",
    "exactness": "What it targets",
    "law": "Law on a quadratic",
    "temperature": "Temperature",
    "tempering": "Posterior",
    "t_eff": "Effective temperature",
    "step_size": "Step size",
    "variance_reduction": "Control variates",
    "chains": "Chains",
    "starts": "Warm starts",
    "num_examples": "Training examples N",
}
ACCOUNT = {
    "step_size": "Step size h",
    "auto": "Chosen by the run itself",
    "k_max": "Largest curvature of U/N",
    "k_prior": "Least curvature, the prior's",
    "variance": "Variance of a batch gradient along the stiffest direction",
    "grows": "It is that one posterior width away, and grows with the distance",
    "variance_end": "That variance by the run's end",
    "discretisation": "Bias of the variance by the finite step",
    "heat": "Bias of the variance by minibatch noise",
    "t_eff": "Effective temperature to expect by the run's end",
    "largest_stable": "Largest stable step size",
    "relaxation": "Steps to forget, stiffest direction",
    "relaxation_prior": "Steps to forget, where only the prior holds",
    "steps": "Steps planned, a chain",
}
COST = {
    "train_s": "Warm start, seconds",
    "sample_s": "Burn-in and sampling, seconds",
    "eval_s": "Evaluation, seconds",
    "gradient_evaluations": "Gradient evaluations, all",
    "sampling_gradient_evaluations": "Gradient evaluations of the sampling phase",
}


def sampler(files: RunFiles) -> Section:
    """What the sampler says of itself, and the model it moved."""
    own, m = files.manifest.get("sampler") or {}, files.metrics
    stated = {**(m.get("sampler") or {}), **own}
    rows = [
        [cell(title), _given(stated, n)]
        for n, title in SAMPLER.items()
        if stated.get(n) is not None
    ]
    prior = stated.get("prior") or {}
    rows += [[cell(f"Prior {n.replace('_', ' ')}"), _given(prior, n)] for n in prior]
    blocks: list[Block] = [Table("Sampler", ["What", "Value"], rows)]
    blocks.append(_account(files.run.get("account")))
    lora, model = files.manifest.get("lora") or {}, files.manifest.get("model") or {}
    given = {**model, **{f"LoRA {n.replace('_', ' ')}": v for n, v in lora.items() if n != "base"}}
    rows = [[cell(n.replace("_", " ")), _given(given, n)] for n in given]
    return Section(
        "Sampler and model", "sampler", [*blocks, Table("Model", ["What", "Value"], rows)]
    )


def _account(account: Any) -> Block:
    if not isinstance(account, Mapping):
        return Missing("Account of the step size", "the run recorded none")
    rows = [[cell(title), _given(account, n)] for n, title in ACCOUNT.items() if n in account]
    return Table("Account of the step size, taken before sampling", ["What", "Value"], rows)


def made(files: RunFiles) -> Section:
    """Provenance and cost."""
    run, cost = files.run, files.metrics.get("cost") or {}
    commit = run.get("git_commit") or "not in a git working tree"
    said = (
        f"Status {run.get('status', 'unknown')}; begun {run.get('started', 'at an unknown time')}, "
        f"ended {run.get('ended', 'at an unknown time')}; seed {run.get('seed')}; device "
        f"{run.get('device')}; git commit {commit}."
    )
    data = run.get("data") or {}
    sets = [
        [cell(name), cell((data.get("sizes") or {}).get(name)), cell(print_)]
        for name, print_ in (data.get("fingerprint") or {}).items()
    ]
    blocks: list[Block] = [Text(said)]
    rows = [[cell(title), cell(cost[n], 2)] for n, title in COST.items() if cost.get(n) is not None]
    if rows:
        blocks.append(Table("Cost", ["What", "Value"], rows))
    if sets:
        blocks.append(Table("Data", ["Part", "Examples", "sha256"], sets))
    versions = [[cell(name), cell(str(x))] for name, x in (run.get("versions") or {}).items()]
    if versions:
        blocks.append(Table("Versions", ["Package", "Version"], versions))
    config = files.root / "config.yaml"
    if config.is_file():
        blocks.append(Code(config.read_text(encoding="utf-8", errors="replace"), "config.yaml"))
    return Section("How it was made", "made", blocks)


def _given(figures: Figures, name: str) -> Cell:
    """Values of all kinds in one column: as words."""
    value = figures.get(name)
    if value is None:
        reason = str(figures.get(f"{name}_reason") or f"{name}: none was given")
        return cell(None, reason=reason)
    if isinstance(value, list | tuple):
        return cell(", ".join(map(str, value)) or "none")
    shown = f"{value:.6g}" if isinstance(value, float) else cell(value).text
    return Cell(shown, number=False)
