"""Adapters to be stacked: on disk for small real models, and toy ones of any shape in memory.

Shapes: K members, R rank, D widths, C classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora.composition.sources import Source
from bayesian_lora.composition.stack import Stack
from bayesian_lora.data.glue_datasets import get_task
from bayesian_lora.ensemble import Ensemble
from bayesian_lora.manifest import MANIFEST, Provenance, read_manifest, write_manifest
from bayesian_lora.member_files import MemberRecord, write_folder
from bayesian_lora.models.hf_lora import HuggingFaceLora, LoraSpec, build_huggingface_lora_model
from bayesian_lora.models.peft_io import adapter_config, write_member
from bayesian_lora.utils.lora_params import split

SAMPLER = {"name": "sgld", "temperature": 1.0, "tempering": "posterior", "starts": "independent"}
BASE_FACTS = {"name": "toy", "base": "toy", "fingerprint": "f" * 64, "dtype": "float32"}


def lora_model(path: Path, task: str, seed: int, chains: int = 1, **options: Any) -> Any:
    """A model of one of the tiny encoders whose factors and head are all random."""
    options = {"rank": 2, "alpha": 3.0, **options}
    labels = get_task(task).num_labels
    model = build_huggingface_lora_model(str(path), labels, chains=chains, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.chain_parameters().values():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def write_peft(folder: Path, path: Path, task: str, seed: int, **options: Any) -> Path:
    """A PEFT folder of which nothing else is known."""
    model = lora_model(path, task, seed, **options)
    (member,) = split(model.chain_parameters())
    write_member(folder, member, adapter_config(model.info.spec))
    return folder


def write_run(
    root: Path,
    path: Path,
    task: str,
    seed: int,
    chains: int = 1,
    weights: Sequence[float] = (),
    **options: Any,
) -> Path:
    """A run's folder: an ensemble of `chains` members, each of them a warm start too."""
    model = lora_model(path, task, seed, chains, **options)
    members = split(model.chain_parameters())
    records = [
        MemberRecord("", chain=m, draw=0, step=1, weight=w)
        for m, w in enumerate(weights or [1.0] * chains)
    ]
    provenance = provenance_of(model, task)
    Ensemble(provenance, records, members).save(root)
    text = adapter_config(model.info.spec)
    starts = [
        write_folder(root, root / "map" / f"chain_{m}", member, text, record)
        for m, (member, record) in enumerate(zip(members, records, strict=True))
    ]
    write_manifest(root, provenance, read_manifest(root)[1], starts)
    assert (root / MANIFEST).is_file()
    return root


def provenance_of(model: HuggingFaceLora, task: str) -> Provenance:
    spec, source = get_task(task), model.info.source
    facts = {"name": source.name, "base": source.public_id, "fingerprint": model.fingerprint()}
    wide = next(iter(model.chain_parameters().values())).dtype == torch.float64
    dtype = "float64" if wide else "float32"
    labels = list(spec.label_names)
    return Provenance(
        model={**facts, "num_labels": spec.num_labels, "max_length": 32, "dtype": dtype},
        task={"name": spec.name, "label_names": labels, "likelihood": spec.likelihood},
        lora=dataclasses.asdict(model.info.spec),
        sampler=dict(SAMPLER),
    )


def toy_source(
    name: str,
    widths: Mapping[str, tuple[int, int]],
    *,
    rank: int = 2,
    alpha: float = 3.0,
    rslora: bool = False,
    members: int = 1,
    weights: Sequence[float] = (),
    targets: Sequence[str] = (),
    classes: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **model: Any,
) -> Source:
    """A source of these modules {name: (D_in, D_out)}, a random head on it; no files."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"classifier.weight": (classes, 8)}
    for module, (d_in, d_out) in widths.items():
        shapes |= {f"{module}.lora_A": (rank, d_in), f"{module}.lora_B": (d_out, rank)}
    tensors: list[dict[str, Tensor]] = [
        {n: torch.randn(shape, generator=generator, dtype=dtype) for n, shape in shapes.items()}
        for _ in range(members)
    ]
    endings = tuple(targets) or tuple(sorted({m.rpartition(".")[2] for m in widths}))
    own = np.array(weights or [1.0] * members)
    return Source(
        name=name,
        path=f"toys/{name}",
        spec=LoraSpec(rank, alpha, 0.0, endings, rslora, ("classifier", "score"), "toy"),
        members=tuple(tensors),
        weights=own / own.sum(),
        model={**BASE_FACTS, "num_labels": classes, "max_length": 16, **model},
        task={
            "name": "sst2",
            "label_names": [str(c) for c in range(classes)],
            "likelihood": "categorical",
        },
    )


def update_of(source: Source, module: str, k: int = 0) -> Tensor:
    """ΔW (D_out, D_in) of member k, dense; zero where it does not adapt the module."""
    assert source.spec is not None
    a, b = (source.members[k][f"{module}.lora_{side}"] for side in "AB")
    return source.spec.scaling * (b @ a)


def stacked_update(stack: Stack, module: str, k: int = 0) -> Tensor:
    """ΔW (D_out, D_in) of a stack's member k, dense."""
    a, b = (stack.factors[f"{module}.lora_{side}"][k] for side in "AB")
    return stack.spec.scaling * (b @ a)
