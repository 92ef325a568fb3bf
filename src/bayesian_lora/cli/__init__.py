"""The command line: `bayesian-lora --help`."""
