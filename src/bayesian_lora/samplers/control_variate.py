"""Variance-reduced minibatch gradients: a control variate at the warm start.

Shapes: M chains.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bayesian_lora.samplers.base import Closure


class ControlVariate:
    """g_B(θ) → g_B(θ) − g_B(θ*) + g(θ*), θ* the parameters at construction.

    Unbiased for the full gradient at every θ; its variance is that of g_B(θ) − g_B(θ*), which is
    0 at θ* and grows with the distance. Wraps the closure of a batch, so it works with every
    sampler: ``sampler.step(control.closure(batch_closure))``.
    Cost: one full gradient at the start; two batch gradients where there was one (the one at θ*
    is computed once for each wrapped closure: three instead of two for SAM); two copies of the
    parameters.
    Source: Baker, Fearnhead, Fox & Nemeth (2019), eq. 5, with the warm start as θ*.

    Args:
        params: the sampled parameters, at θ*.
        full: the closure of the whole training set; called once. None if `load_state_dict` follows.

    Raises:
        ValueError: a parameter has no gradient after `full`.
    """

    def __init__(self, params: Iterable[Tensor], full: Closure | None) -> None:
        self.params = list(params)
        self.anchor: list[Tensor] = []
        self.full_gradient: list[Tensor] = []
        if full is None:
            return
        with torch.enable_grad():
            full()
        if any(p.grad is None for p in self.params):
            raise ValueError("a parameter has no gradient: sample only those that the loss uses")
        self.anchor = [p.detach().clone() for p in self.params]
        self.full_gradient = [p.grad.detach().clone() for p in self.params if p.grad is not None]

    def closure(self, batch: Closure) -> Closure:
        """The closure of the same batch with reduced variance; its value is the batch's at θ."""
        correction: list[Tensor] = []  # g(θ*) − g_B(θ*)

        def compute() -> Tensor:
            loss = batch()
            if not correction:
                correction.extend(self._correct(batch))
            with torch.no_grad():
                for p, term in zip(self.params, correction, strict=True):
                    assert p.grad is not None
                    p.grad.add_(term)
            return loss

        compute.plain = batch  # type: ignore[attr-defined]  # for SAM's perturbation
        return compute

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these chains alone, of parameters (M, …)."""
        self.anchor = [t[list(kept)] for t in self.anchor]
        self.full_gradient = [t[list(kept)] for t in self.full_gradient]

    def state_dict(self) -> dict[str, list[Tensor]]:
        """θ* and g(θ*)."""
        return {
            "anchor": [t.clone() for t in self.anchor],
            "full_gradient": [t.clone() for t in self.full_gradient],
        }

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Undo `state_dict`."""
        device = self.params[0].device
        self.anchor = [t.to(device, copy=True) for t in state["anchor"]]
        self.full_gradient = [t.to(device, copy=True) for t in state["full_gradient"]]

    def _correct(self, batch: Closure) -> list[Tensor]:
        """The correction of this batch; θ and its gradient are as before afterwards."""
        here = [(p.detach().clone(), p.grad) for p in self.params]
        self._place(self.anchor)
        try:
            for p in self.params:
                p.grad = None
            batch()
            return [f - p.grad for f, p in zip(self.full_gradient, self.params, strict=True)]  # type: ignore
        finally:
            self._place([value for value, _ in here])
            for p, (_, grad) in zip(self.params, here, strict=True):
                p.grad = grad

    @torch.no_grad()
    def _place(self, values: list[Tensor]) -> None:
        for p, value in zip(self.params, values, strict=True):
            p.copy_(value)
