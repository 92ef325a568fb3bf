"""Heat maps of a similarity comparison, each beside what chance gives, as PNG.

Colours: blue to red through white for cosines, cividis for φ: both are read without red and green.
Every figure takes a pair of `composition.similarity.compare`, or the comparison, as it is in
`similarity.json`, and gives the PNG's bytes. matplotlib is loaded when the first one is drawn.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Figures = Mapping[str, Any]

SIDES = ("left", "right")
SIDE_TITLES = {"left": "left singular vectors (output)", "right": "right singular vectors (input)"}
DIVERGING, RISING = "RdBu_r", "cividis"
NOTHING = "0.85"
"""The grey of a cell that has no value."""
MOST_ROWS = 12
"""Layers below one another in a map of small maps; more stand side by side."""
NO_GRID = np.zeros((0, 0))
MOST_NOTES = 60
"""Cells of a panel above which their values are not written into them."""
NAMES = {"cosine": "cosine of ΔW", "phi_left": "φ, output side", "phi_right": "φ, input side"}


def phi_map(pair: Figures) -> bytes:
    """φ(i, j) of both sides, mean over the modules; beside it max(i, j)/n and a random LoRA."""
    figure = _figure((10.5, 6.6))
    axes = figure.subplots(2, 3)
    columns = ("phi", "baseline", "control_mean")
    titles = (f"{pair['first']} and {pair['second']}", "chance: max(i, j)/n", "random LoRA")
    for row, side in zip(axes, SIDES, strict=True):
        grids = [_array(pair["whole"][f"grids_{side}"][name]) for name in columns]
        images = _panels(row, grids, RISING)
        for ax, title, grid in zip(row, titles, grids, strict=True):
            ax.set_title(f"{title}\n{_range(grid)}", fontsize=10)
            _count_axes(ax, grids[0].shape)
            ax.set_xlabel(f"j, directions of {pair['second']}")
        row[0].set_ylabel(f"{SIDE_TITLES[side]}\ni, directions of {pair['first']}")
        figure.colorbar(images, ax=row, label="φ(i, j)", shrink=0.9)
    modules = pair["whole"]["modules"]
    figure.suptitle(f"Subspace similarity of ΔW, mean over {modules} modules")
    return _png(figure)


def module_phi_map(pair: Figures, side: str) -> bytes:
    """φ(i, j) of every module on one side, a small map each; the last two columns are chance."""
    modules = pair["modules"]
    layers, kinds = _layers(modules), _kinds(modules)
    blocks = -(-len(layers) // MOST_ROWS)
    rows = -(-len(layers) // blocks)
    columns = blocks * len(kinds) + 2
    figure = _figure((1.9 + 0.35 * blocks + 0.95 * columns, 1.2 + 0.95 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    grids = {(m["layer"], m["kind"]): _array(m[f"grids_{side}"]["phi"]) for m in modules}
    whole = pair["whole"][f"grids_{side}"]
    chance = [_array(whole[name]) for name in ("baseline", "control_mean")]
    top = _top([*grids.values(), *chance])
    shown: dict[Any, np.ndarray] = {}
    for n, layer in enumerate(layers):
        own = axes[n % rows, n // rows * len(kinds) :][: len(kinds)]
        shown |= {ax: grids.get((layer, k), NO_GRID) for ax, k in zip(own, kinds, strict=True)}
        own[0].set_ylabel(_layer_name(layer), rotation=0, ha="right", va="center", fontsize=8)
    shown |= dict(zip(axes[0, -2:], chance, strict=True))
    titles = [*list(kinds.values()) * blocks, "chance:\nmax(i, j)/n", "random\nLoRA"]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8)
    images = [_heat(ax, grid, RISING, 0.0, top) for ax, grid in shown.items()]
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_visible(ax in shown)
    size = " × ".join(str(n) for n in chance[0].shape)
    title = f"φ(i, j) of {pair['first']} (i, down) and {pair['second']} (j, across)"
    figure.suptitle(f"{title}\n{SIDE_TITLES[side]}, i × j up to {size}", fontsize=9)
    figure.colorbar(images[0], ax=axes, label="φ(i, j)", shrink=min(1.0, 5 / rows))
    return _png(figure)


def layer_map(pair: Figures) -> bytes:
    """Cosine and φ of all directions by layer and kind of module, beside those of a random LoRA.

    The mark on a colour bar of φ is max(r1, r2)/n, those of the cosine two deviations of chance.
    """
    modules = pair["modules"]
    layers, kinds = _layers(modules), _kinds(modules)
    short = 0.34 if len(layers) <= 16 else 0.2
    width = max(2.6, 0.62 * len(kinds) + 1.2)
    figure = _figure((1.0 + 3 * width, 1.8 + short * len(layers)))
    axes = figure.subplots(1, 6, squeeze=False)[0]
    for k, name in enumerate(NAMES):
        panels = [_by_place(modules, name, layers, kinds, which) for which in ("own", "random")]
        own = axes[2 * k : 2 * k + 2]
        images = _panels(own, panels, DIVERGING if name == "cosine" else RISING, notes=True)
        bar = figure.colorbar(images, ax=own, location="bottom", aspect=25, pad=0.02)
        bar.set_label(NAMES[name] if name == "cosine" else f"{NAMES[name]} (r1, r2)")
        bar.ax.locator_params(nbins=4)
        _mark(bar, pair["whole"], name)
        for ax, title, panel in zip(own, (NAMES[name], "random LoRA"), panels, strict=True):
            ax.set_title(f"{title}\n{_range(panel)}", fontsize=9)
            ax.set_xticks(range(len(kinds)), list(kinds.values()), rotation=45, ha="right")
            ax.set_yticks(range(len(layers)), [_layer_name(layer) for layer in layers])
            ax.tick_params(labelsize=8, labelleft=ax is axes[0])
    figure.suptitle(f"{pair['first']} and {pair['second']}, by layer and module")
    return _png(figure)


def pairs_map(comparison: Figures) -> bytes:
    """Every adapter against every other: cosine and φ of the whole, a random LoRA below."""
    names = [adapter["name"] for adapter in comparison["adapters"]]
    place = {name: i for i, name in enumerate(names)}
    size = max(2.4, 0.62 * len(names) + 1.0)
    figure = _figure((3 * size + 1.5, 2 * size + 1.2))
    axes = figure.subplots(2, 3)
    for k, name in enumerate(NAMES):
        panels = [np.full((len(names),) * 2, np.nan) for _ in range(2)]
        for pair in comparison["pairs"]:
            i, j = place[pair["first"]], place[pair["second"]]
            for panel, which in zip(panels, ("own", "random"), strict=True):
                panel[i, j] = panel[j, i] = _value(pair["whole"], name, which)
        images = _panels(axes[:, k], panels, DIVERGING if name == "cosine" else RISING, notes=True)
        bar = figure.colorbar(images, ax=axes[:, k], location="bottom", aspect=25)
        bar.ax.locator_params(nbins=4)
        for ax, title, panel in zip(axes[:, k], (NAMES[name], "random LoRA"), panels, strict=True):
            ax.set_title(f"{title}\n{_range(panel)}", fontsize=10)
            ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
            ax.set_yticks(range(len(names)), names)
            ax.tick_params(labelsize=8)
    figure.suptitle("Adapters against one another, all modules together")
    return _png(figure)


def pictures(comparison: Figures) -> dict[str, bytes]:
    """All heat maps of a comparison by file name; φ grids where there is more than φ(1, 1)."""
    found: dict[str, bytes] = {}
    if len(comparison["adapters"]) > 2:
        found["pairs.png"] = pairs_map(comparison)
    for pair in comparison["pairs"]:
        name = re.sub(r"[^\w-]+", "-", f"{pair['first']}-{pair['second']}")
        found[f"{name}-layers.png"] = layer_map(pair)
        if _array(pair["whole"]["grids_left"]["phi"]).size > 1:
            found[f"{name}-phi.png"] = phi_map(pair)
            for side in SIDES:
                found[f"{name}-phi-{side}.png"] = module_phi_map(pair, side)
    return found


def short_names(kinds: Sequence[str]) -> dict[str, str]:
    """Each kind of module by its last words, as many as tell it from the others."""
    names = {}
    for kind in kinds:
        words = kind.split(".")
        ends = (".".join(words[-n:]) for n in range(1, len(words)))
        others = [other for other in kinds if other != kind]
        alone = (e for e in ends if not any(f".{o}".endswith(f".{e}") for o in others))
        names[kind] = next(alone, kind).removeprefix("*.")
    return names


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _array(grid: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array(grid, dtype=np.float64).reshape(len(grid), len(grid[0]) if grid else 0)


def _top(panels: Sequence[np.ndarray]) -> float:
    """The largest magnitude on the panels, 1 if there is none."""
    shown = np.concatenate([np.abs(panel[np.isfinite(panel)]) for panel in panels])
    return float(shown.max()) if shown.size and shown.max() > 0 else 1.0


def _range(panel: np.ndarray) -> str:
    """The smallest and the largest value, for what is too even to be read from colours."""
    shown = panel[np.isfinite(panel)]
    return f"{shown.min():.2g} to {shown.max():.2g}" if shown.size else "no values"


def _panels(
    axes: Sequence[Any], panels: Sequence[np.ndarray], colours: str, notes: bool = False
) -> Any:
    """Panels on one scale, from 0 or symmetrical about it."""
    top = _top(panels)
    low = -top if colours == DIVERGING else 0.0
    images = None
    for ax, panel in zip(axes, panels, strict=True):
        images = _heat(ax, panel, colours, low, top)
        if notes and panel.size <= MOST_NOTES:
            _write_values(ax, panel, colours, low, top)
    return images


def _heat(ax: Any, panel: np.ndarray, colours: str, low: float, top: float) -> Any:
    shown = panel if panel.size else np.full((1, 1), np.nan)
    ax.set_facecolor(NOTHING)
    return ax.imshow(shown, cmap=colours, vmin=low, vmax=top, aspect="auto")


def _write_values(ax: Any, panel: np.ndarray, colours: str, low: float, top: float) -> None:
    for (i, j), x in np.ndenumerate(panel):
        if np.isfinite(x):
            share = (x - low) / (top - low)
            dark = share < 0.5 if colours == RISING else abs(share - 0.5) > 0.35
            digits = 2 if top >= 0.1 else 3
            text = f"{round(x, digits) + 0.0:.{digits}f}"  # adding 0 leaves no "-0.00"
            colour = "white" if dark else "black"
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)


def _count_axes(ax: Any, shape: tuple[int, ...]) -> None:
    """Ticks 1, 2, … for i and j, not all of many."""
    for set_ticks, length in zip((ax.set_yticks, ax.set_xticks), shape, strict=True):
        step = max(1, length // 8)
        shown = range(step - 1 if step > 1 else 0, length, step)
        set_ticks(list(shown), [str(n + 1) for n in shown])


def _layers(modules: Sequence[Figures]) -> list[int | None]:
    return list(dict.fromkeys(m["layer"] for m in modules))


def _kinds(modules: Sequence[Figures]) -> dict[str, str]:
    return short_names(list(dict.fromkeys(m["kind"] for m in modules)))


def _layer_name(layer: int | None) -> str:
    return "no layer" if layer is None else f"layer {layer}"


def _value(group: Figures, name: str, which: str) -> float:
    if which == "own":
        value = group[name]
    else:
        control = group["control"][name]
        value = None if control is None else control["mean"]
    return np.nan if value is None else float(value)


def _by_place(
    modules: Sequence[Figures],
    name: str,
    layers: Sequence[int | None],
    kinds: Mapping[str, str],
    which: str,
) -> np.ndarray:
    panel = np.full((len(layers), len(kinds)), np.nan)
    rows, columns = list(layers), list(kinds)
    for module in modules:
        place = rows.index(module["layer"]), columns.index(module["kind"])
        panel[place] = _value(module, name, which)
    return panel


def _mark(bar: Any, whole: Figures, name: str) -> None:
    """Where chance lies on a colour bar."""
    low, high = bar.mappable.get_clim()
    if name == "cosine":
        control = whole["control"]["cosine"]
        marks = [] if control is None else [-2 * control["sd"], 2 * control["sd"]]
    else:
        baseline = whole[f"baseline_{name.removeprefix('phi_')}"]
        marks = [] if baseline is None else [baseline]
    for mark in marks:
        if low <= mark <= high:
            bar.ax.axvline(mark, color="black" if name == "cosine" else "white", lw=1.5, ls=":")
