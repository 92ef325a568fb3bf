"""Steps of ours against steps of the peers, at one chain and at many."""

import argparse
import statistics
import tempfile
from typing import Any

import numpy as np
import torch
from options import Figures, add_examples, add_rounds, add_steps, add_task, command
from ours import OurSteps, our_steps
from peers import PeftLoops, hf_trainer, mega_batch, peft_loop, peft_model, posteriors_sgld
from products import Peak, operations, plain_shapes
from rounds import Case, Rates, alternate, ratios, sides, spread, table
from setting import BATCH, load

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.models.hf_lora import Precision

HALF = {"fp32": False, "bf16 autocast": True}
PRECISIONS: tuple[Precision, Precision] = ("float32", "bfloat16")


def add(commands: Any) -> None:
    examples = ["--task sst2", "--task mrpc --precision best --json runs/speed.jsonl"]
    parser = command(commands, "train", train, examples)
    add_task(parser)
    choices = ["float32", "best"]
    words = "float32 on both sides, or whichever precision is best for each"
    parser.add_argument("--precision", choices=choices, default="float32", help=words)
    add_examples(parser, 8_192, "train")
    add_steps(parser)
    words = "steps of Trainer by length (default: a mega-batch, whose batches go long to short)"
    parser.add_argument("--grouped-steps", type=int, help=words)
    add_rounds(parser)

    parser = command(commands, "chains", chains, ["", "--chains 1 8 --task mrpc --rounds 7"])
    add_task(parser)
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    add_examples(parser, 8_192, "train")
    add_steps(parser)
    add_rounds(parser)


def train(given: argparse.Namespace) -> Figures:
    """One SGLD step (M = 1 and 8) against a step of HF Trainer, a PEFT loop, posteriors' SGLD.

    A step of ours draws its batch, goes forward and backward, and adds its noise. Peers run as
    PEFT's users run them: in train mode, PEFT's default lora_dropout=0, the base encoder's own
    dropout (.1) active as HuggingFace has it, AdamW, batches of 32 padded to their longest text.
    HF Trainer is timed from the end of its first step to the end of its last. Also the share of
    the machine's rate at products of the same shapes, in useful tokens, float32: by plain
    F.linear, and by whichever is faster of it and the product that ours uses.
    """
    data = load(given.task, "train", given.examples)
    print(f"{given.task}: {len(data)} texts, {data.lengths.mean():.1f} tokens a text")
    with tempfile.TemporaryDirectory() as folder:
        ours = _ours(data, given)
        peers = _peers(data, given, folder)
        alone = ours["ours, float32, M = 1"]
        share = _Share(alone, Peak(plain_shapes(alone.model, _typical(data)), torch.float32))
        rates = alternate({**ours, "ours, float32, M = 1": share, **peers}, given.rounds)
    main = ["ours, float32, M = 1", "ours, float32, M = 8"]
    if given.precision == "best":
        main = ["ours, bfloat16, M = 1", "ours, float32, M = 1"]
    print("\n".join(["", *table(rates, main), ""]))
    if given.precision == "best":
        own = [name for name in ours if name.endswith("M = 1")]
        kinds = sorted({name.rpartition(",")[0] for name in peers})
        by_kind = {kind: [n for n in peers if n.startswith(f"{kind}, ")] for kind in kinds}
        print("\n".join(sides(rates, own, by_kind)))
    print("\n".join(share.lines()))
    return {"rates": rates, "useful": share.useful[1:], "peaks": share.peaks[1:]}


class _Share:
    """Steps, and right before them the machine's rate at their products' shapes.

    By call, the warming one too: `useful` operations a second of the steps, `peaks` of plain
    F.linear and of the fastest product.
    """

    def __init__(self, steps: OurSteps, peak: Peak) -> None:
        self.steps, self.peak = steps, peak
        self.useful: list[float] = []
        self.peaks: list[tuple[float, float]] = []

    def __call__(self) -> float:
        self.peak()
        self.peaks.append((self.peak.plain, self.peak.fastest))
        rate = self.steps()
        self.useful.append(step_rate(self.steps, rate))
        return rate

    def lines(self) -> list[str]:
        plain, fastest = zip(*self.peaks[1:], strict=True)
        names = {"plain F.linear": plain, "the fastest product here": fastest}
        return [
            f"float32 step, M = 1: {spread(ratios(self.useful[1:], peaks)).format(3)} of the "
            f"{statistics.median(peaks) / 1e9:.0f} GFLOP/s of {name} on its shapes"
            for name, peaks in names.items()
        ]


def step_rate(steps: OurSteps, rate: float) -> float:
    """Useful operations a second of the last call, which made `rate` examples a second."""
    done = sum(operations(steps.model, lengths) for lengths in steps.lengths)
    examples = sum(lengths.size for lengths in steps.lengths)
    return done / examples * rate


def _typical(data: TokenisedSet) -> np.ndarray:
    """Lengths (1, B) of a batch as long as the average one."""
    return np.full((1, BATCH), round(float(data.lengths.mean())))


def _ours(data: TokenisedSet, given: argparse.Namespace) -> dict[str, OurSteps]:
    precisions = PRECISIONS if given.precision == "best" else PRECISIONS[:1]
    return {
        f"ours, {dtype}, M = {chains}": our_steps(data, chains, dtype, given.steps)
        for dtype in precisions
        for chains in (1, 8)
    }


def _peers(data: TokenisedSet, given: argparse.Namespace, folder: str) -> dict[str, Case]:
    found: dict[str, Case] = {}
    grouped = given.grouped_steps or mega_batch(data)
    for name, half in HALF.items():
        if half and given.precision == "float32":
            continue
        found[f"PEFT loop, {name}"] = peft_loop(data, half, given.steps)
        found[f"HF Trainer, {name}"] = hf_trainer(data, half, given.steps, False, folder)
        found[f"HF Trainer by length, {name}"] = hf_trainer(data, half, grouped, True, folder)
    other = posteriors_sgld(data, given.steps)
    if other is None:
        print("posteriors is not installed (pip install -c constraints.txt posteriors): no row")
    else:
        found["posteriors SGLD, fp32"] = other
    return found


def chains(given: argparse.Namespace) -> Figures:
    """Examples/s summed over M chains: ours in both precisions, and M separate PEFT loops.

    The PEFT loops (float32) are M models with an optimiser each, stepped in turn, in train mode
    with the encoder's own dropout; every case sees as many examples in a round, whatever M.
    """
    data = load(given.task, "train", given.examples)
    print(f"{given.task}: {data.lengths.mean():.1f} tokens a text")
    cases: dict[str, Case] = {}
    models = [peft_model() for _ in range(max(given.chains))]
    for m in given.chains:
        for dtype in PRECISIONS:
            cases[f"ours, {dtype}, M = {m}"] = our_steps(data, m, dtype, given.steps)
        steps = max(1, given.steps // m)
        cases[f"PEFT loops, M = {m}"] = PeftLoops(data, models[:m], False, steps, seed=m)
    rates = alternate(cases, given.rounds)
    print("\n".join(["", *_by_chains(rates, given.chains)]))
    return {"points": points(rates)}


def _by_chains(rates: Rates, chains: list[int]) -> list[str]:
    """Each series against its own first number of chains, and ours against as many PEFT loops."""
    first = chains[0]
    lines = [
        f"| | examples/s | against M = {first} | against the PEFT loops |",
        "|---|---|---|---|",
    ]
    for name, values in rates.items():
        series, _, m = name.rpartition(", M = ")
        alone = spread(ratios(values, rates[f"{series}, M = {first}"])).format(2)
        loops = spread(ratios(values, rates[f"PEFT loops, M = {m}"])).format(2)
        lines.append(f"| {name} | {spread(values).format(1)} | {alone} | {loops} |")
    return lines


def points(rates: Rates, mark: str = ", M = ") -> list[dict[str, Any]]:
    """Rows for `plot`: the series, its x (the number after `mark`), one value a round."""
    parts = {name: name.rpartition(mark) for name in rates}
    return [
        {"series": series, "x": int(x), "values": rates[name]}
        for name, (series, _, x) in parts.items()
    ]
