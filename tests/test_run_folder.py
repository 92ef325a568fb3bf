"""The folder of a run: what may begin in it, its status, and the files written along the way.

Shapes: M chains.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bayesian_lora import __version__, run_folder
from bayesian_lora.errors import InputError
from bayesian_lora.run_folder import RunFolder, git_commit, read_starts, read_traces, versions
from bayesian_lora.utils.files import read_json


def read(path: Path) -> dict:
    return read_json(path, "file")


@pytest.mark.parametrize("overwrite", [False, True])
def test_new_and_empty_folders_are_free(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").check_free(overwrite)
    RunFolder(tmp_path / "a" / "b" / "new").check_free(overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_run_is_replaced_only_when_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin("seed: 0\n", {})
    for status in ("running", "stopped", "finished"):
        folder.finish(status)
        with pytest.raises(InputError, match=rf"status: {status}.*output\.overwrite=true"):
            RunFolder(tmp_path / "run").check_free(overwrite=False)
        RunFolder(tmp_path / "run").check_free(overwrite=True)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: damaged"):
        RunFolder(tmp_path / "run").check_free(overwrite=False)
    RunFolder(tmp_path / "run").check_free(overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_run_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "letter").write_text("Dear …")
    with pytest.raises(InputError, match="other files and no run"):
        RunFolder(tmp_path).check_free(overwrite)
    for path in (tmp_path / "letter", tmp_path / "letter" / "run"):
        with pytest.raises(InputError, match="letter is a file"):
            RunFolder(path).check_free(overwrite)


def test_a_place_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="cannot be written to"):
        RunFolder(tmp_path / "new" / "run").check_free(False)


def test_beginning_clears_the_old_run_but_not_the_folder_itself(tmp_path: Path) -> None:
    """So that the folder may be a link to another disk."""
    disk, outside = tmp_path / "disk", tmp_path / "outside"
    (disk / "samples" / "sample_0001").mkdir(parents=True)
    (disk / "metrics.json").write_text("{}")
    outside.mkdir()
    (outside / "precious").write_text("kept")
    (disk / "link").symlink_to(outside)
    (tmp_path / "run").symlink_to(disk)
    folder = RunFolder(tmp_path / "run")
    folder.begin("seed: 3\n", {"seed": 3})
    assert sorted(p.name for p in disk.iterdir()) == ["config.yaml", "run.json"]
    assert (tmp_path / "run").is_symlink()
    assert (outside / "precious").read_text() == "kept"


def test_the_status_goes_from_running_to_its_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "run")
    folder.begin("seed: 3\n", {"seed": 3, "device": "cpu"})
    first = read(folder.root / "run.json")
    assert (folder.root / "config.yaml").read_text() == "seed: 3\n"
    assert (first["status"], first["seed"], first["device"]) == ("running", 3, "cpu")
    assert first["pid"] == os.getpid()
    assert first["versions"] == versions()
    folder.finish("sampled", members=4)
    folder.finish("finished", t_eff=1.5)
    last = read(folder.root / "run.json")
    assert (last["status"], last["members"], last["t_eff"]) == ("finished", 4, 1.5)
    assert last["started"] == first["started"] <= last["ended"]
    assert last["wall_s"] >= 0


def test_versions_name_what_a_result_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = versions()
    assert found["bayesian_lora"] == __version__
    assert found["torch"] == torch.__version__
    monkeypatch.setattr(run_folder, "PACKAGES", ("no-such-package",))
    assert versions()["no-such-package"] == "not installed"


def test_the_commit_is_that_of_the_working_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "run_folder.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None  # not a working tree
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert git_commit() is None  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = (tmp_path / ".git" / "HEAD").read_text().split()[1]
    assert git_commit() == (tmp_path / ".git" / head).read_text().strip()
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_traces_are_read_from_all_parts_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_traces(tmp_path) == {}
    assert read_starts(tmp_path) is None
    whole = np.arange(24.0).reshape(2, 12)
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        folder.write_traces({"u": whole[:, rows], "v": -whole[:, rows]})
    folder.write_traces({})
    folder.write_starts({"u": np.ones(2), "v": np.zeros(2)})
    names = sorted(p.name for p in (tmp_path / "traces").iterdir())
    assert names == ["part_00001.npz", "part_00002.npz", "part_00003.npz", "starts.npz"]
    found = read_traces(tmp_path)
    np.testing.assert_array_equal(found["u"], whole)
    np.testing.assert_array_equal(found["v"], -whole)
    starts = read_starts(tmp_path)
    assert starts is not None
    np.testing.assert_array_equal(starts["u"], np.ones(2))


def test_damaged_parts_are_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_traces({"u": np.ones((2, 3)), "v": np.ones((2, 3))})
    folder.write_traces({"u": np.ones((2, 3))})
    with pytest.raises(InputError, match="part_00002"):
        read_traces(tmp_path)
    folder.parts = 1
    folder.write_traces({"u": np.ones((3, 3)), "v": np.ones((3, 3))})
    with pytest.raises(InputError, match="part_00002"):
        read_traces(tmp_path)
    (tmp_path / "traces" / "part_00002.npz").write_bytes(b"")
    with pytest.raises(InputError, match="part_00002"):
        read_traces(tmp_path)


def test_the_default_splits_figures_are_metrics_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    usual = folder.write_metrics("matched", "matched", {"n": 1})
    other = folder.write_metrics("mismatched", "matched", {"n": 2})
    assert (usual.name, other.name) == ("metrics.json", "metrics.mismatched.json")
    assert (read(usual), read(other)) == ({"n": 1}, {"n": 2})
    folder.write_predictions("mismatched", {"logits": np.zeros((1, 2, 3))})
    assert (tmp_path / "predictions" / "mismatched.npz").is_file()


def test_log_lines_are_appended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log({"step": 1})
    folder.log({"step": 2})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
