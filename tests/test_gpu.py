"""The same numbers on a GPU as on the CPU; skipped where there is none."""

from pathlib import Path

import pytest
import torch

from bayesian_lora.cli.main import main
from bayesian_lora.config import build_config
from bayesian_lora.ensemble import Ensemble
from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.train import train
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.progress import Progress
from bayesian_lora.utils.rng import chain_generators
from bayesian_lora.warm_start import StepReport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_logits_and_gradients_agree_with_the_cpu(family: str, tiny_models: dict[str, Path]) -> None:
    ids = torch.randint(5, 60, (3, 4, 9), generator=torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", "cuda"):
        model = build_huggingface_lora_model(
            str(tiny_models[family]),
            chains=3,
            generators=chain_generators(0, range(3), "init"),
            dtype="float64",
        ).to(device)
        logits = model(ids.to(device), torch.ones_like(ids).to(device))
        logits.square().sum().backward()
        grads = [p.grad for p in model.chain_parameters().values() if p.grad is not None]
        found[device] = (logits.detach().cpu(), [g.cpu() for g in grads])
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], rtol=1e-8, atol=1e-10)
    for ours, reference in zip(found["cuda"][1], found["cpu"][1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-10)


def test_a_whole_run(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "gpu.yaml"
    config.write_text("device: cuda\n")
    overrides = [
        f"model.name={tiny_models['bert']}",
        "data.max_length=32",
        "data.train_examples=64",
        "train.epochs=1",
        "sampler.burn_in=2",
        "sampler.thin=1",
        "sampler.num_samples=8",
        f"output.dir={tmp_path / 'run'}",
    ]
    main(["train", str(config), *overrides])
    assert len(Ensemble.load(tmp_path / "run")) == 8


def test_a_run_goes_on_from_its_checkpoint(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Interrupted in the warm start and extended later: the same members as in one go."""

    def run(name: str, *more: str) -> Path:
        keys = {
            "model": {"name": str(tiny_models["bert"])},
            "data": {"max_length": 32, "train_examples": 64},
            "train": {"epochs": 2, "early_stopping": True},
            "sampler": {"burn_in": 2, "thin": 1, "num_samples": 8},
            "output": {"dir": str(tmp_path / name), "checkpoint_seconds": 0},
            "device": "cuda",
        }
        return train(build_config(keys, more), Progress(quiet=True))

    whole = Ensemble.load(run("whole", "sampler.num_samples=12"))
    kept = Run.on_step

    def interrupted(self: Run, report: StepReport) -> None:
        kept(self, report)
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "on_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("run")
    run("run")
    found = Ensemble.load(run("run", "sampler.num_samples=12"))
    for a, b in zip(found, whole, strict=True):
        for name, tensor in a.items():
            torch.testing.assert_close(tensor, b[name])
