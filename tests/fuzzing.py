"""Damage for files, and what a reader makes of it: a value, or one `InputError` of one line."""

import copy
import json
import math
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bayesian_lora.errors import InputError

SECONDS = 2.0
"""Of the process's own time for one input, so that a busy machine hangs nothing."""
FAST = 40
UNSAFE_ADVICE = ("allow_pickle=True", "allow_pickle=`", "trust_remote_code=True", "weights_only")
HUGE, DEEP, LARGE_FLOAT, TWIN = "@HUGE@", "@DEEP@", "@1e999@", "@TWIN@"
LITERALS = {HUGE: "9" * 5000, DEEP: "[" * 3000 + "]" * 3000, LARGE_FLOAT: "1e999"}
"""What `json.dumps` would not write; beyond 4,300 digits Python reads no whole number."""

SCALARS: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**400, -(10**400), 0.5, -0.0, 5e-324, 1e308),
    *(math.nan, math.inf, -math.inf, HUGE, DEEP, LARGE_FLOAT),
    *("", "a", "a\nb", "\x1b[31m", "\0", "\ud800", "..", "../..", "/", ".", "é" * 300, "x" * 5000),
]
LEAVES = st.sampled_from(SCALARS) | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
PIECES = [
    *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\n", b"\0", b"\xff", b"\xed\xa0\x80"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b'"\\ud800"', b"\xef\xbb\xbf"),
    *(b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"{}", b"[]", b'"checksum"', b"\r", b"\t"),
]


class Hang(BaseException):
    """A reader took more than `SECONDS`; no reader's `except` catches it."""


def outcome(read: Callable[[], Any]) -> str:
    """``value``, or the message of the `InputError`; anything else passes through.

    The message is one printable line, without advice to load something unsafely.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    old = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        read()
    except InputError as error:
        message = str(error)
    else:
        message = "value"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
    assert message
    assert message.isprintable(), f"not one plain line: {message[:300]!r}"
    assert not any(words in message for words in UNSAFE_ADVICE), message[:300]
    return message


def search(
    inputs: st.SearchStrategy[Any], read: Callable[[Any], Any], examples: int
) -> Counter[str]:
    """Try so many inputs; how many gave a ``value`` and how many were ``refused``."""
    found: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(inputs)
    def attempt(value: Any) -> None:
        result = outcome(lambda: read(value))
        found["value" if result == "value" else "refused"] += 1

    attempt()
    assert found.total() >= examples
    return found


def budgets(full: int) -> pytest.MarkDecorator:
    """Parametrises `examples`: a few for every run of the tests, `full` where there is time."""
    slow = pytest.param(full, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
    return pytest.mark.parametrize("examples", [FAST, slow])


@st.composite
def damaged_trees(draw: st.DrawFn, tree: Any) -> Any:
    """A copy of a JSON tree with up to three places replaced, removed, added, doubled or moved."""
    whole = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(0, 3))):
        _damage(draw, whole)
    return whole[0]


def _damage(draw: st.DrawFn, whole: list[Any]) -> None:
    parent: Any = whole
    place: Any = 0
    while isinstance(parent[place], dict | list) and parent[place] and draw(st.integers(0, 3)):
        parent = parent[place]
        places = list(parent) if isinstance(parent, dict) else range(len(parent))
        place = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["replace", "remove", "add", "twin", "wrap", "swap"]))
    other = draw(VALUES)
    if kind == "remove" and parent is not whole:
        del parent[place]
    elif kind == "add" and isinstance(parent, dict):
        parent[draw(st.text(max_size=4) | st.sampled_from(["a\nb", "\ud800", "\x1b"]))] = other
    elif kind == "twin" and isinstance(parent, dict):
        parent[f"{place}{TWIN}"] = other
    elif kind == "wrap":
        parent[place] = draw(st.sampled_from([[parent[place]], {"a": parent[place]}]))
    elif kind == "swap" and len(parent) > 1:
        places = list(parent) if isinstance(parent, dict) else range(len(parent))
        second = draw(st.sampled_from(places))
        parent[place], parent[second] = parent[second], parent[place]
    else:
        parent[place] = other


def to_json(tree: Any) -> str:
    """JSON text of a tree, with the literals and doubled keys that `json.dumps` would not write."""
    text = json.dumps(tree)
    for mark, literal in LITERALS.items():
        text = text.replace(f'"{mark}"', literal)
    return text.replace(f'{TWIN}"', '"')


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, pieces: Sequence[bytes] = PIECES) -> bytes:
    """Up to four bits flipped, stretches removed, doubled or zeroed, pieces put in, the end cut."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        place, size = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
        kind = draw(st.sampled_from(["flip", "remove", "double", "insert", "cut", "zero"]))
        stretch = data[place : place + size]
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "remove":
            del data[place : place + size]
        elif kind == "double":
            data[place:place] = stretch
        elif kind == "insert":
            data[place:place] = draw(st.sampled_from(pieces) | st.binary(max_size=8))
        elif kind == "cut" and draw(st.booleans()):
            del data[place:]
        else:
            data[place : place + size] = bytes(len(stretch))
    return bytes(data)
