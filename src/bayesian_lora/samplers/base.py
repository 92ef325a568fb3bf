"""What all samplers share: units, the prior's drift, noise per chain, statistics, state.

Shapes: M chains, d parameters of one chain.
Units (the mean-loss scale, so that step sizes compare with SGD's):
    U(θ) = N·L(θ) + ‖θ‖²/(2σ²)     energy; the target is exp(−U/T)
    g    = ∇L_B + θ/(Nσ²)          drift, L_B the minibatch mean negative log-likelihood
    s    = √(2hT/N)                noise standard deviation of one step of size h
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesian_lora.utils.rng import restore_states, save_states

Closure = Callable[[], Tensor]


class Sampler(torch.optim.Optimizer, ABC):
    """Base of the samplers: an optimiser whose step leaves exp(−U/T) (nearly) invariant.

    Args:
        params: parameters or parameter groups; `prior_std` and `temperature` may differ by group.
        step_size: h > 0, kept under the group key ``lr`` so that torch's schedulers work.
        num_examples: N, the training examples whose *mean* loss the closure returns.
        prior_std: σ > 0 of the Gaussian prior; ``math.inf`` for a flat one.
        temperature: T ≥ 0; 1 is the posterior, 0 is gradient descent.
        chain_dim: 0 if parameters carry a leading chain dimension M, None if there is one chain.
        generators: one `torch.Generator` for all, or a list of one per chain; None is torch's
            global one.

    Raises:
        ValueError: an argument outside its range, chains that do not agree in number.
    """

    exactness = "unstated"

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
        **defaults: Any,
    ) -> None:
        if chain_dim not in (None, 0):
            raise ValueError(f"chain_dim={chain_dim}: 0 (leading dimension) or None (one chain)")
        if num_examples < 1:
            raise ValueError(f"num_examples={num_examples}: N, the training set's size, is ≥ 1")
        self.num_examples = num_examples
        self.chain_dim = chain_dim
        self.generators = generators
        self.stats: dict[str, Tensor] = {}
        """Of the last step, each (M,): ``drift_norm``, ``noise_norm``, ``step_size``."""
        values = {"lr": step_size, "prior_std": prior_std, "temperature": temperature, **defaults}
        super().__init__(params, values)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, with the checks of the constructor."""
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])
        self.num_chains = self._count_chains()

    @abstractmethod
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Move every chain; the closure's value. Every sampler has its own."""

    def _count_chains(self) -> int:
        sizes = {
            1 if self.chain_dim is None else (p.shape[0] if p.ndim else -1)
            for group in self.param_groups
            for p in group["params"]
        }
        if len(sizes) != 1 or -1 in sizes:
            raise ValueError(f"parameters disagree on the number of chains: {sorted(sizes)}")
        chains = sizes.pop()
        if isinstance(self.generators, Sequence) and len(self.generators) != chains:
            raise ValueError(f"{len(self.generators)} generators for {chains} chains: one for each")
        return chains

    def drift(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters with a gradient, and g = ∇L_B + θ/(Nσ²) of each."""
        params = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params if p.grad is not None]
        if not params or math.isinf(group["prior_std"]):
            return params, grads
        precision = 1.0 / (self.num_examples * group["prior_std"] ** 2)
        return params, list(torch._foreach_add(grads, params, alpha=precision))  # type: ignore

    def add_noise(self, params: list[Tensor], std: float) -> None:
        """params ← params + std·z, z ~ N(0, I): one flat draw per chain, none if std is 0."""
        if std == 0:
            return
        device, dtype = params[0].device, params[0].dtype
        sizes = [p.numel() // self.num_chains for p in params]
        flat = torch.empty(self.num_chains, sum(sizes), device=device, dtype=dtype)
        if isinstance(self.generators, Sequence):
            for row, generator in zip(flat, self.generators, strict=True):
                row.normal_(generator=generator)
        else:
            flat.normal_(generator=self.generators)
        parts = flat.split(sizes, dim=1)
        z = [part.reshape(p.shape).to(p.dtype) for part, p in zip(parts, params, strict=True)]
        torch._foreach_add_(params, z, alpha=std)  # type: ignore
        self._accumulate("noise_norm", std * torch.linalg.vector_norm(flat, dim=1))

    def record(self, step_size: float, drift: Sequence[Tensor]) -> None:
        """Keep this group's share of the step's statistics."""
        flat = torch.cat([g.reshape(self.num_chains, -1) for g in drift], dim=1)
        norm = torch.linalg.vector_norm(flat, dim=1)
        self._accumulate("drift_norm", norm)
        self._accumulate("noise_norm", torch.zeros_like(norm))  # at T = 0 nothing else sets it
        self.stats["step_size"] = torch.full((self.num_chains,), step_size)

    def _accumulate(self, name: str, norm: Tensor) -> None:
        """Norms of several groups add in squares."""
        self.stats[name] = torch.hypot(self.stats.get(name, torch.zeros_like(norm)), norm)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict and the generators' states under ``generators``."""
        return {**super().state_dict(), "generators": save_states(self._generator_list())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore without casting: float64 state of float32 parameters stays float64."""
        given = copy.copy(state_dict)
        states = given.pop("generators")
        kept = copy.deepcopy(given["state"])
        super().load_state_dict({**given, "state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        for index, values in kept.items():
            self.state[params[index]] = {
                key: v.to(params[index].device) if isinstance(v, Tensor) else v
                for key, v in values.items()
            }
        restore_states(self._generator_list(), states)

    def _generator_list(self) -> list[torch.Generator]:
        if self.generators is None:
            return []
        return list(self.generators) if isinstance(self.generators, Sequence) else [self.generators]


def noise_std(step_size: float, temperature: float, num_examples: int) -> float:
    """s = √(2hT/N)."""
    return math.sqrt(2.0 * step_size * temperature / num_examples)


def _check_group(group: dict[str, Any]) -> None:
    if not (group["lr"] > 0 and math.isfinite(group["lr"])):
        raise ValueError(f"step_size={group['lr']}: must be finite and > 0")
    if not group["prior_std"] > 0:
        raise ValueError(f"prior_std={group['prior_std']}: must be > 0 (math.inf: flat prior)")
    if not (group["temperature"] >= 0 and math.isfinite(group["temperature"])):
        raise ValueError(f"temperature={group['temperature']}: must be finite and ≥ 0")
