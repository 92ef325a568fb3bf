"""Steps of any phase → `log.jsonl` and the progress display.

Shapes: M chains.
"""

import math
import time
from typing import Any

from torch import Tensor

from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import RunFolder
from bayesian_lora.warm_start import StepReport

LOG_LINES_PER_PHASE = 100
PHASE_NAMES = {
    "prior": "Prior search",
    "map": "Warm start",
    "burn_in": "Burn-in",
    "sampling": "Sampling",
}


class StepLogger:
    """Steps → `log.jsonl` (about a hundred lines a phase) and the progress display.

    `alive`: the numbers of the chains that go on; the run shortens it where one is dropped.
    """

    def __init__(
        self, folder: RunFolder, progress: Progress, temperature: float, alive: list[int]
    ) -> None:
        self.chains, self.alive = len(alive), alive
        self.folder, self.progress, self.temperature = folder, progress, temperature
        self.phase, self.last = "map", 0
        self._examples, self._since = 0, time.monotonic()
        self._rate = 0.0

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts now."""
        self.phase, self.last = phase, 0
        self._examples, self._since = 0, time.monotonic()
        self.progress.start(PHASE_NAMES[phase], total)

    def step(self, report: StepReport) -> None:
        self.last = report.step
        self._examples += report.examples
        every = max(1, report.total // LOG_LINES_PER_PHASE)
        if report.step % every == 0 or report.step == report.total:
            self._log(report)
        self.progress.update(report.step, lambda: self._facts(report))

    def milestone(self, row: dict[str, Any]) -> None:
        """A row of `Milestones`: a line of its own in the log, and one for a person."""
        self.folder.log({"phase": "milestone", **row})
        self.progress.say(milestone_line(row))

    def place(self) -> str:
        """Phase and step, for messages."""
        return f"{PHASE_NAMES[self.phase].lower()} after step {self.last}"

    def _log(self, report: StepReport) -> None:
        now = time.monotonic()
        self._rate = self._examples / max(now - self._since, 1e-9)
        self._examples, self._since = 0, now
        line: dict[str, Any] = {
            "phase": self.phase,
            "step": report.step,
            "loss": self._by_chain(report.loss),
            "lr": report.lr,
            "examples_per_s": round(self._rate, 1),
        }
        if report.accuracy is not None:
            line["accuracy"] = self._by_chain(report.accuracy)
        if report.t_eff is not None:
            line["t_eff"] = self._by_chain(report.t_eff)
        self.folder.log(line)

    def _by_chain(self, values: Tensor) -> list[float | None]:
        """One value a chain that began: null where it was dropped or is not finite."""
        if len(values) != len(self.alive):  # one fit for all chains, or one for each prior
            return values.tolist()
        row: list[float | None] = [None] * self.chains
        for number, value in zip(self.alive, values.tolist(), strict=True):
            row[number] = value if math.isfinite(value) else None
        return row

    def _facts(self, report: StepReport) -> str:
        parts = [f"loss {float(report.loss.mean()):.4f}"]
        if report.accuracy is not None:
            parts.append(f"acc {float(report.accuracy.mean()):.3f}")
        if report.phase != "map":
            cold = " (cold)" if self.temperature < 1 else ""
            parts.append(f"T {self.temperature:g}{cold}")
        if report.t_eff is not None:
            parts.append(f"T_eff {float(report.t_eff.mean()):.3g}")
        return " | ".join([*parts, f"{self._rate:.0f} examples/s"])


def milestone_line(row: dict[str, Any]) -> str:
    """What a milestone says, in one line."""
    head = f"After {row['step']:,} sampling steps: "
    if row["ess_min"] is None:
        return f"{head}no effective sample size ({row['ess_min_reason']})"
    note = f"; {row['note']}" if "note" in row else ""
    return (
        f"{head}effective sample size at least {row['ess_min']:.3g} ({row['quantity']}), "
        f"{row['ess_per_step']:.2g} a step of a chain{note}"
    )
