"""`benchmarks/mixing_mrpc.py`: its configurations, its cost, when its target is met."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MIXED = {
    **{"rhat_max": 1.04, "ess_bulk_min": 150.0, "ess_tail_min": 120.0, "start_dispersion": 2.5},
    **{"t_eff": 1.2, "verdict": "mixed", "reason": "R-hat at most 1.04"},
    "quantities": {
        "log_posterior": {"rhat": 1.01, "ess_bulk": 300.0},
        "probe_logprob[0]": {"rhat": 1.04, "ess_bulk": 150.0},
        "constant": {"rhat": None, "ess_bulk": None},
    },
}


@pytest.fixture(scope="module")
def script(load: Callable[[str], Any]) -> Any:
    return load("mixing_mrpc")


def options(**given: Any) -> Namespace:
    usual = {"configuration": "narrow", "sampler": "sghmc+vr", "set": [], "quick": False}
    return Namespace(**{**usual, **given})


def test_the_target_is_met_where_all_three_hold(script: Any) -> None:
    assert script.target(MIXED).startswith("Target: met (R-hat 1.04, at most 1.05; ")


@pytest.mark.parametrize(
    ("figure", "value", "said"),
    [
        ("rhat_max", 1.06, "R-hat 1.06, at most 1.05"),
        ("ess_bulk_min", 99.0, "bulk ESS 99, at least 100"),
        ("start_dispersion", 1.9, "spread of the starts 1.9, at least 2"),
    ],
)
def test_the_target_is_missed_by_what_does_not_hold(
    script: Any, figure: str, value: float, said: str
) -> None:
    assert script.target({**MIXED, figure: value}) == f"Target: missed ({said})"


def test_a_figure_that_is_not_there_meets_nothing(script: Any) -> None:
    without = {**MIXED, "rhat_max": None, "rhat_max_reason": "1 chain"}
    assert script.target(without) == "Target: not available (1 chain)"


def test_the_worst_quantities_are_named_first(script: Any) -> None:
    assert script.worst(MIXED) == ["probe_logprob[0] 1.040 (150)", "log_posterior 1.010 (300)"]


def test_every_configuration_is_valid_and_says_what_it_is(script: Any, tmp_path: Path) -> None:
    figures = {"accuracy": 0.8, "nll": 0.5}
    metrics = {
        "diagnostics": MIXED,
        "map": {name: {"mean": value} for name, value in figures.items()},
        **{"map_ensemble": figures, "ensemble": figures, "sampler": {"step_size": 1e-3}},
        "cost": {"sampling_gradient_evaluations": 7000, "train_s": 60.0, "sample_s": 3000.0},
    }
    texts = set()
    for name in script.CONFIGURATIONS:
        config = script.config_of(options(configuration=name), tmp_path / name)
        assert config.sampler.variance_reduction
        own = config.train.starts == "independent"
        assert own == (config.sampler.step_size == "auto") == (name != "narrow")
        lines = script.result_lines(metrics, config)
        assert ("from fits of their own" if own else "from one fit, spread by 0.1") in lines[0]
        assert f"σ = {config.prior.std:g}" in lines[0]
        assert "| T_eff | 1.2 |" in lines
        assert "| gradients of a chain after burn-in | 7,000 |" in lines
        texts.add(lines[0])
    assert len(texts) == len(script.CONFIGURATIONS)
    assert not any(tmp_path.iterdir())


def test_the_cost_counts_every_gradient(script: Any, tmp_path: Path) -> None:
    given = ["data.train_examples=100", "data.batch_size=10", "train.epochs=3"]
    config = script.config_of(options(quick=True, set=given), tmp_path / "run")
    steps = config.sampler.burn_in + config.sampler.thin * config.sampler.num_samples // 4
    lines = script.cost_lines(config, 36.0)
    assert f"{4 * steps:,} chain-steps of 10 examples, 2 gradients each" in lines[0]
    # A tenth is held out of train: 9 batches an epoch.
    total = 3 * 9 + 2 * steps
    assert f"{total:,} gradient steps" in lines[0]
    assert f"{36 * total / 3600:.2f} hours" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--configuration", "wide"], "choose of narrow, last_layer, rank1"),
        (["--sampler", "sghmc+x"], "after + stands vr"),
        (["--set", "prior.stdd=1"], "prior.stdd"),
        (["--set", "device=tpu"], "device='tpu'"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_made(
    script: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    out = tmp_path / "out" / "run"
    assert script.main([*arguments, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not out.parent.exists()


@pytest.mark.slow
def test_the_toy_is_made_once_and_shown_again(
    script: Any,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    command = ["--quick", "--out", str(out), "--set", f"model.name={tiny_models['bert']}"]
    assert script.main(command) == 0
    text = (tmp_path / "run.md").read_text()
    assert "Target: missed" in text
    assert "| largest R-hat |" in text
    stamp = (out / "ensemble.json").stat().st_mtime_ns
    capsys.readouterr()
    assert script.main(command) == 0
    assert (out / "ensemble.json").stat().st_mtime_ns == stamp
    assert "Burn-in" not in capsys.readouterr().out
    assert (tmp_path / "run.md").read_text() == text
