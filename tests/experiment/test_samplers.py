"""From a config to its sampler, schedule and account; warm starts of another run; the prior search.

Shapes: M chains.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesian_lora import Ensemble
from bayesian_lora.account import Account
from bayesian_lora.config import SAMPLERS, Config, build_config
from bayesian_lora.ensemble import map_ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment import phases
from bayesian_lora.experiment.priors import prior_lines, search_lines
from bayesian_lora.experiment.samplers import idle_keys, make_chains, make_sampler, open_account
from bayesian_lora.experiment.setup import Prior, Setup, prepare
from bayesian_lora.experiment.train import train
from bayesian_lora.progress import Progress
from bayesian_lora.samplers import CSGLD, MODULES
from bayesian_lora.samplers.schedules import CycleThinning
from bayesian_lora.sampling import Chains

BASE: dict[str, Any] = {
    "data": {"name": "synthetic", "train_examples": 40, "batch_size": 8, "max_length": 48},
    "model": {"lora": {"rank": 2, "alpha": 4.0}},
    "prior": {"std": 0.3},
    "train": {"epochs": 1, "lr": 5.0e-3},
    "sampler": {
        "step_size": "auto",
        "burn_in": 4,
        "thin": 2,
        "num_samples": 4,
        "chains": 2,
        "cycle_steps": 4,
    },
}
OWN = {
    "psgld": {"beta2": 0.8, "lambd": 0.01},
    "asgld": {"a": 0.2, "beta1": 0.5, "beta2": 0.6, "lambd": 0.01, "anneal": False},
    "sghmc": {"friction": 0.2, "integrator": "baoab"},
    "sgnht": {"friction": 0.2},
    "csgld": {"cycle_steps": 4, "explore_fraction": 0.25},
    "sam_sgld": {"rho": 0.2, "lambd": 0.01},
    "sam_sgld_rank1": {"rho": 0.2, "sigma_dir": -0.5, "u_mode": "cross_chain", "beta1": 0.3},
}

Make = Callable[..., Path]


def config_of(model: Path, folder: Path, *overrides: str) -> Config:
    return build_config(BASE, [f"model.name={model}", f"output.dir={folder}", *overrides])


@pytest.fixture(scope="module")
def setup(tiny_models: dict[str, Path]) -> Setup:
    config = config_of(tiny_models["bert"], Path("unused"))
    return prepare(config, Progress(quiet=True))


@pytest.fixture(scope="module")
def make(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    def run(*overrides: str, model: str = "bert") -> Path:
        folder = tmp_path_factory.mktemp("samplers") / "run"
        return train(config_of(tiny_models[model], folder, *overrides), Progress(quiet=True))

    return run


@pytest.fixture(scope="module")
def plain(make: Make) -> Path:
    return make()


def read(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_names_are_those_of_the_family() -> None:
    assert SAMPLERS.keys() == MODULES.keys()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_config_makes_its_sampler(setup: Setup, name: str) -> None:
    keys = [f"sampler.name={name}", "sampler.temperature=0.5", "sampler.step_size=1e-3"]
    keys += [f"sampler.{key}={value}" for key, value in OWN.get(name, {}).items()]
    config = config_of(Path("unused"), Path("unused"), *keys)
    sampler = make_sampler(config, setup.groups, 36, setup.streams)
    assert type(sampler).__name__ == MODULES[name]
    assert sampler.num_examples == 36
    assert sampler.num_chains == 2
    assert sampler.exactness
    assert sampler.law
    for group in sampler.param_groups:
        assert (group["lr"], group["prior_std"], group["temperature"]) == (1e-3, 0.3, 0.5)
    for key, value in OWN.get(name, {}).items():
        owner = sampler.cycle if isinstance(sampler, CSGLD) else sampler
        assert getattr(owner, "steps" if key == "cycle_steps" else key) == value


def test_adapting_samplers_learn_how_long_burn_in_is(setup: Setup) -> None:
    for name in ("psgld", "asgld", "sam_sgld_rank1"):
        config = config_of(Path("x"), Path("x"), f"sampler.name={name}", "sampler.burn_in=7")
        assert make_sampler(config, setup.groups, 36, setup.streams).burn_in == 7  # type: ignore[attr-defined]


def test_keys_without_effect_are_known() -> None:
    keys = ("sampler.rho=0.1", "sampler.beta2=0.5")
    config = config_of(Path("x"), Path("x"), "sampler.name=psgld", *keys)
    assert idle_keys(config.sampler) == ["cycle_steps", "rho"]


def test_cycles_decide_which_draws_are_kept(setup: Setup) -> None:
    setup.config.sampler.name = "csgld"
    try:
        chains = make_chains(setup)
    finally:
        setup.config.sampler.name = "sgld"
    assert isinstance(chains.thinning, CycleThinning)
    assert [s for s in range(1, 9) if chains.thinning.draw_after(s) is not None] == [4, 8]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_from_its_config(make: Make, plain: Path, name: str) -> None:
    """Four chains' worth of the whole pipeline, from the same warm starts, with `auto`."""
    folder = make(f"sampler.name={name}", f"train.starts_from={plain}")
    sampler = read(folder / "ensemble.json")["sampler"]
    assert sampler["name"] == name
    assert sampler["exactness"]
    assert sampler["law"]
    assert sampler["variance_reduction"] is False
    account = read(folder / "run.json")["account"]
    assert account["auto"] is True
    assert sampler["step_size"] == pytest.approx(account["step_size"])
    assert account["discretisation"] + account["heat"] == pytest.approx(0.1) or (
        account["step_size"] == pytest.approx(0.5 * account["largest_stable"])
    )
    assert len(Ensemble.load(folder)) == 4
    metrics = read(folder / "metrics.json")
    assert np.isfinite(metrics["ensemble"]["nll"])
    if name == "csgld":
        steps = [row["step"] for row in log(folder)]
        assert max(steps) == 8, "two draws a chain, one a cycle of four"


def test_samplers_from_one_start_differ(make: Make, plain: Path) -> None:
    other = make("sampler.name=sghmc", f"train.starts_from={plain}")
    for a, b in zip(map_ensemble(plain), map_ensemble(other), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = Ensemble.load(plain).members[0], Ensemble.load(other).members[0]
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_taking_starts_over_changes_no_draw(make: Make, plain: Path) -> None:
    """The sampler's streams do not depend on who fitted the start."""
    again = make(f"train.starts_from={plain}")
    for a, b in zip(Ensemble.load(plain), Ensemble.load(again), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("sampler.chains=4",), "it has 2 warm starts, this run wants 4"),
        (("model.lora.rank=4",), "the adapter differs"),
        (("data.train_examples=32",), "the training data differs"),
        (("prior.std=0.2",), "prior.std differs"),
        (("prior.head_std=0.2",), "prior.head_std differs"),
    ],
)
def test_starts_of_another_setting_are_refused(
    make: Make, plain: Path, keys: tuple[str, ...], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        make(f"train.starts_from={plain}", *keys)


def test_starts_that_are_not_there(make: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run with warm starts there"):
        make(f"train.starts_from={tmp_path}")


def test_an_unstable_step_stops_before_sampling(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(tiny_models["bert"], tmp_path / "run", "sampler.step_size=1e6")
    with pytest.raises(InputError, match=r"unstable.* set sampler\.step_size below that"):
        train(config, Progress(quiet=True))
    assert read(tmp_path / "run" / "run.json")["status"] == "stopped"
    assert len(map_ensemble(tmp_path / "run")) == 2, "the warm starts are kept"


def test_variance_reduction_runs_and_is_recorded(make: Make, plain: Path) -> None:
    keys = ("sampler.variance_reduction=true", "sampler.name=sam_sgld")
    folder = make(f"train.starts_from={plain}", *keys)
    assert read(folder / "ensemble.json")["sampler"]["variance_reduction"] is True
    spent = read(folder / "run.json")["gradient_evaluations"]
    assert spent > 5 + 3 * 8, "one full pass, three gradients a step of SAM"


def test_chains_of_one_fit_have_their_control_variate_there(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at their spread starts, which they leave: at the fit the posterior lies around."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def opened(setup: Setup, chains: Chains) -> Account:
        assert chains.control is not None
        starts = setup.model.chain_parameters().values()
        seen.extend(
            (a, p.detach().clone()) for a, p in zip(chains.control.anchor, starts, strict=True)
        )
        return open_account(setup, chains)

    monkeypatch.setattr(phases, "open_account", opened)
    keys = ("train.starts=shared", "train.jitter=0.05", "sampler.variance_reduction=true")
    folder = make(*keys)
    (fit,) = map_ensemble(folder)
    assert len(seen) == len(dict(fit)) > 4
    for stored in fit.values():
        rows = [a for a, _ in seen if a.shape[1:] == stored.shape and torch.equal(a[0], stored)]
        assert rows
        assert all(torch.equal(a[1], stored) for a in rows)
    away = torch.cat([(p - a).flatten(1) for a, p in seen], dim=1)
    assert away.std(1).tolist() == pytest.approx([0.05, 0.05], rel=0.15)


def test_the_prior_search_takes_the_best_candidate(make: Make) -> None:
    keys = ("prior.std=auto", "prior.candidates=[0.4, 0.02]", "data.train_examples=120")
    folder = make(*keys, "train.epochs=3")
    found = read(folder / "run.json")["prior_search"]
    assert found["candidates"] == [0.02, 0.4]
    assert found["std"] == found["candidates"][int(np.argmin(found["validation_nll"]))]
    assert len(set(found["validation_nll"])) == 2, "the candidates' fits differ"
    prior = read(folder / "ensemble.json")["sampler"]["prior"]
    assert prior == {"std": found["std"], "head_std": found["std"]}
    assert log(folder)[0]["phase"] == "prior"
    taken = make(*keys, f"train.starts_from={folder}")
    assert read(taken / "ensemble.json")["sampler"]["prior"] == prior
    assert read(taken / "run.json")["prior_search"] is None


def test_a_wide_prior_grows_more(make: Make) -> None:
    """The candidates' priors act: the narrow one's factors stay smaller."""
    from bayesian_lora.experiment import priors

    norms = {}
    kept = priors.WarmStart

    class Watched(kept):  # type: ignore[misc, valid-type]
        def finish(self) -> None:
            super().finish()
            for m, std in enumerate(torch.as_tensor(self.groups[0].std).tolist()):
                norms[round(std, 3)] = sum(
                    float(t.detach()[m].square().sum()) for t in self.groups[0].tensors
                )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(priors, "WarmStart", Watched)
        make("prior.std=auto", "prior.candidates=[0.02, 0.4]", "train.epochs=4")
    assert norms[0.02] < 0.7 * norms[0.4]


def test_the_search_prints_its_table() -> None:
    found = {"std": 0.1, "candidates": [0.05, 0.1], "validation_nll": [0.5, 0.4]}
    lines = search_lines(found)
    assert lines[2].endswith("0.4000  <- chosen")
    assert "consider going further" in lines[-1]
    inner = {"std": 0.1, "candidates": [0.05, 0.1, 0.2], "validation_nll": [0.5, 0.4, 0.6]}
    assert len(search_lines(inner)) == 4


def test_the_prior_that_acts_is_printed(setup: Setup) -> None:
    kept = setup.prior
    try:
        setup.prior = Prior(0.2, 0.2)
        assert prior_lines(setup)[0].startswith("Prior: N(0, 0.2²) on every parameter; ")
        setup.prior = Prior(0.1, 0.5)
        expected = "Prior: N(0, 0.1²) on the factors, N(0, 0.5²) on the head; "
        line, warning = prior_lines(setup)
        assert line.startswith(expected)
        assert "an entry of ΔW has prior sd 0.02828" in line  # (α/r)·√r·σ² = 2·√2·.01
        assert "penalty of 2.8" in warning  # 1/(36 · .01)
        assert "raise prior.std" in warning
        setup.prior = Prior(1.0, 1.0)
        assert len(prior_lines(setup)) == 1
    finally:
        setup.prior = kept
