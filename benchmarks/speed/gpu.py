"""Steps on a GPU at the shapes of BERT-base and RoBERTa-base, by the number of chains."""

import argparse
import gc
import tempfile
from typing import Any

import torch
from options import Figures, add_examples, add_rounds, add_steps, add_task, command
from ours import OurSteps, our_model
from products import Peak, plain_shapes
from rounds import Spread, alternate, ratios, spread
from setting import load
from training import PRECISIONS, step_rate
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.models.hf_lora import Precision

SHAPES = {
    "BERT-base": (BertModel, BertConfig),
    # Two kinds of token types, for the tokeniser is that of the packaged encoder.
    "RoBERTa-base": (
        RobertaModel,
        lambda: RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=2),
    ),
}


def add(commands: Any) -> None:
    parser = command(commands, "gpu", gpu, ["", "--chains 1 8 --shapes BERT-base --task mrpc"])
    add_task(parser)
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    add_examples(parser, 8_192, "train")
    add_steps(parser)
    add_rounds(parser)


def gpu(given: argparse.Namespace) -> Figures:
    """Examples/s, share of peak and memory on a GPU; random weights, batch 32 a chain.

    Every number of chains makes as many steps; the peak is that of plain F.linear on the shapes
    of the step, in its precision, measured in the same rounds.
    """
    if not torch.cuda.is_available():
        print("no CUDA device here: not run")
        return {}
    data = load(given.task, "train", given.examples)
    print(f"{torch.cuda.get_device_name()}, {given.task}, batch 32 a chain\n")
    against = f"against M = {given.chains[0]}"
    print(f"| shape, precision | M | examples/s | {against} | share of peak | peak memory |")
    print("|---|---|---|---|---|---|")
    results: Figures = {"device": torch.cuda.get_device_name()}
    for shape in given.shapes:
        network, config = SHAPES[shape]
        with tempfile.TemporaryDirectory() as folder:
            network(config()).save_pretrained(folder)
            for dtype in PRECISIONS:
                results[f"{shape}, {dtype}"] = _row(f"{shape}, {dtype}", folder, dtype, data, given)
    return results


def _row(
    name: str, folder: str, dtype: Precision, data: TokenisedSet, given: argparse.Namespace
) -> Figures:
    """All numbers of chains of one shape and precision, printed; the figures by M."""
    found: Figures = {}
    for chains in given.chains:
        rates, share, memory = _measured(folder, dtype, chains, data, given)
        gc.collect()
        torch.cuda.empty_cache()
        first = found.setdefault(str(given.chains[0]), {"rates": rates})["rates"]
        against = spread(ratios(rates, first)).format(2)
        print(
            f"| {name} | {chains} | {spread(rates).format(0)} | {against} | {share.format(3)} | "
            f"{memory:.1f} GiB |",
            flush=True,
        )
        found[str(chains)] = {"rates": rates, "share": share.median, "memory_gib": memory}
    return found


def _measured(
    folder: str, dtype: Precision, chains: int, data: TokenisedSet, given: argparse.Namespace
) -> tuple[list[float], Spread, float]:
    """Examples/s by round, share of peak, GiB allocated at most."""
    steps = OurSteps(data, our_model(chains, dtype, folder, "cuda"), given.steps)
    steps()  # its batches say which shapes there are
    shapes = plain_shapes(steps.model, steps.lengths[0])
    own: list[float] = []
    memory = 0.0
    peak = Peak(shapes, getattr(torch, dtype), "cuda")

    def rate() -> float:
        nonlocal memory
        torch.cuda.reset_peak_memory_stats()
        value = steps()
        memory = max(memory, torch.cuda.max_memory_allocated() / 2**30)
        own.append(step_rate(steps, value))
        return value

    rates = alternate({"peak": peak, "ours": rate}, given.rounds)
    share = spread(ratios(own[1:], rates["peak"]))
    return rates["ours"], share, memory
