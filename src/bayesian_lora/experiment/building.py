"""From a `Config` to device, model and generators.

Shapes: M chains.
"""

import dataclasses

import torch

from bayesian_lora.config import Config
from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model
from bayesian_lora.models.sources import ModelSource
from bayesian_lora.sampling import Streams
from bayesian_lora.utils.rng import chain_generators, derive_seed

STREAMS = tuple(field.name for field in dataclasses.fields(Streams))


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        InputError: unknown, or not on this machine.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available()}
    available["mps"] = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device(next(d for d in ("cuda", "mps", "cpu") if available[d]))
    kind, _, index = name.partition(":")
    if kind not in available or (index and not index.isdigit()):
        raise InputError(f"device={name!r}: choose auto, cpu, cuda, cuda:<number> or mps")
    if not available[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise InputError(f"device={name!r} is not available on this machine; use device=auto")
    return torch.device(name)


def build_model(
    config: Config,
    source: ModelSource,
    num_labels: int,
    device: torch.device,
    chains: int | None = None,
) -> HuggingFaceLora:
    """The chain-dimensional model; chains that share one start are fitted as one.

    A chain's factors are drawn before its head and whatever the task: equal seeds (``seed``, or
    ``train.init_seed`` for the factors alone) and equal targets give equal ones.
    """
    lora = config.model.lora
    if chains is None:
        chains = 1 if config.train.starts == "shared" else config.sampler.chains
    model = build_huggingface_lora_model(
        source,
        num_labels,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        rslora=lora.rslora,
        chains=chains,
        seed=config.seed,
        device=device,
        dtype=config.model.dtype,
    )
    if config.train.init_seed is not None:
        generators = chain_generators(config.train.init_seed, range(chains), "init", device)
        for layer in model.lora_layers().values():
            layer.initialise(generators)
    return model


def make_streams(config: Config, device: torch.device) -> Streams:
    """Every chain's generators; what acts on tensors draws on their device."""
    seed, numbers = config.seed, range(config.sampler.chains)
    on = {"dropout": device, "noise": device}
    return Streams(
        **{name: chain_generators(seed, numbers, name, on.get(name, "cpu")) for name in STREAMS}
    )


def chain_seeds(config: Config) -> dict[str, list[int]]:
    """What every chain's generators were seeded with, by purpose; see `utils.rng`."""
    purposes, numbers = ("init", *STREAMS), range(config.sampler.chains)
    seeds = {name: [derive_seed(config.seed, m, name) for m in numbers] for name in purposes}
    if (factors := config.train.init_seed) is not None:
        seeds["init of the factors"] = [derive_seed(factors, m, "init") for m in numbers]
    return seeds


@torch.no_grad()
def start_at_mean(model: HuggingFaceLora, mean: float) -> None:
    """Regression heads begin at the labels' mean, not at 0."""
    last = list(model.head_layers().values())[-1]
    if last.bias is not None:
        last.bias.fill_(mean)
