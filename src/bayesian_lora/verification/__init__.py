"""The samplers checked on this machine against the laws they claim: `bayesian-lora verify`."""
