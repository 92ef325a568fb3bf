"""Stochastic-gradient MCMC samplers as `torch.optim.Optimizer`s, one method a file."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayesian_lora.samplers.asgld import ASGLD
    from bayesian_lora.samplers.control_variate import ControlVariate
    from bayesian_lora.samplers.csgld import CSGLD
    from bayesian_lora.samplers.psgld import PSGLD
    from bayesian_lora.samplers.sam_sgld import SAMSGLD
    from bayesian_lora.samplers.sam_sgld_rank1 import SAMSGLDRank1
    from bayesian_lora.samplers.sghmc import SGHMC
    from bayesian_lora.samplers.sgld import SGLD
    from bayesian_lora.samplers.sgnht import SGNHT

__all__ = [
    "ASGLD",
    "CSGLD",
    "PSGLD",
    "SAMSGLD",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "ControlVariate",
    "SAMSGLDRank1",
]

MODULES = {
    "sgld": "SGLD",
    "psgld": "PSGLD",
    "asgld": "ASGLD",
    "sghmc": "SGHMC",
    "sgnht": "SGNHT",
    "csgld": "CSGLD",
    "sam_sgld": "SAMSGLD",
    "sam_sgld_rank1": "SAMSGLDRank1",
}
"""The name of a sampler, in configs and of its file, and its class."""


def __getattr__(name: str) -> object:
    files = {
        **{cls: module for module, cls in MODULES.items()},
        "ControlVariate": "control_variate",
    }
    if name not in files:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"bayesian_lora.samplers.{files[name]}"), name)
