"""Members as PEFT folders: written so that `PeftModel.from_pretrained` loads them, and read back.

A member maps names relative to the HuggingFace model ("….query.lora_A", "classifier.weight") to
tensors without a chain dimension.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from bayesian_lora.errors import InputError
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.utils.files import write_atomic

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_UNSUPPORTED = {
    "use_dora": "DoRA",
    "rank_pattern": "ranks that differ by layer",
    "alpha_pattern": "alphas that differ by layer",
    "layers_to_transform": "a choice of layers",
    "layer_replication": "repeated layers",
    "exclude_modules": "excluded layers",
    "fan_in_fan_out": "transposed layers",
    "lora_bias": "biases of LoRA factors",
    "target_parameters": "targets that are parameters",
    "trainable_token_indices": "trained token embeddings",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def adapter_config(spec: LoraSpec) -> str:
    """The text of `adapter_config.json`, made by PEFT itself."""
    from peft import LoraConfig, TaskType

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        base_model_name_or_path=spec.base,
        inference_mode=True,
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT divides, floats are exact
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        target_modules=list(spec.target_modules),
        modules_to_save=list(spec.head_modules),
    ).to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"


def peft_tensors(member: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names → PEFT's."""
    return {
        PREFIX
        + (f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name): tensor.detach()
        .cpu()
        .contiguous()
        for name, tensor in member.items()
    }


def write_member(folder: Path, member: Mapping[str, Tensor], config_text: str) -> bytes:
    """Write a PEFT folder; the weights come last and by rename, so a folder with them is whole.

    Returns:
        The bytes of the weights file.
    """
    weights = save(peft_tensors(member), metadata={"format": "pt"})
    write_atomic(folder / CONFIG_FILE, config_text)
    write_atomic(folder / WEIGHTS_FILE, weights)
    return weights


def read_spec(folder: Path) -> LoraSpec:
    """The adapter's shape from a PEFT folder.

    Raises:
        InputError: no adapter there, or one with features that plain LoRA does not have.
    """
    path = folder / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found, so this is no PEFT adapter folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, it is not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is not LORA; only LoRA adapters are read")
    odd = [what for key, what in _UNSUPPORTED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        odd.append("trained biases")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        odd.append("a start that changes the base")
    if isinstance(config.get("target_modules"), str):
        odd.append("a pattern for target_modules")
    if odd:
        raise InputError(f"{path}: has {', '.join(odd)}, which plain LoRA does not cover")
    return _checked_spec(path, config)


def _checked_spec(path: Path, config: dict[str, Any]) -> LoraSpec:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    dropout, base = config.get("lora_dropout") or 0.0, config.get("base_model_name_or_path") or ""
    targets, heads = config.get("target_modules"), config.get("modules_to_save") or []
    largest = sys.float_info.max
    right = {
        "r": type(rank) is int and 1 <= rank < 2**31,
        "lora_alpha": type(alpha) in (int, float) and 0 < alpha <= largest,  # type: ignore
        "lora_dropout": type(dropout) in (int, float) and 0 <= dropout < 1,
        "target_modules": _names(targets) and targets != [],
        "modules_to_save": _names(heads),
        "base_model_name_or_path": isinstance(base, str),
    }
    if wrong := [name for name, good in right.items() if not good]:
        needed = "numbers r and lora_alpha and a list target_modules"
        raise InputError(
            f"{path}: damaged, it needs {needed} ({wrong[0]} is {config.get(wrong[0])!r})"
        )
    return LoraSpec(
        rank=rank,  # type: ignore[arg-type]
        alpha=float(alpha),  # type: ignore[arg-type]
        dropout=float(dropout),
        target_modules=tuple(sorted(targets)),  # type: ignore[arg-type]
        rslora=bool(config.get("use_rslora")),
        head_modules=tuple(heads),
        base=base,
    )


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def read_member(folder: Path) -> dict[str, Tensor]:
    """A PEFT folder's tensors under our names.

    Raises:
        InputError: the weights are missing, damaged, or not those of a LoRA adapter.
    """
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: member file missing; restore it") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: member file damaged ({error}); restore it") from error
    return {_own_name(path, key): tensor for key, tensor in tensors.items()}


def _own_name(path: Path, key: str) -> str:
    if not key.startswith(PREFIX):
        raise InputError(
            f"{path}: tensor {key!r} does not follow PEFT's naming ({PREFIX}…); restore it"
        )
    name = key.removeprefix(PREFIX)
    if name.endswith((".lora_A.weight", ".lora_B.weight")):
        return name.removesuffix(".weight")
    return name
