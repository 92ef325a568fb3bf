"""A comparison's cells: axes from the command or the config, their product, names, validation."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bayesian_lora.errors import InputError
from bayesian_lora.experiment.cells import (
    NAME_LENGTH,
    as_text,
    cell_names,
    differences,
    make_plan,
    read_arguments,
    split_values,
    start_of,
)

WORDS = st.from_regex(r"[a-z0-9.'_-]{1,6}", fullmatch=True)
QUOTED = st.text(st.sampled_from("a,[]{}'\\ :"), max_size=6).map(lambda s: f'"{_escaped(s)}"')
SINGLE = st.text(st.sampled_from('a,[]{}"\\ :'), max_size=6).map(lambda s: f"'{s}'")
VALUES = st.recursive(
    WORDS.filter(lambda s: not s.startswith("'")) | QUOTED | SINGLE,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda x: f"[{','.join(x)}]")
        | st.lists(inner, max_size=3).map(lambda x: f"{{{', '.join(f'k: {v}' for v in x)}}}")
    ),
    max_leaves=5,
)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(
        "sampler: {burn_in: 10, num_samples: 8, chains: 2}\n"
        "compare: {sampler.name: [sgld, psgld], prior.std: [0.1, auto]}\n"
    )
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("sgld", ["sgld"]),
        ("sgld,psgld", ["sgld", "psgld"]),
        ("", [""]),
        ("a,", ["a", ""]),
        ("[query,value]", ["[query,value]"]),
        ("[query,value],auto,[key]", ["[query,value]", "auto", "[key]"]),
        ("{a: 1,b: [2,3]},x", ["{a: 1,b: [2,3]}", "x"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ('"a,]b",c', ['"a,]b"', "c"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        (r'"a\\",c', [r'"a\\"', "c"]),
        ("'it''s,x',y", ["'it''s,x'", "y"]),
        ("it's,fine", ["it's", "fine"]),
        ('["a]",b],c', ['["a]",b]', "c"]),
        ("a], b", ["a]", " b"]),
        ("[a,b", ["[a,b"]),
    ],
)
def test_values_are_split_at_top_level_commas(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_joined_values_are_split_where_they_were_joined(values: list[str]) -> None:
    assert split_values(",".join(values)) == values


def _is_yaml(text: str) -> bool:
    """Alone what it is in a list: a lone "-" is not."""
    try:
        return yaml.safe_load(f"[{text}]") == [yaml.safe_load(text)]
    except yaml.YAMLError:
        return False


@given(st.text(st.sampled_from("ab,[]{}'\"\\: ")))
def test_nothing_is_lost_in_splitting(text: str) -> None:
    assert ",".join(split_values(text)) == text


@given(st.lists(VALUES.filter(_is_yaml), min_size=1, max_size=4))
def test_a_yaml_list_is_split_as_yaml_does(values: list[str]) -> None:
    whole = yaml.safe_load(f"[{','.join(values)}]")
    assert [yaml.safe_load(value) for value in split_values(",".join(values))] == whole


@pytest.mark.parametrize(
    "value",
    [
        *("sgld", "a b", "1", "true", "null", "off", "", "it's", "x,y", "[", "é", "-", "${x"),
        *(1, 0.001, 1e-05, True, None, ["a", "b"], {"a": [1, "x,y"]}),
    ],
)
def test_a_value_of_the_section_is_read_back_from_its_text(value: Any) -> None:
    text = as_text(value)
    assert split_values(text) == [text]
    assert yaml.safe_load(text) == value or isinstance(value, float)
    if isinstance(value, float):
        assert float(text) == value


def test_arguments_with_several_values_are_axes() -> None:
    arguments = ["sampler.name=sgld, psgld", "seed=3", "model.lora.target_modules=[query,value]"]
    axes, overrides = read_arguments(arguments)
    assert axes == {"sampler.name": ["sgld", "psgld"]}
    assert overrides == ["seed=3", "model.lora.target_modules=[query,value]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=1,"], "'seed=1,': an empty value between commas; write key=v1,v2"),
        (["seed=1,2", "seed=3,4"], "'seed=3,4': seed is given twice"),
        (["seed=1,2", "seed=3"], "'seed=3': seed also varies over 1, 2; keep one of the two"),
    ],
)
def test_contradicting_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        read_arguments(arguments)


def test_cells_are_the_product_of_the_axes(config: Path) -> None:
    axes = ["sampler.name=sgld,sghmc", "model.lora.rank=2,4,8", "seed=7"]
    plan = make_plan(config, axes)
    wanted = [(name, rank) for name in ("sgld", "sghmc") for rank in (2, 4, 8)]
    found = [(c.config.sampler.name, c.config.model.lora.rank) for c in plan.cells]
    assert found == wanted
    assert [c.name for c in plan.cells] == [
        f"sampler.name={n},model.lora.rank={r}" for n, r in wanted
    ]
    assert {c.config.seed for c in plan.cells} == {7}
    assert {c.config.prior.std for c in plan.cells} == {0.1}, "the section is replaced"
    assert [c.config.compare for c in plan.cells] == [{}] * 6
    assert plan.root == Path("runs/small")
    assert plan.common()["sampler.burn_in"] == 10
    assert not {"sampler.name", "model.lora.rank", "output.dir"} & plan.common().keys()


def test_without_axes_the_config_says_what_is_compared(config: Path) -> None:
    plan = make_plan(config, ["output.dir=elsewhere"])
    assert plan.axes == {"sampler.name": ["sgld", "psgld"], "prior.std": ["0.1", "auto"]}
    stds = [0.1, "auto", 0.1, "auto"]
    assert [cell.config.prior.std for cell in plan.cells] == stds
    assert plan.root == Path("elsewhere")
    kept = make_plan(config, ["sampler.name=csgld", "sampler.burn_in=0", "sampler.thin=2"])
    assert kept.axes == {"sampler.name": ["csgld"], "prior.std": ["0.1", "auto"]}
    assert {cell.config.sampler.name for cell in kept.cells} == {"csgld"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampler.name=sgld,pslgd"], r"cell sampler\.name=pslgd: .*did you mean psgld"),
        (["sampler.nam=a,b"], r"cell sampler\.nam=a: .*sampler\.nam"),
        (
            ["sampler.num_samples=8,9"],
            r"cell sampler\.num_samples=9: .*multiple of sampler\.chains",
        ),
        (["seed=1,2", "sampler.chains=3"], r"cell seed=1: .*set sampler\.num_samples=9"),
        (["seed=1,2", "seeds=3"], r"cell seed=1: override 'seeds=3'"),
        (["seed=1,01"], "cells seed=1 and seed=01 are the same run: leave one out"),
        (["output.dir=a,b"], "output.dir=a,b: a comparison does not vary output.dir"),
        (["train.starts_from=a,b"], "a comparison does not vary train.starts_from"),
    ],
)
def test_every_cell_is_validated_and_the_wrong_one_named(
    config: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        make_plan(config, arguments)
    assert "\n" not in str(raised.value)


def test_without_any_axis_the_message_says_how_to_give_one(config: Path) -> None:
    config.write_text("seed: 1\n")
    message = r"nothing to compare: .*sampler\.name=sgld,psgld.*compare: \{sampler\.name: "
    with pytest.raises(InputError, match=message):
        make_plan(config, ["sampler.name=sgld"])
    config.write_text("compare: {sampler.name: []}")
    with pytest.raises(InputError, match=r"compare: sampler\.name has no values: "):
        make_plan(config)


def test_names_are_safe_and_distinct() -> None:
    combinations = [
        ["a=x/y", "b=[query, value]"],
        ["a=x y", "b=[query, value]"],
        ["a=X_Y", 'b=["query", "value"]'],
        ["a=é:*?\n", "b=.."],
        [f"a={'z' * 300}", "b=1"],
        [f"a={'z' * 300}", "b=2"],
        ["sampler.name=psgld", "model.lora.rank=8"],
    ]
    names = cell_names(combinations)
    assert names[0].startswith("a=x_y,b=query_value")
    assert names[-1] == "sampler.name=psgld,model.lora.rank=8"
    assert len({name.casefold() for name in names}) == len(combinations)
    for name in names:
        assert re.fullmatch(r"[\w.=,+~-]+", name, re.ASCII)
        assert not name.endswith(".")
        assert len(name) <= NAME_LENGTH + 3


def test_a_warm_start_depends_on_all_but_the_sampler(config: Path) -> None:
    def starts(*arguments: str) -> list[Any]:
        return [start_of(cell.config) for cell in make_plan(config, arguments).cells]

    for key in ("sampler.name=sgld,sghmc", "sampler.burn_in=1,2", "sampler.temperature=0.5,1"):
        first, second = starts(key)
        assert first == second, key
    for key in ("sampler.chains=2,4", "seed=1,2", "prior.std=0.1,0.2", "model.lora.rank=2,4"):
        first, second = starts(key)
        assert first != second, key


def test_differences_are_named_key_by_key() -> None:
    old, new = {"a": 1, "b": [1], "c": "x"}, {"a": 1, "b": [2], "d": None}
    assert differences(old, new) == [
        "b: [1] there, [2] here",
        "c: x there, nothing here",
        "d: nothing there, null here",
    ]
    assert differences(old, dict(old)) == []
