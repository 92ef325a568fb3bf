"""Speed, memory and growth: ours against the ways to do it with PEFT, as markdown tables.

    BAYESIAN_LORA_DATA=… python benchmarks/speed train --task sst2
    BAYESIAN_LORA_DATA=… python benchmarks/speed predict --members 20
    python benchmarks/speed growth

Ours and its peers alternate in one process, after a round that warms up. A ratio is the median
over the rounds of ours divided by the peer's of the same round, with the smallest and the largest.
Run it alone: two OpenMP programs slow each other. `COMMAND --help` has examples.
"""

import argparse
import json
import warnings
from collections.abc import Sequence

import gpu
import growth
import memory
import plot
import predicting
import profiling
import startup
import stored
import training
import transformers
from setting import machine

MODULES = (training, predicting, stored, memory, startup, growth, profiling, gpu, plot)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in MODULES:
        module.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    given = build_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the peers, at every import
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    told = machine()
    if getattr(given, "alone", None) is None:
        print(", ".join(f"{name} {value}" for name, value in told.items()), flush=True)
    figures = given.run(given)
    if given.json is not None:
        asked = {n: v for n, v in vars(given).items() if n not in ("run", "command", "json")}
        record = {"command": given.command, "arguments": asked, "machine": told, **figures}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        with given.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")


if __name__ == "__main__":
    main()
