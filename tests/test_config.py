"""The schema of a run: defaults, round trip, and one clear line for whatever is wrong."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bayesian_lora.config import (
    PLANNED_SAMPLERS,
    SAMPLERS,
    Config,
    build_config,
    dump_config,
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


def keys(value: Any = Config, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted."""
    found = []
    for field in dataclasses.fields(value):
        found.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            found += keys(field.type, f"{prefix}{field.name}.")
    return found


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.chians=2", "Did you mean: 'chains'"),
        ("sampler.chains=two", "sampler.chains: Value 'two' of type 'str' could not be converted"),
        ("sampler.chains=", "sampler.chains: Incompatible value 'None'"),
        ("data.name=[sst2", "the value is not YAML"),
        ("data=sst2", "str is not a subclass of DataConfig"),
        ("data.name.x=1", "data.name"),
        ("data..name=x", "Key '' not in 'DataConfig'"),
        ("data.files=[a.csv]", "data.files"),
    ],
)
def test_wrong_overrides_are_named(override: str, message: str) -> None:
    found = refused({}, override)
    assert found.startswith(f"override {override!r}: ")
    assert message in found


@pytest.mark.parametrize("key", [key for key in keys() if len(key.rpartition(".")[2]) > 3])
def test_a_misspelt_key_names_the_nearest(key: str) -> None:
    section, _, name = key.rpartition(".")
    misspelt = name[:-2] + name[-1] + name[-2] + "s"
    raw: Any = {misspelt: 1}
    for part in reversed(section.split(".") if section else []):
        raw = {part: raw}
    message = refused(raw)
    assert f"Key '{misspelt}' not in" in message
    assert f"Did you mean: '{name}'?" in message


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
            "sampler.step_size=-0.0001: input should be greater than 0",
        ),
        ("sampler: {step_size: .nan}", "sampler.step_size=nan: input should be a finite number"),
        ("sampler: {step_size: .inf}", "sampler.step_size=inf: input should be a finite number"),
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
        ("prior: {std: 0}", "prior.std=0.0: input should be greater than 0"),
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


@pytest.mark.parametrize("name", PLANNED_SAMPLERS)
def test_a_planned_sampler_is_one_line(name: str) -> None:
    message = refused({"sampler": {"name": name}})
    assert message.startswith(f"sampler.name={name}: not in this version yet")
    assert all(known in message for known in SAMPLERS)


def test_an_unknown_sampler_lists_the_known_ones() -> None:
    message = refused({"sampler": {"name": "nuts"}})
    assert message.startswith("sampler.name=nuts: unknown sampler; known: ")
    assert all(name in message for name in (*SAMPLERS, *PLANNED_SAMPLERS))


def test_keys_that_contradict_each_other_are_refused() -> None:
    early = {"train": {"early_stopping": True}, "data": {"validation_share": 0}}
    assert "set data.validation_share=0.1" in refused(early)
    assert "set train.early_stopping=true" in refused({"train": {"patience": 2}})
    both = {"train": {"patience": 2, "early_stopping": True}}
    assert build_config(both).train.patience == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- data\n- model\n", "a config is a mapping of keys to values, found a list"),
        (b"data: {name: sst2", "not a readable YAML file"),
        (b"data: a: b", "not a readable YAML file"),
        (b"seed: 1\nseed: 2", "duplicate key"),
        (b"5", "not a readable YAML file"),
        (b"\xff\xfe\x00\x01", "not a readable YAML file"),
        (b"seed: \x00", "not a readable YAML file"),
        (b"data: &a {files: *a}", "not a readable YAML file"),
        (b"? [a]\n: 1", "not a readable YAML file"),
        (b"null: 1", "not a readable YAML file"),
        (b"seed: !!python/object/apply:os.getcwd []", "not a readable YAML file"),
    ],
)
def test_files_that_are_no_config_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{message}") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError, match=r"not found: give the path of a YAML file"):
            load_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_config_files_validate(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# "), "it opens with how to run it"
    try:
        config = load_config(path)
    except InputError as error:
        assert re.fullmatch(r"sampler\.name=\w+: not in this version yet; .*", str(error))
    else:
        assert config.output.dir == str(Path("runs") / path.stem)


NAMES = sorted({part for key in keys() for part in key.split(".")})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=3)
    | st.sampled_from(["auto", "sgld", "???", "${seed}", "${", "1e-3", "float64", "shared", "\\"])
)
KEYS = st.sampled_from(NAMES) | st.text(max_size=5) | st.integers() | st.booleans() | st.floats()
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def only_input_errors(path: Path, overrides: list[str]) -> None:
    try:
        config = load_config(path, overrides)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, Config)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "fuzz.yaml"


@given(st.dictionaries(st.sampled_from(NAMES) | KEYS, TREES, max_size=4))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@example({"data": {"files": [1]}})
def test_whatever_the_yaml_the_reader_gives_a_config_or_an_input_error(
    scratch: Path, raw: dict[Any, Any]
) -> None:
    scratch.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    only_input_errors(scratch, [])


@given(st.binary(max_size=60) | st.text(alphabet=":{}[]&*!|>-?'\"%@`#,\n\t ab$.", max_size=40))
@settings(max_examples=300, deadline=None)
def test_whatever_the_bytes_the_reader_gives_a_config_or_an_input_error(
    scratch: Path, content: bytes | str
) -> None:
    scratch.write_bytes(content if isinstance(content, bytes) else content.encode())
    only_input_errors(scratch, [])


@given(
    st.sampled_from(keys()) | st.text(alphabet="data.[]${}='\"\\ \n", max_size=12),
    st.text(max_size=12) | st.text(alphabet=":{}[]&*!|>-?'\"%@`#,\n\t ab$.0123", max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_whatever_the_override_the_reader_gives_a_config_or_an_input_error(
    scratch: Path, key: str, value: str
) -> None:
    scratch.write_text("", encoding="utf-8")
    only_input_errors(scratch, [f"{key}={value}"])


PLAIN = st.text(alphabet="abc/.- é'\"#:{}[],&*!%@`0\t", max_size=12)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**40),
            "data": st.fixed_dictionaries(
                {},
                optional={
                    "name": PLAIN,
                    "dir": st.none() | PLAIN,
                    "files": st.dictionaries(PLAIN.filter(bool), PLAIN, max_size=2),
                    "text_columns": st.lists(PLAIN, max_size=2),
                    "train_examples": st.none() | st.integers(2, 10**6),
                    "regression": st.booleans(),
                },
            ),
            "model": st.fixed_dictionaries(
                {"lora": st.fixed_dictionaries({"alpha": st.floats(1e-300, 1e300)})},
                optional={"name": PLAIN},
            ),
            "sampler": st.fixed_dictionaries({"step_size": st.floats(1e-12, 1e3)}),
            "output": st.fixed_dictionaries({"dir": PLAIN}),
        },
    )
)
@settings(max_examples=150, deadline=None)
def test_a_dumped_config_loads_back_equal(scratch: Path, raw: dict[str, Any]) -> None:
    config = build_config(raw)
    scratch.write_text(dump_config(config), encoding="utf-8")
    back = load_config(scratch)
    if config.output.dir is None:
        back.output.dir = None
    assert back == config
    assert dump_config(back) == dump_config(config)
