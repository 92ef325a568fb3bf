"""What being safe costs: the time of checkpoints, and memory and open files over a long run.

    python benchmarks/reliability.py checkpoints [--chains 1 4 8]
    python benchmarks/reliability.py long [--steps 200000]

`checkpoints`: the packaged encoder (r = 8 on query and value) on the embedded task, a checkpoint
after every step; medians, and the share of a run's time at the default interval. `long`: `train`
itself on a one-layer encoder of width 8; memory and open files after 2,000 steps and at the end.
Run it alone: two OpenMP programs slow each other.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from bayesian_lora.config import build_config
from bayesian_lora.config_schema import OutputConfig
from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.train import train
from bayesian_lora.models.sources import resolve_model
from bayesian_lora.progress import Progress
from bayesian_lora.warm_start import StepReport

QUIET = Progress(quiet=True)
SETTLED = 2_000


def checkpoints(chains: list[int]) -> None:
    """Print the time and size of a checkpoint for each number of chains."""
    interval = OutputConfig().checkpoint_seconds
    print(f"| chains | a checkpoint, ms (smallest to largest) | MB | share at {interval:g} s |")
    print("|---|---|---|---|")
    for number in chains:
        times, size = _checkpoint_times(number)
        middle = statistics.median(times)
        spread = f"{1e3 * middle:.0f} ({1e3 * min(times):.0f} to {1e3 * max(times):.0f})"
        share = middle / (interval + middle)
        print(f"| {number} | {spread} | {size / 1e6:.1f} | {share:.2%} |", flush=True)


def _checkpoint_times(chains: int) -> tuple[list[float], int]:
    times: list[float] = []
    kept = Run.checkpoint

    def timed(self: Run) -> None:
        began = time.perf_counter()
        kept(self)
        times.append(time.perf_counter() - began)

    Run.checkpoint = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "run"
            keys: dict[str, Any] = {
                "data": {"train_examples": 32, "batch_size": 4},
                "train": {"epochs": 1},
                "sampler": {"burn_in": 4, "thin": 4, "num_samples": chains, "chains": chains},
                "output": {"dir": str(root), "checkpoint_seconds": 0},
            }
            train(build_config(keys), QUIET)
            return times, (root / "checkpoint" / "newest.safetensors").stat().st_size
    finally:
        Run.checkpoint = kept


def long(steps: int) -> None:
    """Print memory and open files of a run of so many sampling steps, early and at its end."""
    seen: dict[int, tuple[float, int]] = {}
    kept = Run.on_step

    def watched(self: Run, report: StepReport) -> None:
        kept(self, report)
        if report.phase == "sampling" and report.step in (SETTLED, report.total):
            seen[report.step] = (_megabytes(), len(os.listdir("/proc/self/fd")))

    Run.on_step = watched
    try:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "run"
            model = smallest_model(Path(folder) / "model")
            keys: dict[str, Any] = {
                "data": {"train_examples": 16, "batch_size": 2, "max_length": 8},
                "model": {"name": str(model), "lora": {"rank": 1}},
                "train": {"epochs": 1},
                "sampler": {"burn_in": 100, "chains": 1, "num_samples": 20, "thin": steps // 20},
                "output": {"dir": str(root)},
            }
            spent = _timed(lambda: train(build_config(keys), QUIET))
            files = sum(path.is_file() for path in root.rglob("*"))
    finally:
        Run.on_step = kept
    for step, (megabytes, handles) in seen.items():
        print(f"step {step:>9,}: {megabytes:.1f} MB resident, {handles} open files")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{spent:.0f} s, peak {peak:.1f} MB, {files} files in the run's folder")


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def smallest_model(folder: Path) -> Path:
    """One layer of width 8 with random weights, and the packaged encoder's tokeniser."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model("minilm").path)
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=16,
        vocab_size=len(tokenizer),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cost = commands.add_parser("checkpoints", help="time and size of a checkpoint")
    cost.add_argument("--chains", type=int, nargs="+", default=[1, 4, 8])
    run = commands.add_parser("long", help="memory and open files over many steps")
    run.add_argument("--steps", type=int, default=200_000)
    given = parser.parse_args()
    if given.command == "checkpoints":
        checkpoints(given.chains)
    else:
        torch.set_num_threads(1)
        long(given.steps)


if __name__ == "__main__":
    main()
