"""The page: offline, escaped, navigable, for light and dark, and the same from the same figures."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bayesian_lora.report.page import (
    MISSING,
    Cell,
    Code,
    Missing,
    Page,
    Picture,
    Section,
    Table,
    Text,
    cell,
    number,
    plot,
    png_picture,
    render,
    write,
)

EVIL = "<script>alert('x')</script>\"&"


class Reader(HTMLParser):
    """Every tag with its attributes, and the text of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(page: Page) -> Reader:
    reader = Reader()
    reader.feed(render(page))
    return reader


def line(axes: Any) -> None:
    axes.plot([1, 2], [0.5, 0.7], label="a")
    axes.legend()


@pytest.fixture(scope="module")
def picture() -> Picture:
    return plot(line, text=f"a line {EVIL}", caption=f"a caption {EVIL}")


@pytest.fixture
def page(picture: Picture) -> Page:
    rows = [
        [cell(EVIL), cell(0.5), cell(None, reason=f"why {EVIL}")],
        [cell("b"), cell(2), cell(3)],
    ]
    blocks = [
        Text(EVIL, "answer"),
        Code(EVIL, "Command"),
        Missing("Figures", EVIL),
        picture,
        png_picture(b"\x89PNG", "a map", "of a map"),
        Table(EVIL, ["Name", EVIL, "c"], rows, note=EVIL),
    ]
    sections = [Section(EVIL, "one", blocks), Section("Two", "two", [])]
    return Page(f"Title {EVIL}", EVIL, sections, EVIL)


def test_texts_are_escaped(page: Page) -> None:
    reader = read(page)
    assert not reader.all("script")
    assert "".join(reader.words).count(EVIL) == 15  # title twice; every other text once
    assert f"a line {EVIL}" in [image["alt"] for image in reader.all("img")]


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    reader = read(page)
    places = [
        value or ""
        for _, attributes in reader.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert len(places) == 6
    assert all(place.startswith(("#", "data:image/")) for place in places)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "form"}
    assert not any(name.startswith("on") for _, found in reader.tags for name in found)
    policy = next(m["content"] for m in reader.all("meta") if "http-equiv" in m)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(" not in render(page)
    assert "@import" not in render(page)


def test_a_keyboard_gets_everywhere(page: Page) -> None:
    reader = read(page)
    ids = [found["id"] for _, found in reader.tags if "id" in found]
    assert len(set(ids)) == len(ids)
    targets = [str(link["href"]).removeprefix("#") for link in reader.all("a")]
    assert targets == ["content", "one", "two"]
    assert set(targets) <= set(ids)
    assert len(reader.all("h1")) == 1
    assert [found["id"] for found in reader.all("h2")] == ["one", "two"]
    scrolling = [found for found in reader.all("div") if found.get("class") == "scroll"]
    assert scrolling[0]["tabindex"] == "0"
    assert ":focus-visible" in render(page)


def test_a_table_says_what_its_cells_are(page: Page) -> None:
    reader = read(page)
    assert len(reader.all("caption")) == len(reader.all("table")) == 1
    assert [found["scope"] for found in reader.all("th")] == ["col"] * 3 + ["row"] * 2
    assert [found.get("class") for found in reader.all("th")[:3]] == [None, "n", "n"]
    assert MISSING in reader.words
    assert f"Not available: why {EVIL}." in "".join(reader.words)


def test_a_long_text_has_a_wide_column() -> None:
    rows = [[cell("a"), Cell("many words", number=False, long=True), cell(1.0)]]
    found = read(Page("t", "l", [Section("s", "s", [Table("c", ["a", "b", "c"], rows)])]))
    assert [td.get("class") for td in found.all("td")] == ["long", "n "]


def test_light_and_dark(page: Page, picture: Picture) -> None:
    text = render(page)
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "@media print" in text
    source = read(page).all("source")
    assert [found["media"] for found in source] == ["screen and (prefers-color-scheme: dark)"]
    assert source[0]["srcset"] == picture.dark != picture.light


def test_the_same_figures_make_the_same_page(page: Page, picture: Picture) -> None:
    again = plot(line, text=picture.text, caption=picture.caption)
    assert again == picture
    assert render(page) == render(page)


def test_lines_differ_without_colour() -> None:
    seen: list[tuple[str, str]] = []

    def draw(axes: Any) -> None:
        lines = [axes.plot([0, 1], [0, i])[0] for i in range(28)]
        seen.extend((line.get_linestyle(), line.get_marker()) for line in lines)

    plot(draw, text="t", caption="c")
    light, dark = seen[:28], seen[28:]
    assert len(set(light)) == 28
    assert light == dark


def test_a_plot_of_several_panels() -> None:
    seen: list[int] = []

    def draw(panels: Any) -> None:
        seen.append(len(panels))
        for axes in panels:
            axes.plot([0, 1], [1, 0])

    found = plot(draw, text="t", caption="c", panels=3)
    assert seen == [3, 3]
    assert found.light.startswith("data:image/svg+xml;base64,")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.5000"),
        (0.0, "0.0000"),
        (1234.5, "1,234.5000"),
        (4e-6, "4.0e-06"),
        (-4e-6, "-4.0e-06"),
    ],
)
def test_numbers_keep_what_they_say(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12345, "12,345"), (True, "yes"), (False, "no"), ("word", "word"), (None, MISSING)],
)
def test_cells(value: object, shown: str) -> None:
    assert cell(value, reason="because").text == shown


def test_a_figure_that_is_missing_always_has_a_reason() -> None:
    assert cell(None).reason
    table = Table("c", ["a", "b"], [[cell("x"), cell(None, reason="r")], [cell("y"), cell(None)]])
    assert table.missing == ["r", cell(None).reason]


def test_a_column_is_numeric_if_all_that_is_known_is() -> None:
    rows = [
        [cell("x"), cell(1), Cell("–", number=False), cell(None)],
        [cell("y"), *map(cell, (2, 3, None))],
    ]
    assert Table("c", ["a", "b", "c", "d"], rows).numeric == [False, True, False, False]
    assert Table("c", ["a"], []).numeric == [False]


def test_written_whole(tmp_path: Path, page: Page) -> None:
    write(tmp_path / "page.html", page)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render(page)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
