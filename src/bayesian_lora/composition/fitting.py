"""One weight for each adapter of a stack, fitted on a few labelled examples.

ΔW = Σ_i w_i ΔW_i is linear in w, and w_i multiplies the columns of B that are part i's. With G the
gradient of the loss by B, ∂L/∂w_i = Σ_layers ⟨G_i, B_i⟩/w_i on those columns: exact, by one
backward pass for all weights (LoraHub, Huang et al. 2023, searches the same weights without
gradients).

Shapes: K members, P parts, R rank, T tasks, N examples, C classes, b examples of a pass.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_model import build_stack_model, stack_state
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.errors import InputError
from bayesian_lora.models.task_heads import TaskModel
from bayesian_lora.progress import Progress

GRADIENT_SHARE = 4
"""A pass that keeps its activations for the gradient takes this part of a plain pass's tokens."""


@dataclass(frozen=True)
class FittedWeights:
    """What `fit_weights` found.

    weights, start (P,), in the order of the stack's parts; nll_before, nll_after: {task: mean NLL
    of the members' mixture, nats} on the examples of the fit, so in-sample; examples: {task: N};
    evaluations: of loss and gradient on all examples; converged: as SciPy says.
    """

    weights: np.ndarray
    start: np.ndarray
    nll_before: Mapping[str, float]
    nll_after: Mapping[str, float]
    examples: Mapping[str, int]
    prior_std: float
    evaluations: int
    converged: bool

    @property
    def loss_before(self) -> float:
        """Mean over the tasks at the start."""
        return float(np.mean(list(self.nll_before.values())))

    @property
    def loss_after(self) -> float:
        """Mean over the tasks at the weights found."""
        return float(np.mean(list(self.nll_after.values())))

    def facts(self) -> dict[str, Any]:
        """For `stack.json`: everything, as JSON has it (an infinite prior_std is null)."""
        return {
            **dataclasses.asdict(self),
            "weights": self.weights.tolist(),
            "start": self.start.tolist(),
            "prior_std": self.prior_std if math.isfinite(self.prior_std) else None,
        }


def fit_weights(
    stack: Stack,
    sets: Mapping[str, TokenisedSet],
    *,
    start: Sequence[float] | None = None,
    prior_std: float = 1.0,
    max_steps: int = 50,
    model: TaskModel | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> FittedWeights:
    """The weights w (P,) that minimise, by L-BFGS from `start`,

        mean over tasks of NLL_t(w)  +  Σ_i (w_i − start_i)²/(2 σ² N),

    NLL_t being the mean over task t's examples of −log Σ_k ω_k p_k(y | x; w), with ω the members'
    weights, and N all examples: the weights' posterior mode under N(start_i, σ²), where the tasks
    have equally many examples. A few examples that are all classified rightly would otherwise send
    weights to infinity. The loss is not convex: this is the minimum next to `start`.

    Args:
        stack: one weight vector serves all its K members.
        sets: a few labelled examples of one or more of the stack's tasks.
        start: (P,) where the search begins and what the ridge pulls towards; the stack's own.
        prior_std: σ, in units of a weight; infinity is no ridge.
        max_steps: of L-BFGS.
        model: `build_stack_model(stack)`, to spare building it; it holds the stack again after.

    Raises:
        InputError: no sets, a task the stack does not carry or a regression, columns that belong
            to no part (compressed or merged), a part of weight 0, or a start, prior_std or
            max_steps out of range.
    """
    from scipy.optimize import minimize

    begin = _checked_start(stack, start)
    _check_sets(stack, sets)
    _check_numbers(prior_std, max_steps)
    model = model or build_stack_model(stack, device=device)
    loss = WeightLoss(stack, sets, model)
    precision = 1 / (prior_std**2 * sum(len(data) for data in sets.values()))
    progress = progress or Progress(quiet=True)

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        nll, gradient = loss(weights)
        pull = weights - begin
        progress.update(min(loss.evaluations, max_steps), lambda: f"NLL {nll.mean():.4f}")
        return float(nll.mean() + precision * pull @ pull / 2), gradient + precision * pull

    progress.start("Fitting weights", max_steps)
    try:
        before, _ = loss(begin)
        # Single precision leaves noise of about 1e-7 in the loss, which no step can better.
        exact = next(iter(model.chain_parameters().values())).dtype == torch.float64
        options = {"maxiter": max_steps, "ftol": 1e-12 if exact else 1e-7, "gtol": 1e-6}
        found = minimize(objective, begin, jac=True, method="L-BFGS-B", options=options)
        after, _ = loss(found.x)
    finally:
        model.load_chains(stack_state(stack))
        progress.end()
    return FittedWeights(
        weights=found.x,
        start=begin,
        nll_before=dict(zip(sets, before.tolist(), strict=True)),
        nll_after=dict(zip(sets, after.tolist(), strict=True)),
        examples={task: len(data) for task, data in sets.items()},
        prior_std=prior_std,
        evaluations=loss.evaluations,
        converged=bool(found.success),
    )


def reweighted(
    stack: Stack, weights: Sequence[float] | np.ndarray, facts: Mapping[str, Any] | None = None
) -> Stack:
    """The stack at other weights (P,), one for each part: its columns of B scaled to them.

    Args:
        facts: how the weights came about, such as `FittedWeights.facts()`, for `stack.json`.

    Raises:
        InputError: weights that do not match in number or are not finite, columns that belong to
            no part, or a part of weight 0 now.
    """
    own, new = _own_weights(stack), np.asarray(weights, dtype=np.float64)
    if new.shape != own.shape or not np.isfinite(new).all():
        raise InputError(
            f"weights {new.tolist()}: the stack's {len(own)} parts "
            f"({', '.join(part.name for part in stack.parts)}) need one finite number each"
        )
    scale = column_scale(stack, new)
    factors = {
        name: (tensor * scale).to(tensor.dtype) if name.endswith(".lora_B") else tensor
        for name, tensor in stack.factors.items()
    }
    parts = tuple(
        dataclasses.replace(part, weight=w)
        for part, w in zip(stack.parts, new.tolist(), strict=True)
    )
    made = {"kind": "fitted", "weights": new.tolist(), **(facts or {}), "of": dict(stack.facts)}
    return stack.changed(parts=parts, factors=factors, facts=made)


def column_scale(stack: Stack, weights: np.ndarray) -> Tensor:
    """(R,) float64: what B's columns are multiplied by to bring their parts to these weights."""
    scale = torch.ones(stack.spec.rank, dtype=torch.float64)
    for part, weight in zip(stack.parts, weights.tolist(), strict=True):
        scale[slice(*part.columns)] = weight / part.weight
    return scale


class WeightLoss:
    """w (P,) → the tasks' mean NLLs (T,), in nats, and the gradient (P,) of their mean.

    Args:
        stack: made the model's B what they are.
        sets: of the stack's tasks.
        model: made for the stack; its chains become the stack's members, its B change in place.
    """

    def __init__(self, stack: Stack, sets: Mapping[str, TokenisedSet], model: TaskModel) -> None:
        self.stack, self.sets, self.model = stack, sets, model
        model.load_chains(stack_state(stack))
        names = [name for name in stack.factors if name.endswith(".lora_B")]
        own = model.chain_parameters()
        self._parameters = [own[name] for name in names]
        self._originals = [stack.factors[name].to(own[name]) for name in names]
        weights = torch.from_numpy(np.asarray(stack.weights, dtype=np.float64))
        self._log_weights = weights.log().to(model.device)
        self.evaluations = 0

    def __call__(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = column_scale(self.stack, weights)
        for parameter, original in zip(self._parameters, self._originals, strict=True):
            parameter.data = original * scale.to(original)
        columns = torch.zeros_like(scale)
        nll = []
        for task, data in self.sets.items():
            total = 0.0
            for rows in data.by_length(self._budget):
                part = self._nll(task, data, rows) / len(data)
                total += float(part.detach())
                columns += self._by_column(part)
            nll.append(total)
        self.evaluations += 1
        sums = [float(columns[slice(*part.columns)].sum()) for part in self.stack.parts]
        per_weight = np.array(sums) / _own_weights(self.stack)
        return np.array(nll), per_weight / len(self.sets)

    @property
    def _budget(self) -> int:
        """Padded tokens of each member in a pass."""
        return max(1, self.model.tokens_per_pass // (GRADIENT_SHARE * len(self.stack)))

    def _nll(self, task: str, data: TokenisedSet, rows: np.ndarray) -> Tensor:
        """Summed −log Σ_k ω_k p_k(y | x) of rows (b,)."""
        batch = data.batch(rows, self.model.device)
        logits = self.model(**batch.inputs)[..., self.model.slices[task]].double()
        right = batch.labels.expand(len(logits), -1)[..., None]
        each = logits.log_softmax(-1).gather(-1, right)[..., 0]  # (K, b)
        return -(each + self._log_weights[:, None]).logsumexp(0).sum()

    def _by_column(self, loss: Tensor) -> Tensor:
        """Σ over layers, members and outputs of G ∘ B at weight w_i⁰, by column (R,)."""
        gradients = torch.autograd.grad(loss, self._parameters)
        terms = [
            (g.double() * original).sum((0, 1))
            for g, original in zip(gradients, self._originals, strict=True)
        ]
        return torch.stack(terms).sum(0).cpu()


def _own_weights(stack: Stack) -> np.ndarray:
    """(P,) as the stack has them; every part must have columns and a weight to be scaled from."""
    for part in stack.parts:
        if part.columns[0] == part.columns[1]:
            raise InputError(
                f"part {part.name!r} has no columns of its own (the stack is compressed or "
                "merged); weight the adapters before that"
            )
        if part.weight == 0:
            raise InputError(
                f"part {part.name!r} has weight 0, from which no other can be reached; stack it "
                "with another weight first"
            )
    return np.array([part.weight for part in stack.parts])


def _check_numbers(prior_std: float, max_steps: int) -> None:
    if not prior_std > 0 or max_steps < 1:
        raise InputError(
            f"prior_std={prior_std:g}, max_steps={max_steps}: must be above 0 and at least 1"
        )


def _checked_start(stack: Stack, start: Sequence[float] | None) -> np.ndarray:
    """(P,): the stack's own weights where none are given."""
    own = _own_weights(stack)
    begin = own if start is None else np.array(start, dtype=np.float64)
    if begin.shape != own.shape or not np.isfinite(begin).all():
        raise InputError(f"start {begin.tolist()}: the {len(own)} parts need one number each")
    return begin


def _check_sets(stack: Stack, sets: Mapping[str, TokenisedSet]) -> None:
    known = ", ".join(stack.tasks)
    if not sets:
        raise InputError(f"no examples to fit weights on; give some of {known}")
    for task in sets:
        if task not in stack.tasks:
            raise InputError(f"task {task!r} is none of the stack's: choose of {known}")
        if stack.tasks[task].likelihood != "categorical":
            raise InputError(
                f"task {task!r} is a regression, whose noise a stack does not know; fit the "
                "weights on classifications"
            )
