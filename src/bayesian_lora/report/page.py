"""One offline HTML file: sections of text, tables and figures under a navigation.

The page asks for nothing: its pictures are data, its policy refuses the rest. Without a chart it
holds no script; with one it holds those that draw it, and runs no others. Every text is escaped by
the template.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bayesian_lora.report.drawing import drawing
from bayesian_lora.utils.files import write_atomic

THEMES: Mapping[str, Mapping[str, Any]] = {
    "light": {
        "text": "#1d2733",
        "back": "#ffffff",
        "grid": "#d5dae0",
        "cycle": ["#1f6fb2", "#c2540a", "#23855d", "#8a4fb0", "#b03a5b", "#5f6b78", "#8d7a00"],
    },
    "dark": {
        "text": "#e4e9ef",
        "back": "#171c22",
        "grid": "#3a434d",
        "cycle": ["#6db3ee", "#f19a5b", "#62c79b", "#c597e6", "#ec88a6", "#a9b4c0", "#d8c653"],
    },
}
LINES, MARKS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""Lines differ in style and marker too: colour alone tells nobody anything."""
MISSING = "not available"


@dataclass(frozen=True)
class Cell:
    """A table's cell: what is shown, and why where it is not available.

    `tone` marks it: "good", "bad", or "" for neither; never the only carrier of a meaning. `long`
    is of a text that needs a wide column.
    """

    text: str
    reason: str = ""
    tone: str = ""
    number: bool = True
    long: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph; `tone` "answer" sets it off as what the section found."""

    text: str
    tone: str = ""
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Code:
    """Lines shown as they are."""

    text: str
    label: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Table:
    """Rows under columns; a row's first cell is its heading."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    kind: ClassVar[str] = "table"

    @property
    def numeric(self) -> list[bool]:
        """Of each column whether it has numbers, and nothing else but what is not available."""
        found = []
        for column in zip(*self.rows, strict=True):
            shown = [cell.number for cell in column if not cell.reason]
            found.append(bool(shown) and all(shown))
        return found or [False] * len(self.columns)

    @property
    def missing(self) -> list[str]:
        """Why cells are not available, each reason once."""
        reasons = [cell.reason for row in self.rows for cell in row if cell.reason]
        return list(dict.fromkeys(reasons))


@dataclass(frozen=True)
class Picture:
    """A figure as data URIs, for a light and for a dark page; `text` says what it shows."""

    light: str
    dark: str | None
    text: str
    caption: str
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Chart:
    """A plotly figure (`report.charts` makes them); `text` says what it shows, `numbers` holds it.

    `figure` is {"data": [...], "layout": {...}}; the page's style sheet colours text and grid.
    """

    figure: Mapping[str, Any]
    text: str
    caption: str
    numbers: Table
    kind: ClassVar[str] = "chart"

    @property
    def json(self) -> str:
        """The figure as JSON that can stand inside a script element."""
        text = json.dumps(self.figure, allow_nan=False, separators=(",", ":"))
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@dataclass(frozen=True)
class Missing:
    """What the section cannot show, and why."""

    what: str
    reason: str
    kind: ClassVar[str] = "missing"


Block = Text | Code | Table | Picture | Chart | Missing


@dataclass(frozen=True)
class Section:
    """A heading under `anchor` (letters, digits, hyphens) and its blocks."""

    title: str
    anchor: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report: its title, what it is about in a line or two, its sections."""

    title: str
    lead: str
    sections: Sequence[Section]
    footer: str = ""


def cell(value: Any, digits: int = 4, *, reason: str = "", tone: str = "") -> Cell:
    """A number to `digits` decimals, whole numbers and words as they are.

    None is "not available", for which a reason is asked.
    """
    if value is None:
        return Cell(MISSING, reason or "it was not recorded", number=False)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", tone=tone, number=False)
    if isinstance(value, int):
        return Cell(f"{value:,}", tone=tone)
    if isinstance(value, float):
        return Cell(number(value, digits), tone=tone)
    return Cell(str(value), tone=tone, number=False)


def number(value: float, digits: int = 4) -> str:
    """Decimals where they say something, powers of ten where decimals would show none."""
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}"


def with_error(value: float | None, error: float | None, reason: str, digits: int = 4) -> Cell:
    """``0.8480 ± 0.0120``."""
    if value is None:
        return cell(None, reason=reason)
    shown = number(value, digits)
    return Cell(shown if error is None else f"{shown} ± {number(error, digits)}")


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
        InputError: it has charts and plotly is not installed.
    """
    import jinja2

    charts = any(block.kind == "chart" for section in page.sections for block in section.blocks)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bayesian_lora.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        page=page, drawing=drawing() if charts else None
    )


def write(path: Path, page: Page) -> None:
    """Write the page, whole or not at all."""
    write_atomic(path, render(page))


def png_picture(png: bytes, text: str, caption: str) -> Picture:
    """A picture that is made already; the page gives it a light ground."""
    return Picture(_uri("image/png", png), None, text, caption)


def plot(
    draw: Callable[[Any], None],
    *,
    text: str,
    caption: str,
    size: tuple[float, float] = (7.2, 3.6),
    panels: int = 1,
) -> Picture:
    """What `draw` puts on matplotlib axes (a list of them if `panels` > 1), for both grounds.

    Args:
        draw: called once a theme.
        text: what a person reads in place of the picture.
        size: inches.
    """
    uris = [_uri("image/svg+xml", _svg(draw, theme, size, panels)) for theme in ("light", "dark")]
    return Picture(uris[0], uris[1], text, caption)


def _svg(draw: Callable[[Any], None], theme: str, size: tuple[float, float], panels: int) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink = THEMES[theme]
    settings: dict[Any, Any] = {
        "svg.hashsalt": "report",  # the same page from the same figures
        "text.color": ink["text"],
        "axes.labelcolor": ink["text"],
        "axes.edgecolor": ink["grid"],
        "axes.facecolor": ink["back"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": _cycle(ink["cycle"]),
        "lines.markersize": 3.5,
        "grid.color": ink["grid"],
        "grid.linewidth": 0.6,
        "xtick.color": ink["text"],
        "ytick.color": ink["text"],
        "figure.facecolor": ink["back"],
        "legend.frameon": False,
        "font.size": 10,
    }
    buffer = io.BytesIO()
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        draw(list(axes) if panels > 1 else axes[0])
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _cycle(colours: Sequence[str]) -> Any:
    """Colour, line and marker of line after line: 28 of them differ also without colour."""
    from cycler import cycler

    turns = range(len(colours) * len(LINES))
    return cycler(
        color=[colours[i % len(colours)] for i in turns],
        linestyle=[LINES[i % len(LINES)] for i in turns],
        marker=[MARKS[i % len(MARKS)] for i in turns],
    )


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
