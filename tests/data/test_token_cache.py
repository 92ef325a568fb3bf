"""Token ids kept on disk: found again, found by everything they depend on, rebuilt if damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from bayesian_lora.data import batching
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.token_cache import cache_key, default_folder, write_tokens
from bayesian_lora.utils.files import read_npz, write_npz


def pairs(*rows: tuple[str, str]) -> Examples:
    n = len(rows)
    return Examples(
        tuple([row[j] for row in rows] for j in range(2)), np.zeros(n, np.int64), np.arange(n)
    )


SET = pairs(("the plot is good", "it was fun"), ("bad", "a dull long story"), ("", "fine"))


@pytest.fixture
def tokenizer(tiny_models: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_models["bert"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the sets that were tokenised."""
    sizes: list[int] = []
    real = batching.encode

    def spy(texts: Any, *arguments: Any) -> Any:
        sizes.append(len(texts[0]))
        return real(texts, *arguments)

    monkeypatch.setattr(batching, "encode", spy)
    return sizes


def inputs(data: TokenisedSet) -> dict[str, list[Any]]:
    return {name: x.tolist() for name, x in data.batch(np.arange(len(data))).inputs.items()}


def test_a_set_is_tokenised_once(tokenizer: Any, calls: list[int], tmp_path: Path) -> None:
    first = TokenisedSet(SET, tokenizer, 12, tmp_path)
    again = TokenisedSet(SET, tokenizer, 12, tmp_path)
    assert calls == [3]
    assert inputs(again) == inputs(first) == inputs(TokenisedSet(SET, tokenizer, 12))
    assert calls == [3, 3], "without a folder there is no cache"
    assert again.lengths.dtype == first.lengths.dtype
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".npz"]


def test_what_the_ids_depend_on_is_in_the_key(tokenizer: Any, tiny_models: dict[str, Path]) -> None:
    cased = AutoTokenizer.from_pretrained(tiny_models["bert"], do_lower_case=False)
    keys = [
        cache_key(SET.texts, tokenizer, 12),
        cache_key(SET.texts, tokenizer, 13),
        cache_key(SET.take(np.array([0, 1])).texts, tokenizer, 12),
        cache_key(SET.take(np.array([1, 0, 2])).texts, tokenizer, 12),
        cache_key(SET.texts[:1], tokenizer, 12),
        cache_key(SET.texts[::-1], tokenizer, 12),
        cache_key((["ab", "c"],), tokenizer, 12),
        cache_key((["a", "bc"],), tokenizer, 12),
        cache_key(SET.texts, cased, 12),
        cache_key(SET.texts, AutoTokenizer.from_pretrained(tiny_models["roberta"]), 12),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_depend_on_earlier_calls(tokenizer: Any) -> None:
    before = cache_key(SET.texts, tokenizer, 12)
    tokenizer(["a text"], truncation=True, max_length=5, padding="max_length")
    assert cache_key(SET.texts, tokenizer, 12) == before


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def damage_bytes(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_lengths(path: Path) -> None:
    columns = read_npz(path)
    columns["lengths"] = columns["lengths"] + 1
    write_npz(path, columns)


def damage_size(path: Path) -> None:
    columns = read_npz(path)
    columns["lengths"] = np.array([columns["lengths"].sum()])
    write_npz(path, columns)


def damage_names(path: Path) -> None:
    columns = read_npz(path)
    columns.pop("input_ids")
    write_npz(path, columns)


@pytest.mark.parametrize(
    "damage",
    [damage_cut, damage_bytes, damage_empty, damage_lengths, damage_size, damage_names],
)
def test_a_damaged_file_is_rebuilt(
    damage: Any, tokenizer: Any, calls: list[int], tmp_path: Path
) -> None:
    expected = inputs(TokenisedSet(SET, tokenizer, 12, tmp_path))
    (path,) = (tmp_path / "tokens").iterdir()
    damage(path)
    assert inputs(TokenisedSet(SET, tokenizer, 12, tmp_path)) == expected
    assert calls == [3, 3]
    assert inputs(TokenisedSet(SET, tokenizer, 12, tmp_path)) == expected
    assert calls == [3, 3]


def test_a_folder_that_cannot_be_written_is_no_obstacle(tokenizer: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    expected = inputs(TokenisedSet(SET, tokenizer, 12))
    assert inputs(TokenisedSet(SET, tokenizer, 12, blocked)) == expected


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BAYESIAN_LORA_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"
    monkeypatch.setenv("BAYESIAN_LORA_CACHE", "")
    assert default_folder() is None
    monkeypatch.delenv("BAYESIAN_LORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "bayesian-lora"
    for odd in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", odd)
        assert default_folder() == Path.home() / ".cache" / "bayesian-lora"


def test_what_cannot_be_put_in_place_leaves_nothing_behind(tmp_path: Path) -> None:
    in_the_way = tmp_path / "tokens" / "key.npz"
    in_the_way.mkdir(parents=True)
    write_tokens(tmp_path, "key", {"lengths": np.ones(1, dtype=np.int64)})
    assert list(in_the_way.parent.iterdir()) == [in_the_way]
