"""What this machine offers to a run, line by line."""

import os
import platform
import time
from pathlib import Path

from bayesian_lora.data.glue_datasets import TASKS, load_split
from bayesian_lora.data.preparation import DATA_VARIABLE
from bayesian_lora.errors import InputError
from bayesian_lora.models.sources import resolve_model
from bayesian_lora.run_folder import versions
from bayesian_lora.utils.hub import connection_error, offline_by_choice


def report() -> list[str]:
    """One line a fact; nothing is downloaded or written."""
    import torch

    found = versions()
    lines = [
        f"Python: {found.pop('python')} on {platform.system()} {platform.machine()}",
        f"torch: {found['torch']}, {torch.get_num_threads()} threads",
        f"Device: {_device()}",
        f"bfloat16: {_bfloat16()}",
        "Packages: " + ", ".join(f"{name} {v}" for name, v in found.items() if name != "torch"),
        f"Hub: {_hub()}",
        f"Local data: {_local_data()}",
        f"Packaged encoder (minilm): {_packaged()}",
    ]
    return lines


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _bfloat16() -> str:
    """A short measurement: matrix products in bfloat16 against float32."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1024, 1024, device=device, dtype=dtype)
        _ = (x @ x).sum().item()
        began = time.perf_counter()
        for _i in range(5):
            x = x @ x / 1024
        _ = x.sum().item()
        seconds[dtype] = time.perf_counter() - began
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    return f"matrix products {ratio:.1f}× as fast as float32"


def _hub() -> str:
    if offline_by_choice():
        return "not used (HF_HUB_OFFLINE is set)"
    error = connection_error()
    if error is not None:
        return f"not reachable ({error}); model.name=minilm and local data need no hub"
    return "reachable"


def _local_data() -> str:
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        return f"none ({DATA_VARIABLE} is not set)"
    folder = Path(value)
    if not folder.is_dir():
        return f"{DATA_VARIABLE}={value} is not a folder"
    found, missing = [], []
    for name, task in TASKS.items():
        if task.local is None:
            continue
        try:
            load_split(task, task.default_split, data_dir=folder)
            found.append(name)
        except InputError:
            missing.append(name)
    absent = f"; not found or unreadable: {', '.join(missing)}" if missing else ""
    return f"{value}: {', '.join(found) or 'no task'}{absent}"


def _packaged() -> str:
    try:
        resolve_model("minilm")
    except InputError as error:
        return str(error)
    return "installed, sha256 verified"
