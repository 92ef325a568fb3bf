"""The config reader on files that are none and on arbitrary input: a config or an `InputError`."""

import dataclasses
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesian_lora.config import Config, build_config, dump_config, load_config
from bayesian_lora.errors import InputError

from .fuzzing import LITERALS, TWIN, budgets, damaged_bytes, damaged_trees, search

FULL, EXPANSIONS = 3500, 400
"""Inputs of each kind; of expansions, which take long to be refused, fewer."""


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


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "fuzz.yaml"


def yaml_of(tree: Any) -> bytes:
    """YAML text of a tree, with literals and doubled keys that no dump would write."""
    text = yaml.safe_dump(tree, allow_unicode=True)
    for mark, literal in LITERALS.items():
        text = text.replace(f"'{mark}'", literal)
    return text.replace(TWIN, "").encode("utf-8", "surrogatepass")


def bomb(levels: int, width: int, kind: str) -> str:
    """Each line has the one before it several times: width^levels in all."""
    names = [f"a{i}" for i in range(levels)]
    lines = [f"{names[0]}: &{names[0]} {{name: x}}"]
    for last, name in pairwise(names):
        refs = ", ".join([f"*{last}"] * width)
        inner = {"list": f"[{refs}]", "merge": f"{{<<: [{refs}]}}", "map": f"{{{name}: *{last}}}"}
        lines.append(f"{name}: &{name} {inner[kind]}")
    return "\n".join([*lines, f"data: *{names[-1]}"])


def references(levels: int, width: int) -> str:
    """The same of ``${…}``, which OmegaConf resolves key by key."""
    names = ["name", "dir", "hub_config", "label_column", "train_split", "eval_split"][:levels]
    lines = [f"  {a}: '{f'${{data.{b}}}' * width}'" for a, b in pairwise(names)]
    return "\n".join(["data:", *lines, f"  {names[-1]}: x"])


YAML_PIECES = [
    *(
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"<<: [*a, *a]",
        b"? ",
        b"- ",
        b"|",
        b">",
        b"\t",
        b"---\n",
        b"...",
    ),
    *(
        b"!!int x",
        b"!!int ''",
        b"!!bool x",
        b"!!float x",
        b"!!timestamp x",
        b"!!binary x",
        b"!!set ",
    ),
    *(b"!!python/object/apply:os.getcwd []", b"!x ", b"%YAML 9.9\n", b"1" * 5000, b"1" * 400),
    *(
        b"0x" + b"f" * 5000,
        b"1" + b":59" * 500,
        b"[" * 50,
        b"{a: " * 50,
        b"[" * 100_000,
        b"{}",
        b"~",
    ),
    *(
        b"${seed}",
        b"${oc.env:HOME}",
        b"${",
        b"}",
        b"'",
        b'"',
        b"\xef\xbb\xbf",
        b"\xc2\x85",
        b"\x1b",
    ),
    *(b".nan", b"-.inf", b"1e999", b"=", b"???", b"2001-13-45", b"trust_remote_code: 1\n", b"\xff"),
]
DEFAULTS = yaml.safe_load(dump_config(build_config({"data": {"files": {"train": "a.csv"}}})))
LINES = st.text(alphabet=":{}[]&*!|>-?'\"%@`#,\n\t ab$.0123", max_size=40)
WIDTHS = st.integers(1, 9)
FILES: dict[str, st.SearchStrategy[bytes]] = {
    "text": st.binary(max_size=60)
    | LINES.map(str.encode)
    | damaged_bytes(dump_config(build_config({})).encode(), YAML_PIECES),
    "trees": st.builds(nested, st.sampled_from(keys()), TREES).map(yaml_of)
    | st.dictionaries(KEYS, TREES, max_size=4).map(yaml_of)
    | damaged_trees(DEFAULTS).map(yaml_of),
    "expansions": st.builds(
        bomb, st.integers(2, 300), WIDTHS, st.sampled_from(["list", "merge"])
    ).map(str.encode)
    | st.builds(bomb, st.integers(2, 300), st.just(1), st.just("map")).map(str.encode)
    | st.builds(references, st.integers(2, 6), WIDTHS).map(str.encode),
}
"""Contents of a config's file, by their kind."""
OVERRIDES = st.builds(
    "{}={}".format,
    st.sampled_from(keys())
    | st.text(alphabet="data.[]${}='\"\\ \n", max_size=12)
    | st.builds("".join, st.lists(st.sampled_from(["a.", "[0]", "data.", "x["]), max_size=400)),
    st.text(max_size=12) | LINES | st.sampled_from(YAML_PIECES).map(lambda x: x.decode("latin-1")),
)


@pytest.mark.parametrize("kind", ["text", "trees"])
@budgets(FULL)
def test_whatever_the_file_the_reader_gives_a_config_or_an_input_error(
    scratch: Path, kind: str, examples: int
) -> None:
    assert search(FILES[kind], reader(scratch), examples)["refused"]


@pytest.mark.parametrize("examples", [20, pytest.param(EXPANSIONS, marks=pytest.mark.slow)])
def test_whatever_grows_as_it_is_read_is_soon_refused(scratch: Path, examples: int) -> None:
    assert search(FILES["expansions"], reader(scratch), examples)["refused"]


def reader(path: Path) -> Callable[[bytes], Config]:
    """Of a config with this content."""

    def read(content: bytes) -> Config:
        path.write_bytes(content)
        return load_config(path)

    return read


@budgets(FULL)
def test_whatever_the_override_the_reader_gives_a_config_or_an_input_error(
    scratch: Path, examples: int
) -> None:
    scratch.write_text("", encoding="utf-8")
    assert load_config(scratch, ["seed=1"]).seed == 1
    assert search(OVERRIDES, lambda item: load_config(scratch, [item]), examples)["refused"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 100_000, "nested deeper than"),  # else the parser in C ends the process
        ("{a: " * 100_000, "nested deeper than"),
        (bomb(9, 9, "list"), "more than 20 aliases"),
        (references(6, 9), "more than 20 references"),
        ("seed: " + "9" * 5000, "not a readable YAML file"),
        ("seed: 0x" + "f" * 5000, "seed: a whole number beyond"),
        ("train: {lr: " + "9" * 400 + "}", "train.lr: a whole number beyond"),
        ("train: {epochs: '" + "9" * 400 + "'}", "train.epochs: a whole number beyond"),
        ("seed: !!int ''", "not a readable YAML file"),
    ],
    ids=lambda text: text[:20],
)
def test_what_would_stop_the_process_is_refused(scratch: Path, text: str, message: str) -> None:
    scratch.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_config(scratch)


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
