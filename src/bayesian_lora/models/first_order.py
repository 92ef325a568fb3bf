"""The fused operations know their first derivatives only."""

import torch


def refuse_second_derivatives(what: str) -> None:
    """Called by backward passes, which record no graph of their own work.

    Raises:
        RuntimeError: under ``create_graph=True``, whose derivatives would be silently wrong.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has no second derivatives: leave out create_graph=True")
