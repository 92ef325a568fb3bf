"""LoRA tensors out of state dicts in PEFT's naming, and whether they make an adapter.

Shapes: R rank, D widths, C classes.
"""

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from bayesian_lora.errors import InputError
from bayesian_lora.member_files import check_finite
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.models.peft_io import PREFIX

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_SAVED = re.compile(
    r"(?P<module>.+)\.modules_to_save\.((?P<adapter>[^.]+)\.)?(?P<rest>(.+\.)?(weight|bias))"
)
ZIP = b"PK\x03\x04"
OLD_PICKLES = 5
"""In a file of torch's format before its archives: magic, version, system, state, storages."""
LONGEST_NAME = 1000
NAMING = "….lora_A.weight and ….lora_B.weight"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict under our names: LoRA factors and head, half precision as float32.

    ``base_model.model.`` may lead the keys or not; an adapter's name may stand in them
    (``.lora_A.default.weight``); of a whole model's state the frozen weights are left out.

    Raises:
        InputError: missing, damaged, holds more than tensors, or is no LoRA in PEFT's naming.
    """
    tensors = _load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    named = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    found: dict[str, Tensor] = {}
    adapters: set[str] = set()
    rest: dict[str, Tensor] = {}
    for key, tensor in named.items():
        if match := _LORA.fullmatch(key):
            found[f"{match['module']}.lora_{match['side']}"] = tensor
            adapters.add(match["adapter"] or "default")
        else:
            rest[key] = tensor
    if not found:
        some = next(iter(tensors), "nothing")
        raise InputError(
            f"{path}: no tensor follows PEFT's naming ({NAMING}; the first is {some!r}); save the "
            "adapter with PEFT's save_pretrained"
        )
    found |= _heads(rest, adapters)
    if len(adapters) > 1:
        raise InputError(
            f"{path}: holds the adapters {', '.join(sorted(adapters))}; save them one by one"
        )
    return _in_one_precision(path, found)


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: weights missing; restore them") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: weights damaged ({error}); restore them") from error


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        _check_names(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on odd pickles, which are refused
            value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: weights missing; restore them") from error
    except Exception as error:  # a damaged archive raises whatever its first odd byte leads to
        if "weights_only" in str(error):  # whose advice is to switch it off
            raise InputError(
                f"{path}: damaged, or holds more than tensors, and code is never unpickled; save "
                "the state dict alone, best as .safetensors"
            ) from error
        why = " ".join(str(error).strip().split("\n")[0].split()) or type(error).__name__
        raise InputError(f"{path}: weights damaged ({why}); restore them") from error
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    plain = isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
    )
    if not plain:
        raise InputError(
            f"{path}: no state dict, which maps names to tensors; save the adapter's state dict"
        )
    return value


def _check_names(path: Path) -> None:
    """Whether every class that is named has a name of usual length, and the pickles are whole.

    torch searches the message in which it refuses a class, in time that is quadratic in the name:
    one of a million characters would take it an hour.

    Raises:
        Exception: whatever the first odd byte leads to.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP)) == ZIP:  # as torch tells them
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".pkl")]
                pickles: list[BinaryIO] = [io.BytesIO(archive.read(name)) for name in names]
        else:
            file.seek(0)
            pickles = [file] * OLD_PICKLES
        for one in pickles:
            for opcode, value, _ in pickletools.genops(one):
                if opcode.name == "GLOBAL" and len(str(value)) > LONGEST_NAME:
                    raise ValueError(f"a class with a name of {len(str(value))} characters")


def _heads(rest: Mapping[str, Tensor], adapters: set[str]) -> dict[str, Tensor]:
    """Head tensors among what is not LoRA; `adapters` gets the names found with them."""
    saved = {key: match for key in rest if (match := _SAVED.fullmatch(key))}
    if not saved and not any(".base_layer." in key for key in rest):
        return dict(rest)
    adapters |= {match["adapter"] or "default" for match in saved.values()}
    return {f"{match['module']}.{match['rest']}": rest[key] for key, match in saved.items()}


def _in_one_precision(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All float64 if one of them is, float32 otherwise."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(
                f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, not real "
                "numbers; save the adapter without quantisation"
            )
    wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if wide else torch.float32
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}


def check_adapter(member: Mapping[str, Tensor], spec: LoraSpec | None, where: str) -> None:
    """Whether a member's tensors are an adapter, and the one its config describes.

    Raises:
        InputError: a factor without its fellow, of another shape or rank, not finite, outside the
            config's targets; or a tensor that is neither LoRA nor head.
    """
    check_finite(member, where, "; leave it out, or train it again")
    for name, tensor in member.items():
        if name.endswith((".lora_A", ".lora_B")):
            _check_pair(member, name, where)
            if spec is not None:
                _check_factor(name, tensor, spec, where)
        elif "lora_" in name or (spec is not None and not _is_head(name, spec)):
            raise InputError(
                f"{where}: {name} is neither a LoRA factor ({NAMING}) nor part of the head; only "
                "plain LoRA with a classification head is read"
            )


def _check_pair(member: Mapping[str, Tensor], name: str, where: str) -> None:
    stem = name[:-1]
    a, b = member.get(stem + "A"), member.get(stem + "B")
    if a is None or b is None:
        missing = stem + ("A" if a is None else "B")
        raise InputError(f"{where}: damaged, {missing} is missing; restore the file")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise InputError(
            f"{where}: damaged, {stem}A {tuple(a.shape)} and {stem}B {tuple(b.shape)} are not "
            "(R, D_in) and (D_out, R); restore the file"
        )


def _check_factor(name: str, tensor: Tensor, spec: LoraSpec, where: str) -> None:
    module = name.rpartition(".")[0]
    rank = tensor.shape[0 if name.endswith("A") else 1]
    if rank != spec.rank:
        raise InputError(
            f"{where}: {name} has rank {rank}, its config says {spec.rank}; restore the config"
        )
    if not any(matches(module, target) for target in spec.target_modules):
        raise InputError(
            f"{where}: {name} is none of the config's target_modules "
            f"({', '.join(spec.target_modules)}); restore the config"
        )


def matches(module: str, target: str) -> bool:
    """Whether a name in `target_modules` means the module, as PEFT has it."""
    return module == target or module.endswith("." + target)


def _is_head(name: str, spec: LoraSpec) -> bool:
    return any(f".{root}." in f".{name}" for root in spec.head_modules)


def head_outputs(member: Mapping[str, Tensor]) -> int | None:
    """C of an adapter's head, whose last layer is its narrowest; None without a head."""
    widths = [
        tensor.shape[0]
        for name, tensor in member.items()
        if name.endswith(".weight") and tensor.ndim == 2
    ]
    return min(widths, default=None)
