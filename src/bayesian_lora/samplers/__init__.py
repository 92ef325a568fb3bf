"""Stochastic-gradient MCMC samplers as `torch.optim.Optimizer`s, one method a file."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayesian_lora.samplers.sgld import SGLD

__all__ = ["SGLD"]


def __getattr__(name: str) -> object:
    if name == "SGLD":
        from bayesian_lora.samplers.sgld import SGLD

        return SGLD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
