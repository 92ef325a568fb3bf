"""Two LoRA updates compared by what they do, ΔW = s·BA, from the factors alone.

Shapes: D widths, R rank of the factors, r ≤ R the numerical rank of ΔW. No D × D matrix is ever
formed: everything comes from the thin singular value decomposition ΔW = U S Vᵀ, which QR of the
two factors and an SVD of an R × R matrix give. None of it depends on the gauge: (B, A) and
(B M, M⁻¹ A) are the same ΔW.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding, not directions of ΔW."""
NO_NORM = 1e-100
"""A ‖ΔW‖ below this is zero: its square could not be told from zero."""


@dataclass(frozen=True)
class Update:
    """ΔW (D_out, D_in) by its singular directions, in float64.

    left U (D_out, R), values S (R,) in falling order, right V (D_in, R); the first `rank`
    columns are directions, the others belong to singular values that are zero to rounding.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    rank: int

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return float(self.values.norm())

    def scaled(self, factor: float) -> "Update":
        """factor·ΔW, for a positive factor."""
        return Update(self.left, self.values * factor, self.right, self.rank)


@dataclass(frozen=True)
class Pair:
    """What two updates at one module have in common.

    inner ⟨ΔW_1, ΔW_2⟩_F; norms and ranks of both; per side (left, right) the principal angles
    (min(r1, r2),) in rising order, in radians, and the grid φ (r1, r2) whose entry [i − 1, j − 1]
    is φ(i, j): both empty where one ΔW is zero. difference ‖ΔW_2 − ΔW_1‖_F, where asked for.
    """

    inner: float
    norms: tuple[float, float]
    ranks: tuple[int, int]
    widths: tuple[int, int]
    angles: tuple[np.ndarray, np.ndarray]
    phi: tuple[np.ndarray, np.ndarray]
    difference: float | None = None

    @property
    def defined(self) -> bool:
        """Whether both updates have a direction at all."""
        return min(self.ranks) > 0


def decompose(a: Tensor, b: Tensor, scale: float = 1.0) -> Update:
    """The update scale·B A of factors A (R, D_in), B (D_out, R)."""
    left, upper_b = torch.linalg.qr(b.detach().double())
    right, upper_a = torch.linalg.qr(a.detach().double().T)
    u, values, vh = torch.linalg.svd(upper_b @ upper_a.T, full_matrices=False)
    values = values * abs(scale)
    largest = float(values[0]) if len(values) else 0.0
    rank = int((values > RANK_TOLERANCE * largest).sum()) if largest > NO_NORM else 0
    return Update(left @ u * math.copysign(1.0, scale), values, right @ vh.T, rank)


def random_update(d_out: int, d_in: int, rank: int, generator: torch.Generator) -> Update:
    """A random LoRA of this rank with ‖ΔW‖_F = 1: Gaussian factors, so isotropic directions.

    Against any fixed ΔW its cosine has mean 0 and standard deviation 1/√(D_out·D_in) exactly (its
    entries are uncorrelated and have equal variance), its φ(i, j) the mean `random_phi`.
    """
    b = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    update = decompose(a, b)
    return update.scaled(1.0 / update.norm)


def random_phi(rows: int, columns: int, width: int) -> np.ndarray:
    """E φ(i, j) = max(i, j)/n (rows, columns) for independent uniform subspaces of R^n, n = width.

    For a fixed orthonormal U (n, i) and a uniform V (n, j), E VVᵀ = (j/n) I, hence
    E‖UᵀV‖²_F = tr(Uᵀ E[VVᵀ] U) = ij/n; division by min(i, j) leaves max(i, j)/n.
    """
    i, j = np.arange(1, rows + 1)[:, None], np.arange(1, columns + 1)[None, :]
    return np.maximum(i, j) / width


def phi_grid(overlaps: Tensor) -> np.ndarray:
    """φ(i, j) = ‖U_1^{(i)ᵀ} U_2^{(j)}‖²_F / min(i, j) for all i, j, of U_1ᵀU_2 (r1, r2).

    1 if the smaller subspace lies in the larger, 0 if they are orthogonal (Hu et al. 2021, eq. 4,
    there on the singular vectors of A; here on those of ΔW, which no change of gauge turns).
    """
    sums = overlaps.square().cumsum(0).cumsum(1).numpy()
    i, j = np.indices(sums.shape) + 1
    return np.minimum(sums / np.minimum(i, j), 1.0)


def principal_angles(first: Tensor, second: Tensor) -> np.ndarray:
    """Angles between the spans of orthonormal columns (n, p) and (n, q): (min(p, q),), rising.

    Of cosine and sine the one that is not near 1 is used, so that small angles keep their digits
    (Björck and Golub 1973).
    """
    large, small = (first, second) if first.shape[1] >= second.shape[1] else (second, first)
    overlaps = large.T @ small
    cosines = torch.linalg.svdvals(overlaps).clamp(max=1.0)
    sines = torch.linalg.svdvals(small - large @ overlaps).clamp(max=1.0).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos()).numpy()


def geodesic_distance(angles: np.ndarray) -> float:
    """Grassmann geodesic √(Σ θ²), radians; of unequal ranks over the smaller's angles."""
    return float(np.sqrt(np.square(angles).sum()))


def projection_distance(angles: np.ndarray) -> float:
    """√(Σ sin²θ) = ‖U_1U_1ᵀ − U_2U_2ᵀ‖_F/√2 at equal ranks (the chordal convention of two)."""
    return float(np.sqrt(np.square(np.sin(angles)).sum()))


def compare_updates(first: Update, second: Update, *, difference: bool = False) -> Pair:
    """All figures of two updates of the same widths.

    ⟨ΔW_1, ΔW_2⟩ = Σ_kl s_k t_l (U_1ᵀU_2)_kl (V_1ᵀV_2)_kl, which is ⟨B_1ᵀB_2, A_1A_2ᵀ⟩ s_1 s_2 in
    the gauge of the singular vectors. ‖ΔW_2 − ΔW_1‖ comes from the factors [U_2S_2, −U_1S_1] and
    [V_2, V_1]: as a difference of squares a small drift would drown in rounding.
    """
    left, right = first.left.T @ second.left, first.right.T @ second.right
    inner = first.values @ (left * right) @ second.values
    r1, r2 = first.rank, second.rank
    none, empty = np.zeros(0), np.zeros((0, 0))
    angles, phi = (none, none), (empty, empty)
    if min(r1, r2):
        angles = (
            principal_angles(first.left[:, :r1], second.left[:, :r2]),
            principal_angles(first.right[:, :r1], second.right[:, :r2]),
        )
        phi = (phi_grid(left[:r1, :r2]), phi_grid(right[:r1, :r2]))
    return Pair(
        inner=float(inner),
        norms=(first.norm, second.norm),
        ranks=(r1, r2),
        widths=(first.left.shape[0], first.right.shape[0]),
        angles=angles,
        phi=phi,
        difference=_difference(first, second) if difference else None,
    )


def _difference(first: Update, second: Update) -> float:
    b = torch.cat([second.left * second.values, -first.left * first.values], 1)
    a = torch.cat([second.right, first.right], 1)
    return decompose(a.T, b).norm


def factor_cosine(first: Tensor, second: Tensor) -> float | None:
    """Cosine of two factors as vectors: depends on the gauge and on a shared initialisation.

    None where their shapes differ or one is zero.
    """
    if first.shape != second.shape:
        return None
    x, y = first.detach().double().flatten(), second.detach().double().flatten()
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms > NO_NORM else None


SIDES = ("left", "right")


def figures(pairs: Sequence[Pair]) -> dict[str, float | None]:
    """The figures of one module or of several together; None where none of them has a direction.

    ``cosine`` is that of the whole ΔW, all modules one vector, ``cosine_mean`` the mean of the
    modules' own; per side ``phi`` is φ(r1, r2), ``angle`` the mean principal angle (radians),
    ``geodesic`` and ``projection`` the Grassmann distances: means over the modules that have
    them. ``relative_change`` is ‖ΔW_2 − ΔW_1‖/‖ΔW_1‖ of the whole.
    """
    norms = [math.hypot(*(pair.norms[k] for pair in pairs)) for k in (0, 1)]
    defined = [pair for pair in pairs if pair.defined]
    values: dict[str, float | None] = {"cosine": None}
    if min(norms) > NO_NORM:
        # Divided one by one: the product of two small norms could underflow.
        values["cosine"] = _unit(sum(pair.inner for pair in pairs) / norms[0] / norms[1])
    cosines = [_unit(pair.inner / pair.norms[0] / pair.norms[1]) for pair in defined]
    values["cosine_mean"] = _mean(cosines)
    for s, side in enumerate(SIDES):
        values[f"phi_{side}"] = _mean([float(pair.phi[s][-1, -1]) for pair in defined])
        values[f"angle_{side}"] = _mean([float(pair.angles[s].mean()) for pair in defined])
        values[f"geodesic_{side}"] = _mean([geodesic_distance(p.angles[s]) for p in defined])
        values[f"projection_{side}"] = _mean([projection_distance(p.angles[s]) for p in defined])
    if all(pair.difference is not None for pair in pairs):
        changes = math.hypot(*(pair.difference or 0.0 for pair in pairs))
        values["relative_change"] = changes / norms[0] if norms[0] > NO_NORM else None
    return values


def _unit(cosine: float) -> float:
    """Rounding may pass 1 by its last digit."""
    return max(-1.0, min(1.0, cosine))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def spread(
    rows: Sequence[dict[str, float | None]], weights: np.ndarray | None = None
) -> dict[str, dict[str, float] | None]:
    """Mean and standard deviation of each figure over repeats, or over weighted members.

    Unweighted rows are draws of a random control, so their deviation is the sample's (n − 1).
    """
    spreads: dict[str, dict[str, float] | None] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if any(value is None for value in values):
            spreads[name] = None
            continue
        array = np.array(values, dtype=np.float64)
        mean = float(np.average(array, weights=weights))
        variance = float(np.average(np.square(array - mean), weights=weights))
        if weights is None:
            variance *= len(array) / max(1, len(array) - 1)
        spreads[name] = {"mean": mean, "sd": math.sqrt(variance)}
    return spreads


def mean_grid(grids: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of grids that may differ in shape, each cell over those that have it; NaN where none."""
    shape = tuple(max((grid.shape[k] for grid in grids), default=0) for k in (0, 1))
    total, count = np.zeros(shape), np.zeros(shape)
    for grid in grids:
        total[: grid.shape[0], : grid.shape[1]] += grid
        count[: grid.shape[0], : grid.shape[1]] += 1
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)
