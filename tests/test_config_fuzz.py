"""The config reader on files that are none and on arbitrary input: a config or an `InputError`."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bayesian_lora.config import Config, build_config, dump_config, load_config
from bayesian_lora.errors import InputError


def keys(value: Any = Config, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted."""
    found = []
    for field in dataclasses.fields(value):
        found.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            found += keys(field.type, f"{prefix}{field.name}.")
    return found


def nested(key: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` of the dotted key a.b."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


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
        message = str(error)
    else:
        message = f"read as {type(config).__name__}"
    assert "\n" not in message


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "fuzz.yaml"


@given(st.builds(nested, st.sampled_from(keys()), TREES) | st.dictionaries(KEYS, TREES, max_size=4))
@settings(max_examples=120, deadline=None)
@example({"data": {"files": [1]}})
def test_whatever_the_yaml_the_reader_gives_a_config_or_an_input_error(
    scratch: Path, raw: dict[Any, Any]
) -> None:
    scratch.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    only_input_errors(scratch, [])


@given(st.binary(max_size=60) | st.text(alphabet=":{}[]&*!|>-?'\"%@`#,\n\t ab$.", max_size=40))
@settings(max_examples=80, deadline=None)
def test_whatever_the_bytes_the_reader_gives_a_config_or_an_input_error(
    scratch: Path, content: bytes | str
) -> None:
    scratch.write_bytes(content if isinstance(content, bytes) else content.encode())
    only_input_errors(scratch, [])


@given(
    st.sampled_from(keys()) | st.text(alphabet="data.[]${}='\"\\ \n", max_size=12),
    st.text(max_size=12) | st.text(alphabet=":{}[]&*!|>-?'\"%@`#,\n\t ab$.0123", max_size=12),
)
@settings(max_examples=80, deadline=None)
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
@settings(max_examples=30, deadline=None)
def test_a_dumped_config_loads_back_equal(scratch: Path, raw: dict[str, Any]) -> None:
    config = build_config(raw)
    scratch.write_text(dump_config(config), encoding="utf-8")
    back = load_config(scratch)
    if config.output.dir is None:
        back.output.dir = None
    assert back == config
    assert dump_config(back) == dump_config(config)


@pytest.mark.parametrize("key", [key for key in keys() if len(key.rpartition(".")[2]) > 3])
def test_a_misspelt_key_names_the_nearest(key: str) -> None:
    section, _, name = key.rpartition(".")
    # beta1 and beta2 differ in the last letter alone
    misspelt = "x" + name if name[-1].isdigit() else name[:-2] + name[-1] + name[-2] + "s"
    with pytest.raises(InputError) as caught:
        build_config(nested(f"{section}.{misspelt}" if section else misspelt, 1))
    message = str(caught.value)
    assert f"Key '{misspelt}' not in" in message
    assert re.search(rf"Did you mean.*: '{name}'", message), "the nearest comes first"
