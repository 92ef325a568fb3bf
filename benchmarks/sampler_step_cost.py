"""Time of a sampler's step beyond its gradients, in per cent of one forward and backward pass.

    python benchmarks/sampler_step_cost.py [--chains 1 4] [--rounds 9] [--samplers sgld …]

Packaged encoder, r = 8 on query and value, random batches of 32 as long as SST-2's training phrases
(9.4 words on average, padded to the longest). A step is timed with a closure that leaves the
gradients in place and returns the loss, so SAM's second gradient counts as a gradient. Rounds
alternate between the pass and all samplers; medians are printed. Run it alone: two OpenMP
programs slow each other.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesian_lora import samplers as family
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.posterior import negative_log_likelihood
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.utils.rng import chain_generators

BATCH, RANK, N, STEP, TARGET = 32, 8, 67_349, 1e-4, 5.0
ADAPTING = {"burn_in": 1_000_000}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgld": ("sgld", {}),
    "psgld": ("psgld", {"burn_in": 1}),
    "psgld, adapting": ("psgld", ADAPTING),
    "asgld": ("asgld", {"burn_in": 1}),
    "asgld, adapting": ("asgld", ADAPTING),
    "sghmc": ("sghmc", {}),
    "sghmc, baoab": ("sghmc", {"integrator": "baoab"}),
    "sgnht": ("sgnht", {}),
    "csgld": ("csgld", {"explore_fraction": 0.0}),
    "sam_sgld": ("sam_sgld", {}),
    "sam_sgld_rank1": ("sam_sgld_rank1", {"burn_in": 1}),
}
"""What is timed: a sampler after its adaptation, or (adapting) in it."""


def random_batch(chains: int, vocabulary: int) -> dict[str, Tensor]:
    """Token ids and mask (M, 32, L), alike for every chain; words are exponential in number."""
    rng = torch.Generator().manual_seed(0)
    words = torch.empty(BATCH).exponential_(1 / 9.4, generator=rng).ceil().clamp(max=52)
    lengths = 2 + words.long()  # [CLS] and [SEP]
    ids = torch.randint(1000, vocabulary, (chains, BATCH, int(lengths.max())), generator=rng)
    mask = (torch.arange(ids.shape[-1]) < lengths[:, None]).long().expand(ids.shape)
    return {"input_ids": ids * mask, "attention_mask": mask}


def forward_backward(model: ChainModel, chains: int) -> Callable[[], Tensor]:
    """The closure of one batch; the losses (M,)."""
    batch = random_batch(chains, model.base.config.vocab_size)  # type: ignore[union-attr]
    labels = torch.arange(BATCH).remainder(2).expand(chains, -1)

    def closure() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = negative_log_likelihood("categorical", model(**batch), labels).mean(1)
        loss.sum().backward()
        return loss.detach()

    return closure


def make(name: str, own: dict[str, Any], model: ChainModel, chains: int) -> Sampler:
    return getattr(family, family.MODULES[name])(
        list(model.chain_parameters().values()),
        step_size=STEP,
        num_examples=N,
        prior_std=0.1,
        chain_dim=0,
        generators=chain_generators(0, range(chains), "noise"),
        **own,
    )


def seconds(call: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def step_costs(names: list[str], chains: int, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a pass (key ``pass``) and of every row's step, one value a round."""
    model = build_huggingface_lora_model("minilm", num_labels=2, rank=RANK, chains=chains)
    closure = forward_backward(model, chains)
    loss = closure()
    samplers = {name: make(*ROWS[name], model, chains) for name in names}

    def leave() -> Tensor:
        return loss

    for sampler in samplers.values():  # adaptation of one step, buffers, caches
        for _ in range(3):
            sampler.step(leave)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        found.setdefault("pass", []).append(seconds(closure, 1))
        for name, sampler in samplers.items():
            spent = seconds(lambda sampler=sampler: sampler.step(leave), repeats)
            found.setdefault(name, []).append(spent)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5, help="steps timed together in a round")
    parser.add_argument("--samplers", nargs="+", choices=list(ROWS), default=list(ROWS))
    given = parser.parse_args()
    for chains in given.chains:
        found = step_costs(given.samplers, chains, given.rounds, given.repeats)
        whole = found.pop("pass")
        middle = statistics.median(whole)
        print(
            f"{chains} chains: forward and backward {1e3 * middle:.1f} ms "
            f"(median of {len(whole)}; {1e3 * min(whole):.1f} to {1e3 * max(whole):.1f})"
        )
        for name, times in found.items():
            own = statistics.median(times)
            share = 100 * own / middle
            verdict = "" if share <= TARGET else f"  above {TARGET:g} %"
            print(
                f"  {name:<18} {1e3 * own:7.2f} ms ({1e3 * min(times):.2f} to "
                f"{1e3 * max(times):.2f}) {share:6.2f} %{verdict}"
            )


if __name__ == "__main__":
    main()
