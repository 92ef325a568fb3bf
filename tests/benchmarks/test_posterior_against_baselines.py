"""`benchmarks/posterior_against_baselines.py`: its plan, what it refuses, a toy of it all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayesian_lora.config import SAMPLERS, load_config
from bayesian_lora.errors import InputError
from bayesian_lora.utils.files import write_json

SYNTHETIC = ["synthetic"]


@pytest.fixture(scope="module")
def front(load: Callable[[str], Any]) -> Any:
    return load("posterior_against_baselines")


@pytest.fixture(scope="module")
def plan(load: Callable[[str], Any]) -> Any:
    return load("baselines_plan")


def test_the_plan_shares_fits_within_a_seed_and_the_prior_over_seeds(
    plan: Any, tmp_path: Path
) -> None:
    cells = plan.make_plan(["mrpc", "cola"], ["sgld", "sghmc+vr"], tmp_path)
    assert [cell.name for cell in cells[:3]] == [
        *("mrpc, seed 0, sgld", "mrpc, seed 0, sghmc+vr", "mrpc, seed 1, sgld"),
    ]
    assert len(cells) == 2 * 3 + 2 * 2
    first, second, third = cells[:3]
    assert (first.starts_from, first.prior_from) == ((), None)
    assert second.starts_from == (first.folder,)
    assert third.starts_from == ()
    assert third.prior_from == first.folder
    assert (third.config.seed, third.config.output.dir) == (1, str(third.folder))
    sampler = second.config.sampler
    assert (sampler.name, sampler.integrator) == ("sghmc", "baoab")
    assert sampler.variance_reduction
    assert not first.config.sampler.variance_reduction
    assert all(cell.config.train.early_stopping for cell in cells)
    assert not any(tmp_path.iterdir())


def test_later_seeds_take_the_prior_that_the_first_has_found(plan: Any, tmp_path: Path) -> None:
    first, _, third = plan.make_plan(["sst2"], ["sgld", "psgld"], tmp_path)[:3]
    assert first.resolved().prior.std == "auto"
    assert third.resolved() is None
    write_json(first.folder / "run.json", {"prior_search": {"std": 0.2}})
    assert third.resolved().prior.std == 0.2
    assert third.config.prior.std == "auto", "the plan itself does not change"


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("task", ["mrpc", "cola", "sst2"])
def test_a_cell_is_about_1000_chain_steps(plan: Any, tmp_path: Path, task: str, name: str) -> None:
    cell = plan.make_plan([task], [name], tmp_path, seeds=1)[0]
    assert cell.config.data.batch_size == 32
    work = plan.work_of(cell, plan.Sizes(3000, 400))
    assert 950 <= work.chain_steps <= 1050


@pytest.mark.parametrize("starts", ["independent", "shared"])
def test_a_step_is_timed_whatever_the_starts(
    front: Any, plan: Any, tiny_models: dict[str, Path], starts: str
) -> None:
    keys = (f"model.name={tiny_models['bert']}", f"train.starts={starts}")
    config = load_config(plan.CONFIGS / "demo.yaml", [*keys, "data.max_length=32"])
    assert 0 < front.step_seconds(config) < 60


def test_the_work_counts_fits_search_and_control_variates_once(plan: Any, tmp_path: Path) -> None:
    cells = plan.make_plan(["cola"], ["sgld", "sgld+vr"], tmp_path, seeds=2)
    sizes = plan.Sizes(train=320, evaluation=96)
    first, reduced, second, _ = (plan.work_of(cell, sizes) for cell in cells)
    assert (first.fit, first.search) == (8 * 10, 8 * 10), "four candidates in four chains"
    assert (reduced.fit, reduced.search) == (0, 0)
    assert (second.fit, second.search) == (80, 0)
    assert (first.sampling, reduced.sampling) == (250, 2 * 250 + 10)
    rows, members = 125 * 40, (20 + 4) * 96 / 4
    assert first.looking == pytest.approx((rows + members) / 32 / 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "mrcp"], "task 'mrcp' is not one of mrpc"),
        (["--only", "mrpc", "mrpc"], "each once"),
        (["--seeds", "0"], "--seeds 0"),
        (["--samplers", "sgldd"], "did you mean sgld"),
        (["--samplers", "sghmc+x"], "after + stands vr"),
        (["--samplers", "map"], "draws nothing"),
        (["--set", "train.early_stopping=false"], "early_stopping"),
        (["--set", "train.starts=shared"], "fits of their own"),
        (["--set", "train.starts_from=x"], "leave the key out"),
        (["--set", "output.overwrite=true"], "finished runs are kept"),
        (["--set", "sampler.chainz=3"], "chains"),
        (["--set", "device=tpu"], "device='tpu'"),
        (["--quick", "--only", "mrpc"], "one task"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_made(
    front: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    out = tmp_path / "out"
    only = [] if {"--only", "--quick"} & {*arguments} else ["--only", *SYNTHETIC]
    assert front.main([*arguments, *only, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not out.exists()


def test_a_folder_of_something_else_is_refused(
    front: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = tmp_path / "synthetic" / "seed_1" / "sgld" / "notes.txt"
    beside.parent.mkdir(parents=True)
    beside.write_text("mine")
    command = ["--only", *SYNTHETIC, "--samplers", "sgld", "--out", str(tmp_path), "--dry-run"]
    assert front.main(command) == 1
    assert "holds other files and no run" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_makes_nothing(
    front: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert front.main(["--only", *SYNTHETIC, "--dry-run", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    # demo.yaml: 4 chains of 10 + 5 · 5 steps, two samplers, two seeds.
    assert f"To be made: {4 * 4 * 35} chain-steps" in printed
    assert "synthetic, seed 1, sghmc+vr" in printed
    assert "Time: not measured" in printed
    assert not out.exists()


# --- A toy of it all --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_toy_ends_in_a_table_and_is_not_made_twice(
    front: Any,
    plan: Any,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--quick", "--out", str(tmp_path)]
    toy = ["--set", f"model.name={tiny_models['bert']}"]
    assert front.main([*command, *toy]) == 0
    text = (tmp_path / "table.md").read_text()
    assert "seeds: 2" in text
    assert "| sghmc+vr |" in text
    assert "Estimate for what is not finished" in capsys.readouterr().out
    cells = plan.make_plan(
        SYNTHETIC, ["sgld", "sghmc+vr"], tmp_path, overrides=[*front.QUICK, toy[1]]
    )
    priors = [cell.resolved().prior.std for cell in cells[1:]]
    assert len(set(priors)) == 1
    assert priors[0] in (0.2, 0.4)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert stamps
    assert front.main([*command, *toy]) == 0
    assert capsys.readouterr().out.count("already done") == 4
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert (tmp_path / "table.md").read_text() == text
    assert front.main([*command, *toy, "train.epochs=1"]) == 1
    assert "train.epochs: 2 there, 1 here" in capsys.readouterr().err
    with pytest.raises(InputError, match="another config"):
        plan.check_inputs(plan.make_plan(SYNTHETIC, ["sgld"], tmp_path, overrides=[toy[1]]))
