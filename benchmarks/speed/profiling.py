"""Where the time of one step goes, in a plain PEFT loop and in ours."""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from options import Figures, add_dtype, add_examples, add_steps, add_task, command
from ours import our_model, our_sampler
from peers import PeftLoops, peft_loop
from setting import BATCH, RANK, load
from torch.profiler import ProfilerActivity, profile, record_function

from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.models.hf_lora import Precision
from bayesian_lora.objective import Objective
from bayesian_lora.utils.rng import chain_generators

STEP, GRADIENT = "measured step", "its gradient"
PRODUCTS = {"mm", "addmm", "addmm_", "linear", "_linear_pointwise", "mkldnn_linear", "matmul", "t"}
LORA, REST = "LoRA products", "Python and the rest"
CATEGORIES: dict[str, set[str]] = {
    "matrix products": PRODUCTS,
    LORA: set(),
    "attention": {
        "bmm",
        "baddbmm",
        "softmax",
        "_softmax",
        "_softmax_backward_data",
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_attention_math",
    },
    "layer norm": {"layer_norm", "native_layer_norm", "native_layer_norm_backward"},
    "activation": {"gelu", "gelu_backward", "relu", "tanh", "tanh_backward", "threshold_backward"},
    "dropout": {"dropout", "native_dropout", "native_dropout_backward", "bernoulli_"},
    "copies and indexing": {
        "copy_",
        "_to_copy",
        "to",
        "clone",
        "contiguous",
        "reshape",
        "cat",
        "stack",
        "index",
        "index_select",
        "index_copy_",
        "gather",
        "embedding",
        "fill_",
        "zero_",
        "zeros",
        "zeros_like",
        "new_zeros",
        "split",
        "split_with_sizes",
    },
    "sums and other elementwise": {
        "add",
        "add_",
        "mul",
        "mul_",
        "div",
        "div_",
        "sub",
        "sum",
        "masked_fill",
        "where",
    },
    "sampler or optimiser": set(),
    REST: set(),
}
BY_NAME = {op: name for name, ops in CATEGORIES.items() for op in ops}


def add(commands: Any) -> None:
    parser = command(commands, "profile", profile_steps, ["", "--task mrpc --dtype bfloat16"])
    add_task(parser)
    add_dtype(parser)
    add_examples(parser, 8_192, "train")
    add_steps(parser)


def profile_steps(given: argparse.Namespace) -> Figures:
    """Where the time of one step goes: before (a plain PEFT loop) and after (ours).

    Self time of torch's operations, in categories. LoRA products are those with a side as long
    as the rank; what the operations leave of the step is Python's, drawing batches included. The
    profiler slows a step: its time without it stands beside.
    """
    data = load(given.task, "train", given.examples)
    steps = {
        "before: PEFT loop, fp32": _peft_step(peft_loop(data, False, 1)),
        "before: PEFT loop, bf16 autocast": _peft_step(peft_loop(data, True, 1)),
        f"after: ours, {given.dtype}": _our_step(data, given.dtype),
    }
    found = {name: profiled(step, given.steps) for name, step in steps.items()}
    print(f"\n{given.task}, batch {BATCH}, means of {given.steps} steps\n")
    print("| | " + " | ".join(f"{name}: ms (share)" for name in found) + " |")
    print("|---" * (1 + len(found)) + "|")
    for category in CATEGORIES:
        cells = [f"{f[category]:.1f} ({f[category] / f['profiled']:.0%})" for f in found.values()]
        print(f"| {category} | " + " | ".join(cells) + " |")
    for row in ("profiled", "unprofiled"):
        print(f"| {row} step | " + " | ".join(f"{f[row]:.1f}" for f in found.values()) + " |")
    return {"ms": found}


def _our_step(data: TokenisedSet, dtype: Precision) -> Callable[[], None]:
    model = our_model(1, dtype)
    objective, sampler = Objective(model, data, "categorical"), our_sampler(model, data)
    order = BatchOrder(len(data), BATCH, chain_generators(0, range(1), "batches"))

    def step() -> None:
        closure = objective.closure(order.iid())

        def gradient() -> torch.Tensor:
            with record_function(GRADIENT):
                return closure()

        with record_function(STEP):
            sampler.step(gradient)

    return step


def _peft_step(loops: PeftLoops) -> Callable[[], None]:
    return lambda: loops.step(loops.models[0], loops.optimizers[0])


def profiled(step: Callable[[], None], steps: int) -> dict[str, float]:
    """ms of a step by category; `profiled` and `unprofiled` are its wall times."""
    step()
    found: dict[str, float] = defaultdict(float)
    found["unprofiled"] = _milliseconds(step, steps)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        found["profiled"] = _milliseconds(step, steps)
    for event in seen.events() or ():
        found[category(event)] += event.self_cpu_time_total / 1e3 / steps
    named = sum(found[name] for name in CATEGORIES if name != REST)
    found[REST] = found["profiled"] - named
    return found


def _milliseconds(step: Callable[[], None], steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return 1e3 * (time.perf_counter() - began) / steps


def category(event: Any) -> str:
    """Of a profiler's event: by where it happens, its shapes, its name."""
    above: list[str] = []
    parent = event
    while parent is not None:
        above.append(parent.name)
        parent = parent.cpu_parent
    library, _, name = event.name.rpartition("::")
    # A sampler is an optimiser, and its step has the gradient inside.
    if GRADIENT not in above and any(n == STEP or n.startswith("Optimizer.") for n in above):
        return "sampler or optimiser" if library == "aten" else REST
    found = BY_NAME.get(name, REST) if library in ("aten", "mkldnn") else REST
    if found == "matrix products" and any(RANK in shape for shape in event.input_shapes or ()):
        return LORA
    return found
