"""Peak memory of eight chains against one at equal tokens a step."""

import argparse
import gc
import json
from typing import Any

import numpy as np
from children import megabytes, reset_peak, run_alone
from options import Figures, add_dtype, add_examples, add_rounds, add_steps, add_task, command
from ours import our_model, our_sampler
from rounds import ratios, spread
from setting import load

from bayesian_lora.objective import Objective

SEQUENCES = 256
CHAINS = (1, 8)


def add(commands: Any) -> None:
    parser = command(commands, "memory", memory, ["", "--task mrpc --dtype bfloat16"])
    add_task(parser)
    add_dtype(parser)
    add_examples(parser, 2_048, "train")
    add_steps(parser, 5)
    add_rounds(parser)
    parser.add_argument("--alone", type=int, metavar="M", help=argparse.SUPPRESS)


def memory(given: argparse.Namespace) -> Figures:
    """Peak resident memory: M = 8 with batch 32 against M = 1 with batch 256, the same texts.

    Each in processes of its own: of the whole process, and of the steps beyond what is resident
    once everything is imported and model and data are loaded.
    """
    if given.alone is not None:
        return _alone(given)
    own = ["--task", given.task, "--dtype", given.dtype]
    own += ["--examples", given.examples, "--steps", given.steps]
    rows: dict[int, list[dict[str, float]]] = {m: [] for m in CHAINS}
    for _ in range(given.rounds):
        for m in CHAINS:
            rows[m].append(run_alone("memory", "--alone", m, *own))
    print("\n| | whole process, MB | after loading, MB | beyond it, MB |\n|---|---|---|---|")
    for m, found in rows.items():
        cells = [spread([row[n] for row in found]).format(0) for n in ("peak", "loaded", "growth")]
        print(f"| M = {m}, batch {SEQUENCES // m} | " + " | ".join(cells) + " |")
    for name in ("peak", "growth"):
        one, many = ([row[name] for row in rows[m]] for m in CHAINS)
        print(
            f"{name}: M = {CHAINS[1]} over M = {CHAINS[0]}: {spread(ratios(many, one)).format(2)}"
        )
    return {"rows": {f"M = {m}": found for m, found in rows.items()}}


def _alone(given: argparse.Namespace) -> Figures:
    chains = given.alone
    data = load(given.task, "train", given.examples)
    model = our_model(chains, given.dtype)
    objective, sampler = Objective(model, data, "categorical"), our_sampler(model, data)
    rng = np.random.default_rng(0)
    gc.collect()
    loading, loaded = megabytes("VmHWM"), megabytes("VmRSS")
    reset_peak()
    for _ in range(given.steps):
        rows = rng.integers(0, len(data), SEQUENCES).reshape(chains, -1)
        sampler.step(objective.closure(rows))
    steps = megabytes("VmHWM")
    found = {"peak": max(loading, steps), "loaded": loaded, "growth": steps - loaded}
    print(json.dumps(found))
    return found
