"""`metrics.csv`: a run's figures row by row, whole up to the last row whatever ends the run.

A tracker (`utils.tracking`) gets the same rows, if one is named.
"""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bayesian_lora.utils.tracking import Tracker, open_tracker

NAME = "metrics.csv"
Value = float | int | str | None


class MetricsLog:
    """Rows of named figures → `metrics.csv` and a tracker.

    Args:
        folder: of the run; it is made where it is not there.
        columns: of the file, in their order.
        tracker: wandb, tensorboard, trackio or mlflow; None is the file alone.
        run_name: the tracker's name of the run; that of the folder by default.
        config: the run's settings, for the tracker.
        position: bytes of an earlier file to keep (its `position` then); 0 begins anew.

    Raises:
        InputError: the tracker's package is not installed.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        tracker: str | None = None,
        run_name: str = "",
        config: Mapping[str, Any] | None = None,
        position: int = 0,
    ) -> None:
        self.path, self.columns = folder / NAME, list(columns)
        self._tracker: Tracker | None = None
        if tracker is not None:
            self._tracker = open_tracker(tracker, folder, run_name or folder.name, config)
        folder.mkdir(parents=True, exist_ok=True)
        if position and self.path.is_file():
            os.truncate(self.path, min(position, self.path.stat().st_size))
        else:
            self.path.write_bytes(self._line(self.columns))
        self._rows = max(0, self.path.read_bytes().count(b"\n") - 1)

    @property
    def position(self) -> int:
        """Bytes written so far, for a checkpoint."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def log(self, row: Mapping[str, Value], tracked: bool = True) -> None:
        """Append a row; what is not in it, None or not finite is an empty field.

        The tracker gets the numbers of `tracked` rows, the row's number in the file as its step:
        that rises whatever the figures are of.

        Raises:
            ValueError: a name that is no column.
        """
        if unknown := row.keys() - set(self.columns):
            raise ValueError(f"{sorted(unknown)} are no columns of {self.path}")
        with self.path.open("ab") as file:
            file.write(self._line([_text(row.get(name)) for name in self.columns]))
        self._rows += 1
        if self._tracker is None or not tracked:
            return
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._tracker.log(numbers, step=self._rows)

    def close(self) -> None:
        """Let the tracker send what it has; the file needs nothing."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None

    def _line(self, cells: Sequence[str]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue().encode()


def _text(value: Value) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)
