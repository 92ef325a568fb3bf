"""Compression and merging against dense algebra, an own TIES, and PEFT where PEFT is right.

Shapes: K members, R rank, D widths.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import model as peft_lora
from torch import Tensor
from transformers import AutoModel

from bayesian_lora.composition.merging import METHODS, compress, merge, merged_update
from bayesian_lora.composition.sources import Source, read_source
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_files import read_stack, write_stack
from bayesian_lora.composition.stack_model import build_stack_model
from bayesian_lora.composition.stacking import stack_sources
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.errors import InputError
from bayesian_lora.predict import predict_logits
from bayesian_lora.utils.rng import derive_seed
from tests.composition.adapters import stacked_update, toy_source, update_of, write_peft
from tests.composition.stacks import make_sets, make_stack

MODULES = {"net.0.query": (9, 9), "net.0.up": (9, 14), "net.1.query": (9, 9), "net.1.up": (9, 14)}
SOME = {name: widths for name, widths in MODULES.items() if name.endswith("query")}
FULL = 9


def unlike(members: int = 1) -> list[Source]:
    """Other ranks, alphas, scalings and modules, in float64."""
    return [
        toy_source("a", MODULES, rank=2, alpha=3.0, members=members, seed=1),
        toy_source("b", MODULES, rank=1, alpha=4.0, rslora=True, members=members, seed=2),
        toy_source("c", SOME, rank=3, alpha=2.0, rslora=True, members=members, seed=3),
    ]


def dense(source: Source, module: str, k: int = 0) -> np.ndarray:
    """ΔW, zero where the source does not adapt the module."""
    if module not in source.widths:
        return np.zeros(MODULES[module][::-1])
    return update_of(source, module, k).numpy()


def plain_ties(
    updates: Sequence[np.ndarray], weights: Sequence[float], density: float
) -> np.ndarray:
    """Yadav et al. (2023), algorithm 1: trim, elect signs, mean of those that agree."""
    trimmed = []
    for update in updates:
        least = np.sort(np.abs(update), axis=None)[-int(density * update.size)]
        trimmed.append(np.where(np.abs(update) >= least, update, 0.0))
    whole = np.stack(trimmed)
    elected = np.where(whole.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(whole) == elected
    total = (np.asarray(weights)[:, None, None] * whole * agree).sum(0)
    return total / np.maximum(agree.sum(0), 1)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_compression_is_the_truncated_svd_and_states_its_error(rank: int) -> None:
    stack = stack_sources(unlike(members=2))
    small = compress(stack, rank)
    assert (small.spec.rank, small.spec.scaling) == (rank, 1.0)
    lost, whole = np.zeros(2), np.zeros(2)
    for module, (d_in, d_out) in MODULES.items():
        assert small.factors[f"{module}.lora_A"].shape == (2, rank, d_in)
        assert small.factors[f"{module}.lora_B"].shape == (2, d_out, rank)
        for k in range(2):
            before, after = stacked_update(stack, module, k), stacked_update(small, module, k)
            u, s, vh = np.linalg.svd(before.numpy(), full_matrices=False)
            nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
            np.testing.assert_allclose(after.numpy(), nearest, atol=1e-12)
            error = small.facts["error"]["layers"][module][k]
            distance = float((before - after).norm() / before.norm())
            assert error == pytest.approx(distance, abs=1e-12)
            assert error == pytest.approx(
                math.sqrt((s[rank:] ** 2).sum() / (s**2).sum()), abs=1e-12
            )
            lost[k] += (s[rank:] ** 2).sum()
            whole[k] += (s**2).sum()
    error = small.facts["error"]
    np.testing.assert_allclose(error["members"], np.sqrt(lost / whole), atol=1e-12)
    assert error["overall"] == pytest.approx(math.sqrt(lost.sum() / whole.sum()), abs=1e-12)
    assert (error["overall"] > 0.05) == (rank < 6)


def test_compressed_factors_share_the_norm_and_heads_and_parts_stay_on_record() -> None:
    stack = stack_sources(unlike(), weights=[1.0, 2.0, 0.5])
    small = compress(stack, 2)
    for module in MODULES:
        a, b = (small.factors[f"{module}.lora_{side}"][0] for side in "AB")
        torch.testing.assert_close(a @ a.T, b.T @ b)
    assert [(p.name, p.columns, p.weight, p.task) for p in small.parts] == [
        ("a", (0, 0), 1.0, "a"),
        ("b", (0, 0), 2.0, "b"),
        ("c", (0, 0), 0.5, "c"),
    ]
    assert small.heads == stack.heads
    assert small.facts["kind"] == "svd"
    assert small.facts["of"]["kind"] == "exact"
    json.dumps(small.facts, allow_nan=False)


def test_a_layer_narrower_than_the_rank_is_filled_up_with_zeros() -> None:
    widths = {"net.0.query": (9, 9), "net.0.thin": (9, 3)}
    stack = stack_sources(
        [toy_source(name, widths, rank=3, seed=i) for i, name in enumerate("ab")], over_width=True
    )
    small = compress(stack, 5)
    thin = [small.factors[f"net.0.thin.lora_{side}"] for side in "AB"]
    assert (thin[0].shape, thin[1].shape) == ((1, 5, 9), (1, 3, 5))
    assert not thin[0][:, 3:].any()
    assert not thin[1][..., 3:].any()
    torch.testing.assert_close(
        stacked_update(small, "net.0.thin"), stacked_update(stack, "net.0.thin")
    )
    assert small.facts["error"]["layers"]["net.0.thin"][0] < 1e-12


def test_nothing_is_lost_of_an_update_that_is_zero() -> None:
    stack = stack_sources(unlike())
    name = "net.0.up.lora_B"
    silent = stack.changed(factors={**stack.factors, name: 0 * stack.factors[name]})
    small = compress(silent, 2)
    assert small.facts["error"]["layers"]["net.0.up"] == [0.0]
    assert not stacked_update(small, "net.0.up").any()


def test_a_compressed_stack_predicts_and_is_stored_as_any_other(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models["bert"]
    stack = make_stack(base, {"long": 2, "third": 2}, members=2)
    data: TokenisedSet = make_sets(base, size=12)["long"]
    logits = predict_logits(build_stack_model(stack), data)
    whole, cut = compress(stack, 4), compress(stack, 1)
    np.testing.assert_allclose(predict_logits(build_stack_model(whole), data), logits, atol=1e-5)
    assert np.abs(predict_logits(build_stack_model(cut), data) - logits).max() > 1e-2
    write_stack(tmp_path / "cut", cut)
    back = read_stack(tmp_path / "cut")
    assert back.parts == cut.parts
    assert all(torch.equal(back.factors[name], cut.factors[name]) for name in cut.factors)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_acts_on_the_updates_whatever_ranks_and_scalings(density: float) -> None:
    sources, weights = unlike(members=2), [1.0, -0.5, 2.0]
    stack = merge(sources, "ties", density, weights, rank=FULL)
    for module in MODULES:
        for k in range(2):
            expected = plain_ties([dense(s, module, k) for s in sources], weights, density)
            np.testing.assert_allclose(stacked_update(stack, module, k), expected, atol=1e-12)
    assert stack.facts["error"]["overall"] < 1e-12


def test_no_factors_gauge_changes_what_is_merged() -> None:
    a, b, _ = unlike()
    turn = torch.tensor([[2.0, 1.0], [0.5, -3.0]], dtype=torch.float64)
    turned = {
        name: turn.inverse() @ tensor
        if name.endswith("lora_A")
        else tensor @ turn
        if name.endswith("lora_B")
        else tensor
        for name, tensor in a.members[0].items()
    }
    other = type(a)(a.name, a.path, a.spec, (turned,), a.weights, a.model, a.task)
    for method in METHODS:
        one, two = (merge([source, b], method, 0.4, seed=5) for source in (a, other))
        for module in MODULES:
            torch.testing.assert_close(stacked_update(one, module), stacked_update(two, module))


@pytest.mark.parametrize("method", METHODS)
def test_at_density_one_nothing_is_dropped(method: str) -> None:
    sources, weights = unlike(), [1.0, 0.5, -1.0]
    stack = merge(sources, method, 1.0, weights, rank=FULL)
    for module in MODULES:
        updates = [dense(source, module) for source in sources]
        plain = np.einsum("i,ijk", weights, np.stack(updates))
        expected = plain if method == "dare_linear" else plain_ties(updates, weights, 1.0)
        np.testing.assert_allclose(stacked_update(stack, module), expected, atol=1e-12)


def test_dares_dropping_is_fair() -> None:
    """Each number is kept with the density and rescaled: right on average, with its variance."""
    draws, density, weights = 4_000, 0.3, [1.0, -2.0]
    updates = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    generator = torch.Generator().manual_seed(7)
    found = torch.stack(
        [merged_update(updates, "dare_linear", density, weights, generator) for _ in range(draws)]
    ).double()
    expected = sum(w * u for w, u in zip(weights, updates, strict=True))
    assert isinstance(expected, Tensor)
    spread = sum((w * u) ** 2 for w, u in zip(weights, updates, strict=True)) * (1 / density - 1)
    assert isinstance(spread, Tensor)
    z = (found.mean(0) - expected) / (spread / draws).sqrt()
    assert z.abs().max() < 4.5
    assert z.square().mean() < 3
    torch.testing.assert_close(found.var(0), spread.double(), rtol=0.2, atol=0)


def test_seeds_alone_decide_what_dare_drops_and_torchs_state_is_left_alone() -> None:
    sources = unlike(members=2)
    before = torch.get_rng_state()
    first = merge(sources, "dare_ties", 0.4, seed=3, rank=FULL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = (merge(sources, "dare_ties", 0.4, seed=s, rank=FULL) for s in (3, 4))
    singles = [
        type(s)(s.name, s.path, s.spec, s.members[:1], np.ones(1), s.model, s.task) for s in sources
    ]
    alone = merge(singles, "dare_ties", 0.4, seed=3, rank=FULL)
    for name, tensor in first.factors.items():
        assert torch.equal(tensor, again.factors[name])
        assert not torch.allclose(tensor, other.factors[name])
        assert torch.equal(tensor[0], alone.factors[name][0])
    assert first.facts["seed"] == 3
    assert "seed" not in merge(sources, "ties").facts


def test_the_rank_is_the_sum_of_ranks_or_as_asked_and_the_cut_is_stated() -> None:
    sources = unlike()
    assert merge(sources).spec.rank == 6
    whole, cut = merge(sources, rank=FULL), merge(sources, rank=2)
    assert (cut.spec.rank, cut.spec.scaling) == (2, 1.0)
    for module in MODULES:
        full = stacked_update(whole, module)
        distance = float((full - stacked_update(cut, module)).norm() / full.norm())
        assert cut.facts["error"]["layers"][module] == [pytest.approx(distance, abs=1e-12)]
        assert distance > 0.1
    assert [(p.columns, p.weight) for p in merge(sources, weights=[1, 2, 3]).parts] == [
        ((0, 0), 1.0),
        ((0, 0), 2.0),
        ((0, 0), 3.0),
    ]
    assert cut.heads.keys() == {"a", "b", "c"}
    assert torch.equal(
        cut.heads["b"]["classifier.weight"][0], sources[1].members[0]["classifier.weight"]
    )
    json.dumps(cut.facts, allow_nan=False)


def test_ranks_that_add_up_to_more_than_the_width_are_cut_to_it() -> None:
    sources = [toy_source(name, SOME, rank=6, seed=i) for i, name in enumerate("ab")]
    stack = merge(sources, density=1.0)
    assert stack.spec.rank == FULL
    assert stack.facts["error"]["overall"] < 1e-12


def peft_merged(
    base: Path, sources: Sequence[Source], rslora: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Layer → ΔW of `add_weighted_adapter` on the sources' factors, without their heads."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["query", "value"], use_rslora=rslora)
    network = AutoModel.from_pretrained(base)
    model: Any = get_peft_model(network, config, adapter_name=sources[0].name)
    for source in sources[1:]:
        model.add_adapter(source.name, config)
    modules: dict[str, Any] = {
        name: network.get_submodule(name.removeprefix("bert."))
        for name in sorted(sources[0].widths)
    }
    with torch.no_grad():
        for name, module in modules.items():
            for source in sources:
                for side in "AB":
                    weight = getattr(module, f"lora_{side}")[source.name].weight
                    weight.copy_(source.members[0][f"{name}.lora_{side}"])
    names = [source.name for source in sources]
    model.base_model.add_weighted_adapter(names, [1.0, 0.6], "merged", **options)
    return {name: module.get_delta_weight("merged").detach() for name, module in modules.items()}


def alike(base: Path, tmp_path: Path, **options: Any) -> list[Source]:
    """Two adapters of one shape."""
    return [
        read_source(f"{name}={write_peft(tmp_path / name, base, 'sst2', seed=i, **options)}")
        for i, name in enumerate(["one", "two"])
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [3, 32])
def test_equal_to_pefts_own_merging_where_that_is_right(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    rank: int,
) -> None:
    """Same ranks, no rsLoRA, no heads, ΔW and not the factors merged."""
    base = tiny_models["bert"]
    sources = alike(base, tmp_path)
    stack = merge(sources, method, 0.4, [1.0, 0.6], seed=11, rank=rank)
    plain, calls = getattr(peft_lora, method), []

    def seeded(*arguments: Any) -> Tensor:
        """Making the new adapter draws numbers too, before the first layer is merged."""
        if not calls:
            torch.manual_seed(derive_seed(11, 0, "dare"))
        calls.append(arguments)
        return plain(*arguments[:3])

    monkeypatch.setattr(peft_lora, method, seeded)
    with torch.random.fork_rng():
        expected = peft_merged(
            base, sources, combination_type=f"{method}_svd", svd_rank=rank, density=0.4
        )
    assert len(calls) == len(expected) == len(stack.layers) == 4
    for name, update in expected.items():
        torch.testing.assert_close(stacked_update(stack, name), update, rtol=0, atol=1e-5)


def test_pefts_own_merging_of_rslora_is_at_another_scale_and_ours_is_not(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models["bert"]
    sources = alike(base, tmp_path, rslora=True)
    ours = merge(sources, "ties", 0.4, [1.0, 0.6], rank=4)
    options = {"combination_type": "ties_svd", "svd_rank": 4, "density": 0.4}
    for name, update in peft_merged(base, sources, rslora=True, **options).items():
        torch.testing.assert_close(2.0 * stacked_update(ours, name), update, rtol=0, atol=1e-5)
        whole = plain_ties([update_of(s, name).numpy() for s in sources], [1.0, 0.6], 0.4)
        u, s, vh = np.linalg.svd(whole)
        nearest = (u[:, :4] * s[:4]) @ vh[:4]
        np.testing.assert_allclose(stacked_update(ours, name), nearest, atol=1e-5)


def with_nan(stack: Stack) -> Stack:
    broken = stack.factors["net.0.up.lora_A"].clone()
    broken[0, 1, 2] = math.nan
    return stack.changed(factors={**stack.factors, "net.0.up.lora_A": broken})


def test_mistakes_are_named() -> None:
    sources = unlike()
    stack = stack_sources(sources)
    for wrong, words in (
        (lambda: compress(stack, 0), "rank=0: .*1 to 9"),
        (lambda: compress(stack, 7), "rank=7: the stack has rank 6; choose 1 to 6"),
        (lambda: compress(with_nan(stack), 2), "net.0.up.lora_A is not finite"),
        (lambda: merge(sources, "tie"), "'tie' is unknown: did you mean ties"),
        (lambda: merge(sources, "dare"), "known are ties, dare_linear, dare_ties"),
        (lambda: merge(sources, density=0.0), "density=0: .* above 0 and at most 1"),
        (lambda: merge(sources, density=1.1), "density=1.1: .* above 0 and at most 1"),
        (lambda: merge(sources, density=math.nan), "density=nan"),
        (lambda: merge(sources, density=0.01), "density=0.01: keeps none of the 81 numbers of"),
        (lambda: merge(sources, weights=[1.0, 2.0]), "3 adapters need one finite number each"),
        (lambda: merge(sources, weights=[1, 2, math.inf]), "3 adapters need one finite number"),
        (lambda: merge(sources, rank=10), "rank=10: the widest layer takes 1 to 9"),
        (lambda: merge(sources[:1]), "at least two"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()
