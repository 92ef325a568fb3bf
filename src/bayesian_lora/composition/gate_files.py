"""A gated stack on disk: the stack's folder, and beside `stack.json` its gate.

`gate.safetensors` has the gate's tensors (K, …), none for a gate without parameters; the section
``gate`` of `stack.json` its options, the file's sha256 and how it was trained. `stack.json` is
written last, so a folder that has it is whole.

Shapes: K members.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load, save

from bayesian_lora.composition.experts import experts_of
from bayesian_lora.composition.gates import Gated, GateOptions
from bayesian_lora.composition.stack_files import (
    STACK_FILE,
    check_free,
    is_stack,
    read_extra,
    read_stack,
    write_stack,
)
from bayesian_lora.errors import InputError
from bayesian_lora.member_files import check_finite
from bayesian_lora.utils.files import write_atomic

GATE_FILE = "gate.safetensors"
SECTION = "gate"
FORMAT = 1


def is_gated(folder: str | Path) -> bool:
    """Whether a folder holds a gate, with or without the stack it belongs to."""
    return (Path(folder) / GATE_FILE).is_file()


def write_gated(folder: str | Path, gated: Gated, extra: dict[str, Any] | None = None) -> None:
    """Write a gated stack into a new folder; `extra` are more sections of `stack.json`.

    Raises:
        InputError: the folder holds something already, or a tensor is not finite; nothing is
            written.
    """
    root = Path(folder)
    check_finite(gated.state, "the gate", "; nothing is written")
    check_free(root)
    if is_gated(root):
        raise InputError(f"{root}: already holds {GATE_FILE}; name another folder")
    content = save({name: t.contiguous().cpu() for name, t in gated.state.items()})
    section = {
        "format": FORMAT,
        "options": dataclasses.asdict(gated.options),
        "experts": [part.name for part in gated.stack.parts],
        "sha256": hashlib.sha256(content).hexdigest(),
        "report": gated.report,
    }
    made = not root.exists()
    write_atomic(root / GATE_FILE, content)
    try:
        write_stack(root, gated.stack, {SECTION: section, **(extra or {})})
    except BaseException:
        (root / GATE_FILE).unlink(missing_ok=True)
        if made:
            root.rmdir()
        raise


def load_gated(folder: str | Path) -> Gated:
    """Undo `write_gated`; every file is checked against its sha256.

    Raises:
        InputError: no gate there, a gate without its experts, or one of other experts, files
            missing, damaged or not finite (named).
    """
    root = Path(folder)
    path = root / GATE_FILE
    if not is_stack(root):
        what = "a gate without its experts" if path.is_file() else "no gated stack there"
        raise InputError(f"{root}: {what}, it has no {STACK_FILE}; restore the folder as written")
    section = read_extra(root).get(SECTION)
    if section is None:
        raise InputError(
            f"{root}: a stack without a gate; make one with 'bayesian-lora gate {root}'"
        )
    try:
        if section["format"] != FORMAT:
            raise ValueError(f"its format is {section['format']!r}, this version reads {FORMAT}")
        options, report = GateOptions(**section["options"]), dict(section["report"])
        sha256, experts = section["sha256"], list(section["experts"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{root / STACK_FILE}: its gate section is damaged ({error}); restore it"
        ) from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{path}: damaged, its sha256 is not the recorded one; restore it")
    try:
        state = load(content)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: damaged ({error}); restore it") from error
    check_finite(state, str(path), "; restore it")
    stack = read_stack(root)
    experts_of(stack, options.top_k)
    parts = [part.name for part in stack.parts]
    odd = [name for name, tensor in state.items() if tensor.shape[:1] != (len(stack),)]
    if parts != experts or odd:
        raise InputError(
            f"{path}: a gate over {', '.join(map(str, experts))}, and the stack has the parts "
            f"{', '.join(parts)} and {len(stack)} members; restore the folder as it was written"
        )
    return Gated(stack, options, state, report)
