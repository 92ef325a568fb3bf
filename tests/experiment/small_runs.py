"""Small runs made once for a module of tests.

Shapes: K members.
"""

from collections.abc import Callable
from pathlib import Path

from bayesian_lora.config import load_config
from bayesian_lora.experiment.train import train

from .same_runs import QUIET, config_of

K = 6
SMALL = """\
data: {{name: synthetic, train_examples: 40, batch_size: 8, max_length: 48}}
model: {{name: {model}, lora: {{rank: 2, alpha: 4.0}}}}
prior: {{std: 0.3}}
train: {{epochs: 1, lr: 5.0e-3}}
sampler: {{step_size: 1.0e-3, burn_in: 2, thin: 2, num_samples: 6, chains: 2}}
output: {{dir: {folder}}}
"""
Make = Callable[..., Path]


def small_run(model: Path, root: Path) -> Path:
    """The folder, below `root`, of a finished run of K members."""
    config = root / "small.yaml"
    config.write_text(SMALL.format(model=model, folder=root / "run"))
    return train(load_config(config), QUIET)


def made_once(model: Path, folder: Callable[[], Path], *common: str) -> Make:
    """A function of further keys: the run with all of these, which is made once."""
    known: dict[tuple[str, ...], Path] = {}

    def run(*keys: str) -> Path:
        if keys not in known:
            known[keys] = train(config_of(model, folder() / "run", *common, *keys), QUIET)
        return known[keys]

    return run
