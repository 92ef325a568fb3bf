"""Train: python3 scripts/train_lora_hf.py --config configs/….yaml [key=value …]."""

import argparse

from bayesian_lora.cli.main import main


def arguments() -> list[str]:
    parser = argparse.ArgumentParser(description="Fit, sample and evaluate, as a config says.")
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to change")
    given = parser.parse_intermixed_args()
    return ["train", given.config, *given.overrides]


if __name__ == "__main__":
    main(arguments())
