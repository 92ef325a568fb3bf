"""How far sampling has come after 1,000, 10,000, 100,000, … steps, in constant memory.

Effective sample sizes come from batch means that are taken as the traces are recorded
(`online.OnlineBatchMeans`), so they need no stored trace; `diagnostics` has the last word.

Shapes: M chains, Q quantities.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bayesian_lora.monitoring.online import OnlineBatchMeans
from bayesian_lora.traces import RAW

FIRST, FACTOR = 1_000, 10
"""The first milestone in sampling steps, and how much further every next one is."""
Row = dict[str, Any]


class Milestones:
    """Rows of figures over the traces so far; raw parameters do not count.

    A row has ``step`` (sampling steps of a chain), ``rows`` (of the traces), ``chains``;
    ``ess_min``, ``ess_median`` over the quantities, of all chains together; ``quantity`` with the
    least, the ``mcse`` of its mean in its own unit, and a ``note`` where its figures are only a
    bound; ``ess_per_step``: the least over the steps of all chains; ``undefined``: how many
    quantities have no figures. What is None has a ``<name>_reason`` beside it.

    Args:
        chains: M.
    """

    def __init__(self, chains: int) -> None:
        self.chains = chains
        self.step, self.rows, self.due = 0, 0, FIRST
        self.names: list[str] = []
        self.noted: list[Row] = []
        self._means: OnlineBatchMeans | None = None
        self._new: list[Row] = []

    def record(self, row: Mapping[str, np.ndarray]) -> None:
        """Take in a row of the traces, each quantity (M,)."""
        if self._means is None and row:
            self._begin([name for name in row if not name.startswith(RAW)])
        if self._means is None:
            return
        self._means.update(np.stack([row[name] for name in self.names], axis=1))
        self.rows += 1

    def _begin(self, names: list[str]) -> None:
        self.names, self._means = names, OnlineBatchMeans((self.chains, len(names)))

    def stepped(self, step: int) -> None:
        """So many sampling steps are made, their row recorded; note it if it is a milestone."""
        self.step = step
        if step == self.due:
            self.due *= FACTOR
            self.noted.append(self.now())
            self._new.append(self.noted[-1])

    def take(self) -> list[Row]:
        """The milestones noted since the last call."""
        new, self._new = self._new, []
        return new

    def facts(self) -> list[Row]:
        """Every milestone, and where things stand now if that is past the last one."""
        known = self.noted[-1]["step"] if self.noted else 0
        return [*self.noted, *([self.now()] if self.step > known else [])]

    def now(self) -> Row:
        """The figures as they stand."""
        row: Row = {"step": self.step, "rows": self.rows, "chains": self.chains}
        if self._means is None:
            return row | _missing("no row of the traces is recorded yet") | {"undefined": 0}
        found = self._means.pooled()
        known = np.flatnonzero(np.isfinite(found.ess))
        row["undefined"] = len(self.names) - len(known)
        if not len(known):
            return row | _missing(f"{self.names[0]}: {found.reason[0]}")
        least = int(known[np.argmin(found.ess[known])])
        note = {} if found.note[least] is None else {"note": str(found.note[least])}
        return (
            row
            | note
            | {
                "ess_min": float(found.ess[least]),
                "ess_median": float(np.median(found.ess[known])),
                "quantity": self.names[least],
                "mcse": float(found.mcse[least]),
                "ess_per_step": float(found.ess[least]) / (self.step * self.chains),
            }
        )

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these chains alone, as if the others had never been."""
        self.chains = len(kept)
        if self._means is not None:
            self._means.keep(kept)

    def state_dict(self) -> Row:
        """Copies: tensors, plain numbers, and the rows, which `take` has given away."""
        means = None if self._means is None else _as_tensors(self._means.state_dict())
        counts = {name: getattr(self, name) for name in ("step", "rows", "due")}
        noted = [dict(row) for row in self.noted]
        return {**counts, "names": [*self.names], "noted": noted, "means": means}

    def load_state_dict(self, state: Row) -> None:
        """Undo `state_dict`, for as many chains."""
        self.step, self.rows, self.due = (state[name] for name in ("step", "rows", "due"))
        self.noted, self._means = [dict(row) for row in state["noted"]], None
        if state["means"] is not None:
            self._begin([*state["names"]])
            assert self._means is not None
            self._means.load_state_dict(_as_arrays(state["means"]))


def _missing(reason: str) -> Row:
    names = ("ess_min", "ess_median", "quantity", "mcse", "ess_per_step")
    return {k: v for n in names for k, v in ((n, None), (f"{n}_reason", reason))}


def _as_tensors(state: Any) -> Any:
    """NumPy's arrays as tensors of their own, which checkpoints hold."""
    if isinstance(state, dict):
        return {name: _as_tensors(value) for name, value in state.items()}
    return torch.from_numpy(state.copy()) if isinstance(state, np.ndarray) else state


def _as_arrays(state: Any) -> Any:
    """Undo `_as_tensors`."""
    if isinstance(state, dict):
        return {name: _as_arrays(value) for name, value in state.items()}
    return state.numpy().copy() if isinstance(state, torch.Tensor) else state
