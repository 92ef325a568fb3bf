"""Named tensors with a leading chain dimension: split, stack, flatten, dot products and norms.

Shapes: M chains, d parameters of one chain. A *state* maps names to tensors (M, …); a *member*
maps the same names to tensors without the chain dimension.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def num_chains(state: State) -> int:
    """M, checked to be the same for all tensors.

    Raises:
        ValueError: no tensors, or leading dimensions that differ.
    """
    sizes = {tensor.shape[0] for tensor in state.values()}
    if len(sizes) != 1:
        raise ValueError(f"leading (chain) dimensions must agree, found {sorted(sizes)}")
    return sizes.pop()


def split(state: State) -> list[dict[str, Tensor]]:
    """(M, …) tensors → M members, each an own contiguous copy on the CPU."""
    return [
        {name: tensor[m].detach().to("cpu", copy=True) for name, tensor in state.items()}
        for m in range(num_chains(state))
    ]


def stack(members: Sequence[State]) -> dict[str, Tensor]:
    """Members → (M, …) tensors.

    Raises:
        ValueError: no members, or members whose names or shapes differ.
    """
    if not members:
        raise ValueError("an empty list of members cannot be stacked")
    names = members[0].keys()
    for i, member in enumerate(members):
        if member.keys() != names:
            odd = sorted(set(member) ^ set(names))
            raise ValueError(f"member {i} has other tensors than member 0: {odd[:3]}")
        for name in names:
            if member[name].shape != members[0][name].shape:
                raise ValueError(
                    f"member {i}: {name} is {tuple(member[name].shape)}, "
                    f"in member 0 {tuple(members[0][name].shape)}"
                )
    return {name: torch.stack([member[name] for member in members]) for name in names}


def flatten(state: State) -> Tensor:
    """(M, …) tensors → (M, d), names in the state's order."""
    return torch.cat([tensor.reshape(tensor.shape[0], -1) for tensor in state.values()], dim=1)


def unflatten(flat: Tensor, like: State) -> dict[str, Tensor]:
    """Undo `flatten`: (M, d) → tensors shaped as in `like` but for M."""
    sizes = [tensor[0].numel() for tensor in like.values()]
    parts = flat.split(sizes, dim=1)
    return {
        name: part.reshape(flat.shape[0], *tensor.shape[1:])
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }


def chain_dot(a: State, b: State) -> Tensor:
    """Σ aᵢbᵢ over all tensors, per chain (M,), in float64."""
    chains = num_chains(a)
    total = torch.zeros(chains, dtype=torch.float64, device=next(iter(a.values())).device)
    for name, tensor in a.items():
        total += (tensor.double() * b[name].double()).reshape(chains, -1).sum(1)
    return total


def chain_norm(state: State) -> Tensor:
    """Euclidean norm over all tensors, per chain (M,), in float64."""
    return chain_dot(state, state).sqrt()
