"""What a person sees of a run: a bar per phase on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any

LINES_PER_PHASE = 10


class Progress:
    """Prints lines and shows phases. A bar if standard output is a terminal, else about ten
    lines a phase. `quiet` shows nothing.
    """

    def __init__(self, quiet: bool = False, terminal: bool | None = None) -> None:
        self.quiet = quiet
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        self._bar: Any = None
        self._task: Any = None
        self._name, self._total, self._began = "", 0, 0.0

    def say(self, line: str = "") -> None:
        """One line, above the bar if there is one."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def start(self, name: str, total: int) -> None:
        """Begin a phase of `total` steps."""
        self.end()
        self._name, self._total, self._began = name, total, time.monotonic()
        if self.terminal and not self.quiet:
            self._bar = _bar()
            self._task = self._bar.add_task(name, total=total, facts="")
            self._bar.start()

    def update(self, done: int, facts: Callable[[], str]) -> None:
        """`done` steps are made; `facts` is asked for its text only where it is shown."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=facts())
        elif not self.quiet and self._line_due(done):
            spent = time.monotonic() - self._began
            left = spent / done * (self._total - done) if done else 0.0
            text = f"  {self._name} {done}/{self._total} | {facts()} | {_clock(left)} left"
            print(text, flush=True)

    def more(self, steps: int) -> None:
        """So many more steps are made, of a phase of lots that goes without lines."""
        if self._bar is not None:
            self._bar.advance(self._task, steps)

    def _line_due(self, done: int) -> bool:
        return done == self._total or done % max(1, -(-self._total // LINES_PER_PHASE)) == 0

    def end(self) -> None:
        """Close the present phase's bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = ("{task.description}", "{task.fields[facts]}")
    return RichProgress(
        TextColumn(columns[0]),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(columns[1], markup=False),
        TimeRemainingColumn(),
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
