"""Charts as plotly figures in plain dictionaries: series on one panel or several.

One palette serves light and dark pages and paper: each colour stands out from all three grounds by
3 to 1 or more (WCAG 1.4.11), so that nothing is drawn anew when the colour scheme changes; text and
grid take their colours from the page's style sheet. Nothing here imports plotly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bayesian_lora.report.page import Chart, Table

PALETTE = ("#2a7fc9", "#d2691e", "#2f9467", "#a065c8", "#cf4a6f", "#9a8420", "#3a93a8")
NEUTRAL = "#7f8a96"
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
LEGEND_PX, TITLE_PX, AXIS_PX, BETWEEN_PX = 34, 22, 50, 30
MOST_TICKS = 10
DIGITS = 5
"""Significant digits of a point: more would fill the file and not be seen."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """Points of one kind on a panel; None leaves a gap.

    colour: place in the palette, None for a neutral reference; style: of dash and marker.
    error: half the length of a bar through each point, along the axis `error_of`.
    group: series of one group share their entry of the legend, which the first makes.
    """

    name: str
    x: Sequence[float | str | None]
    y: Sequence[float | str | None]
    kind: Literal["line", "points", "both", "bars"] = "line"
    colour: int | None = 0
    style: int = 0
    error: Values | None = None
    error_of: Literal["x", "y"] = "y"
    panel: int = 0
    legend: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `y_names` are written at 0, 1, … from above to below."""

    x: str
    y: str
    title: str = ""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_log: bool = False
    y_names: Sequence[str] | None = None


def chart(
    series: Sequence[Series],
    panels: Sequence[Panel],
    *,
    text: str,
    caption: str,
    numbers: Table,
    columns: int = 1,
    panel_height: int = 260,
) -> Chart:
    """A chart of panels in rows of `columns`.

    Args:
        text: what a person reads in place of it.
        numbers: the table of what it shows.
        panel_height: pixels, of the axes alone.
    """
    rows = math.ceil(len(panels) / columns)
    legend = LEGEND_PX if sum(one.legend for one in series) > 1 else 0
    head = legend + (TITLE_PX if any(panel.title for panel in panels) else 8)
    # One title along the foot serves the panels above one another, if it is theirs as well.
    alike = len({panel.x for panel in panels}) == 1
    between = TITLE_PX + (BETWEEN_PX if alike else AXIS_PX)
    inner = rows * panel_height + (rows - 1) * between
    layout: dict[str, Any] = {
        "height": inner + head + AXIS_PX,
        "margin": {"l": 58, "r": 14, "t": head, "b": AXIS_PX},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12},
        "showlegend": bool(legend),
        "legend": {
            **{"orientation": "h", "x": 0, "xanchor": "left", "yanchor": "bottom"},
            "y": 1 + (head - legend) / inner,
        },
        "hovermode": "closest",
        "dragmode": False,
        "bargap": 0.08,
        "annotations": [],
    }
    height, width = panel_height / inner, (1 - 0.13 * (columns - 1)) / columns
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        top = 1 - row * (panel_height + between) / inner
        left = column * (width + 0.13)
        ends = [max(0.0, top - height), top]
        foot = not alike or place + columns >= len(panels)
        panel_axes = _axes(place, panel, [left, min(1.0, left + width)], ends, foot)
        if _few_whole([v for one in series if one.panel == place for v in one.x]):
            panel_axes[f"xaxis{place + 1 if place else ''}"]["dtick"] = 1
        layout |= panel_axes
        if panel.title:
            layout["annotations"].append(_title(panel.title, left, top))
    data = [_trace(one) for one in series]
    return Chart({"data": data, "layout": layout}, text, caption, numbers)


def _few_whole(values: Sequence[float | str | None]) -> bool:
    """Whether an axis counts up a few whole numbers, so that ticks between them would be none."""
    whole = [v for v in values if isinstance(v, int)]
    return len(whole) == len(values) > 0 and max(whole) - min(whole) <= MOST_TICKS


def rounded(values: Sequence[float | str | None]) -> list[Any]:
    """Numbers to the digits that can be seen; what is not finite is None, a gap."""
    return [_rounded(value) if not isinstance(value, str) else value for value in values]


def _rounded(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def _axes(
    place: int, panel: Panel, across: list[float], up: list[float], foot: bool
) -> dict[str, Any]:
    number = str(place + 1) if place else ""
    shared = {"fixedrange": True, "automargin": True, "zeroline": False}
    titles = [{"text": text, "standoff": 6} for text in (panel.x if foot else "", panel.y)]
    x: dict[str, Any] = {**shared, "title": titles[0], "domain": across}
    y: dict[str, Any] = {**shared, "title": titles[1], "domain": up}
    x |= {"anchor": f"y{number}"} | ({"type": "log", "dtick": 1} if panel.x_log else {})
    y |= {"anchor": f"x{number}"}
    for axis, ends in ((x, panel.x_range), (y, panel.y_range)):
        if ends is not None:
            axis["range"] = list(ends)
    if panel.y_names is not None:
        count = len(panel.y_names)
        y |= {"tickvals": list(range(count)), "ticktext": [_plain(n) for n in panel.y_names]}
        y["range"] = [count - 0.5, -0.5]
    return {f"xaxis{number}": x, f"yaxis{number}": y}


def _title(text: str, left: float, top: float) -> dict[str, Any]:
    return {
        **{"text": f"<b>{_plain(text)}</b>", "showarrow": False, "xref": "paper", "yref": "paper"},
        **{"x": left, "y": top, "xanchor": "left", "yanchor": "bottom", "font": {"size": 12}},
    }


def _plain(text: str) -> str:
    """Plotly reads some HTML in its texts: none of it is meant."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _trace(one: Series) -> dict[str, Any]:
    colour = NEUTRAL if one.colour is None else PALETTE[one.colour % len(PALETTE)]
    number = str(one.panel + 1) if one.panel else ""
    trace: dict[str, Any] = {
        **{"name": _plain(one.name), "legendgroup": one.name, "showlegend": one.legend},
        **{"x": rounded(one.x), "y": rounded(one.y)},
        **{"xaxis": f"x{number}", "yaxis": f"y{number}"},
    }
    if one.kind == "bars":
        return trace | {"type": "bar", "marker": {"color": colour}}
    modes = {"line": "lines", "points": "markers", "both": "lines+markers"}
    trace |= {
        "type": "scatter",
        "mode": modes[one.kind],
        "line": {"color": colour, "width": 1.6, "dash": DASHES[one.style % len(DASHES)]},
        "marker": {"color": colour, "size": 7, "symbol": SYMBOLS[one.style % len(SYMBOLS)]},
    }
    if one.error is not None:
        # A point of a line without an error would show the caps of one of length 0.
        cap = 0 if one.kind == "line" else 4
        bars: Mapping[str, Any] = {"type": "data", "thickness": 1.4, "width": cap, "color": colour}
        trace[f"error_{one.error_of}"] = {**bars, "array": rounded(one.error)}
    return trace
