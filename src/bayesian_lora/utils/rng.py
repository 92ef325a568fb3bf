"""One random generator per chain, derived from (seed, chain, purpose), saved and restored.

A chain's stream depends on its own global number only: chain 3 of 8 draws what chain 3 alone
draws, in any process and on any rank.
"""

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, chain: int, purpose: str) -> int:
    """A 63-bit seed from (seed, chain, purpose); distinct arguments give independent streams."""
    key = (chain, zlib.crc32(purpose.encode()))
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    high, low = sequence.generate_state(2, np.uint32).tolist()
    return (high << 31) ^ low


def chain_generators(
    seed: int, chains: Iterable[int], purpose: str, device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """One seeded generator for each global chain number, on `device`."""
    return [
        torch.Generator(device).manual_seed(derive_seed(seed, chain, purpose)) for chain in chains
    ]


def normal_like(
    flat: Tensor, generators: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """z ~ N(0, I), (M, d): one row from each chain's generator, or all from one."""
    z = torch.empty_like(flat)
    if not isinstance(generators, Sequence):
        return z.normal_(generator=generators)
    for row, generator in zip(z, generators, strict=True):
        row.normal_(generator=generator)
    return z


def save_states(generators: Sequence[torch.Generator]) -> list[Tensor]:
    """The generators' states, byte tensors on the CPU."""
    return [generator.get_state().clone() for generator in generators]


def restore_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    """Undo `save_states`.

    Raises:
        ValueError: the numbers of generators and states differ.
    """
    if len(generators) != len(states):
        raise ValueError(f"{len(states)} generator states for {len(generators)} generators")
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
