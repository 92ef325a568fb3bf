"""Charts: figures that plotly takes, read on light, dark and paper, small, and safe in a page."""

import json
import re
from typing import Any

import pytest

from bayesian_lora.report.charts import DASHES, NEUTRAL, PALETTE, Panel, Series, chart, rounded
from bayesian_lora.report.page import THEMES, Chart, Page, Section, Table, cell, render

EVIL = "</script><b>x & y</b>"
NUMBERS = Table("numbers", ["a", "b"], [[cell("x"), cell(1.0)]])


def make(series: list[Series], panels: list[Panel], columns: int = 1) -> Chart:
    return chart(series, panels, text=EVIL, caption=EVIL, numbers=NUMBERS, columns=columns)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [*PALETTE, NEUTRAL])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_colour_stands_out_from_both_grounds(colour: str, theme: str) -> None:
    bright, dull = sorted((luminance(colour), luminance(THEMES[theme]["back"])), reverse=True)
    assert (bright + 0.05) / (dull + 0.05) >= 3.0


def test_plotly_takes_every_kind_of_series() -> None:
    import plotly.graph_objects as go

    series = [
        Series("a", [1, 2], [0.5, None], "both", error=[0.1, 0.2]),
        Series("b", [1, 2], [3, 4], "bars", 1, panel=1),
        Series("c", [1.0, 10.0], [0, 1], "points", None, 2, [0.1, None], "x", panel=2),
    ]
    panels = [
        Panel("x", "y", "one", (0, 1), (0, 2)),
        Panel("x", "y", x_log=True),
        Panel("x", "", y_names=["first", "second"]),
    ]
    found: Any = go.Figure(make(series, panels, 2).figure)  # raises ValueError on a name it has not
    assert [trace.type for trace in found.data] == ["scatter", "bar", "scatter"]
    assert found.layout.xaxis2.type == "log"
    assert found.layout.yaxis3.ticktext == ("first", "second")
    assert found.layout.yaxis3.range == (1.5, -0.5)
    assert found.data[2].error_x.array[0] == 0.1


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_panels_stay_apart_and_inside(columns: int) -> None:
    layout = make([], [Panel("x", "y", str(i)) for i in range(5)], columns).figure["layout"]
    places = []
    for i in range(5):
        number = str(i + 1) if i else ""
        across, up = (layout[f"{axis}axis{number}"]["domain"] for axis in "xy")
        assert 0 <= across[0] < across[1] <= 1
        assert 0 <= up[0] < up[1] <= 1
        places.append((across, up))
    for i, (across, up) in enumerate(places):
        for other, above in places[:i]:
            beside = across[0] >= other[1] or other[0] >= across[1]
            assert beside or up[1] < above[0]


def test_lines_of_one_colour_differ_in_style() -> None:
    series = [Series(str(i), [0], [0], "both", 0, i) for i in range(len(DASHES))]
    data = make(series, [Panel("x", "y")]).figure["data"]
    assert len({trace["line"]["dash"] for trace in data}) == len(DASHES)
    assert len({trace["marker"]["symbol"] for trace in data}) == len(DASHES)


def test_points_keep_what_can_be_seen() -> None:
    given = [0.123456789, 1e-9, None, float("nan"), float("inf"), "word", 12345678]
    assert rounded(given) == [0.12346, 1e-9, None, None, None, "word", 12346000.0]


def test_a_legend_only_where_there_is_a_choice() -> None:
    one = make([Series("a", [0], [0])], [Panel("x", "y")])
    two = make([Series("a", [0], [0]), Series("b", [0], [0])], [Panel("x", "y")])
    assert not one.figure["layout"]["showlegend"]
    assert two.figure["layout"]["showlegend"]


def test_no_text_ends_the_script_or_becomes_markup() -> None:
    found = make([Series(EVIL, [0], [0]), Series("b", [0], [0])], [Panel("x", "y", EVIL)])
    assert not re.search("[<>&]", found.json)
    shown = json.loads(found.json)
    assert shown == found.figure
    escaped = "&lt;/script&gt;&lt;b&gt;x &amp; y&lt;/b&gt;"
    assert shown["data"][0]["name"] == escaped
    assert shown["layout"]["annotations"][0]["text"] == f"<b>{escaped}</b>"
    page = render(Page("t", "l", [Section("s", "s", [found])]))
    assert EVIL not in page
    assert "Numbers: numbers" in page


def test_a_few_whole_numbers_have_no_ticks_between_them() -> None:
    def ticks(x: list[float | str | None]) -> object:
        found = chart(
            [Series("a", x, [0.5] * len(x))],
            [Panel("k", "y")],
            text="t",
            caption="c",
            numbers=Table("n", [], []),
        )
        return found.figure["layout"]["xaxis"].get("dtick")

    assert ticks([1, 2, 4]) == 1
    assert ticks([1, 2, 400]) is None
    assert ticks([0.0, 1.0]) is None
