"""What all samplers share: units, chains, the prior's drift, noise, statistics, state.

Shapes: M chains, d parameters of one chain. A *flat* tensor is (M, d): all parameters of a chain
in one row, in which every update rule is written.
Units (the mean-loss scale, so that step sizes compare with SGD's):
    U(θ) = N·L(θ) + ‖θ‖²/(2σ²)     energy; the target is exp(−U/T)
    g    = ∇L_B + θ/(Nσ²)          drift, L_B the minibatch mean negative log-likelihood
    s    = √(2hT/N)                noise standard deviation of one step of size h
    k                              curvature of U/N
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.samplers.failures import require_finite
from bayesian_lora.samplers.flat import (
    Scale,
    check_group,
    count_chains,
    keep_rows,
    mean,
    move,
    precise,
    to_device,
)
from bayesian_lora.samplers.heat import along, begin_watch, follow
from bayesian_lora.utils.rng import normal_like, restore_states, save_states

Closure = Callable[[], Tensor]


class Sampler(torch.optim.Optimizer, ABC):
    """Base of the samplers: an optimiser whose step leaves exp(−U/T) (nearly) invariant.

    Args:
        params: parameters or parameter groups; `prior_std` and `temperature` may differ by group.
        step_size: h > 0, kept under the group key ``lr`` so that torch's schedulers work.
        num_examples: N, the training examples whose *mean* loss the closure returns.
        prior_std: σ > 0 of the Gaussian prior; ``math.inf`` for a flat one.
        temperature: T ≥ 0; 1 is the posterior, below it "cold", 0 is gradient descent.
        chain_dim: 0 if parameters carry a leading chain dimension M, None if there is one chain.
        generators: one `torch.Generator` for all, or a list of one per chain; None is torch's
            global one.

    Raises:
        ValueError: an argument outside its range, chains that do not agree in number.
    """

    exactness = "exact as h → 0"
    """What the sampler targets: one of the words of `docs/samplers.md`."""
    law: str = ""
    """Its stationary law on a quadratic of curvature k, full batch: the formula of its bias."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        step_size: float,
        num_examples: int,
        prior_std: float = math.inf,
        temperature: float = 1.0,
        chain_dim: int | None = None,
        generators: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> None:
        if chain_dim not in (None, 0):
            raise ValueError(f"chain_dim={chain_dim}: 0 (leading dimension) or None (one chain)")
        if not num_examples >= 1:  # also NaN
            raise ValueError(f"num_examples={num_examples}: N, the training set's size, is ≥ 1")
        self.num_examples = num_examples
        self.chain_dim = chain_dim
        self.generators = generators
        self.memory: dict[str, Any] = {"step": 0}
        """All that a rule remembers between steps: flat tensors (M, d), values (M,), counters."""
        self.stats: dict[str, Tensor] = {}
        """Of the last step, each (M,): ``drift_norm``, ``noise_norm``, ``step_size``, ``t_eff``
        (NaN until `watch` is called), and a sampler's own."""
        values = {"lr": step_size, "prior_std": prior_std, "temperature": temperature}
        super().__init__(params, values)

    bias_gain = 0.5
    """α: the variance along curvature k is T/(Nk) · 1/(1 − αhk)."""
    heat_gain = 1.0
    """η: variance v of the (whitened) minibatch gradient makes T_eff = T + η N h v/2."""
    planned_heat_gain: float | None = None
    """η for v measured before the rule has adapted, where it differs."""

    @property
    def stability(self) -> float:
        """The rule is stable while h·k is below this."""
        return 1.0 / self.bias_gain

    def variance_factor(self, h: float, k: float) -> float:
        """Derived variance along curvature k, over the target's T/(Nk)."""
        return 1.0 / (1.0 - self.bias_gain * h * k)

    def relaxation_steps(self, h: float, k: float) -> float:
        """Steps in which a deviation along curvature k falls to 1/e."""
        return 1.0 / (h * k)

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """One step of every chain.

        Args:
            closure: zeroes gradients, computes the mean NLL per chain, (M,) or a scalar for one
                chain, calls ``.sum().backward()`` and returns it detached. Called once for each
                gradient the rule needs, always for the same batch.

        Returns:
            The closure's value at the parameters before the step.
        Raises:
            Diverged: a chain's gradient is not finite; no chain has moved.
        """
        loss = self.gradient(closure)
        with torch.no_grad():
            g = self.drift()
            h = self.per_coordinate(lambda group: group["lr"])
            self.stats = {"drift_norm": torch.linalg.vector_norm(g, dim=1)}
            require_finite("the gradient", self.stats["drift_norm"])
            self.stats["step_size"] = torch.full_like(self.stats["drift_norm"], mean(h))
            if (watch := self.memory.get("watch")) is not None:
                watch["moved"] = torch.zeros_like(watch["moved"])
            self.update(g, h)
            self.stats["t_eff"] = self._follow(g, h)
            self.memory["step"] += 1
        return loss

    @abstractmethod
    def update(self, g: Tensor, h: Scale) -> None:
        """The rule: move θ by `shift` and `add_noise`, given the drift g (M, d)."""

    def gradient(self, closure: Closure) -> Tensor:
        """Leave the rule's gradient in ``.grad``; the closure's value at θ."""
        with torch.enable_grad():
            return closure()

    def drift(self, prior: bool = True) -> Tensor:
        """g = ∇L_B + θ/(Nσ²), flat (M, d), of the parameters that have a gradient.

        Args:
            prior: whether θ/(Nσ²) is added.

        Raises:
            ValueError: none has one.
        """
        flat = []
        self._parts: list[tuple[dict[str, Any], int]] = []
        self.present: list[Tensor] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if prior and params and math.isfinite(group["prior_std"]):
                precision = 1.0 / (self.num_examples * group["prior_std"] ** 2)
                pair = [precise(g) for g in grads], [precise(p) for p in params]
                grads = torch._foreach_add(*pair, alpha=precision)  # type: ignore
            flat += [precise(g).reshape(self.num_chains, -1) for g in grads]
            self.present += params
            self._parts.append((group, sum(p.numel() for p in params) // self.num_chains))
        if not flat:
            raise ValueError("no parameter has a gradient: the closure must call .backward()")
        return torch.cat(flat, dim=1)

    def shift(self, x: Tensor, scale: Scale = 1.0) -> None:
        """θ ← θ + scale·x for a flat x (M, d)."""
        if (watch := self.memory.get("watch")) is not None:
            w = self.dual(watch["direction"])
            watch["moved"] = watch["moved"] + (w * (x * scale)).sum(1)
        move(self.present, x, scale)

    def normal(self, like: Tensor) -> Tensor:
        """z ~ N(0, I), flat (M, d); zeros, without a draw, where every temperature is 0."""
        if all(group["temperature"] == 0 for group, _ in self._parts):
            return torch.zeros_like(like)
        return normal_like(like, self.generators)

    def add_noise(self, noise: Tensor) -> None:
        """θ ← θ + noise, flat (M, d), and keep its norm."""
        self.shift(noise)
        self.stats["noise_norm"] = torch.linalg.vector_norm(noise, dim=1)

    def noise_std(self, h: Scale) -> Scale:
        """s = √(2hT/N)."""
        return (2.0 * h * self.temperature / self.num_examples) ** 0.5

    @property
    def temperature(self) -> Scale:
        return self.per_coordinate(lambda group: group["temperature"])

    def mean_temperature(self) -> float:
        """T, averaged over coordinates where groups differ."""
        return mean(self.temperature)

    def per_coordinate(self, value: Callable[[dict[str, Any]], float]) -> Scale:
        """A group's value for each of its coordinates: one number if the groups agree."""
        values = [(float(value(group)), size) for group, size in self._parts if size]
        if len({v for v, _ in values}) == 1:
            return values[0][0]
        like = precise(self.present[0].new_empty(0))
        return torch.cat([like.new_full((size,), v) for v, size in values])

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """The flat tensor a rule remembers under a name; zeros at first.

        Raises:
            ValueError: other parameters have gradients now than before.
        """
        kept = self.memory.setdefault(name, torch.zeros_like(like))
        if kept.shape != like.shape:
            raise ValueError(
                f"parameters with gradients changed between steps: {tuple(kept.shape)} values "
                f"before, {tuple(like.shape)} now; make a new sampler for the new set"
            )
        return kept

    def watch(self, direction: Tensor, curvature: Tensor | float = 0.0) -> None:
        """Follow the minibatch noise along unit vectors (M, d); ``stats["t_eff"]`` is its mean.

        `curvature` (M,) of U/N along them, in the rule's metric: what the chain's own motion
        changes in the gradient is taken out. Costs no gradient and no random number.
        """
        self.memory["watch"] = begin_watch(direction, curvature)

    def _follow(self, g: Tensor, h: Scale) -> Tensor:
        unknown = torch.full_like(self.stats["drift_norm"], math.nan)
        if (watch := self.memory.get("watch")) is None:
            return unknown
        w = watch["direction"]
        variance = follow(watch, (w * self.whitened(g)).sum(1))
        if variance is None:
            return unknown
        t, h = along(self.temperature, w), along(h, w)
        watch["t_eff"] = self.effective_temperature(t, h, variance)
        return watch["t_eff"]

    @property
    def t_eff(self) -> Tensor | None:
        """T_eff (M,) along the watched direction since `watch`; None before its second step."""
        return self.memory.get("watch", {}).get("t_eff")

    def effective_temperature(self, t: Scale, h: Scale, variance: Tensor) -> Tensor:
        """T_eff (M,) from the variance (M,) of the (whitened) minibatch gradient: T + ηNhv/2."""
        return t + 0.5 * self.heat_gain * self.num_examples * h * variance

    def whitened(self, g: Tensor) -> Tensor:
        """The drift in coordinates in which the rule's noise is isotropic."""
        return g

    def dual(self, w: Tensor) -> Tensor:
        """What w is to motions: w where the noise is isotropic, else `whitened`'s inverse of it."""
        return w

    def adapt(self, g: Tensor) -> None:
        """Learn from a drift without moving; only preconditioned rules do."""

    def metric(self, like: Tensor) -> Tensor | None:
        """G (M, d) of a preconditioned rule; curvatures are then those of √G K √G."""
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, with the checks of the constructor."""
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            self.num_chains = count_chains(self.param_groups, self.chain_dim, self.generators)
        except ValueError:
            self.param_groups.pop()
            raise

    def keep_chains(self, kept: Sequence[int]) -> None:
        """Go on with these chains alone; the parameters have been cut to them already."""
        self.memory = keep_rows(self.memory, kept)
        if isinstance(self.generators, Sequence):
            self.generators = [self.generators[m] for m in kept]
        self.num_chains = count_chains(self.param_groups, self.chain_dim, self.generators)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, what the rule remembers, and the generators' states."""
        return {
            **super().state_dict(),
            "memory": copy.deepcopy(self.memory),
            "generators": save_states(self._generator_list()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore without casting: float64 memory of float32 parameters stays float64."""
        given = copy.copy(state_dict)
        states, memory = given.pop("generators"), given.pop("memory")
        restore_states(self._generator_list(), states)
        super().load_state_dict(given)
        device = self.param_groups[0]["params"][0].device
        self.memory = to_device(copy.deepcopy(memory), device)

    def _generator_list(self) -> list[torch.Generator]:
        given = self.generators
        return [*given] if isinstance(given, Sequence) else [g for g in (given,) if g is not None]
