"""The schema of a run: defaults, round trip, and one clear line for whatever is wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bayesian_lora.config import (
    SAMPLERS,
    build_config,
    load_config,
)
from bayesian_lora.errors import InputError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.y*ml"))
SEED_EXAMPLE = """
data:
  name: sst2
  batch_size: 32
  max_length: 128

model:
  name: bert-base-uncased
  lora:
    rank: 8
    alpha: 16.0
    dropout: 0.1

sampler:
  name: sgld
  step_size: 5.0e-4
  burn_in: 1000
  thin: 200
  num_samples: 20
"""


def written(folder: Path, text: str, name: str = "experiment.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(raw: dict[str, Any] | str, *overrides: str) -> str:
    """The message of a config that must be refused, checked to be one line."""
    value = yaml.safe_load(raw) if isinstance(raw, str) else raw
    with pytest.raises(InputError) as caught:
        build_config(value, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_seed_s_example_is_a_config(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, SEED_EXAMPLE, "experiment_sst2_bert_sgld.yaml"))
    assert (config.data.name, config.data.batch_size, config.data.max_length) == ("sst2", 32, 128)
    assert config.model.name == "bert-base-uncased"
    lora = config.model.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 16.0, 0.1)
    sampler = config.sampler
    assert (sampler.name, sampler.step_size) == ("sgld", 5e-4)
    assert (sampler.burn_in, sampler.thin, sampler.num_samples) == (1000, 200, 20)
    assert config.output.dir == str(Path("runs") / "experiment_sst2_bert_sgld")


def test_defaults_are_the_seed_s_and_the_design_s() -> None:
    """The seed's example without its values, 10 epochs of warm start and the design's 4 chains."""
    config = build_config({})
    example = build_config(yaml.safe_load(SEED_EXAMPLE))
    assert config.sampler == example.sampler
    assert config.model.lora == example.model.lora
    assert (config.data.batch_size, config.data.max_length) == (32, 128)
    assert config.train.epochs == 10
    assert config.sampler.chains == 4
    assert config.sampler.temperature == 1.0
    assert config.data.dir is None
    assert config.output.dir is None


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}"])
def test_an_empty_file_is_all_defaults(tmp_path: Path, text: str) -> None:
    config = load_config(written(tmp_path, text))
    config.output.dir = None
    assert config == build_config({})


def test_numbers_may_be_written_as_yaml_1_1_misreads_them(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "sampler: {step_size: 1e-4}\nprior: {std: 1}"))
    assert config.sampler.step_size == 1e-4
    assert config.prior.std == 1.0
    assert isinstance(config.prior.std, float)


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, SEED_EXAMPLE)
    overrides = [
        "model.name=minilm",
        "data.train_examples=5000",
        "sampler.step_size=1e-3",
        "model.lora.target_modules=[query, key]",
        "data.files.train=my.csv",
        "sampler.chains=2",
        "sampler.chains=5",
        "output.dir=elsewhere",
        "data.dir=null",
    ]
    config = load_config(path, overrides)
    assert config.model.name == "minilm"
    assert config.model.lora.rank == 8
    assert config.data.train_examples == 5000
    assert config.sampler.step_size == 1e-3
    assert config.model.lora.target_modules == ["query", "key"]
    assert config.data.files == {"train": "my.csv"}
    assert config.sampler.chains == 5, "the last one counts"
    assert config.output.dir == "elsewhere"
    assert config.data.dir is None


@pytest.mark.parametrize("override", ["sampler.chains", "=2", "", " =2", "sampler.chains:2"])
def test_overrides_without_key_or_value_are_refused(override: str) -> None:
    assert f"override {override!r}: write key=value" in refused({}, override)


def test_a_backslash_cannot_hide_where_the_value_begins() -> None:
    """The parser in C would end the process over the real value, which is nested too deeply."""
    assert "a key has no backslash" in refused({}, "seed\\==" + "[" * 100_000)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.chians=2", "Did you mean one of: 'chains', 'thin', 'bias'?"),
        ("sampler.chains=two", "sampler.chains: Value 'two' of type 'str' could not be converted"),
        ("sampler.chains=", "sampler.chains: Incompatible value 'None'"),
        ("data.name=[sst2", "the value is not YAML"),
        ("data=sst2", "str is not a subclass of DataConfig"),
        ("data.name.x=1", "data.name"),
        ("data..name=x", "Key '' not in 'DataConfig'"),
        ("data.files=[a.csv]", "a list stands where a mapping is wanted"),
        ("[data=sst2", "unpaired brackets"),
    ],
)
def test_wrong_overrides_are_named(override: str, message: str) -> None:
    found = refused({}, override)
    assert found.startswith(f"override {override!r}: ")
    assert message in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {lora: {rank: 0}}",
            "model.lora.rank=0: input should be greater than or equal to 1",
        ),
        ("model: {lora: {alpha: 0}}", "model.lora.alpha=0.0: input should be greater than 0"),
        ("model: {lora: {dropout: 1}}", "model.lora.dropout=1.0: input should be less than 1"),
        (
            "sampler: {step_size: -1e-4}",
            "sampler.step_size='-1e-4': input should be greater than 0, or auto",
        ),
        ("sampler: {step_size: .nan}", "sampler.step_size=nan: input should be greater than 0"),
        ("sampler: {step_size: .inf}", "sampler.step_size=inf: input should be greater than 0"),
        ("sampler: {thin: 0}", "sampler.thin=0: input should be greater than or equal to 1"),
        (
            "sampler: {burn_in: -1}",
            "sampler.burn_in=-1: input should be greater than or equal to 0",
        ),
        ("sampler: {chains: 0}", "sampler.chains=0: input should be greater than or equal to 1"),
        (
            "sampler: {num_samples: 0}",
            "sampler.num_samples=0: input should be greater than or equal",
        ),
        ("sampler: {temperature: -1}", "sampler.temperature=-1.0: input should be greater than or"),
        (
            "sampler: {trace_every: 0}",
            "sampler.trace_every=0: input should be greater than or equal",
        ),
        ("prior: {std: 0}", "prior.std=0: input should be greater than 0"),
        ("prior: {head_std: -1}", "prior.head_std=-1.0: input should be greater than 0"),
        ("data: {batch_size: 0}", "data.batch_size=0: input should be greater than or equal to 1"),
        ("data: {max_length: 3}", "data.max_length=3: input should be greater than or equal to 4"),
        (
            "data: {train_examples: 1}",
            "data.train_examples=1: input should be greater than or equal",
        ),
        ("data: {validation_share: 1}", "data.validation_share=1.0: input should be less than 1"),
        ("train: {epochs: -1}", "train.epochs=-1: input should be greater than or equal to 0"),
        ("train: {lr: 0}", "train.lr=0.0: input should be greater than 0"),
        ("seed: -1", "seed=-1: input should be greater than or equal to 0"),
        ("model: {dtype: int8}", "model.dtype: Invalid value 'int8', expected one of ['float32',"),
        ("train: {starts: both}", "train.starts: Invalid value 'both', expected one of"),
    ],
)
def test_values_out_of_range_name_key_value_and_range(text: str, message: str) -> None:
    assert message in refused(text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sampler: {thin: 2.5}", "sampler.thin"),
        ("sampler: {thin: true}", "sampler.thin"),
        ("sampler: {thin: often}", "sampler.thin"),
        ("sampler: {thin: null}", "sampler.thin"),
        ("sampler: {thin: [1]}", "sampler.thin"),
        ("sampler: {step_size: small}", "sampler.step_size"),
        ("sampler: sgld", "SamplerConfig"),
        ("sampler: null", "sampler"),
        ("data: [sst2]", "DataConfig"),
        ("data: {files: [a.csv]}", "data.files"),
        ("data: {files: {train: [a.csv]}}", "data.files.train"),
        ("data: {text_columns: sentence}", "data.text_columns"),
        ("data: {regression: perhaps}", "data.regression"),
        ("model: {name: null}", "model.name"),
        ("model: {lora: {target_modules: 5}}", "model.lora.target_modules"),
        ("model: {lora: {target_modules: query}}", "model.lora.target_modules='query'"),
        ("model: {lora: {target_modules: []}}", "model.lora.target_modules=[]"),
        ("seed: 2020-01-01", "seed"),
        ("seed: ${no_such_key}", "seed"),
    ],
)
def test_values_of_the_wrong_type_name_their_key(text: str, key: str) -> None:
    assert re.search(rf"(^|: |\b){re.escape(key)}", refused(text))


def test_chains_that_do_not_divide_the_samples_are_told_the_nearest_number() -> None:
    message = refused({"sampler": {"num_samples": 21, "chains": 4}})
    assert message == (
        "sampler.num_samples=21 is the total over all chains and must be a multiple of "
        "sampler.chains=4: set sampler.num_samples=24"
    )
    assert build_config({"sampler": {"num_samples": 24}}).sampler.num_samples == 24


def test_an_unknown_sampler_lists_the_known_ones() -> None:
    message = refused({"sampler": {"name": "nuts"}})
    assert message.startswith("sampler.name=nuts: unknown sampler")
    assert all(name in message for name in SAMPLERS)
    assert "did you mean sghmc?" in refused({"sampler": {"name": "sgmhc"}})


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_validates(name: str) -> None:
    assert build_config({"sampler": {"name": name}}).sampler.name == name


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"sigma_dir": -1.0}, "greater than -1"),
        ({"rho": -0.1}, "greater than or equal to 0"),
        ({"temperature": -1.0}, "greater than or equal to 0"),
        ({"beta1": 1.0}, "less than 1"),
        ({"beta2": -0.1}, "greater than or equal to 0"),
        ({"friction": 0.0}, "greater than 0"),
        ({"friction": 1.1}, "less than or equal to 1"),
        ({"thermostat_rate": 0.0}, "greater than 0"),
        ({"explore_fraction": 1.0}, "less than 1"),
        ({"cycle_steps": 1}, "greater than or equal to 2"),
        ({"bias": 1.0}, "less than 1"),
        ({"step_size": 0.0}, "greater than 0"),
        ({"step_size": "often"}, "sampler.step_size='often'"),
        ({"u_mode": "mine"}, "Invalid value 'mine', expected one of"),
        ({"integrator": "leapfrog"}, "Invalid value 'leapfrog', expected one of"),
        (
            {"name": "sam_sgld_rank1", "u_mode": "cross_chain", "chains": 1},
            "set sampler.chains=2 or more",
        ),
        ({"name": "psgld", "burn_in": 0}, "set sampler.burn_in=100 or more"),
        ({"name": "asgld", "burn_in": 0}, "set sampler.burn_in=100 or more"),
        ({"name": "sam_sgld_rank1", "burn_in": 0}, "set sampler.burn_in=100 or more"),
        ({"name": "sgnht", "temperature": 0}, "raise it or set sampler.name=sghmc"),
        ({"step_size": "auto", "temperature": 0}, "raise sampler.temperature"),
        ({"name": "csgld", "burn_in": 30, "cycle_steps": 20, "thin": 5}, "burn_in=40 or 0"),
        (
            {"name": "csgld", "burn_in": 0, "cycle_steps": 20, "thin": 11},
            "set sampler.thin=10 or less",
        ),
    ],
)
def test_what_samplers_ask_of_their_keys(keys: dict[str, Any], rule: str) -> None:
    message = refused({"sampler": keys})
    assert "sampler." in message
    assert rule in message


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "asgld", "burn_in": 0, "anneal": False},
        {"name": "sam_sgld_rank1", "burn_in": 0, "u_mode": "current"},
        {"name": "csgld", "burn_in": 40, "cycle_steps": 20, "thin": 10},
        {"step_size": "auto"},
        {"sigma_dir": -0.9, "rho": 0.0},
    ],
)
def test_what_samplers_allow(keys: dict[str, Any]) -> None:
    config = build_config({"sampler": keys})
    assert all(getattr(config.sampler, key) == value for key, value in keys.items())


def test_an_automatic_prior_needs_held_out_data_and_candidates() -> None:
    auto = {"prior": {"std": "auto"}}
    assert build_config(auto).prior.std == "auto"
    message = refused({**auto, "data": {"validation_share": 0}})
    assert "set data.validation_share=0.1" in message
    assert "at least one" in refused({"prior": {"candidates": []}})
    assert "prior.candidates" in refused({"prior": {"candidates": [0.1, -1.0]}})
    assert "prior.std='wide'" in refused({"prior": {"std": "wide"}})


def test_keys_that_contradict_each_other_are_refused() -> None:
    early = {"train": {"early_stopping": True}, "data": {"validation_share": 0}}
    assert "set data.validation_share=0.1" in refused(early)
    assert "set train.early_stopping=true" in refused({"train": {"patience": 2}})
    both = {"train": {"patience": 2, "early_stopping": True}}
    assert build_config(both).train.patience == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_config_files_validate(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# "), "it opens with how to run it"
    assert load_config(path).output.dir == str(Path("runs") / path.stem)
