"""`compare`: what is run, what is not run again, what is shared, and what is on disk at any moment.

A stand-in for `train` writes a run's files; real runs are in test_compare_real_runs.py.
"""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bayesian_lora.config import Config, dump_run_config
from bayesian_lora.errors import InputError
from bayesian_lora.experiment import compare as module
from bayesian_lora.experiment.compare import compare, failed_cells
from bayesian_lora.progress import Progress
from bayesian_lora.utils.files import read_json, write_atomic, write_json

QUIET = Progress(quiet=True)
SMALL: dict[str, Any] = {
    "data": {"name": "synthetic", "train_examples": 32, "batch_size": 8, "max_length": 48},
    "model": {"lora": {"rank": 2, "alpha": 4.0}},
    "prior": {"std": 0.3},
    "train": {"epochs": 1, "lr": 5.0e-3},
    "sampler": {"step_size": 1.0e-3, "burn_in": 2, "thin": 2, "num_samples": 4, "chains": 2},
}


class Trainer:
    """Stands for `train`: writes a run's files; `on[n]` is raised in its n-th run, from 1, after
    the warm start.
    """

    def __init__(self) -> None:
        self.configs: list[Config] = []
        self.on: dict[int, BaseException] = {}

    @property
    def names(self) -> list[str]:
        return [Path(str(config.output.dir)).name for config in self.configs]

    def __call__(self, config: Config, progress: Progress) -> Path:
        self.configs.append(config)
        root = Path(str(config.output.dir))
        write_atomic(root / "config.yaml", dump_run_config(config))
        write_json(root / "run.json", {"status": "running"})
        fits = 1 if config.train.starts == "shared" else config.sampler.chains
        for m in range(fits):
            write_atomic(root / "map" / f"chain_{m}" / "adapter_model.safetensors", b"")
        write_json(root / "ensemble.json", {})
        if error := self.on.get(len(self.configs)):
            write_json(root / "run.json", {"status": "stopped"})
            raise error
        spread = {"nll": {"mean": 0.7, "sd": 0.1}}
        figures = {"accuracy": 0.5, "nll": 0.1 * len(self.configs), "ece": 0.1, "brier": 0.5}
        diagnostics = {"rhat_max": None, "ess_bulk_min": 8.0, "t_eff": 1.0, "verdict": "not mixed"}
        cost = {"train_s": 1.0, "sample_s": 1.0, "eval_s": 1.0, "gradient_evaluations": 30}
        metrics = {
            "task": "synthetic",
            "split": "validation",
            "n": 600,
            "temperature": 1.0,
            "tempering": "posterior",
            "sampler": {"name": "sgld", "step_size": 1e-3, "exactness": "exact as h → 0"},
            "map": spread,
            "map_ensemble": {"nll": 0.65},
            "single": spread,
            "ensemble": figures | {"k": config.sampler.num_samples},
            "diagnostics": diagnostics | {"reason": "short"},
            "cost": cost | {"sampling_gradient_evaluations": 16},
        }
        write_json(root / "metrics.json", metrics)
        write_json(root / "run.json", {"status": "finished", "wall_s": 3.5})
        return root


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    stand_in = Trainer()
    monkeypatch.setattr(module, "train", stand_in)
    return stand_in


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"output": {"dir": str(tmp_path / "out")}}))
    return path


def read(root: Path) -> dict[str, Any]:
    json.loads((root / "comparison.json").read_text(), parse_constant=pytest.fail)
    return read_json(root / "comparison.json", "comparison")


def cells(root: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in read(root)["cells"]}


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """sha256 and time of change of every file."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): (
            hashlib.sha256(p.read_bytes()).hexdigest(),
            p.stat().st_mtime_ns,
        )
        for p in files
    }


RANKS = ["model.lora.rank=2,4", "sampler.name=sgld,sghmc"]
NAMES = [f"model.lora.rank={r},sampler.name={s}" for r in (2, 4) for s in ("sgld", "sghmc")]


def test_every_combination_has_its_run_and_its_entry(config: Path, trainer: Trainer) -> None:
    root = compare(config, [*RANKS, "seed=3"], QUIET)
    assert trainer.names == NAMES
    assert {c.seed for c in trainer.configs} == {3}
    assert [c.model.lora.rank for c in trainer.configs] == [2, 2, 4, 4]
    record = read(root)
    assert record["axes"] == {"model.lora.rank": ["2", "4"], "sampler.name": ["sgld", "sghmc"]}
    assert record["config"]["seed"] == 3
    for entry in record["cells"]:
        assert entry["folder"] == entry["name"]
        assert (entry["status"], entry["error"]) == ("finished", None)
        stored = json.loads((root / entry["folder"] / "metrics.json").read_text())
        for name in ("map", "map_ensemble", "single", "ensemble"):
            assert entry["metrics"][name] == stored[name]
        assert entry["metrics"]["diagnostics"].items() <= stored["diagnostics"].items()
        assert entry["gradient_evaluations"] == 30
        assert entry["seconds"] == {"train_s": 1.0, "sample_s": 1.0, "eval_s": 1.0, "wall_s": 3.5}
    assert record["cells"][1]["overrides"] == ["model.lora.rank=2", "sampler.name=sghmc"]
    rows = list(csv.DictReader((root / "comparison.csv").read_text().splitlines()))
    assert [row["model.lora.rank"] for row in rows] == ["2", "2", "4", "4"]
    assert [float(row["nll"]) for row in rows] == [0.1 * i for i in (1, 2, 3, 4)]
    assert {row["ess_per_1000"] for row in rows} == {"500.0"}
    assert {row["rhat_max"] for row in rows} == {""}


def test_cells_that_differ_in_their_sampler_share_a_warm_start(
    config: Path, trainer: Trainer
) -> None:
    root = compare(config, RANKS, QUIET)
    first, third = str(root / NAMES[0]), str(root / NAMES[2])
    assert [c.train.starts_from for c in trainer.configs] == [None, first, None, third]
    found = cells(root)
    assert [found[n]["warm_start"] for n in NAMES] == [NAMES[0], NAMES[0], NAMES[2], NAMES[2]]
    assert [found[n]["starts_from"] for n in NAMES] == [None, NAMES[0], None, NAMES[2]]


def test_other_chains_need_other_warm_starts(config: Path, trainer: Trainer) -> None:
    compare(config, ["sampler.chains=2,4", "sampler.temperature=1,0.5"], QUIET)
    given = [c.train.starts_from is None for c in trainer.configs]
    assert given == [True, False, True, False]


def test_warm_starts_that_the_user_names_are_everyones(config: Path, trainer: Trainer) -> None:
    root = compare(config, ["sampler.name=sgld,sghmc", "train.starts_from=runs/x"], QUIET)
    assert [c.train.starts_from for c in trainer.configs] == ["runs/x", "runs/x"]
    assert {entry["warm_start"] for entry in read(root)["cells"]} == {"runs/x"}
    compare(config, ["sampler.name=sgld,sghmc", "train.starts_from=runs/x"], QUIET)
    assert len(trainer.configs) == 2


def test_a_shared_start_is_one_fit(config: Path, trainer: Trainer) -> None:
    compare(config, ["sampler.name=sgld,sghmc", "train.starts=shared"], QUIET)
    assert [c.train.starts_from is None for c in trainer.configs] == [True, False]


def test_finished_cells_are_not_run_again(
    config: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    root = compare(config, RANKS, QUIET)
    before, table = snapshot(root), (root / "comparison.csv").read_bytes()
    assert compare(config, RANKS, Progress(terminal=False)) == root
    assert len(trainer.configs) == 4
    after = snapshot(root)
    assert {k: v for k, v in after.items() if "/" in k} == {
        k: v for k, v in before.items() if "/" in k
    }
    assert (root / "comparison.csv").read_bytes() == table
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in before.items()}
    printed = capsys.readouterr().out
    assert f"[1/4] {NAMES[0]}: already done" in printed
    assert printed.count("already done") == 4


def test_an_interrupted_comparison_goes_on_where_it_was(
    config: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.on[3] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compare(config, [*RANKS, "output.overwrite=true"], Progress(terminal=False))
    root = config.parent / "out"
    statuses = [entry["status"] for entry in read(root)["cells"]]
    assert statuses == ["finished", "finished", "interrupted", "pending"]
    printed = capsys.readouterr().out
    command = f"bayesian-lora compare {config} {' '.join(RANKS)}\n"
    assert f"2 of 4 cells are done and stay in {root}; go on with: {command}" in printed
    before = {name: snapshot(root / name) for name in NAMES[:2]}
    compare(config, RANKS, QUIET)
    assert trainer.names[3:] == NAMES[2:]
    assert {name: snapshot(root / name) for name in NAMES[:2]} == before
    assert {entry["status"] for entry in read(root)["cells"]} == {"finished"}
    assert [entry["error"] for entry in read(root)["cells"]] == [None] * 4
    assert trainer.configs[3].train.starts_from is None
    assert trainer.configs[4].train.starts_from == str(root / NAMES[2])


def test_a_killed_comparison_goes_on_too(config: Path, trainer: Trainer) -> None:
    """As a kill leaves it: the record and the folder say running."""
    root = compare(config, RANKS, QUIET)
    record = read(root)
    record["cells"][1]["status"] = "running"
    write_json(root / "comparison.json", record)
    write_json(root / NAMES[1] / "run.json", {"status": "running"})
    compare(config, RANKS, QUIET)
    assert trainer.names[4:] == [NAMES[1]]
    assert trainer.configs[4].train.starts_from == str(root / NAMES[0])


def test_other_errors_are_recorded_and_raised(config: Path, trainer: Trainer) -> None:
    trainer.on[1] = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(config, RANKS, QUIET)
    entry = read(config.parent / "out")["cells"][0]
    assert (entry["status"], entry["error"]) == ("interrupted", "RuntimeError out of memory")


def test_a_cell_that_fails_does_not_keep_the_others(
    config: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.on[1] = InputError("sampler.step_size=1: unstable")
    root = compare(config, RANKS, Progress(terminal=False))
    assert failed_cells(root) == [NAMES[0]]
    found = cells(root)
    assert found[NAMES[0]]["error"] == "sampler.step_size=1: unstable"
    assert found[NAMES[1]]["status"] == "finished"
    printed = capsys.readouterr().out
    assert f"{NAMES[0]} failed: sampler.step_size=1: unstable" in printed
    # Its warm start was whole, so the others take it, and it takes it back from them.
    assert found[NAMES[1]]["starts_from"] == NAMES[0]
    compare(config, RANKS, QUIET)
    assert trainer.names[4:] == [NAMES[0]]
    assert trainer.configs[4].train.starts_from == str(root / NAMES[1])
    assert cells(root)[NAMES[0]]["warm_start"] == NAMES[0]
    assert failed_cells(root) == []
    compare(config, RANKS, QUIET)  # which still takes it for the same comparison
    assert len(trainer.configs) == 5


def test_a_broken_warm_start_is_not_shared(
    config: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.on[1] = InputError("the loss is not finite")
    run = trainer.__call__

    def without_map(config: Config, progress: Progress) -> Path:
        try:
            return run(config, progress)
        except InputError:
            (Path(str(config.output.dir)) / "map/chain_1/adapter_model.safetensors").unlink()
            raise

    monkeypatch.setattr(module, "train", without_map)
    compare(config, RANKS, QUIET)
    assert trainer.configs[1].train.starts_from is None


def test_a_folder_that_was_changed_is_run_again(config: Path, trainer: Trainer) -> None:
    root = compare(config, RANKS, QUIET)
    changed = (root / NAMES[2] / "config.yaml").read_text().replace("seed: 0", "seed: 1")
    (root / NAMES[2] / "config.yaml").write_text(changed)
    (root / NAMES[3] / "metrics.json").write_text("{")
    compare(config, RANKS, QUIET)
    assert trainer.names[4:] == NAMES[2:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.lora.rank=2,8", RANKS[1]], r"axis model\.lora\.rank: 2,4 there, 2,8 here"),
        (RANKS[::-1], r"axes: model\.lora\.rank, sampler\.name there, sampler\.name, model"),
        ([RANKS[0]], r"axis sampler\.name: sgld,sghmc there, nothing here"),
        ([*RANKS, "seed=1"], r"\(seed: 0 there, 1 here\)"),
        ([*RANKS, "train.starts_from=x"], r"\(train\.starts_from: null there, x here\)"),
    ],
)
def test_another_comparison_is_replaced_only_when_told(
    config: Path, trainer: Trainer, arguments: list[str], message: str
) -> None:
    root = compare(config, RANKS, QUIET)
    (root / "notes.txt").write_text("mine")
    before = snapshot(root)
    with pytest.raises(InputError, match=message) as raised:
        compare(config, arguments, QUIET)
    assert "output.overwrite=true" in str(raised.value)
    assert snapshot(root) == before
    assert len(trainer.configs) == 4
    compare(config, [*arguments, "output.overwrite=true"], QUIET)
    assert trainer.names[4:] == [entry["name"] for entry in read(root)["cells"]]
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    assert folders == {entry["folder"] for entry in read(root)["cells"]}
    assert (root / "notes.txt").read_text() == "mine"


def test_a_folder_with_something_else_is_refused(config: Path, trainer: Trainer) -> None:
    root = config.parent / "out"
    root.mkdir()
    (root / "notes.txt").write_text("mine")
    for text, message in (
        (None, "holds other files and no run"),
        ("run.json", "holds a single run; name another folder"),
        ("comparison.json", "damaged, it is no comparison's record"),
    ):
        if text is not None:
            (root / text).write_text("{}")
        with pytest.raises(InputError, match=message):
            compare(config, [*RANKS, "output.overwrite=true"], QUIET)
        (root / "run.json").unlink(missing_ok=True)
    assert trainer.configs == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sampler.name=sgld,psgldd", r"^cell sampler\.name=psgldd: "),
        ("data.name=synthetic,sst3", r"^cell data\.name=sst3: .*sst3"),
        ("device=cpu,tpu", r"^cell device=tpu: device='tpu': choose"),
        ("data.dir=null,no/folder", r"^cell data\.dir=no/folder: .*is not a folder"),
    ],
)
def test_nothing_begins_before_every_cell_is_valid(
    config: Path, trainer: Trainer, argument: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare(config, [argument], QUIET)
    assert trainer.configs == []
    assert [path.name for path in config.parent.iterdir()] == ["small.yaml"]


def test_the_record_is_whole_after_every_cell(
    config: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    run = trainer.__call__

    def look(config: Config, progress: Progress) -> Path:
        root = Path(str(config.output.dir)).parent
        seen.append([entry["status"] for entry in read(root)["cells"]])
        assert len((root / "comparison.csv").read_text().splitlines()) == 3
        return run(config, progress)

    monkeypatch.setattr(module, "train", look)
    compare(config, ["seed=1,2"], QUIET)
    assert seen == [["running", "pending"], ["finished", "running"]]


def test_the_sections_axes_are_used_without_any_on_the_command(
    config: Path, trainer: Trainer
) -> None:
    text = config.read_text() + "compare:\n  sampler.name: [sgld, sam_sgld]\n"
    config.write_text(text)
    root = compare(config, ["sampler.rho=0.1"], QUIET)
    assert trainer.names == ["sampler.name=sgld", "sampler.name=sam_sgld"]
    assert {c.sampler.rho for c in trainer.configs} == {0.1}
    assert all(c.compare == {} for c in trainer.configs)
    assert (root / trainer.names[0] / "config.yaml").is_file()
