"""The mathematics of comparing two ΔW, against dense matrices, scipy and known answers."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from bayesian_lora.composition.subspaces import (
    Pair,
    Update,
    compare_updates,
    decompose,
    factor_cosine,
    figures,
    geodesic_distance,
    mean_grid,
    phi_grid,
    principal_angles,
    projection_distance,
    random_phi,
    random_update,
    spread,
)

D_OUT, D_IN = 14, 10


def factors(seed: int, rank: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random A (R, D_in), B (D_out, R)."""
    own = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, D_IN, generator=own, dtype=dtype)
    return a, torch.randn(D_OUT, rank, generator=own, dtype=dtype)


def pair_of(seeds: tuple[int, int] = (0, 1), ranks: tuple[int, int] = (3, 3)) -> Pair:
    one, two = (decompose(*factors(s, r)) for s, r in zip(seeds, ranks, strict=True))
    return compare_updates(one, two, difference=True)


def value(pairs: list[Pair], name: str) -> float:
    found = figures(pairs)[name]
    assert found is not None
    return found


@pytest.mark.parametrize("scale", [2.0, -0.5])
def test_the_decomposition_is_that_of_the_dense_matrix(scale: float) -> None:
    a, b = factors(0)
    update = decompose(a, b, scale)
    dense = scale * b @ a
    torch.testing.assert_close(update.left * update.values @ update.right.T, dense)
    torch.testing.assert_close(update.values, torch.linalg.svdvals(dense)[:3])
    assert update.rank == 3
    assert update.norm == pytest.approx(float(dense.norm()), rel=1e-12)


@pytest.mark.parametrize("ranks", [(3, 3), (2, 5), (1, 1), (12, 3)])
def test_inner_product_norms_and_difference_are_the_dense_ones(ranks: tuple[int, int]) -> None:
    (a1, b1), (a2, b2) = factors(0, ranks[0]), factors(1, ranks[1])
    one, two = 1.5 * b1 @ a1, 0.25 * b2 @ a2
    pair = compare_updates(decompose(a1, b1, 1.5), decompose(a2, b2, 0.25), difference=True)
    assert pair.inner == pytest.approx(float((one * two).sum()), rel=1e-10)
    by_factors = 1.5 * 0.25 * ((b1.T @ b2) * (a1 @ a2.T)).sum()
    assert pair.inner == pytest.approx(float(by_factors), rel=1e-10)
    assert pair.norms == pytest.approx((float(one.norm()), float(two.norm())))
    assert pair.difference == pytest.approx(float((two - one).norm()))


def test_phi_and_angles_are_those_of_the_dense_singular_vectors() -> None:
    (a1, b1), (a2, b2) = factors(0, 3), factors(1, 2)
    pair = compare_updates(decompose(a1, b1), decompose(a2, b2))
    sides = [np.linalg.svd((b @ a).numpy()) for a, b in ((a1, b1), (a2, b2))]
    bases = [(u[0], u[2].T) for u in sides]
    for side in (0, 1):
        one, two = bases[0][side][:, :3], bases[1][side][:, :2]
        assert pair.phi[side].shape == (3, 2)
        for i in (1, 2, 3):
            for j in (1, 2):
                overlap = np.square(one[:, :i].T @ two[:, :j]).sum() / min(i, j)
                assert pair.phi[side][i - 1, j - 1] == pytest.approx(overlap)
        angles = np.sort(scipy.linalg.subspace_angles(one, two))
        np.testing.assert_allclose(pair.angles[side], angles, atol=1e-12)


def test_an_update_against_itself_is_one_and_at_no_distance() -> None:
    update = decompose(*factors(0))
    pair = compare_updates(update, update, difference=True)
    found = figures([pair])
    assert found["cosine"] == pytest.approx(1.0)
    assert [found["phi_left"], found["phi_right"]] == pytest.approx([1.0, 1.0])
    for name in ("geodesic_left", "geodesic_right", "projection_left", "relative_change"):
        assert found[name] == pytest.approx(0.0, abs=1e-14), name


def test_orthogonal_updates_have_nothing_in_common() -> None:
    eye = torch.eye(D_OUT, dtype=torch.float64)
    a = torch.eye(D_IN, dtype=torch.float64)
    pair = compare_updates(decompose(a[:2], eye[:, :2]), decompose(a[2:4], eye[:, 2:4]))
    found = figures([pair])
    assert found["cosine"] == found["phi_left"] == found["phi_right"] == 0.0
    assert found["geodesic_left"] == pytest.approx(math.sqrt(2) * math.pi / 2)
    assert found["projection_left"] == pytest.approx(math.sqrt(2))


def test_a_change_of_gauge_changes_factor_cosines_and_nothing_else() -> None:
    (a1, b1), (a2, b2) = factors(0), factors(1)
    m = torch.randn(3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    turned = (torch.linalg.inv(m) @ a2, b2 @ m)
    first = decompose(a1, b1)
    plain = compare_updates(first, decompose(a2, b2), difference=True)
    gauged = compare_updates(first, decompose(*turned), difference=True)
    assert figures([gauged]) == pytest.approx(figures([plain]), rel=1e-9)
    np.testing.assert_allclose(gauged.phi[0], plain.phi[0], atol=1e-10)
    np.testing.assert_allclose(gauged.angles[1], plain.angles[1], atol=1e-10)
    for one, same, other in ((a1, a2, turned[0]), (b1, b2, turned[1])):
        before, after = factor_cosine(one, same), factor_cosine(one, other)
        assert before is not None
        assert after is not None
        assert abs(before - after) > 1e-3


def test_a_shared_start_shows_in_the_cosine_of_a_alone() -> None:
    a, b1 = factors(0)
    _, b2 = factors(1)
    assert factor_cosine(a, a) == pytest.approx(1.0)
    found = factor_cosine(b1, b2)
    assert found is not None
    assert abs(found) < 0.5
    assert factor_cosine(a, a[:2]) is None
    assert factor_cosine(a, torch.zeros_like(a)) is None


def test_padding_and_repeated_columns_are_no_directions() -> None:
    a, b = factors(0, 2, torch.float32)
    padded = torch.cat([a, torch.ones(3, D_IN)]), torch.cat([b, torch.zeros(D_OUT, 3)], 1)
    repeated = torch.cat([a, a]), torch.cat([0.3 * b, 0.7 * b], 1)
    for factor_a, factor_b in (padded, repeated):
        update = decompose(factor_a, factor_b)
        assert update.rank == 2
        pair = compare_updates(decompose(a, b), update)
        assert pair.phi[0].shape == (2, 2)
        assert value([pair], "phi_right") == pytest.approx(1.0)
        assert value([pair], "cosine") == pytest.approx(1.0, abs=1e-6)


def test_a_zero_update_has_no_figures_rather_than_nan() -> None:
    a, b = factors(0)
    zero = decompose(a, torch.zeros_like(b))
    empty = decompose(a[:0], b[:, :0])
    underflown = decompose(a, 1e-200 * b)  # its squares are zero
    for nothing in (zero, empty, underflown):
        assert nothing.rank == 0
        pair = compare_updates(decompose(a, b), nothing, difference=True)
        assert not pair.defined
        found = figures([pair])
        assert found.pop("relative_change") == pytest.approx(1.0)
        assert set(found.values()) == {None}
        assert figures([compare_updates(nothing, nothing, difference=True)])["cosine"] is None


def test_a_zero_module_counts_in_the_whole_cosine_and_in_no_mean() -> None:
    a, b = factors(0)
    one = decompose(a, b)
    zero = decompose(a, torch.zeros_like(b))
    pairs = [compare_updates(one, one), compare_updates(one, zero)]
    assert value(pairs, "cosine") == pytest.approx(1 / math.sqrt(2))
    assert value(pairs, "cosine_mean") == pytest.approx(1.0)
    assert value(pairs, "phi_left") == pytest.approx(1.0)


def test_the_whole_cosine_is_that_of_all_modules_as_one_vector() -> None:
    several = [(factors(s), factors(s + 10)) for s in range(3)]
    pairs = [compare_updates(decompose(*f), decompose(*g), difference=True) for f, g in several]
    one, two = (
        torch.cat([(b @ a).flatten() for a, b in column]) for column in zip(*several, strict=True)
    )
    assert value(pairs, "cosine") == pytest.approx(float(one @ two / one.norm() / two.norm()))
    assert value(pairs, "relative_change") == pytest.approx(float((two - one).norm() / one.norm()))


def test_a_tiny_change_keeps_its_digits() -> None:
    a, b = factors(0)
    step = torch.zeros_like(b)
    step[0, 0] = 1e-9 * float(b.abs().max())
    pair = compare_updates(decompose(a, b), decompose(a, b + step), difference=True)
    assert pair.difference == pytest.approx(float((step @ a).norm()), rel=1e-5)


def test_small_angles_keep_their_digits() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    tilted = eye[:, :1] * math.cos(1e-10) + eye[:, 3:4] * math.sin(1e-10)
    assert principal_angles(eye[:, :1], tilted)[0] == pytest.approx(1e-10, rel=1e-9)
    assert principal_angles(tilted, eye[:, :2])[0] == pytest.approx(1e-10, rel=1e-9)


def test_distances_of_known_angles() -> None:
    angles = np.array([0.3, 0.4])
    assert geodesic_distance(angles) == pytest.approx(0.5)
    assert projection_distance(angles) == pytest.approx(math.hypot(math.sin(0.3), math.sin(0.4)))


def test_the_projection_distance_is_that_of_the_projectors() -> None:
    one, two = decompose(*factors(0)), decompose(*factors(1))
    gap = one.left @ one.left.T - two.left @ two.left.T
    found = value([compare_updates(one, two)], "projection_left")
    assert found == pytest.approx(float(gap.norm()) / math.sqrt(2))


def test_phi_of_random_subspaces_averages_to_the_baseline() -> None:
    """E φ(i, j) = max(i, j)/n, on both sides, against a fixed and an arbitrary adapter."""
    draws = 1500
    own = torch.Generator().manual_seed(0)
    fixed = decompose(*factors(0))
    pairs = [compare_updates(fixed, random_update(D_OUT, D_IN, 4, own)) for _ in range(draws)]
    for side, width in enumerate((D_OUT, D_IN)):
        grids = np.stack([pair.phi[side] for pair in pairs])
        z = (grids.mean(0) - random_phi(3, 4, width)) / (grids.std(0) / math.sqrt(draws))
        assert np.abs(z).max() < 4.0
        assert np.abs(z).max() > 0.0


def test_cosines_with_random_updates_have_the_stated_deviation() -> None:
    """Mean 0 and deviation 1/√(D_out·D_in), whatever the ranks and spectra."""
    draws = 1500
    own = torch.Generator().manual_seed(1)
    a, b = factors(0)
    one = decompose(a, b * torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64))
    pairs = [compare_updates(one, random_update(D_OUT, D_IN, 2, own)) for _ in range(draws)]
    cosines = np.array([value([pair], "cosine") for pair in pairs])
    sd = 1 / math.sqrt(D_OUT * D_IN)
    assert abs(cosines.mean()) < 4 * sd / math.sqrt(draws)
    assert cosines.std() == pytest.approx(sd, rel=0.1)


def test_a_random_update_has_the_rank_and_norm_asked_for() -> None:
    own = torch.Generator().manual_seed(0)
    update = random_update(D_OUT, D_IN, 4, own).scaled(2.5)
    assert isinstance(update, Update)
    assert update.rank == 4
    assert update.norm == pytest.approx(2.5)


def test_phi_lies_between_nothing_and_one() -> None:
    pair = pair_of(ranks=(5, 2))
    for grid in pair.phi:
        assert ((grid >= 0) & (grid <= 1)).all()
    eye = torch.eye(3, dtype=torch.float64)
    assert (phi_grid(eye) == [[1, 1, 1], [1, 1, 1], [1, 1, 1]]).all()


def test_spread_takes_the_sample_deviation_or_the_members_weights() -> None:
    rows: list[dict[str, float | None]] = [{"x": 1.0, "y": None}, {"x": 3.0, "y": 1.0}]
    assert spread(rows) == {"x": {"mean": 2.0, "sd": pytest.approx(math.sqrt(2))}, "y": None}
    weighted = spread(rows, np.array([0.25, 0.75]))["x"]
    assert weighted == {"mean": 2.5, "sd": pytest.approx(math.sqrt(0.75))}


def test_grids_of_other_shapes_are_averaged_where_they_exist() -> None:
    found = mean_grid([np.full((1, 2), 1.0), np.full((2, 1), 3.0)])
    np.testing.assert_array_equal(found, [[2.0, 1.0], [3.0, np.nan]])
    assert mean_grid([]).shape == (0, 0)
