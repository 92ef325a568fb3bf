"""Plots take their time: tests of words and tables do without; or their axes are looked at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayesian_lora.report import heatmaps
from bayesian_lora.report import page as page_module
from bayesian_lora.report.run_files import RunFiles, read_run
from tests.report.finished_runs import write_run

AxesOf = Callable[[Callable[[], object]], list[Any]]
"""Of what makes a plot of several panels, its axes."""


@pytest.fixture
def blank_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("pairs.png", "a-b-layers.png", "a-b-phi.png")
    monkeypatch.setattr(page_module, "_svg", lambda *_: b"<svg/>")
    monkeypatch.setattr(heatmaps, "pictures", lambda _: dict.fromkeys(names, b"png"))
    monkeypatch.setattr(heatmaps, "phi_map", lambda _: b"png")


@pytest.fixture
def axes_of(monkeypatch: pytest.MonkeyPatch) -> AxesOf:
    from matplotlib.figure import Figure

    def call(make: Callable[[], object]) -> list[Any]:
        found: list[Any] = []

        def svg(draw: Callable[[Any], None], _: str, size: tuple[float, float], n: int) -> bytes:
            found[:] = Figure(figsize=size, layout="constrained").subplots(1, n)
            draw(found)
            return b"<svg/>"

        monkeypatch.setattr(page_module, "_svg", svg)
        make()
        return found

    return call


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    root = tmp_path_factory.mktemp("finished") / "run"
    write_run(root)
    return root


@pytest.fixture(scope="session")
def run_files(run_folder: Path) -> RunFiles:
    return read_run(run_folder)
