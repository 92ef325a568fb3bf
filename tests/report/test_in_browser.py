"""The report in a real browser: it draws, asks for nothing, and serves eyes, keyboard and paper."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bayesian_lora.report.charts import PALETTE
from bayesian_lora.report.page import THEMES, Page, write
from bayesian_lora.report.run_files import read_run
from bayesian_lora.report.run_inputs import Texts
from bayesian_lora.report.run_report import run_page
from tests.browser import Tab, browser, chromium
from tests.report.finished_runs import EXAMPLES

DRAWN = "document.documentElement.dataset.charts"
LIGHT, DARK = ({"prefers-color-scheme": scheme} for scheme in ("light", "dark"))
EVIL = "<img src='https://example.invalid/x.png' onerror='alert(1)'>"


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Page:
    texts = Texts({i: [f"Text {i} {EVIL}"] for i in range(EXAMPLES)})
    return run_page(read_run(run_folder), texts, "experiment_of_a_long_name_without_any_space")


@pytest.fixture(scope="module")
def path(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("page") / "report.html"
    write(found, page)
    return found


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def test_without_a_browser_the_tests_say_why_they_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(pytest.skip.Exception, match="install Debian's package 'chromium'"):
        chromium()


def colour(text: str) -> str:
    """A style's rgb(…) as #rrggbb."""
    parts = re.findall(r"\d+", text)[:3]
    return "#" + "".join(f"{int(part):02x}" for part in parts)


def style(selector: str, name: str) -> str:
    return f"getComputedStyle(document.querySelector({selector!r}))[{name!r}]"


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_it_draws_every_chart_and_asks_for_nothing(tab: Tab, path: Path, scheme: dict) -> None:
    tab.size(1100)
    tab.open(path, scheme)
    tab.wait(DRAWN)
    tab.look("new Promise((done) => setTimeout(done, 300))")  # what comes late is caught too
    assert tab.look(DRAWN) == "drawn"
    assert tab.requests() == [path.resolve().as_uri()]
    assert tab.complaints() == []
    paths = tab.look(
        "[...document.querySelectorAll('.chart')].map((chart) => "
        "chart.querySelectorAll('.trace path, .trace .point path, .bars path').length)"
    )
    assert len(paths) >= 8
    assert min(paths) > 0


def test_a_policy_keeps_other_scripts_and_requests_out(tab: Tab, path: Path) -> None:
    tab.open(path)
    tab.wait(DRAWN)
    assert tab.look("document.querySelectorAll('img').length") == 0  # the evil text is a text
    tab.look(
        "(() => { const other = document.createElement('script'); other.textContent = "
        "'window.ran = true'; document.head.append(other); })()"
    )
    assert tab.look("window.ran") is None
    assert any("Content Security Policy" in text for text in tab.complaints())
    reached = tab.look("fetch('https://example.invalid/').then(() => true, () => false)")
    assert reached is False
    assert any("https://example.invalid/" in text for text in tab.complaints())


def test_it_follows_the_colour_scheme_without_being_drawn_anew(tab: Tab, path: Path) -> None:
    tab.open(path, LIGHT)
    tab.wait(DRAWN)
    for scheme, theme in ((LIGHT, "light"), (DARK, "dark")):
        tab.media(scheme)
        ink = THEMES[theme]
        assert colour(tab.look(style("body", "backgroundColor"))) == ink["back"]
        assert colour(tab.look(style(".chart .xtick text", "fill"))) == ink["text"]
        assert colour(tab.look(style(".chart .ygrid", "stroke"))) == ink["grid"]
        lines = colour(tab.look(style(".chart .js-line", "stroke")))
        assert lines in (*PALETTE, "#7f8a96")


def test_paper_is_light_and_takes_the_charts_whole(tab: Tab, path: Path) -> None:
    tab.size(1100)
    tab.open(path, DARK)
    tab.wait(DRAWN)
    widest = "Math.max(...[...document.querySelectorAll('.chart')].map((c) => c.clientWidth))"
    assert tab.look(widest) <= 672  # A4 and Letter at the browser's own margins hold 700
    tab.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert colour(tab.look(style(".chart .xtick text", "fill"))) == THEMES["light"]["text"]
    assert tab.look(style("nav", "display")) == "none"
    tab.media(DARK)
    printed = tab.pdf()
    assert printed.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 3
    assert tab.look(DRAWN) == "drawn"


def test_a_keyboard_gets_to_links_tables_and_numbers(tab: Tab, path: Path) -> None:
    tab.size(1100)
    tab.open(path, LIGHT)
    tab.wait(DRAWN)
    sections = tab.look("document.querySelectorAll('nav a').length")
    regions = tab.look("document.querySelectorAll('main > section > .scroll').length")
    numbers = tab.look("document.querySelectorAll('summary').length")
    seen: list[str] = []
    focused = "document.activeElement.className || document.activeElement.tagName"
    for _ in range(sections + regions + numbers + 10):
        tab.key("Tab")
        seen.append(tab.look(focused))
        if seen[-1] == "BODY":
            break
    assert seen[0] == "skip"
    assert seen[1 : sections + 1] == ["A"] * sections
    assert seen.count("scroll") == regions
    assert seen.count("SUMMARY") == numbers > 0
    assert tab.look("document.querySelectorAll('.chart a, .chart [tabindex]').length") == 0


def test_every_chart_has_words_and_numbers(tab: Tab, path: Path) -> None:
    tab.open(path, LIGHT)
    tab.wait(DRAWN)
    bare = (
        "[...document.querySelectorAll('.chart')].filter((c) => c.getAttribute('role') !== 'img' "
        "|| c.getAttribute('aria-label').length < 40 "
        "|| !c.parentElement.querySelector('details td')).length"
    )
    assert tab.look(bare) == 0


def test_a_narrow_window_scrolls_tables_and_not_the_page(tab: Tab, path: Path) -> None:
    tab.size(360)
    tab.open(path, LIGHT)
    tab.wait(DRAWN)
    assert tab.look("document.documentElement.scrollWidth") <= 360
    widest = "Math.max(...[...document.querySelectorAll('.main-svg')].map((s) => s.clientWidth))"
    assert 250 < tab.look(widest) <= 340


def test_without_scripts_it_says_where_the_numbers_are(tab: Tab, path: Path) -> None:
    tab.scripts(False)
    try:
        tab.open(path, LIGHT)
        assert tab.requests() == [path.resolve().as_uri()]
        found = tab.call("DOM.getDocument", depth=-1, pierce=True)
        assert "their numbers stand below each of them" in str(found)
        assert "js-plotly-plot" not in str(found)
    finally:
        tab.scripts(True)


def test_a_library_that_does_not_run_leaves_words(tab: Tab, path: Path, tmp_path: Path) -> None:
    whole = path.read_text(encoding="utf-8")
    damaged = tmp_path / "damaged.html"
    library = re.search('id="plotly">([^<]{40})', whole)
    assert library is not None
    damaged.write_text(whole.replace(library[1], "!" * 40), encoding="utf-8")
    tab.open(damaged, LIGHT)
    tab.wait(DRAWN)
    assert tab.look(DRAWN) == "failed"
    words = tab.look("document.querySelector('.chart').textContent")
    assert words.startswith("Not drawn by this browser")
    assert "numbers are below" in words
