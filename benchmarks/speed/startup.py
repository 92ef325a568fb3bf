"""Seconds until the program says something, and until it takes its first step."""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from options import Figures, add_rounds, command
from rounds import alternate, spread

CONFIG = Path(__file__).parents[2] / "configs" / "experiment_mrpc_minilm_sgld.yaml"
COMMAND = "from bayesian_lora.cli.main import main; main()"
IMPORTS = "import torch, transformers, peft"
TOLD = "reached at "
# The first call of a warm start's closure; what comes later is not wanted.
UNTIL_FIRST_STEP = f"""
import os, sys, time
from bayesian_lora.cli.main import main
from bayesian_lora.warm_start import WarmStart

def reached(*_):
    print({TOLD!r}, time.time(), flush=True)
    os._exit(0)

WarmStart._one_step = reached
main(sys.argv[1:])
"""


def add(commands: Any) -> None:
    parser = command(commands, "startup", startup, ["", "--rounds 9"])
    parser.add_argument("--config", type=Path, default=CONFIG, help="of train")
    add_rounds(parser)
    words = "key=value for train, such as data.train_examples=64"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=words)


def startup(given: argparse.Namespace) -> Figures:
    """Seconds of --help, and from the start of train to its first step, beyond the imports alone.

    MRPC with the packaged encoder; a first, unmeasured round fills the cache of tokens. The
    imports are those of a process that does nothing else: torch, transformers and peft.
    """
    with tempfile.TemporaryDirectory() as folder:
        script, runs = Path(folder) / "first_step.py", itertools.count()
        script.write_text(UNTIL_FIRST_STEP)
        cache = {"BAYESIAN_LORA_CACHE": str(Path(folder) / "cache")}
        train = [sys.executable, str(script), "train", str(given.config), *given.overrides]

        def first_step() -> float:
            return _until([*train, f"output.dir={folder}/run_{next(runs)}"], cache)

        imports = [sys.executable, "-c", f"{IMPORTS}; import time; print({TOLD!r}, time.time())"]
        cases = {
            "--help": lambda: _seconds([*_program(), "--help"], {}),
            "imports": lambda: _until(imports, {}),
            "first step": first_step,
        }
        seconds = alternate(cases, given.rounds)
    pairs = zip(seconds["first step"], seconds["imports"], strict=True)
    seconds["first step beyond the imports"] = [a - b for a, b in pairs]
    print("\n| | seconds |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {spread(values).format(2)} |")
    return {"seconds": seconds}


def _program() -> list[str]:
    """The installed command, or what it would run."""
    beside = Path(sys.executable).parent / "bayesian-lora"
    found = str(beside) if beside.is_file() else shutil.which("bayesian-lora")
    return [found] if found else [sys.executable, "-c", COMMAND]


def _seconds(arguments: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(
        arguments, stdout=subprocess.DEVNULL, check=True, env={**os.environ, **environment}
    )
    return time.perf_counter() - began


def _until(arguments: list[str], environment: dict[str, str]) -> float:
    """Seconds from the process's start to the moment it tells."""
    began = time.time()
    done = subprocess.run(
        arguments,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    told = [line for line in done.stdout.splitlines() if line.startswith(TOLD)]
    return float(told[-1].removeprefix(TOLD)) - began
