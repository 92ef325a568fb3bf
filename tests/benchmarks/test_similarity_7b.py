"""The benchmark of `similarity` runs, on adapters of a few numbers."""

import re
from pathlib import Path

import pytest

from .conftest import Load


def test_both_comparisons_are_timed(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    similarity_7b = load("similarity_7b")
    for name, value in {"LAYERS": 2, "WIDTH": 8, "RANK": 2}.items():
        monkeypatch.setattr(similarity_7b, name, value)
    similarity_7b.main(["--keep", str(tmp_path / "kept")])
    printed = capfd.readouterr().out
    assert len(re.findall(r"seconds: \d+\.\d .*peak memory: [1-9]\d+ MiB", printed)) == 2
    assert list((tmp_path / "kept" / "out").glob("*.json"))
    assert list((tmp_path / "kept" / "out").glob("*.png"))
