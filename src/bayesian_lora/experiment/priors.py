"""The prior of a run: its lines for a person, and `prior.std: auto`.

Shapes: K candidates.
"""

from collections.abc import Callable
from typing import Any

import torch

from bayesian_lora.config import MAP
from bayesian_lora.config_schema import TrainConfig
from bayesian_lora.data.batching import BatchOrder
from bayesian_lora.experiment.building import build_model, start_at_mean
from bayesian_lora.experiment.setup import Setup
from bayesian_lora.objective import Objective, prior_groups
from bayesian_lora.posterior import delta_w_prior_std
from bayesian_lora.utils.rng import chain_generators
from bayesian_lora.warm_start import StepReport, WarmStart

STRONG_PRIOR = 0.05


def search_prior(setup: Setup, on_step: Callable[[StepReport], None]) -> dict[str, Any]:
    """The candidate standard deviation whose fit has the lowest held-out NLL.

    All candidates are fitted at once, one in each chain, from the same start, with the same
    batches and dropout, each at its own best epoch; only the prior differs. A criterion of the
    fit, not of the posterior: it says how much the factors may grow, not how wide the posterior
    is. Cost: one warm start of K chains.

    Returns:
        ``std``, ``candidates`` and ``validation_nll`` (K,).
    """
    config = setup.config
    assert setup.validation is not None, "the config asks for held-out data"
    candidates = sorted(config.prior.candidates)
    chains = [0] * len(candidates)
    model = build_model(
        config, setup.model.info.source, setup.task.num_labels, setup.model.device, chains=1
    )
    if setup.regression:
        start_at_mean(model, float(setup.raw.train.labels.mean()))
    first = model.chain_parameters()
    model.load_chains({n: p.detach().expand(len(chains), *p.shape[1:]) for n, p in first.items()})
    objective = Objective(model, setup.train, setup.task.likelihood, config.train.micro_batch)
    order = chain_generators(config.seed, chains, "prior order")
    dropout = chain_generators(config.seed, chains, "prior dropout", model.device)
    stds = torch.tensor(candidates, device=model.device)
    warm = WarmStart(
        objective,
        prior_groups(model, stds, config.prior.head_std),
        BatchOrder(len(setup.train), config.data.batch_size, order),
        epochs=max(1, config.train.epochs),
        **schedule_of(config.train),
        validation=setup.validation,
        early_stopping=True,
        dropout=dropout,
    )
    warm.run(on_step, lambda _: None)
    setup.objective.evaluations += objective.evaluations
    losses = warm.best_loss.tolist()
    best = min(range(len(candidates)), key=losses.__getitem__)
    return {"std": candidates[best], "candidates": candidates, "validation_nll": losses}


def schedule_of(train: TrainConfig) -> dict[str, Any]:
    """A fit's learning rates, as `WarmStart` takes them."""
    names = ("lr", "warmup_share", "schedule", "plateau_factor", "plateau_patience")
    return {name: getattr(train, name) for name in names}


def search_lines(found: dict[str, Any]) -> list[str]:
    """The search's table, and a word where the best candidate is the first or last."""
    pairs = zip(found["candidates"], found["validation_nll"], strict=True)
    lines = ["Prior search: held-out NLL of the fit for each standard deviation"]
    lines += [
        f"  {std:<8g} {loss:.4f}{'  <- chosen' if std == found['std'] else ''}"
        for std, loss in pairs
    ]
    ends = (found["candidates"][0], found["candidates"][-1])
    if found["std"] in ends and len(found["candidates"]) > 1:
        lines.append("  The best is at the end of prior.candidates: consider going further.")
    return lines


def prior_lines(setup: Setup) -> list[str]:
    """What the prior says of ΔW, with a warning where it outweighs the likelihood."""
    prior, info = setup.prior, setup.model.info
    spread = delta_w_prior_std(info.spec.rank, info.spec.scaling, prior.std, prior.std)
    same = prior.head_std == prior.std
    where = "every parameter" if same else f"the factors, N(0, {prior.head_std:g}²) on the head"
    line = f"Prior: N(0, {prior.std:g}²) on {where}; an entry of ΔW has prior sd {spread:.4g}"
    return [line, *_prior_warning(prior.std, len(setup.train)), *_slow_warning(setup)]


def _slow_warning(setup: Setup) -> list[str]:
    """A word before the fit where the prior alone needs more steps than the run has, Nσ²/h.

    Known beforehand for a fixed step size of a rule without preconditioner; the account after the
    fit says the rest.
    """
    s, n = setup.config.sampler, len(setup.train)
    planned = s.burn_in + s.thin * (s.num_samples // s.chains)
    if s.step_size == "auto" or s.name in {MAP, "psgld", "sghmc", "sgnht"}:
        return []
    needed = n * setup.prior.std**2 / s.step_size
    if needed <= planned:
        return []
    return [
        f"Warning: where only the prior holds, a chain forgets in Nσ²/h = {needed:.3g} steps and "
        f"will make {planned}: expect 'not mixed'"
    ]


def _prior_warning(std: float, num_examples: int) -> list[str]:
    """A word where the prior's curvature 1/(Nσ²) is large beside that of the mean loss.

    L2 on both factors pulls ΔW to exactly 0 once it outweighs the likelihood; seen at .09 (N =
    1,080, σ = .1), not at .014 and below.
    """
    curvature = 1.0 / (num_examples * std**2)
    if curvature < STRONG_PRIOR:
        return []
    return [
        f"Warning: this prior acts as an L2 penalty of {curvature:.2g} on the mean loss "
        f"(1/(Nσ²), N = {num_examples}) and may hold the adapters at 0: raise prior.std"
    ]
