"""Posterior sampling, ensembling and composition of LoRA adapters on HuggingFace transformers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayesian_lora.ensemble import Ensemble

__version__ = "0.1.0"
__all__ = ["Ensemble", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Ensemble":
        from bayesian_lora.ensemble import Ensemble

        return Ensemble
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
