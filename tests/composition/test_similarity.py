"""Adapters compared module by module: what is matched, summed up, controlled and refused."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesian_lora.composition.similarity import adapter_of, adapter_of_stack, compare, drift
from bayesian_lora.composition.sources import Source
from bayesian_lora.composition.stack import Part, Stack, StackTask
from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import LoraSpec

MODULES = tuple(
    f"encoder.layer.{layer}.attention.self.{kind}" for layer in (2, 10) for kind in ("query", "key")
)
D_OUT, D_IN = 12, 9


def member(seed: int, rank: int = 2, modules: tuple[str, ...] = MODULES) -> dict[str, Tensor]:
    own = torch.Generator().manual_seed(seed)
    state = {}
    for module in modules:
        state[f"{module}.lora_A"] = torch.randn(rank, D_IN, generator=own)
        state[f"{module}.lora_B"] = torch.randn(D_OUT, rank, generator=own)
    return state


def spec(rank: int = 2, alpha: float = 4.0) -> LoraSpec:
    return LoraSpec(rank, alpha, 0.0, ("key", "query"), False, (), "tiny")


def source(
    name: str, *members: Mapping[str, Tensor], known: bool = True, fingerprint: str | None = None
) -> Source:
    return Source(
        name=name,
        path=f"/somewhere/{name}",
        spec=spec(next(iter(members[0].values())).shape[0]) if known else None,
        members=members,
        weights=np.full(len(members), 1 / len(members)),
        model={"fingerprint": fingerprint} if fingerprint else None,
        task=None,
    )


def compared(*sources: Source, **options: object) -> dict:
    found = compare([adapter_of(s) for s in sources], repeats=3, **options)  # type: ignore[arg-type]
    json.dumps(found, allow_nan=False)
    return found


def dense(state: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    return {
        m: scale * (state[f"{m}.lora_B"].double() @ state[f"{m}.lora_A"].double())
        for m in MODULES
        if f"{m}.lora_A" in state
    }


def cosine(one: Mapping[str, Tensor], two: Mapping[str, Tensor], modules: list[str]) -> float:
    x, y = (torch.cat([w[m].flatten() for m in modules]) for w in (one, two))
    return float(x @ y / x.norm() / y.norm())


@pytest.fixture
def stack() -> Stack:
    """Two rank-1 parts, of which the second came in with weight 0.5."""
    state = member(0)
    return Stack(
        model={"name": "tiny", "base": "tiny", "fingerprint": None, "dtype": "float32"},
        spec=spec(),
        tasks={"sst2": StackTask("sst2", "sst2", ("no", "yes"), "categorical", 16)},
        parts=(Part("sst2", "a", (0, 1)), Part("cola", "b", (1, 2), weight=0.5)),
        factors={name: tensor[None] for name, tensor in state.items()},
        heads={"sst2": {}},
        weights=np.ones(1),
        facts={},
    )


def moved(stack: Stack, change: Callable[[str, Tensor], Tensor]) -> Stack:
    return stack.changed(factors={n: change(n, x.clone()) for n, x in stack.factors.items()})


def test_cosines_are_the_dense_ones_by_module_layer_kind_and_whole() -> None:
    one, two = member(0), member(1, rank=3)
    (pair,) = compared(source("a", one), source("b", two))["pairs"]
    w, v = dense(one), dense(two)
    assert [m["name"] for m in pair["modules"]] == sorted(
        MODULES, key=lambda name: (int(name.split(".")[2]), name)
    ), "layer 2 before layer 10"
    for module in pair["modules"]:
        assert module["cosine"] == pytest.approx(cosine(w, v, [module["name"]]))
    for group in pair["layers"]:
        of_layer = [m for m in MODULES if f".{group['layer']}." in m]
        assert group["cosine"] == pytest.approx(cosine(w, v, of_layer))
        assert group["modules"] == 2
    for group in pair["kinds"]:
        of_kind = [m for m in MODULES if m.endswith(group["kind"].rpartition(".")[2])]
        assert group["cosine"] == pytest.approx(cosine(w, v, of_kind))
    assert [group["layer"] for group in pair["layers"]] == [2, 10]
    assert pair["kinds"][0]["kind"] == "encoder.layer.*.attention.self.key"
    assert pair["whole"]["cosine"] == pytest.approx(cosine(w, v, list(MODULES)))
    mean = sum(m["phi_left"] for m in pair["modules"]) / len(MODULES)
    assert pair["whole"]["phi_left"] == pytest.approx(mean)


def test_norms_need_a_scale_and_cosines_do_not() -> None:
    one, two = member(0), member(1)
    known = compared(source("a", one), source("b", two))
    plain = compared(source("a", one), source("b", two, known=False))
    a, b = plain["adapters"]
    weights = torch.cat([w.flatten() for w in dense(one, scale=2.0).values()])
    assert a["norm"] == pytest.approx(float(weights.norm()))
    assert b["norm"] is None
    assert "adapter_config.json" in b["reason"]
    assert plain["pairs"][0]["modules"][0]["norms"][1] is None
    assert known["pairs"][0]["modules"][0]["norms"][1] > 0
    for name in ("cosine", "phi_left", "geodesic_right"):
        assert plain["pairs"][0]["whole"][name] == pytest.approx(known["pairs"][0]["whole"][name])


def test_the_same_adapter_twice_has_cosine_one() -> None:
    whole = compared(source("a", member(0)), source("a-2", member(0)))["pairs"][0]["whole"]
    assert whole["cosine"] == pytest.approx(1.0)
    assert whole["phi_left"] == pytest.approx(1.0)
    assert whole["geodesic_left"] == pytest.approx(0.0, abs=1e-12)


def test_every_pair_is_compared_once_in_the_order_given() -> None:
    found = compared(*(source(name, member(i)) for i, name in enumerate("abc")))
    names = [(pair["first"], pair["second"]) for pair in found["pairs"]]
    assert names == [("a", "b"), ("a", "c"), ("b", "c")]


def test_the_intersection_is_compared_and_the_rest_named() -> None:
    one, two = member(0, modules=MODULES[:3]), member(1, modules=MODULES[1:])
    (pair,) = compared(source("a", one), source("b", two))["pairs"]
    assert {m["name"] for m in pair["modules"]} == set(MODULES[1:3])
    assert pair["left_out"] == {"first": [MODULES[0]], "second": [MODULES[3]]}


def test_the_control_stands_beside_every_group_and_lies_where_chance_does() -> None:
    one = member(0)
    twice = source("a", one), source("b", {name: x * 3 for name, x in one.items()})
    (pair,) = compare([adapter_of(s) for s in twice], repeats=200)["pairs"]
    for group in (pair["whole"], *pair["layers"], *pair["kinds"], *pair["modules"]):
        control = group["control"]
        sd = control["cosine"]["sd"]
        assert abs(control["cosine"]["mean"]) < 5 * sd / math.sqrt(200)
        assert group["baseline_left"] == pytest.approx(2 / D_OUT)
        assert group["baseline_right"] == pytest.approx(2 / D_IN)
        gap = control["phi_left"]["mean"] - 2 / D_OUT
        assert abs(gap) < 5 * control["phi_left"]["sd"] / math.sqrt(200)
        assert group["cosine"] == pytest.approx(1.0)
    expected = 1 / math.sqrt(D_OUT * D_IN)
    sds = [module["control"]["cosine"]["sd"] for module in pair["modules"]]
    assert sds == pytest.approx([expected] * 4, rel=0.25)


def test_the_random_adapters_have_the_second_ones_norm() -> None:
    """Against a first one that is much larger they change little, against a smaller one much."""
    before = member(0)
    base = Stack(
        {}, spec(), {}, (Part("a", "a", (0, 2)),), {n: x[None] for n, x in before.items()}, {},
        np.ones(1), {},
    )  # fmt: skip
    for factor in (0.1, 3.0):
        after = moved(base, lambda n, x, f=factor: x * f if n.endswith("B") else x)
        whole = drift(base, after, repeats=5)["whole"]["whole"]
        change = whole["control"]["relative_change"]["mean"]
        assert change == pytest.approx(math.hypot(1.0, factor), rel=0.15)


def test_a_seed_makes_the_figures_and_another_changes_only_the_control() -> None:
    sources = source("a", member(0)), source("b", member(1))
    first, again, other = (compared(*sources, seed=s)["pairs"][0]["whole"] for s in (1, 1, 2))
    assert first == again
    assert first["control"]["cosine"] != other["control"]["cosine"]
    assert first["cosine"] == other["cosine"]


def test_a_random_adapter_does_not_depend_on_the_other_modules() -> None:
    whole = compared(source("a", member(0)), source("b", member(1)))["pairs"][0]["modules"]
    alone = (member(i, modules=MODULES) for i in (0, 1))
    cut = [{n: x for n, x in state.items() if n.startswith(MODULES[0])} for state in alone]
    (single,) = compared(source("a", cut[0]), source("b", cut[1]))["pairs"][0]["modules"]
    same = next(m for m in whole if m["name"] == MODULES[0])
    assert single["control"] == same["control"]


def test_ranks_bound_the_grids_and_nothing_else() -> None:
    sources = source("a", member(0, rank=4)), source("b", member(1, rank=3))
    whole, bounded = (compared(*sources, ranks=ranks)["pairs"][0] for ranks in (None, 2))
    for key in ("phi", "baseline", "control_mean", "control_sd"):
        full = np.array(whole["whole"]["grids_left"][key])
        assert full.shape == (4, 3)
        cut = np.array(bounded["whole"]["grids_left"][key])
        np.testing.assert_array_equal(cut, full[:2, :2])
    assert np.array(bounded["modules"][0]["grids_right"]["phi"]).shape == (2, 2)
    assert bounded["whole"]["phi_left"] == whole["whole"]["phi_left"]


def test_a_zero_module_is_null_with_a_reason_never_nan() -> None:
    one, two = member(0), member(1)
    two[f"{MODULES[0]}.lora_B"].zero_()
    (pair,) = compared(source("a", one), source("b", two))["pairs"]
    module = next(m for m in pair["modules"] if m["name"] == MODULES[0])
    assert module["cosine"] is None
    assert module["phi_left"] is None
    assert module["reason"] == "ΔW of b is zero at 1 of 1 modules"
    assert module["control"]["cosine"] is None
    assert pair["whole"]["reason"] == "ΔW of b is zero at 1 of 4 modules"
    assert pair["whole"]["cosine"] == pytest.approx(cosine(dense(one), dense(two), list(MODULES)))
    untrained = {n: torch.zeros_like(x) if n.endswith("B") else x for n, x in one.items()}
    (nothing,) = compared(source("a", untrained), source("b", two))["pairs"]
    assert nothing["whole"]["cosine"] is None
    assert nothing["whole"]["grids_left"]["phi"] == []


def test_members_are_averaged_over_all_pairs_with_their_weights() -> None:
    members = [member(i) for i in range(5)]
    a = dataclasses.replace(source("a", *members[:2]), weights=np.array([0.25, 0.75]))
    b = source("b", *members[2:])
    first, every = (
        compared(a, b, members=which)["pairs"][0]["whole"] for which in ("first", "all")
    )
    assert "members" not in first
    assert {k: v for k, v in every.items() if k != "members"} == first
    cosines = [
        [cosine(dense(x), dense(y), list(MODULES)) for y in members[2:]] for x in members[:2]
    ]
    mean = np.array([0.25, 0.75]) @ np.array(cosines).mean(1)
    assert every["members"]["cosine"]["mean"] == pytest.approx(mean)
    assert every["members"]["cosine"]["sd"] > 0


def test_factor_cosines_depend_on_the_gauge_and_are_labelled_so() -> None:
    one, two = member(0), member(1)
    m = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    turned = {n: torch.linalg.inv(m) @ x if n.endswith("A") else x @ m for n, x in two.items()}
    plain, gauged = (compared(source("a", one), source("b", s)) for s in (two, turned))
    assert "depends on the gauge" in plain["labels"]["factor_cosines"]
    for before, after in zip(*(f["pairs"][0]["modules"] for f in (plain, gauged)), strict=True):
        for factor in ("A", "B"):
            change = before["factor_cosines"][factor] - after["factor_cosines"][factor]
            assert abs(change) > 1e-3
        for name in ("cosine", "phi_left", "phi_right", "geodesic_left", "projection_right"):
            assert after[name] == pytest.approx(before[name], abs=1e-5)


def test_a_module_without_a_layer_is_its_own_kind() -> None:
    modules = ("pooler.dense", *MODULES)
    (pair,) = compared(*(source(n, member(i, 2, modules)) for i, n in enumerate("ab")))["pairs"]
    assert [group["layer"] for group in pair["layers"]] == [2, 10, None]
    assert pair["kinds"][-1]["kind"] == "pooler.dense"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{MODULES[0]}.lora_A": torch.full((2, D_IN), math.nan)}, f"{MODULES[0]}.lora_A has NaN"),
        ({f"{MODULES[0]}.lora_B": torch.full((D_OUT, 2), math.inf)}, "lora_B has an entry beyond"),
        ({f"{MODULES[0]}.lora_A": torch.ones(3, D_IN)}, "has factors A (3, 9) and B (12, 2)"),
    ],
)
def test_damaged_factors_are_named(change: dict[str, Tensor], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        adapter_of(source("a", member(0) | change))


def test_what_is_no_lora_is_refused() -> None:
    with pytest.raises(InputError, match="a: has no LoRA factors"):
        adapter_of(source("a", {"classifier.weight": torch.ones(2, 3)}))
    half = member(0)
    del half[f"{MODULES[1]}.lora_B"]
    with pytest.raises(InputError, match=re.escape(f"{MODULES[1]}.lora_B is missing")):
        adapter_of(source("a", half))


def test_what_cannot_be_compared_is_refused_in_one_line() -> None:
    one = source("a", member(0))
    with pytest.raises(InputError, match="at least two"):
        compared(one)
    other = member(1, modules=("decoder.layer.0.query",))
    with pytest.raises(InputError, match="a and b have no module in common"):
        compared(one, source("b", other))
    wide = {n: torch.cat([x, x], 1) if n.endswith("A") else x for n, x in member(1).items()}
    with pytest.raises(InputError, match="is 12 x 9 in a, 12 x 18 in b"):
        compared(one, source("b", wide))
    bases = [source(n, member(0), fingerprint=n * 64) for n in "ab"]
    with pytest.raises(InputError, match="different base models"):
        compared(*bases)
    with pytest.raises(InputError, match="at least 2"):
        compare([adapter_of(one)] * 2, repeats=1)
    with pytest.raises(InputError, match="begins at 1"):
        compared(one, one, ranks=0)


def test_a_stack_that_was_not_trained_has_not_moved(stack: Stack) -> None:
    found = drift(stack, stack)
    json.dumps(found, allow_nan=False)
    for pair in (found["whole"], *found["parts"].values()):
        assert pair["whole"]["relative_change"] == pytest.approx(0.0, abs=1e-12)
        assert pair["whole"]["cosine"] == pytest.approx(1.0)
        assert pair["whole"]["control"]["relative_change"]["mean"] > 0.5
    for both in found["against"].values():
        assert both["before"]["whole"]["cosine"] == both["after"]["whole"]["cosine"]


def test_drift_is_that_of_the_dense_matrices(stack: Stack) -> None:
    own = torch.Generator().manual_seed(5)
    after = moved(stack, lambda _, x: x + 0.1 * torch.randn(x.shape, generator=own))
    found = drift(stack, after, repeats=3)

    def weights(of: Stack, columns: slice) -> Tensor:
        state = {n: x[0].double() for n, x in of.factors.items()}
        updates = [
            state[f"{m}.lora_B"][:, columns] @ state[f"{m}.lora_A"][columns] for m in MODULES
        ]
        return 2.0 * torch.cat([w.flatten() for w in updates])

    everything = slice(0, 2)
    for columns, pair in (
        (everything, found["whole"]),
        (slice(0, 1), found["parts"]["sst2"]),
        (slice(1, 2), found["parts"]["cola"]),
    ):
        old, new = (weights(s, columns) for s in (stack, after))
        change = float((new - old).norm() / old.norm())
        assert pair["whole"]["relative_change"] == pytest.approx(change)
        assert pair["whole"]["cosine"] == pytest.approx(float(old @ new / old.norm() / new.norm()))
    single = weights(stack, slice(1, 2)) / 0.5  # as it was before it got its weight
    for when, of in (("before", stack), ("after", after)):
        total = weights(of, everything)
        change = float((total - single).norm() / single.norm())
        pair = found["against"]["cola"][when]["whole"]
        assert pair["relative_change"] == pytest.approx(change)


def test_drift_shows_which_part_moved(stack: Stack) -> None:
    def first_column(name: str, x: Tensor) -> Tensor:
        if name.endswith("lora_B"):
            x[:, :, 0] *= -1.0
        return x

    parts = drift(stack, moved(stack, first_column), repeats=2)["parts"]
    assert parts["sst2"]["whole"]["cosine"] == pytest.approx(-1.0)
    assert parts["sst2"]["whole"]["relative_change"] == pytest.approx(2.0)
    assert parts["cola"]["whole"]["relative_change"] == pytest.approx(0.0, abs=1e-12)


def test_members_drift_pair_by_pair(stack: Stack) -> None:
    def doubled(s: Stack) -> Stack:
        factors = {n: torch.cat([x, x + 1.0]) for n, x in s.factors.items()}
        return s.changed(factors=factors, weights=np.array([0.5, 0.5]))

    two = doubled(stack)
    found = drift(two, two, repeats=2)["whole"]["whole"]
    assert found["members"]["cosine"] == {
        "mean": pytest.approx(1.0),
        "sd": pytest.approx(0.0, abs=1e-12),
    }
    with pytest.raises(InputError, match="2 members before and 1 after"):
        drift(two, stack)


def test_other_stacks_are_no_drift(stack: Stack) -> None:
    other = stack.changed(parts=(Part("sst2", "a", (0, 2)),))
    with pytest.raises(InputError, match="differ in their parts or columns"):
        drift(stack, other)


def test_a_stack_stands_beside_single_adapters(stack: Stack) -> None:
    part = adapter_of_stack("sst2", stack, stack.parts[0])
    (pair,) = compare([part, adapter_of_stack("stack", stack)], repeats=2)["pairs"]
    assert pair["modules"][0]["ranks"] == [1, 2]
    assert pair["whole"]["phi_left"] == pytest.approx(1.0)


def test_an_adapter_whose_config_alone_names_another_base_is_not_compared() -> None:
    one = source("a", member(0))
    other = dataclasses.replace(source("b", member(1)), spec=dataclasses.replace(spec(), base="x"))
    with pytest.raises(InputError, match=r"different base models \(tiny, .*; x, "):
        compared(one, other)
    known = source("c", member(1), fingerprint="c" * 64)
    with pytest.raises(InputError, match="different base models"):
        compared(other, known)


def test_the_drift_of_members_has_their_weights_once(stack: Stack) -> None:
    """Member k is one draw before and after."""
    weights = np.array([0.9, 0.1])
    factors = {n: torch.cat([x, x + 1.0]) for n, x in stack.factors.items()}
    two = stack.changed(factors=factors, weights=weights)
    draw = torch.Generator().manual_seed(3)
    moved = {n: x + 0.5 * torch.randn(x.shape, generator=draw) for n, x in factors.items()}
    after = two.changed(factors=moved)
    alone = [
        drift(*(_of_member(s, k) for s in (two, after)), repeats=2)["whole"]["whole"]["cosine"]
        for k in range(2)
    ]
    found = drift(two, after, repeats=2)["whole"]["whole"]["members"]["cosine"]
    assert found["mean"] == pytest.approx(weights @ np.array(alone))


def _of_member(stack: Stack, k: int) -> Stack:
    factors = {n: x[k : k + 1] for n, x in stack.factors.items()}
    return stack.changed(factors=factors, weights=np.ones(1))
