"""Time and memory over the number of draws, members and examples, on a toy model."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from children import megabytes, reset_peak, run_alone
from options import Figures, add_rounds, command
from rounds import spread
from setting import MODEL

from bayesian_lora.config import build_config
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.synthetic import generate
from bayesian_lora.ensemble import Ensemble, load_model
from bayesian_lora.experiment import train as experiment
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.models.sources import resolve_model
from bayesian_lora.predict import predict_logits
from bayesian_lora.progress import Progress
from bayesian_lora.sampling import Chains
from bayesian_lora.warm_start import OnStep

LENGTH, TEXTS, MEMBERS = 32, 64, 10


def add(commands: Any) -> None:
    parser = command(commands, "growth", growth, ["", "--sizes 10 100 1000 --rounds 1"])
    words = "draws, members and examples (default 10 to 10,000)"
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10, 100, 1_000, 10_000], help=words
    )
    add_rounds(parser)
    hidden = {"metavar": "KIND", "choices": ["draws", "examples"], "help": argparse.SUPPRESS}
    parser.add_argument("--alone", **hidden)


def growth(given: argparse.Namespace) -> Figures:
    """Seconds and memory for 10 to 10,000 draws, members and examples, each per unit.

    A one-layer BERT of width 8 on the embedded task, every number in a process of its own.
    Draws: one chain, a draw a step, stored as `train` stores them (folders up to 500, packs
    above). Members: those draws read back, and their prediction of 64 texts. Examples: tokenised,
    and predicted with 10 members. Memory is what is added at most while that goes on.
    """
    if given.alone is not None:
        found = {"draws": _draws, "examples": _examples}[given.alone](given.sizes[0])
        print(json.dumps(found))
        return found
    results: Figures = {}
    for kind in ("draws", "examples"):
        rows = {
            size: [
                run_alone("growth", "--alone", kind, "--sizes", size) for _ in range(given.rounds)
            ]
            for size in given.sizes
        }
        results[kind] = {str(size): found for size, found in rows.items()}
        for part in next(iter(rows.values()))[0]:
            print("\n".join(["", *_lines(kind, part, rows)]))
    return results


def _lines(kind: str, part: str, rows: dict[int, list[Figures]]) -> list[str]:
    """One stage's time and memory over its number; time per unit against that of the largest."""
    seconds = {size: spread([r[part]["seconds"] for r in found]) for size, found in rows.items()}
    largest = max(seconds)
    unit = {size: 1e3 * found.median / size for size, found in seconds.items()}
    lines = [f"| {part}: {kind} | seconds | ms a unit | over that of {largest:,} | MB added |"]
    lines.append("|---|---|---|---|---|")
    for size, found in rows.items():
        memory = spread([row[part]["mb"] for row in found]).format(1)
        ratio = unit[size] / unit[largest]
        lines.append(
            f"| {size:,} | {seconds[size].format(3)} | {unit[size]:.3f} | {ratio:.2f} | {memory} |"
        )
    return lines


def _measured(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds, MB added at most while it goes on; and what it gives."""
    before = megabytes("VmRSS")
    reset_peak()
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mb": megabytes("VmHWM") - before}, result


def _draws(number: int) -> Figures:
    """Collect, read back, predict."""
    torch.set_num_threads(1)
    collect: list[dict[str, float]] = []
    kept, evaluate = Chains.collect, experiment.evaluate_run

    def watched(self: Chains, on_step: OnStep, on_draw: Callable[[int], None]) -> None:
        collect.append(_measured(lambda: kept(self, on_step, on_draw))[0])

    Chains.collect = watched
    experiment.evaluate_run = lambda *_, **__: None
    try:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "run"
            keys: dict[str, Any] = {
                "data": {"train_examples": 16, "batch_size": 2, "max_length": LENGTH},
                "model": {"name": str(toy_model(Path(folder) / "model")), "lora": {"rank": 1}},
                "train": {"epochs": 1},
                "sampler": {"burn_in": 10, "chains": 1, "thin": 1, "num_samples": number},
                "output": {"dir": str(root)},
            }
            experiment.train(build_config(keys), Progress(quiet=True))
            reading, ensemble = _measured(lambda: Ensemble.load(root))
            model, data = load_model(ensemble.provenance), _texts(TEXTS)
            predicting, _ = _measured(lambda: ensemble.predict_set(model, data))
    finally:
        Chains.collect, experiment.evaluate_run = kept, evaluate
    return {"collecting": collect[0], "reading": reading, "predicting": predicting}


def _examples(number: int) -> Figures:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = build_huggingface_lora_model(
            str(toy_model(Path(folder) / "model")), rank=1, chains=MEMBERS
        )
    predict_logits(model, _texts(1))
    examples, tokenizer = generate("train", size=number), _tokenizer()
    tokenising, data = _measured(lambda: TokenisedSet(examples, tokenizer, LENGTH))
    predicting, _ = _measured(lambda: predict_logits(model, data))
    return {"tokenising": tokenising, "predicting": predicting}


def _texts(number: int) -> TokenisedSet:
    return TokenisedSet(generate("train", size=number), _tokenizer(), LENGTH)


def _tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(resolve_model(MODEL).path)


def toy_model(folder: Path) -> Path:
    """One layer of width 8 with random weights, and the packaged encoder's tokeniser."""
    tokenizer = _tokenizer()
    widths: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.BertConfig(
        intermediate_size=8, max_position_embeddings=LENGTH, vocab_size=len(tokenizer), **widths
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
