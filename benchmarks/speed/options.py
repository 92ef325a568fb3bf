"""What the commands share on their command lines: help with examples, and common options."""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""What a command found: raw figures that JSON can hold."""
Run = Callable[[argparse.Namespace], Figures]


def command(commands: Any, name: str, run: Run, examples: list[str]) -> argparse.ArgumentParser:
    """A subcommand whose help is `run`'s docstring, with examples under it."""
    text = inspect.cleandoc(run.__doc__ or "")
    lines = "\n".join(
        f"  python benchmarks/speed {name} {example}".rstrip() for example in examples
    )
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text.split("\n")[0],
        description=text,
        epilog=f"examples:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append raw figures as a line")
    parser.set_defaults(run=run)
    return parser


def add_task(parser: argparse.ArgumentParser, task: str = "sst2") -> None:
    parser.add_argument("--task", default=task, help=f"of the registry (default {task})")


def add_examples(parser: argparse.ArgumentParser, default: int, split: str) -> None:
    """`default` bounds the texts of a split that are read."""
    words = f"at most so many texts of {split} (default {default})"
    parser.add_argument("--examples", type=int, default=default, help=words)


def add_rounds(parser: argparse.ArgumentParser, default: int = 5) -> None:
    words = f"measured rounds after the warming one (default {default})"
    parser.add_argument("--rounds", type=_count, default=default, help=words)


def add_steps(parser: argparse.ArgumentParser, default: int = 16) -> None:
    words = f"steps of one chain in a round (default {default})"
    parser.add_argument("--steps", type=_count, default=default, help=words)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    choices = ["float32", "bfloat16"]
    parser.add_argument("--dtype", default="float32", choices=choices, help="of ours")


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: at least 1")
    return value
