"""Seconds and peak memory of `bayesian-lora similarity` on adapters with a 7B model's shapes.

Two synthetic adapters (32 layers, 4,096 wide, query and value, rank 16) are written as PEFT
folders and compared in a fresh process, whose peak memory includes torch itself:

    python benchmarks/similarity_7b.py [--keep FOLDER]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

LAYERS, WIDTH, RANK, KINDS = 32, 4096, 16, ("q_proj", "v_proj")
SHARED = 0.3
"""What the second adapter's factors have of the first's, so that there is something to see."""
TIMED = """
import resource, sys, time
began = time.monotonic()
from bayesian_lora.cli.main import main
try:
    main(["similarity", *sys.argv[1:]])
except SystemExit as end:
    if end.code:
        raise
seconds = time.monotonic() - began
used = resource.getrusage(resource.RUSAGE_SELF)
cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
print(f"seconds: {seconds:.1f} (of a processor: {cpu:.1f}), peak memory: {peak:.0f} MiB")
"""


def make_adapters(root: Path) -> list[Path]:
    """Two PEFT folders."""
    import torch
    from safetensors.torch import save_file

    own = torch.Generator().manual_seed(0)
    states: list[dict[str, torch.Tensor]] = [{}, {}]
    for layer in range(LAYERS):
        for kind in KINDS:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
            for factor, shape in (("lora_A", (RANK, WIDTH)), ("lora_B", (WIDTH, RANK))):
                one = torch.randn(shape, generator=own)
                other = SHARED * one + (1 - SHARED) * torch.randn(shape, generator=own)
                for state, value in zip(states, (one, other), strict=True):
                    state[f"{prefix}.{factor}.weight"] = value
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"target_modules": [*KINDS], "task_type": "SEQ_CLS"}
    folders = [root / name for name in ("one", "two")]
    for folder, state in zip(folders, states, strict=True):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(state, folder / "adapter_model.safetensors")
    return folders


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="a new folder for the adapters and results")
    kept = parser.parse_args(arguments).keep
    with tempfile.TemporaryDirectory() as temporary:
        root = kept or Path(temporary)
        folders = [str(folder) for folder in make_adapters(root)]
        pictures = ["--out", str(root / "out")]
        for words, out in (("figures", []), ("figures, JSON and heat maps", pictures)):
            done = subprocess.run(
                [sys.executable, "-c", TIMED, *folders, *out],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            print(done.stdout if out else done.stdout.splitlines()[-1])
            print(f"  of: {words}")


if __name__ == "__main__":
    main()
