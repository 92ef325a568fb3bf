"""Named tensors with a leading chain dimension.

Shapes: M chains, d parameters of one chain.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesian_lora.utils.lora_params import (
    chain_dot,
    chain_norm,
    flatten,
    num_chains,
    split,
    stack,
    unflatten,
)

UNHURRIED = settings(deadline=None)


def a_state(chains: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q.lora_B": (4, 2), "q.lora_A": (2, 5), "head.bias": (3,), "log_noise": ()}
    return {n: torch.randn(chains, *shape, generator=generator) for n, shape in shapes.items()}


@given(st.integers(1, 6), st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=4))
@UNHURRIED
def test_split_and_stack_undo_each_other(chains: int, shapes: list[list[int]]) -> None:
    state = {
        f"t{i}": torch.randn(chains, *shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate(shapes)
    }
    members = split(state)
    assert len(members) == num_chains(state) == chains
    back = stack(members)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    flat = flatten(state)
    assert flat.shape == (chains, sum(t[0].numel() for t in state.values()))
    again = unflatten(flat, state)
    assert all(torch.equal(again[name], state[name]) for name in state)


STATES = st.builds(
    lambda chains, shapes, seed: {
        f"t{i}": torch.randn(
            chains, *shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64
        )
        for i, shape in enumerate(shapes)
    },
    st.integers(1, 5),
    st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=4),
    st.integers(0, 2**32),
)


def like(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Another state of the same names and shapes."""
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in state.items()}


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@given(STATES, st.integers(0, 9), st.floats(-100, 100))
@UNHURRIED
def test_the_dot_product_is_one_per_chain(
    state: dict[str, Tensor], seed: int, factor: float
) -> None:
    """Symmetric, linear, bounded by the norms, and each chain's own."""
    b, c = like(state, seed), like(state, seed + 10)
    sums = {n: factor * b[n] + c[n] for n in b}
    assert torch.equal(chain_dot(state, b), chain_dot(b, state))
    assert_close(chain_dot(state, sums), factor * chain_dot(state, b) + chain_dot(state, c))
    bound = chain_norm(state) * chain_norm(b)
    assert bool((chain_dot(state, b).abs() <= bound * (1 + 1e-12)).all())
    assert_close(chain_norm({n: factor * t for n, t in b.items()}), abs(factor) * chain_norm(b))
    for m in range(num_chains(state)):
        alone = [{n: t[m : m + 1] for n, t in given.items()} for given in (state, b)]
        assert_close(chain_dot(*alone), chain_dot(state, b)[m : m + 1])


@given(STATES, st.data())
@UNHURRIED
def test_leaving_chains_out_commutes_with_everything(
    state: dict[str, Tensor], data: st.DataObject
) -> None:
    chains = st.integers(0, num_chains(state) - 1)
    kept = data.draw(st.lists(chains, min_size=1, max_size=5))
    part = {name: tensor[kept] for name, tensor in state.items()}
    members = split(state)
    again = stack([members[m] for m in kept])
    assert all(torch.equal(again[name], part[name]) for name in state)
    assert torch.equal(flatten(part), flatten(state)[kept])
    assert_close(chain_norm(part), chain_norm(state)[kept])
    back = unflatten(flatten(state)[kept], state)
    assert all(torch.equal(back[name], part[name]) for name in state)


@given(STATES, st.integers(0, 9), st.floats(-100, 100))
@UNHURRIED
def test_flattening_is_linear_and_keeps_lengths(
    state: dict[str, Tensor], seed: int, factor: float
) -> None:
    b = like(state, seed)
    sums = {n: t + factor * b[n] for n, t in state.items()}
    assert torch.equal(flatten(sums), flatten(state) + factor * flatten(b))
    assert_close(chain_norm(state), torch.linalg.vector_norm(flatten(state), dim=1))
    assert_close(chain_dot(state, b), (flatten(state) * flatten(b)).sum(1))


def test_members_are_copies_without_a_graph() -> None:
    state = {"a": torch.ones(2, 3, requires_grad=True)}
    members = split(state)
    with torch.no_grad():
        state["a"].zero_()
    assert all(torch.equal(member["a"], torch.ones(3)) for member in members)
    assert all(not member["a"].requires_grad and member["a"].is_contiguous() for member in members)
    # A view would drag all M chains into a member's file.
    assert members[0]["a"].untyped_storage().nbytes() == 3 * 4


def test_flatten_goes_by_chain_and_in_the_state_s_order() -> None:
    state = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "a": torch.tensor([5.0, 6.0])}
    assert flatten(state).tolist() == [[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]]


def test_unflatten_takes_another_number_of_chains() -> None:
    state = a_state(3)
    flat = flatten(a_state(7, seed=1))
    tensors = unflatten(flat, state)
    assert {n: t.shape for n, t in tensors.items()} == {
        n: (7, *t.shape[1:]) for n, t in state.items()
    }
    assert torch.equal(flatten(tensors), flat)


def test_dot_and_norm_are_those_of_the_flat_vectors() -> None:
    a, b = a_state(seed=1), a_state(seed=2)
    reordered = {name: b[name] for name in reversed(b)}
    expected = (flatten(a).double() * flatten(b).double()).sum(1)
    torch.testing.assert_close(chain_dot(a, reordered), expected, atol=1e-12, rtol=1e-12)
    norms = torch.linalg.vector_norm(flatten(a).double(), dim=1)
    torch.testing.assert_close(chain_norm(a), norms, atol=1e-12, rtol=1e-12)
    assert chain_norm(a).shape == (3,)


def test_norms_are_summed_in_float64() -> None:
    """In float32 the many small entries would vanish beside the large one."""
    state = {"large": torch.full((1, 1), 1e4), "small": torch.full((1, 1000), 1e-1)}
    assert chain_norm(state).dtype == torch.float64
    assert chain_norm(state).item() == pytest.approx(math.sqrt(1e8 + 10), rel=1e-9)


@pytest.mark.parametrize("state", [{}, {"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}])
def test_states_without_one_number_of_chains_are_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="dimensions must agree"):
        num_chains(state)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "empty list"),
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], r"member 1 .*\['a', 'b'\]"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}], r"member 1: a is \(3,\).*\(2,\)"),
        ([{"a": torch.zeros(2)}, {}], r"member 1 has other tensors"),
    ],
)
def test_members_that_differ_are_refused(members: list[dict[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack(members)
