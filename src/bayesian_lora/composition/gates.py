"""Gates over a stack's adapters, trained on a mixture of its tasks.

Training minimises −log p(task, y | x) on batches with an equal share of every task: its task is
part of a text's label, and no part of its input. A load-balance term −c·Σ_i log w̄_i, w̄ the mean
weights of a batch (which is then one pass, with its memory), keeps experts from falling idle (as
MoLE's, Wu et al. 2024); held-out losses, which decide on the epoch that is kept, are without it.

Afterwards SGLD (Welling & Teh 2011) may sample the gate's parameters, experts fixed: N counts the
training examples of all tasks, drawn uniformly, the prior is N(0, σ²). Each member's gate is then
one draw, after `posterior_steps` steps from the fit. Their spread is too narrow along directions
that the data leave free, which so few steps hardly move, and too wide by T_eff along stiff ones,
which minibatch noise heats; the report has the stiffest one's. One member is one draw, of which no
uncertainty comes.

Shapes: K members, M = K chains, E experts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.account import measure
from bayesian_lora.composition.experts import alike, experts_of
from bayesian_lora.composition.fit import ChainPlan, Recipe, fit
from bayesian_lora.composition.gated_model import LEAST, GatedModel, gated_model
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_model import updated
from bayesian_lora.composition.stack_objective import StackObjective
from bayesian_lora.composition.task_data import TaskData
from bayesian_lora.data.batching import Batch, BatchOrder
from bayesian_lora.data.joined import JoinedSet
from bayesian_lora.errors import InputError
from bayesian_lora.models.mixing import GateKind
from bayesian_lora.models.sources import ModelSource
from bayesian_lora.progress import Progress
from bayesian_lora.samplers.failures import Diverged
from bayesian_lora.samplers.sgld import SGLD
from bayesian_lora.utils.rng import chain_generators


@dataclass(frozen=True)
class GateOptions:
    """What a gate is and how it is trained.

    kind: see `models.mixing`; temperature: τ > 0; top_k: experts that act, None for all; balance:
    c ≥ 0 of the load-balance term; frozen: whether adapters and heads stay as they are;
    posterior_steps: of SGLD after the fit, 0 for none, with steps of size `step_size`.
    """

    kind: GateKind = "sequence"
    temperature: float = 1.0
    top_k: int | None = None
    balance: float = 0.0
    frozen: bool = True
    posterior_steps: int = 0
    step_size: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in (kinds := get_args(GateKind)):
            raise InputError(f"kind={self.kind!r}: choose one of {', '.join(kinds)}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InputError(f"top_k={self.top_k}: a number of experts, at least 1; None for all")
        for name in ("temperature", "step_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}: must be a positive number")
        if not 0 <= self.balance < math.inf:
            raise InputError(f"balance={self.balance}: must be 0 (off) or a positive number")
        if type(self.posterior_steps) is not int or self.posterior_steps < 0:
            raise InputError(f"posterior_steps={self.posterior_steps}: 0 (none) or more")
        if self.kind == "arrow" and (self.balance or self.posterior_steps or not self.frozen):
            raise InputError(
                "kind='arrow' has no parameters and follows the adapters as they are: leave out "
                "balance, posterior_steps and unfrozen, or choose another kind"
            )


@dataclass(frozen=True)
class Gated:
    """A stack with its gate: state ``gate.…`` (K, …); report: how it was trained, JSON-able."""

    stack: Stack
    options: GateOptions
    state: Mapping[str, Tensor]
    report: dict[str, Any] = field(default_factory=dict)

    def model(
        self, *, device: torch.device | str = "cpu", source: ModelSource | None = None
    ) -> GatedModel:
        """The model to predict with: logits log p(task, y | x).

        Raises:
            InputError: as `gated_model`.
        """
        options = self.options
        return gated_model(
            self.stack,
            options.kind,
            temperature=options.temperature,
            top_k=options.top_k,
            state=self.state,
            device=device,
            source=source,
        )


class GateObjective(StackObjective):
    """−log p(task, y | x), and −c·Σ_i log w̄_i; see the module. `balance` is c."""

    joint = True
    balance = 0.0

    def _pass_size(self, rows: np.ndarray) -> int | None:
        # The term is of the whole batch's mean weights: passes are cut by length, and the mean of
        # each would depend on where they are cut. It costs the memory of the whole batch.
        return None if self.balance else super()._pass_size(rows)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        nll = super().losses(outputs, batch)
        assert isinstance(self.model, GatedModel)
        weights = self.model.take_weights()
        if not self.balance:
            return nll
        return nll + self.balance * load_imbalance(weights)[:, None].to(nll)


def load_imbalance(weights: Tensor) -> Tensor:
    """−Σ_i log w̄_i (M,) of weights (M, B, E), w̄ their means over B; least, E·log E, if equal."""
    return -weights.mean(1).clamp_min(LEAST).log().sum(-1)


def train_gate(
    stack: Stack,
    data: Mapping[str, TaskData],
    options: GateOptions,
    recipe: Recipe,
    *,
    seed: int,
    progress: Progress,
    device: torch.device | str = "cpu",
    source: ModelSource | None = None,
) -> Gated:
    """A gate for every member of a stack, from (`seed`, member); `arrow` is made, not trained.

    Args:
        data: of every task of the stack.
        source: of the base model, in the place of what the stack names.

    Raises:
        InputError: a task without data, a fit or sampling that diverges, or as `gated_model`.
    """
    experts_of(stack, options.top_k)
    if missing := [task for task in stack.tasks if task not in data]:
        raise InputError(f"task {missing[0]!r}: a gate is trained on all its tasks; give its data")
    plain = Gated(stack, options, {})
    report: dict[str, Any] = {"kind": options.kind, "members": len(stack), "trained": False}
    if same := alike(stack):
        report["same_data"] = same
        progress.say(
            f"Tasks {' and '.join(same[0])} are of one data set: no text tells them apart, so the "
            "gate can only guess between them; gate a stack of one of them alone"
        )
    if options.kind == "arrow":
        return dataclasses.replace(plain, report=report)
    model = gated_model(
        stack,
        options.kind,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=seed,
        device=device,
        source=source,
    )
    report |= _fit(model, data, options, recipe, seed, progress)
    if options.posterior_steps:
        try:
            report["posterior"] = _sample(model, data, options, recipe, seed, progress)
        except Diverged as error:
            h = options.step_size
            raise InputError(
                f"step_size={h:g}: {error}; lower its step size, such as to {h / 4:g}"
            ) from error
    found = {n: p.detach().to("cpu", copy=True) for n, p in model.chain_parameters().items()}
    whole = stack
    if not options.frozen:
        how = {"with": "gate", "seed": seed, "recipe": dataclasses.asdict(recipe)}
        facts = {**stack.facts, "retrained": how}
        whole = updated(stack, found, weights=stack.weights, facts=facts)
    state = {name: tensor for name, tensor in found.items() if is_gate(name)}
    return Gated(whole, options, state, report)


def is_gate(name: str) -> bool:
    """Whether a parameter is the gate's."""
    return name.startswith("gate.")


def _fit(
    model: GatedModel,
    data: Mapping[str, TaskData],
    options: GateOptions,
    recipe: Recipe,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    class Balanced(GateObjective):
        balance = options.balance

    moves: Callable[[str], bool] = is_gate if options.frozen else lambda _: True
    plan = ChainPlan(tuple(model.slices), mixing="sum")
    plans = [plan] * model.num_chains
    with only(model, moves):
        report = fit(
            model,
            data,
            plans,
            recipe,
            seed=seed,
            progress=progress,
            objective=Balanced,
            trainable=moves,
        )
    return {"trained": True, **dataclasses.asdict(report)}


@contextmanager
def only(model: GatedModel, moves: Callable[[str], bool]) -> Iterator[None]:
    """Gradients for these parameters alone: those of frozen experts would be made for nothing."""
    others = [p for name, p in model.chain_parameters().items() if not moves(name)]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _sample(
    model: GatedModel,
    data: Mapping[str, TaskData],
    options: GateOptions,
    recipe: Recipe,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """SGLD on the gate's parameters, in place; what was done."""
    train = JoinedSet({task: data[task].train for task in model.slices}, model.slices)
    chains = range(model.num_chains)
    plans = [ChainPlan(tuple(model.slices))] * model.num_chains
    objective = GateObjective(model, train, plans)
    order = BatchOrder(len(train), recipe.batch_size, chain_generators(seed, chains, "gate order"))
    sampler = SGLD(
        [p for name, p in model.chain_parameters().items() if is_gate(name)],
        step_size=options.step_size,
        num_examples=len(train),
        prior_std=recipe.prior_std,
        chain_dim=0,
        generators=chain_generators(seed, chains, "gate noise", model.device),
    )
    with only(model, is_gate):
        _watch(sampler, objective, recipe.batch_size, seed)
        progress.start("Sampling the gate", options.posterior_steps)
        for step in range(1, options.posterior_steps + 1):
            loss = sampler.step(objective.closure(order.iid()))
            mean = float(loss.mean())
            progress.update(step, lambda mean=mean: f"loss {mean:.4f}")
    progress.end()
    t_eff = sampler.t_eff
    exactness = f"{SGLD.exactness}, experts fixed, one draw a member from the fit"
    if model.num_chains == 1:
        exactness += "; a single draw, of which no uncertainty comes"
    return {
        "sampler": "sgld",
        "t_eff": None
        if t_eff is None
        else [t if math.isfinite(t) else None for t in t_eff.tolist()],
        "steps": options.posterior_steps,
        "step_size": options.step_size,
        "prior_std": recipe.prior_std,
        "num_examples": len(train),
        "exactness": exactness,
    }


def _watch(sampler: SGLD, objective: GateObjective, size: int, seed: int) -> None:
    """Have the sampler estimate T_eff along the stiffest direction, by batches of their own."""
    generators = chain_generators(seed, range(sampler.num_chains), "gate probe")
    probe = BatchOrder(len(objective.data), size, generators)
    fixed = objective.closure(probe.iid())
    measured = measure(sampler, lambda: objective.closure(probe.iid()), fixed)
    sampler.watch(measured.direction, measured.curvature)
