"""Heat maps hold the figures they are named after, beside those of chance."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from bayesian_lora.composition.pair_figures import Adapter
from bayesian_lora.composition.similarity import compare
from bayesian_lora.report import heatmaps

MODULES = tuple(f"encoder.layer.{n}.attention.{k}" for n in range(3) for k in ("query", "key"))


def comparison(ranks: tuple[int, ...]) -> dict[str, Any]:
    adapters = []
    for i, rank in enumerate(ranks):
        own = torch.Generator().manual_seed(i)
        member = {
            m: (torch.randn(rank, 10, generator=own), torch.randn(12, rank, generator=own))
            for m in MODULES
        }
        adapters.append(Adapter(f"task {i}", (member,), np.ones(1), 1.0))
    return compare(adapters, repeats=3)


@pytest.fixture(scope="module")
def several() -> dict[str, Any]:
    return comparison((3, 2, 1))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures in place of their PNGs, which take longer."""
    figures: list[Figure] = []
    monkeypatch.setattr(heatmaps, "_png", lambda figure: figures.append(figure) or b"")
    return figures


def panels(figure: Figure) -> list[tuple[str, np.ndarray, tuple[float, float]]]:
    """Title, values and colour limits of each shown image."""
    found = []
    for ax in figure.axes:
        if ax.images and ax.get_visible():
            image = ax.images[0]
            values = np.ma.asarray(image.get_array()).data.astype(float)
            found.append((ax.get_title(), values, image.get_clim()))
    return found


def test_the_phi_map_shows_both_sides_beside_baseline_and_control(
    several: dict[str, Any], drawn: list[Figure]
) -> None:
    pair = several["pairs"][0]
    heatmaps.phi_map(pair)
    shown = panels(drawn[0])
    expected = [
        pair["whole"][f"grids_{side}"][name]
        for side in ("left", "right")
        for name in ("phi", "baseline", "control_mean")
    ]
    assert len(shown) == len(expected)
    for (_, values, limits), grid in zip(shown, expected, strict=True):
        np.testing.assert_allclose(values, grid)
        assert limits[0] == 0.0
        assert limits[1] >= values.max()
    assert shown[0][2] == shown[1][2] == shown[2][2], "one scale, or chance cannot be compared"
    titles = [title for title, *_ in shown[:3]]
    assert titles[0].startswith("task 0 and task 1")
    assert titles[1].startswith("chance: max(i, j)/n")
    assert titles[2].startswith("random LoRA")


def test_the_axes_of_phi_say_whose_directions_they_count(
    several: dict[str, Any], drawn: list[Figure]
) -> None:
    heatmaps.phi_map(several["pairs"][0])
    ax = drawn[0].axes[0]
    assert ax.get_xlabel() == "j, directions of task 1"
    assert ax.get_ylabel().endswith("i, directions of task 0")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["1", "2", "3"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2"]


@pytest.mark.parametrize("most_rows", [12, 2])
def test_small_maps_show_every_module_and_chance(
    several: dict[str, Any],
    drawn: list[Figure],
    monkeypatch: pytest.MonkeyPatch,
    most_rows: int,
) -> None:
    monkeypatch.setattr(heatmaps, "MOST_ROWS", most_rows)
    pair = several["pairs"][0]
    heatmaps.module_phi_map(pair, "right")
    shown = [values for _, values, _ in panels(drawn[0])]
    assert len(shown) == len(MODULES) + 2
    wanted = [m["grids_right"]["phi"] for m in pair["modules"]]
    wanted += [pair["whole"]["grids_right"][name] for name in ("baseline", "control_mean")]
    for grid in wanted:
        assert any(np.allclose(values, grid) for values in shown)
    assert len({limits for *_, limits in panels(drawn[0])}) == 1
    assert "right singular vectors" in drawn[0].get_suptitle()


def test_the_layer_map_places_modules_by_layer_and_kind(
    several: dict[str, Any], drawn: list[Figure]
) -> None:
    pair = several["pairs"][0]
    heatmaps.layer_map(pair)
    shown = panels(drawn[0])
    places = {(m["layer"], m["kind"].rpartition(".")[2]): m for m in pair["modules"]}
    ax = drawn[0].axes[0]
    layers = [tick.get_text() for tick in ax.get_yticklabels()]
    kinds = [tick.get_text() for tick in ax.get_xticklabels()]
    assert layers == ["layer 0", "layer 1", "layer 2"]
    assert sorted(kinds) == ["key", "query"]
    names = ("cosine", "phi_left", "phi_right")
    for name, own, random in zip(names, shown[::2], shown[1::2], strict=True):
        for i in range(3):
            for j, kind in enumerate(kinds):
                module = places[i, kind]
                assert own[1][i, j] == pytest.approx(module[name])
                assert random[1][i, j] == pytest.approx(module["control"][name]["mean"])
        assert own[2] == random[2]
    low, high = shown[0][2]
    assert low == -high, "no cosine may look like another sign's"


def test_what_has_no_value_is_left_grey(several: dict[str, Any], drawn: list[Figure]) -> None:
    pair = copy.deepcopy(several["pairs"][0])
    for name in ("cosine", "phi_left", "phi_right"):
        pair["modules"][0][name] = pair["modules"][0]["control"][name] = None
    heatmaps.layer_map(pair)
    assert np.isnan(panels(drawn[0])[0][1]).sum() == 1


def test_nothing_at_all_can_be_drawn(several: dict[str, Any], drawn: list[Figure]) -> None:
    """Two untrained adapters: every figure is null, no grid has a cell."""
    untrained = comparison((1, 1))
    pair = untrained["pairs"][0]
    for group in (pair["whole"], *pair["modules"]):
        for name in ("cosine", "phi_left", "phi_right"):
            group[name] = group["control"][name] = None
        group["baseline_left"] = group["baseline_right"] = None
        for side in ("left", "right"):
            group[f"grids_{side}"] = {key: [] for key in group[f"grids_{side}"]}
    assert list(heatmaps.pictures(untrained)) == ["task-0-task-1-layers.png"]
    assert "no values" in panels(drawn[0])[0][0]


def test_the_matrix_of_pairs_is_symmetrical_with_chance_below(
    several: dict[str, Any], drawn: list[Figure]
) -> None:
    heatmaps.pairs_map(several)
    shown = panels(drawn[0])
    assert len(shown) == 6
    by_name = {(p["first"], p["second"]): p["whole"] for p in several["pairs"]}
    for k, name in enumerate(("cosine", "phi_left", "phi_right")):
        values, chance = shown[k][1], shown[3 + k][1]
        np.testing.assert_array_equal(values, values.T)
        assert np.isnan(np.diag(values)).all()
        for (one, two), whole in by_name.items():
            place = int(one[-1]), int(two[-1])
            assert values[place] == pytest.approx(whole[name])
            assert chance[place] == pytest.approx(whole["control"][name]["mean"])


@pytest.mark.usefixtures("drawn")
def test_rank_one_needs_no_grid_and_two_adapters_no_matrix(several: dict[str, Any]) -> None:
    assert list(heatmaps.pictures(comparison((1, 1)))) == ["task-0-task-1-layers.png"]
    names = list(heatmaps.pictures(several))
    assert names[0] == "pairs.png"
    assert "task-0-task-1-phi-left.png" in names
    assert len(names) == 1 + 3 * 4


def test_a_picture_is_a_png_and_the_same_every_time(several: dict[str, Any]) -> None:
    png = heatmaps.phi_map(several["pairs"][0])
    assert png == heatmaps.phi_map(several["pairs"][0])
    image = imread(io.BytesIO(png), format="png")
    assert image.shape[0] > 400
    assert image[..., :3].std() > 0.1, "an empty picture"


def test_kinds_are_called_by_as_many_words_as_tell_them_apart() -> None:
    kinds = ["layer.*.attention.self.query", "layer.*.attention.output.dense"]
    assert list(heatmaps.short_names(kinds).values()) == ["query", "dense"]
    names = heatmaps.short_names([*kinds, "layer.*.output.dense"])
    assert list(names.values()) == ["query", "attention.output.dense", "output.dense"]
    assert list(heatmaps.short_names(["pooler.dense", "dense"]).values()) == [
        "pooler.dense",
        "dense",
    ]
    sides = [f"{side}.block.*.layer.0.q" for side in ("encoder", "decoder")]
    assert list(heatmaps.short_names(sides).values()) == sides
