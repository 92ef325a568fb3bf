"""The scripts of a page with charts: the installed library, whole, and no other."""

import base64
import gzip
import hashlib
import html
import importlib.util
import re

import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.report import drawing as module
from bayesian_lora.report.charts import Panel, Series, chart
from bayesian_lora.report.drawing import drawing
from bayesian_lora.report.page import Page, Section, Table, Text, cell, render


def digest(script: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def test_the_library_is_the_installed_one_and_the_policy_names_both_scripts() -> None:
    found = drawing()
    library = gzip.decompress(base64.b64decode(found.library))
    assert library.lstrip().startswith(b"/**\n* plotly.js")
    assert found.policy == f"{digest(library)} {digest(found.starter.encode())}"
    assert len(found.library) < 2_100_000


def test_a_page_with_charts_runs_these_scripts_alone() -> None:
    numbers = Table("n", ["a"], [[cell("x")]])
    one = chart([Series("a", [0], [0])], [Panel("x", "y")], text="t", caption="c", numbers=numbers)
    text = render(Page("t", "l", [Section("s", "s", [one, one])]))
    policy = re.findall('http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert [html.unescape(content) for content in policy] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src {drawing().policy}"
    ]
    scripts = re.findall("<script([^>]*)>(.*?)</script>", text, re.DOTALL)
    run = [body for attributes, body in scripts if "type=" not in attributes]
    assert run == [drawing().starter]  # to the letter, or its sha256 is another
    assert len(scripts) == 4
    assert text.count(drawing().library) == 1
    assert "<noscript>" in text


def test_a_page_without_charts_has_no_script() -> None:
    text = render(Page("t", "l", [Section("s", "s", [Text("words")])]))
    assert "<script" not in text
    assert "script-src" not in text
    assert "<noscript>" not in text


def test_without_plotly_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    module.drawing.cache_clear()
    try:
        with pytest.raises(InputError, match="pip install plotly"):
            drawing()
    finally:
        module.drawing.cache_clear()
