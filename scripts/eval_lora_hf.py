"""Evaluate: python3 scripts/eval_lora_hf.py --config configs/….yaml [--k 20 | --single]."""

import argparse

from bayesian_lora.cli.main import main


def arguments() -> list[str]:
    parser = argparse.ArgumentParser(description="Evaluate the run that a config made.")
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--k", type=int, help="the first k samples, spread evenly over chains")
    which.add_argument("--single", action="store_true", help="the latest sample alone")
    parser.add_argument("--split", help="a split of the task by name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to change")
    given = parser.parse_intermixed_args()
    options = [] if given.k is None else ["--k", str(given.k)]
    options += ["--single"] if given.single else []
    options += [] if given.split is None else ["--split", given.split]
    return ["eval", given.config, *given.overrides, *options]


if __name__ == "__main__":
    main(arguments())
