"""The figure: examples/s over chains, prediction time over members."""

import argparse
import json
from pathlib import Path
from typing import Any

from options import Figures, command
from rounds import spread

TARGET = Path(__file__).parents[2] / "docs" / "figures" / "speed.svg"
COLOURS = {"ours, float32": "#0b6fa4", "ours, bfloat16": "#3d9a50"}
PEERS = ("#c4501b", "#8a5fa8", "#7a6a53")
PANELS = {
    "chains": (
        "chains M",
        "examples/s, summed over chains",
        "{task}: one SGLD step, batch 32 a chain",
    ),
    "predict": ("members K", "seconds", "{task}: prediction of {texts} texts"),
}


def add(commands: Any) -> None:
    parser = command(commands, "plot", plot, ["runs/speed.jsonl", "a.jsonl b.jsonl --out x.png"])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="written by --json")
    parser.add_argument("--out", type=Path, default=TARGET, help="the suffix says the format")


def plot(given: argparse.Namespace) -> Figures:
    """Draw examples/s over M and prediction time over K from what --json has written.

    Of each command the last line that has points is drawn: medians, bars from the smallest to
    the largest of the rounds.
    """
    found = latest(given.files)
    draw(found, given.out)
    print(f"{given.out}: {', '.join(found)}")
    return {}


def latest(files: list[Path]) -> dict[str, dict[str, Any]]:
    """The last record with points of each command that is drawn.

    Raises:
        SystemExit: there is none.
    """
    lines = [line for path in files for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    found = {r["command"]: r for r in records if "points" in r and r["command"] in PANELS}
    if not found:
        raise SystemExit("no points: write them with 'chains --json' or 'predict --members 1 5 …'")
    return {name: found[name] for name in PANELS if name in found}


def draw(records: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    look: Any = {"svg.hashsalt": "speed", "font.size": 9.5, "axes.titlesize": 10}
    with plt.rc_context(look):
        size = (5 * len(records), 3.8)
        figure, axes = plt.subplots(1, len(records), figsize=size, squeeze=False)
        for axis, (name, record) in zip(axes[0], records.items(), strict=True):
            _panel(axis, name, record)
        figure.tight_layout()
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, facecolor="white", dpi=110)
        plt.close(figure)


def _panel(axis: Any, name: str, record: dict[str, Any]) -> None:
    points = record["points"]
    series = list(dict.fromkeys(point["series"] for point in points))
    peers = iter(PEERS)
    for label in series:
        own = sorted((p for p in points if p["series"] == label), key=lambda p: p["x"])
        found = [spread(p["values"]) for p in own]
        middle = [f.median for f in found]
        bars = [
            [f.median - f.smallest for f in found],
            [f.largest - f.median for f in found],
        ]
        colour = COLOURS.get(label) or next(peers)
        ours = label in COLOURS
        style = {"marker": "o" if ours else "s", "linestyle": "-" if ours else "--"}
        axis.errorbar(
            [p["x"] for p in own],
            middle,
            bars,
            label=label,
            color=colour,
            markersize=4,
            linewidth=1.4,
            elinewidth=1,
            capsize=2,
            **style,
        )
    x, y, title = PANELS[name]
    axis.set(xlabel=x, ylabel=y, title=title.format(task=record["arguments"]["task"], **record))
    top = max(max(p["values"]) for p in points)
    axis.set_ylim(0, 1.3 * top)  # room for the legend
    axis.set_xticks(sorted({p["x"] for p in points}))
    if name == "chains":
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.legend(loc="upper left", frameon=False, fontsize=8.5)
