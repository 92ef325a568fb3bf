"""`metrics.csv`: row by row, cut where a checkpoint stood, the tracker's numbers beside it."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.utils import metrics_log
from bayesian_lora.utils.metrics_log import MetricsLog

COLUMNS = ("set", "epoch", "val/loss")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_stand_in_the_file_at_once_and_in_the_columns_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new", COLUMNS)
    log.log({"val/loss": 0.25, "epoch": 0, "set": "held out, all"})
    text = (tmp_path / "new" / "metrics.csv").read_text()
    assert text == 'set,epoch,val/loss\n"held out, all",0,0.25\n'
    log.log({"epoch": 1})
    assert rows(tmp_path / "new")[1] == {"set": "", "epoch": "1", "val/loss": ""}
    log.close()


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_no_number_is_an_empty_field(value: float | None, tmp_path: Path) -> None:
    MetricsLog(tmp_path, COLUMNS).log({"val/loss": value})
    assert rows(tmp_path) == [{"set": "", "epoch": "", "val/loss": ""}]


def test_a_name_that_is_no_column_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, COLUMNS)
    before = log.position
    with pytest.raises(ValueError, match="val/acc"):
        log.log({"epoch": 0, "val/acc": 1.0})
    assert log.position == before


def test_going_on_cuts_what_came_after_the_position_and_a_torn_row(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, COLUMNS)
    log.log({"epoch": 0})
    kept = log.position
    log.log({"epoch": 1})
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(b"torn,2")
    MetricsLog(tmp_path, COLUMNS, position=kept).log({"epoch": 1, "val/loss": 0.5})
    assert [(row["epoch"], row["val/loss"]) for row in rows(tmp_path)] == [("0", ""), ("1", "0.5")]


@pytest.mark.parametrize("position", [0, 10])
def test_without_a_position_or_a_file_it_begins_anew(position: int, tmp_path: Path) -> None:
    if not position:
        (tmp_path / "metrics.csv").write_text("of,another,run\n1,2,3\n")
    log = MetricsLog(tmp_path, COLUMNS, position=position)
    assert rows(tmp_path) == []
    assert log.position == len("set,epoch,val/loss\n")


class Recorder:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.finished = 0

    def start(self) -> None:
        raise AssertionError("it has been started already")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        raise AssertionError(f"it knows the config already: {values}")

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1


def test_the_tracker_gets_the_numbers_of_tracked_rows_at_rising_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, opened = Recorder(), []

    def open_tracker(*arguments: Any) -> Recorder:
        opened.append(arguments)
        return recorder

    monkeypatch.setattr(metrics_log, "open_tracker", open_tracker)
    log = MetricsLog(tmp_path / "sst2", COLUMNS, "wandb", config={"seed": 0})
    assert opened == [("wandb", tmp_path / "sst2", "sst2", {"seed": 0})]
    log.log({"set": "held out", "epoch": 0, "val/loss": 0.5})
    log.log({"epoch": 0, "val/loss": 0.7}, tracked=False)
    kept = log.position
    log.log({"epoch": 1, "val/loss": math.nan})
    assert recorder.logged == [({"epoch": 0, "val/loss": 0.5}, 1), ({"epoch": 1}, 3)]
    log.close()
    log.close()
    assert recorder.finished == 1
    again = MetricsLog(tmp_path / "sst2", COLUMNS, "wandb", position=kept)
    again.log({"epoch": 1})
    assert recorder.logged[-1] == ({"epoch": 1}, 3)


def test_a_missing_package_is_one_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install mlflow"):
        MetricsLog(tmp_path / "run", COLUMNS, "mlflow")
    assert not (tmp_path / "run").exists()
