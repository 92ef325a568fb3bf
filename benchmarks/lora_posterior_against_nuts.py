"""Every exact sampler against NUTS (pyro-ppl) on one LoRA posterior of 1,058 dimensions.

    python benchmarks/lora_posterior_against_nuts.py
    python benchmarks/lora_posterior_against_nuts.py --samplers sgld sghmc_baoab --steps 2000
    python benchmarks/lora_posterior_against_nuts.py --nuts-draws 500

A BERT of one layer, r = 8 on the four attention maps and the head, float64, full batches. LoRA's
factors have a gauge and many modes, so only predictive probabilities of held-out texts are
compared: the mean over draws of the softmax. Everyone starts from draws of the prior.
Shapes: M chains, T draws, d parameters of a chain, X texts, L tokens.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bayesian_lora import diagnostics, samplers
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.utils.lora_params import flatten, unflatten

TARGETS = ("query", "key", "value", "attention.output.dense")
WIDTH, RANK, WORDS, WORDS_PER_TEXT, CLS = 16, 8, 16, 4, 1
TEXTS, LABELS_PER_TEXT, HELD_OUT = 40, 4, 64
NUM_EXAMPLES = TEXTS * LABELS_PER_TEXT
LORA_STD, HEAD_STD, SCALING = 0.12, 0.2, 1.0


# --- The posterior --------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A frozen encoder on disk, and texts of which each has been labelled several times.

    train, held_out: token ids (X, L); targets (X, 2): the shares of the two labels.
    """

    folder: Path
    train: Tensor
    targets: Tensor
    held_out: Tensor

    def model(self, chains: int) -> HuggingFaceLora:
        return build_huggingface_lora_model(
            str(self.folder),
            rank=RANK,
            alpha=RANK * SCALING,
            target_modules=TARGETS,
            chains=chains,
            dtype="float64",
        )

    def mean_nll(self, model: Callable[..., Tensor]) -> Tensor:
        """L (M,) of the training set."""
        logits = model(input_ids=self.train, attention_mask=torch.ones_like(self.train))
        return -(self.targets * F.log_softmax(logits, -1)).sum(-1).mean(-1)

    def probabilities(self, model: HuggingFaceLora) -> np.ndarray:
        """p(label 1) of the held-out texts, (M, X)."""
        with torch.no_grad():
            ids = self.held_out
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return logits.softmax(-1)[..., 1].numpy()


def make_problem(folder: Path, seed: int = 0) -> Problem:
    """A random encoder in `folder`; a text's label follows how many of its words are "good"."""
    from transformers import BertConfig, BertModel, logging

    logging.disable_progress_bar()
    first = CLS + 1
    config = BertConfig(
        vocab_size=first + WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=WIDTH,
        max_position_embeddings=1 + WORDS_PER_TEXT,
        initializer_range=0.4,
    )
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    words = torch.randint(WORDS, (TEXTS + HELD_OUT, WORDS_PER_TEXT), generator=rng)
    chance = torch.sigmoid((2.0 * (words % 2) - 1).sum(1).double())[:TEXTS, None]
    labels = torch.rand(TEXTS, LABELS_PER_TEXT, generator=rng, dtype=torch.float64) < chance
    share = labels.double().mean(1)
    ids = F.pad(words + first, (1, 0), value=CLS)
    return Problem(folder, ids[:TEXTS], torch.stack([1 - share, share], 1), ids[TEXTS:])


def prior_groups(model: HuggingFaceLora) -> list[dict[str, Any]]:
    """The sampler's parameter groups: factors, then head."""
    heads = [p for layer in model.head_layers().values() for p in layer.parameters()]
    factors = [p for layer in model.lora_layers().values() for p in (layer.lora_A, layer.lora_B)]
    stds = {LORA_STD: factors, HEAD_STD: heads}
    return [{"params": tensors, "prior_std": std} for std, tensors in stds.items()]


# --- NUTS -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """NUTS's probabilities (chains, T, X), and its own figures."""

    probs: np.ndarray
    acceptance: list[float]
    divergences: int
    seconds: float

    def split_half(self) -> tuple[float, float]:
        """Largest and mean gap between halves of the chains: about twice the whole's error."""
        half = len(self.probs) // 2
        return gap(self.probs[:half], self.probs[half:])


def whitening(model: HuggingFaceLora) -> Tensor:
    """σ of every parameter, (d,), in the order of `flatten(model.chain_parameters())`."""
    groups = prior_groups(model)
    std_of = {id(p): group["prior_std"] for group in groups for p in group["params"]}
    state = model.chain_parameters()
    return flatten({n: torch.full_like(p[:1], std_of[id(p)]) for n, p in state.items()})[0]


def potential(problem: Problem, model: HuggingFaceLora) -> Callable[[dict[str, Tensor]], Tensor]:
    """U(z) = N·L(σz) + ‖z‖²/2 of whitened parameters z (d,), `model` having one chain.

    Value and gradient, of one pass through the model's parameters, as a linear function of z."""
    state, std = model.chain_parameters(), whitening(model)

    def energy(values: dict[str, Tensor]) -> Tensor:
        z = values["z"]
        with torch.no_grad():
            for name, tensor in unflatten((z * std)[None], state).items():
                state[name].copy_(tensor)
        with torch.enable_grad():
            nll = problem.mean_nll(model)[0]
            gradient = torch.autograd.grad(nll, list(state.values()))
        g = NUM_EXAMPLES * std * torch.cat([part.flatten() for part in gradient])
        likelihood = NUM_EXAMPLES * nll.detach() + (g * (z - z.detach())).sum()
        return likelihood + 0.5 * z.square().sum()

    return energy


def nuts_reference(
    problem: Problem, chains: int = 4, draws: int = 100, warmup: int = 50, seed: int = 1
) -> Reference:
    """NUTS chains in turn, each from a draw of the prior and with the prior's mass matrix."""
    from pyro.infer import MCMC, NUTS

    began = time.perf_counter()
    model, members = problem.model(1), problem.model(1)
    energy, std = potential(problem, model), whitening(model)
    probs, acceptance, divergences = [], [], 0
    figures: dict[str, str] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(chains):
            mcmc = MCMC(
                NUTS(potential_fn=energy, adapt_mass_matrix=False, max_tree_depth=7),
                draws,
                warmup,
                initial_params={"z": torch.randn(len(std), dtype=torch.float64)},
                disable_progbar=True,
                hook_fn=lambda kernel, *_: figures.update(kernel.logging()),
            )
            mcmc.run()
            theta: Tensor = mcmc.get_samples()["z"] * std
            members.load_chains(unflatten(theta, members.chain_parameters()))
            probs.append(problem.probabilities(members))
            acceptance.append(float(figures["acc. prob"]))
            divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
    return Reference(np.stack(probs), acceptance, divergences, time.perf_counter() - began)


# --- Ours -----------------------------------------------------------------------------------

MakeSampler = Callable[..., Sampler]
H, BURN_IN = 0.03, 250
RANK1 = partial(samplers.SAMSGLDRank1, step_size=H, rho=0.0)
# h·k_max, measured: .06 for those with momentum, .2 for the others, .4 at the top of a cycle.
SETTINGS: dict[str, MakeSampler] = {
    "sgld": partial(samplers.SGLD, step_size=H),
    "psgld": partial(samplers.PSGLD, step_size=0.002, lambd=0.01, burn_in=BURN_IN),
    "asgld": partial(samplers.ASGLD, step_size=H, burn_in=BURN_IN),
    "sghmc_euler": partial(samplers.SGHMC, step_size=H / 3, integrator="euler"),
    "sghmc_baoab": partial(samplers.SGHMC, step_size=H / 3, integrator="baoab"),
    "sgnht": partial(samplers.SGNHT, step_size=H / 3),
    "csgld": partial(samplers.CSGLD, step_size=2 * H, cycle_steps=250, explore_fraction=0.1),
    "rank1_frozen": partial(RANK1, u_mode="frozen", burn_in=BURN_IN),
    "rank1_cross_chain": partial(RANK1, u_mode="cross_chain"),
}


def sample(
    problem: Problem, make: MakeSampler, *, steps: int = 500, chains: int = 32, seed: int = 2
) -> np.ndarray:
    """Probabilities (M, T, X) of chains from draws of the prior.

    After burn-in every tenth state is kept, of a cycle those of its sampling share.
    """
    model = problem.model(chains)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in prior_groups(model):
            for p in group["params"]:
                p.normal_(0.0, group["prior_std"], generator=rng)
    sampler = make(prior_groups(model), num_examples=NUM_EXAMPLES, chain_dim=0, generators=rng)

    def closure() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = problem.mean_nll(model)
        loss.sum().backward()
        return loss.detach()

    for _ in range(BURN_IN):
        sampler.step(closure)
    cycle = getattr(sampler, "cycle", None)
    probs = []
    for t in range(BURN_IN, BURN_IN + steps):
        sampler.step(closure)
        if (t + 1) % 10 == 0 and (cycle is None or cycle.sampling(t)):
            probs.append(problem.probabilities(model))
    return np.stack(probs, axis=1)


# --- The comparison -------------------------------------------------------------------------


def gap(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Largest and mean gap over texts of the predictive probabilities of (chains, T, X) draws."""
    difference = np.abs(a.mean((0, 1)) - b.mean((0, 1)))
    return float(difference.max()), float(difference.mean())


def spread(a: np.ndarray, b: np.ndarray) -> float:
    """Standard deviation of a probability over draws, that of a over that of b; mean over texts.

    The temperature is seen here: the mean of a probability hardly feels it.
    """
    return float((a.std((0, 1)) / b.std((0, 1))).mean())


def mixing(probs: np.ndarray) -> tuple[float, float]:
    """Of the texts' probabilities: the largest R-hat and the mean Monte Carlo standard error."""

    def figures(statistic: Callable[[np.ndarray], diagnostics.Estimate]) -> list[float]:
        values = [statistic(trace).value for trace in probs.transpose(2, 0, 1)]
        return [math.inf if value is None else value for value in values]

    return max(figures(diagnostics.rhat)), float(np.mean(figures(diagnostics.mcse_mean)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samplers", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=500, help=f"after {BURN_IN} of burn-in")
    parser.add_argument("--chains", type=int, default=32)
    parser.add_argument("--nuts-draws", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problem = make_problem(Path(folder))
        nuts = nuts_reference(problem, draws=args.nuts_draws)
        half, (rhat, error) = nuts.split_half(), mixing(nuts.probs)
        print(
            f"NUTS: {len(nuts.probs)} chains of {args.nuts_draws} draws, {nuts.seconds:.0f} s, "
            f"acceptance {min(nuts.acceptance):.2f} to {max(nuts.acceptance):.2f}, "
            f"{nuts.divergences} divergences, R-hat {rhat:.3f}, standard error {error:.4f}, "
            f"split-half gap {half[0]:.4f} (mean {half[1]:.4f})"
        )
        print(
            "sampler | steps | largest gap | mean gap | NUTS split | sd ratio | R-hat | error | s"
        )
        for name in args.samplers:
            began = time.perf_counter()
            probs = sample(problem, SETTINGS[name], steps=args.steps, chains=args.chains)
            figures = [*gap(probs, nuts.probs), half[0], spread(probs, nuts.probs), *mixing(probs)]
            row = [name, f"{args.chains} × {args.steps}", *(f"{value:.4f}" for value in figures)]
            print(" | ".join([*row, f"{time.perf_counter() - began:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
