"""Trackers by name: what is missing is said at once, and no server is waited for.

The packages are stand-ins that write down how accelerate calls them, but for tensorboard's own.
"""

import http.server
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.utils import tracking
from bayesian_lora.utils.tracking import PACKAGES, answers, check_tracker, open_tracker

CONFIG = {"seed": 3, "model": {"name": "minilm", "lora": {"targets": ["query", "key"]}}}
FLAT = {"seed": 3, "model.name": "minilm", "model.lora.targets": "['query', 'key']"}
DEAD = "http://127.0.0.1:9"
VARIABLES = ("WANDB_MODE", "WANDB_BASE_URL", "TRACKIO_SPACE_ID", "HF_ENDPOINT")
STAND_IN = """
import json, os

VARIABLES = ("WANDB_MODE", "TRACKIO_SPACE_ID", "MLFLOW_TRACKING_URI")

def note(what, *values, **named):
    line = {"what": what, "values": values, "named": named}
    line["environment"] = {name: os.environ.get(name) for name in VARIABLES}
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(line) + "\\n")
"""
LIKE_WANDB = """
class Run:
    def log(self, values, step=None):
        note("log", values, step)

    def finish(self):
        note("finish")

class Config:
    def update(self, values, allow_val_change):
        note("config", values)

config = Config()

def init(**named):
    note("init", **named)
    return Run()
"""
MLFLOW = """
class validation:
    MAX_PARAM_VAL_LENGTH = 500
    MAX_PARAMS_TAGS_PER_BATCH = 100

class utils:
    validation = validation

def search_experiments(filter_string):
    return []

def create_experiment(**named):
    return "1"

def start_run(**named):
    note("init", **named)

def log_params(values):
    note("config", values)

def log_metrics(values, step):
    note("log", values, step)

def end_run():
    note("finish")
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")  # restored, whatever happens to it here
        monkeypatch.delenv(name)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins of wandb, trackio and mlflow; the file they write into."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("wandb", "trackio", "mlflow"):
        own = MLFLOW if name == "mlflow" else LIKE_WANDB
        (packages / f"{name}.py").write_text(STAND_IN + own)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes.jsonl"))
    yield tmp_path / "notes.jsonl"
    for name in ("wandb", "trackio", "mlflow"):
        sys.modules.pop(name, None)


@pytest.fixture
def server() -> Iterator[str]:
    """One that knows no page, but answers."""
    listening = http.server.HTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    thread.join()
    listening.server_close()


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the screen."""


def read(notes: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in notes.read_text().splitlines()]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_the_remedy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(InputError, match=rf"^track={name}: .*pip install {name}\b.*leave") as error:
        check_tracker(name)
    assert "\n" not in str(error.value)


def test_no_tracker_is_fine_and_an_unknown_one_is_not() -> None:
    check_tracker(None)
    with pytest.raises(InputError, match=r"track=tensorbord: unknown.*tensorboard"):
        check_tracker("tensorbord")


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_gets_name_config_and_figures(
    name: str, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = open_tracker(name, tmp_path / "run", "sst2", CONFIG)
    tracker.log({"val/loss": 0.5}, step=2)
    tracker.finish()
    begun, config, logged, finished = read(notes)
    assert [line["what"] for line in (begun, finished)] == ["init", "finish"]
    assert begun["named"]["run_name" if name == "mlflow" else "name"] == "sst2"
    if name != "mlflow":
        assert begun["named"]["project"] == "bayesian-lora"
    assert config["values"] == [FLAT]
    assert logged["values"] == [{"val/loss": 0.5}, 2]


@pytest.mark.parametrize(
    ("name", "given", "variable", "expected"),
    [
        ("wandb", {"WANDB_BASE_URL": DEAD}, "WANDB_MODE", "offline"),
        ("wandb", {"WANDB_BASE_URL": DEAD, "WANDB_MODE": "disabled"}, "WANDB_MODE", "disabled"),
        ("trackio", {"HF_ENDPOINT": DEAD, "TRACKIO_SPACE_ID": "me/mine"}, "TRACKIO_SPACE_ID", None),
        ("mlflow", {"MLFLOW_TRACKING_URI": DEAD}, "MLFLOW_TRACKING_URI", "file:///"),
    ],
)
def test_a_server_that_does_not_answer_costs_seconds_and_no_run(
    name: str,
    given: dict[str, str],
    variable: str,
    expected: str | None,
    notes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    began = time.monotonic()
    open_tracker(name, tmp_path / "run", "sst2", CONFIG)
    assert time.monotonic() - began < 10
    found = read(notes)[0]["environment"][variable]
    assert found == expected or (expected and found.startswith(expected))


@pytest.mark.parametrize(
    ("name", "address", "variable", "expected"),
    [
        ("wandb", "WANDB_BASE_URL", "WANDB_MODE", None),
        ("trackio", "HF_ENDPOINT", "TRACKIO_SPACE_ID", "me/mine"),
        ("mlflow", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_URI", "http"),
    ],
)
def test_a_server_that_answers_is_used(
    name: str,
    address: str,
    variable: str,
    expected: str | None,
    server: str,
    notes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if name == "trackio":
        monkeypatch.setenv("TRACKIO_SPACE_ID", "me/mine")
    monkeypatch.setenv(address, server)
    open_tracker(name, tmp_path / "run", "sst2", CONFIG)
    found = read(notes)[0]["environment"][variable]
    assert found == (server if expected == "http" else expected)


def test_an_answer_is_an_answer_whatever_it_says(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert answers(server)
    assert not answers(DEAD)
    assert not answers("http://[")


def test_trackio_and_mlflow_on_this_machine_ask_no_server(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(url: str) -> bool:
        raise AssertionError(f"{url} was asked")

    monkeypatch.setattr(tracking, "answers", asked)
    for name in ("trackio", "mlflow"):
        open_tracker(name, tmp_path / "run", "sst2", CONFIG).finish()
    assert [line["what"] for line in read(notes)] == ["init", "config", "finish"] * 2
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_tensorboard_writes_below_the_runs_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = open_tracker("tensorboard", tmp_path / "run", "sst2", CONFIG)
    tracker.log({"val/loss": 0.5}, step=2)
    tracker.finish()
    (events,) = (tmp_path / "run" / "tensorboard").rglob("events.out.*")
    assert b"val/loss" in events.read_bytes()
