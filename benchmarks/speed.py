"""Examples a second: ours against the ways to do it with PEFT, alternating, as a markdown table.

    BAYESIAN_LORA_DATA=… python benchmarks/speed.py train --task sst2
    BAYESIAN_LORA_DATA=… python benchmarks/speed.py train --task mrpc --dtype bfloat16
    BAYESIAN_LORA_DATA=… python benchmarks/speed.py predict --members 20
    BAYESIAN_LORA_DATA=… python benchmarks/speed.py adaptive --ensemble runs/…
    BAYESIAN_LORA_DATA=… python benchmarks/speed.py gpu

Run it alone: two OpenMP programs slow each other. Ratios are medians over the rounds of ours
divided by the peer's of the same round, with the smallest and the largest.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import speed_cases as cases
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import stratified_subset
from bayesian_lora.data.glue_datasets import get_task, load_split
from bayesian_lora.ensemble import Ensemble, load_model
from bayesian_lora.models.sources import resolve_model

CHAINS_ON_GPU = (1, 4, 8, 16, 32)


def load(task: str, split: str, examples: int) -> TokenisedSet:
    folder = os.environ.get("BAYESIAN_LORA_DATA")
    whole = load_split(get_task(task), split, data_dir=Path(folder) if folder else None)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm").path)
    part = whole if examples >= len(whole) else stratified_subset(whole, examples, 0)
    return TokenisedSet(part, tokenizer, 128)


def compare(found: dict[str, cases.Case], rounds: int) -> dict[str, list[float]]:
    """Rates of every case, in alternating order; a first round of each warms up."""
    rates: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, case in found.items():
            rate = case()
            if number:
                rates[name].append(rate)
    return rates


def print_table(rates: dict[str, list[float]], ours: str) -> None:
    print(f"\n| | examples/s | smallest–largest | {ours} against it |")
    print("|---|---|---|---|")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(rates[ours], values, strict=True)]
        spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
        print(
            f"| {name} | {statistics.median(values):.1f} | {min(values):.1f}–{max(values):.1f} | "
            f"{statistics.median(ratios):.2f} × ({spread}) |"
        )
    print(flush=True)


def train(given: argparse.Namespace) -> None:
    """One SGLD step at M = 1 and 8 against one step of the peers."""
    data, half = load(given.task, "train", given.examples), given.dtype == "bfloat16"
    print(f"{given.task}, {given.dtype}: {data.lengths.mean():.1f} tokens a text")
    steps = given.steps
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "ours, M = 1": cases.our_steps(data, 1, given.dtype, steps),
            "ours, M = 8": cases.our_steps(data, 8, given.dtype, max(1, steps // 8)),
            "PEFT loop": cases.peft_loop(data, half, steps),
            "HF Trainer + PEFT": cases.hf_trainer(data, half, steps, False, folder),
            "HF Trainer + PEFT by length": cases.hf_trainer(data, half, steps, True, folder),
        }
        if not half:
            other = cases.posteriors_sgld(data, steps)
            if other is None:
                print("posteriors is not installed: its row is left out")
            else:
                found["posteriors SGLD"] = other
        rates = compare(found, given.rounds)
    print_table(rates, "ours, M = 1")
    if not half:
        print_share_of_peak(data, statistics.median(rates["ours, M = 1"]))


def print_share_of_peak(data: TokenisedSet, rate: float) -> None:
    """Products on useful tokens in a step, against the rate of the products alone."""
    config = cases.our_model(1, "float32").base.config
    d, f, n = config.hidden_size, config.intermediate_size, config.num_hidden_layers  # type: ignore[union-attr]
    layer = 4 * d * d + 2 * d * f
    # Last layer: keys and values only. Backward: no gradient of the first layer's inputs.
    forward = (n - 1) * layer + 2 * d * d
    backward = (n - 2) * layer + (layer - 3 * d * d) + 2 * d * d
    done = 2 * (forward + backward) * float(data.lengths.mean()) * rate
    x, w = torch.randn(int(32 * data.lengths.mean()), d), torch.randn(f, d)
    times: list[float] = []
    for _ in range(30):
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - began)
    peak = 2 * x.shape[0] * d * f / statistics.median(times)
    print(f"products: {done / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s, {done / peak:.0%}")


def predict(given: argparse.Namespace) -> None:
    """K members on the validation set."""
    data, k = load(given.task, "validation", given.examples), given.members
    print(f"{given.task} validation, {len(data)} texts, {k} members; rates are members × texts/s")
    rates = compare(
        {
            "ours, float32": cases.our_prediction(data, k, "float32"),
            "ours, bfloat16": cases.our_prediction(data, k, "bfloat16"),
            "PEFT set_adapter": cases.peft_prediction(data, k, half=False, by_length=False),
            "PEFT set_adapter, sorted": cases.peft_prediction(data, k, half=False, by_length=True),
            "the same, bfloat16": cases.peft_prediction(data, k, half=True, by_length=True),
            "PEFT adapter_names, sorted": cases.peft_mixed_batch(data, k),
        },
        given.rounds,
    )
    print_table(rates, "ours, float32")
    print_table(rates, "ours, bfloat16")


def adaptive(given: argparse.Namespace) -> None:
    """Members used, and the error against all members, of a stored ensemble."""
    ensemble = Ensemble.load(given.ensemble)
    model = load_model(ensemble.provenance)
    task = ensemble.provenance.task["name"]
    data = load(task, get_task(task).default_split, given.examples)
    began = time.perf_counter()
    whole = ensemble.predict_set(model, data)
    middle = time.perf_counter()
    print("\n| tolerance | members used | within it | largest error | time against all |")
    print("|---|---|---|---|---|")
    for tolerance in given.tolerance:
        start = time.perf_counter()
        found = ensemble.predict_set(model, data, tolerance=tolerance)
        taken = (time.perf_counter() - start) / (middle - began)
        error = np.abs(found.probs - whole.probs).max(1)
        assert found.members_used is not None
        print(
            f"| {tolerance} | {found.members_used.mean():.1f} of {len(ensemble)} | "
            f"{(error <= tolerance).mean():.1%} | {error.max():.4f} | {taken:.2f} |"
        )


def gpu(given: argparse.Namespace) -> None:
    """Steps of random weights at BERT-base's shape, by the number of chains."""
    if not torch.cuda.is_available():
        print("no CUDA device here: not run")
        return
    data = load(given.task, "train", given.examples)
    print(f"{torch.cuda.get_device_name()}, {given.task}, batch 32 a chain")
    with tempfile.TemporaryDirectory() as folder:
        BertModel(BertConfig()).save_pretrained(folder)
        print("| precision | M | examples/s | against M = 1 | peak memory |")
        print("|---|---|---|---|---|")
        for dtype in ("float32", "bfloat16"):
            alone = 0.0
            for chains in CHAINS_ON_GPU:
                model = cases.our_model(chains, dtype, folder, "cuda")
                case = cases.our_steps(data, chains, dtype, given.steps, model)
                case()
                torch.cuda.reset_peak_memory_stats()
                rate = statistics.median(case() for _ in range(given.rounds))
                alone = alone or rate
                memory = torch.cuda.max_memory_allocated() / 2**30
                print(
                    f"| {dtype} | {chains} | {rate:.0f} | {rate / alone:.2f} × | {memory:.1f} GiB |"
                )
                del model, case
                torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "predict", "adaptive", "gpu"])
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--examples", type=int, default=960, help="at most so many texts")
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8, help="steps of M = 1 in a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ensemble", help="a run's folder, for adaptive")
    parser.add_argument("--tolerance", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    given = parser.parse_args()
    if given.what == "adaptive" and not given.ensemble:
        parser.error("adaptive needs --ensemble")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor()}")
    {"train": train, "predict": predict, "adaptive": adaptive, "gpu": gpu}[given.what](given)


if __name__ == "__main__":
    main()
