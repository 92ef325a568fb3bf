"""`report.html` of folders on disk: texts come from the data, everything else from the files."""

import html
import json
from pathlib import Path

import pytest

from bayesian_lora.config import build_config
from bayesian_lora.data.synthetic import generate
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.report import page_of, read_texts, write_report
from bayesian_lora.experiment.train import train
from bayesian_lora.progress import Progress
from bayesian_lora.report.page import Chart, Missing, Table
from bayesian_lora.report.run_files import read_run
from bayesian_lora.utils.files import write_json
from tests.report.finished_runs import write_comparison, write_run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_becomes_one_small_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_report(root)
    assert path == root / "report.html"
    assert path.stat().st_size < 3_000_000
    size = f"{path.stat().st_size / 1e6:.2f} MB"
    assert f"Report: {path} ({size})" in capsys.readouterr().out
    text = path.read_text(encoding="utf-8")
    assert "<h1>run: report</h1>" in text
    assert text.count('class="chart"') >= 8


def test_texts_are_those_of_the_examples(root: Path) -> None:
    known = generate("validation", seed=0)
    texts = read_texts(read_run(root))
    assert texts.missing == ""
    for place in (0, 7, 399):
        assert texts.by_id[int(known.ids[place])] == (known.texts[0][place],)
    page = html.unescape(write_report(root).read_text(encoding="utf-8"))
    assert sum(text in page for text in known.texts[0]) >= 10


def test_changed_data_are_not_shown_as_what_was_evaluated(root: Path) -> None:
    run = json.loads((root / "run.json").read_text())
    del run["checksum"]
    run["data"]["fingerprint"]["evaluation"] = "0" * 64
    write_json(root / "run.json", run)
    texts = read_texts(read_run(root))
    assert texts.by_id == {}
    assert "changed since the run" in texts.missing
    assert "changed since the run" in write_report(root).read_text(encoding="utf-8")


def test_data_that_are_gone_leave_the_figures(root: Path, tmp_path: Path) -> None:
    texts = read_texts(read_run(root), str(tmp_path / "nowhere"))
    assert texts.by_id == {}
    assert "nowhere" in texts.missing


def test_an_older_run_has_a_report_that_says_what_it_lacks(tmp_path: Path) -> None:
    write_run(tmp_path, old=True, shifted=False)
    text = html.unescape(write_report(tmp_path).read_text(encoding="utf-8"))
    for what in ("Reliability diagram", "Risk–coverage curve", "Cumulative curve"):
        assert f"<strong>{what}</strong>: not available – not in metrics.json" in text


def test_a_comparison_has_its_own(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    out = tmp_path / "elsewhere" / "page.html"
    assert write_report(tmp_path, out=out, progress=Progress(quiet=True)) == out
    text = out.read_text(encoding="utf-8")
    assert text.count('class="chart"') == 3
    assert "it went wrong &lt;&amp;&gt;" in text
    assert "sampler=psgld: Worth it by NLL." in text
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "neither a run nor a comparison"),
        (("run.json",), "no metrics.json"),
        (("comparison.json",), "damaged"),
    ],
)
def test_a_folder_without_figures_is_one_clear_line(
    tmp_path: Path, files: tuple[str, ...], words: str
) -> None:
    for name in files:
        write_json(tmp_path / name, {"cells": "no list"})
    with pytest.raises(InputError, match=words) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_is_no_place_for_the_file(root: Path) -> None:
    with pytest.raises(InputError, match="name a file"):
        write_report(root, out=root)


def test_a_real_run_lacks_nothing(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    small = {
        "data": {"name": "synthetic", "train_examples": 40, "batch_size": 8, "max_length": 48},
        "model": {"name": str(tiny_models["bert"]), "lora": {"rank": 2, "alpha": 4.0}},
        "prior": {"std": 0.3},
        "train": {"epochs": 1, "lr": 5.0e-3},
        "sampler": {"step_size": 1.0e-3, "burn_in": 2, "thin": 2, "num_samples": 12, "chains": 2},
        "output": {"dir": str(tmp_path / "run")},
    }
    root = train(build_config(small), Progress(quiet=True))
    page = page_of(root)
    for section in page.sections:
        for block in section.blocks:
            words = block.reason if isinstance(block, Missing) else ""
            assert "not in metrics.json" not in words, f"{section.title}: {words}"
    charts = {s.anchor for s in page.sections for b in s.blocks if isinstance(b, Chart)}
    assert charts == {"calibration", "selective", "enough", "chains"}
    inputs = next(s for s in page.sections if s.anchor == "inputs")
    assert all(isinstance(block, Table) and "Text" in block.columns for block in inputs.blocks)
    first = next(b for b in page.sections[0].blocks if isinstance(b, Table))
    nll = list(first.columns).index("NLL")
    assert all("±" in row[nll].text for row in first.rows)
    write_report(root)
    assert (root / "report.html").stat().st_size < 3_000_000
