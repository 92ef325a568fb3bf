"""Small whole files of a run, and what reads each of them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bayesian_lora.config import build_config, dump_run_config
from bayesian_lora.ensemble import Ensemble, map_ensemble, other_starts, why_no_other_starts
from bayesian_lora.errors import InputError
from bayesian_lora.experiment import compare, comparison_table, resume
from bayesian_lora.experiment.cells import make_plan
from bayesian_lora.manifest import MANIFEST, Alternatives, Provenance, write_manifest
from bayesian_lora.member_files import MemberRecord, MemberWriter
from bayesian_lora.models.hf_lora import LoraSpec
from bayesian_lora.models.peft_io import CONFIG_FILE, adapter_config, read_spec
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import RunFolder, read_starts, read_traces
from bayesian_lora.utils.files import write_json

SPEC = LoraSpec(2, 4.0, 0.0, ("query",), False, ("classifier",), "base")
HEAD = Provenance(
    model={
        **{"name": "m", "base": "m", "fingerprint": "f", "dtype": "float32"},
        **{"num_labels": 2, "max_length": 8},
    },
    task={"name": "sst2", "label_names": ["a", "b"], "likelihood": "categorical"},
    lora=json.loads(json.dumps(dataclasses.asdict(SPEC))),
    sampler={
        **{"name": "sgld", "temperature": 1.0, "tempering": "posterior", "starts": "independent"},
        **{"prior": {"std": 0.1, "head_std": 0.1}},
    },
)
NUMBERS = {"mean": 0.5, "sd": 0.1}
METRICS = {
    **{"task": "sst2", "split": "validation", "n": 10, "temperature": 1.0},
    "tempering": "posterior",
    **{"map": {"nll": NUMBERS}, "map_ensemble": {"nll": 0.5}, "single": {"nll": NUMBERS}},
    "ensemble": {"nll": 0.4, "k": 2},
    "sampler": {"step_size": 1e-3, "exactness": "exact as h → 0"},
    "diagnostics": {
        **{"rhat_max": 1.0, "ess_bulk_min": 10.0, "t_eff": 1.0, "verdict": "mixed"},
        "reason": None,
    },
    "cost": {
        **{"gradient_evaluations": 9, "sampling_gradient_evaluations": 5},
        **{"train_s": 1.0, "sample_s": 1.0, "eval_s": 1.0},
    },
}
Reader = Callable[[], Any]


def write_members(root: Path, packed: bool = False) -> MemberWriter:
    """Two members of three tensors and `members.jsonl`."""
    writer = MemberWriter(root, adapter_config(SPEC), expected=501 if packed else 2)
    for draw in range(2):
        shapes = {"q.lora_A": (2, 3), "q.lora_B": (3, 2), "classifier.weight": (2, 3)}
        member = {name: torch.ones(shape) * (draw + 1) for name, shape in shapes.items()}
        writer.add(member, MemberRecord("", chain=draw, draw=0, step=5))
    writer.flush()
    return writer


def ensemble_file(root: Path) -> tuple[Path, Reader]:
    """`ensemble.json` over a folder's member and a pack's."""
    parts = [write_members(root / "plain"), write_members(root / "packed", packed=True)]
    records = [
        dataclasses.replace(r, path=f"{w.root.name}/{r.path}") for w in parts for r in w.records
    ]
    others = Alternatives("early_stopped", {"last": records[1:2]}, "none")
    write_manifest(root, HEAD, records, records[:1], others)

    def read() -> None:
        ensemble = Ensemble.load(root)
        assert ensemble.weights.sum() == pytest.approx(1)
        assert all(torch.isfinite(x).all() for x in ensemble.state().values())
        assert 0 < ensemble.provenance.spec.scaling < np.inf
        map_ensemble(root)
        other_starts(root)
        why_no_other_starts(root)

    return root / MANIFEST, read


def run_file(root: Path) -> tuple[Path, Reader]:
    """`run.json` of a run whose traces are there, as evaluation, resume and comparison read it."""
    config = build_config({"seed": 1, "output": {"dir": str(root)}})
    (root / "config.yaml").write_text(dump_run_config(config))
    folder = RunFolder(root)
    folder.write_traces({"x": np.zeros((2, 3))})
    folder.write_starts({"x": np.zeros(2)})
    data = {"fingerprint": {"train": "t"}}
    folder.finish("finished", data=data, model_fingerprint="m", device="cpu", threads=1)
    write_json(root / "metrics.json", METRICS)
    raw = SimpleNamespace(fingerprint=lambda: data["fingerprint"])
    setup: Any = SimpleNamespace(raw=raw, fingerprint="m")

    def read() -> None:
        refusals = [
            *refused(lambda: read_traces(root)),
            *refused(lambda: read_starts(root)),
            *refused(lambda: resume.check_same_inputs(root, setup)),
        ]
        refused(lambda: compare._finished(root, config))
        assert refused(lambda: resume.find_earlier(config)), "it is of another config"
        assert refused(lambda: RunFolder(root).check_free(overwrite=False)), "it holds a run"
        if refusals:
            raise refusals[0]

    return root / "run.json", read


def refused(read: Reader) -> list[InputError]:
    """Where several readers look at one file: the error, if there is one."""
    found = []
    try:
        read()
    except InputError as error:
        found.append(error)
    assert all(str(error).isprintable() for error in found)
    return found


def metrics_file(root: Path) -> tuple[Path, Reader]:
    """`metrics.json` as a comparison takes its figures from it."""
    run_file(root)
    config = build_config({"output": {"dir": str(root)}})

    def read() -> None:
        if compare._finished(root, config) is None:
            raise InputError("not finished")

    return root / "metrics.json", read


def comparison_file(root: Path) -> tuple[Path, Reader]:
    """`comparison.json` taken over and, at last, cleared; what lies beside it stays."""
    config = root / "config.yaml"
    config.write_text("compare: {sampler.name: [sgld, psgld]}")
    beside, folder = root / "run.json", root / "cells"
    plans = [
        make_plan(config, [f"output.dir={folder}", f"output.overwrite={over}"])
        for over in ("false", "true")
    ]
    quiet = Progress(quiet=True)
    first = compare.Comparison(plans[0], quiet)
    folder.mkdir()
    first.write()
    write_json(beside, {"status": "finished"})

    def read() -> None:
        try:
            compare.failed_cells(folder)
            content = (folder / comparison_table.RECORD).read_bytes()
            again = compare.Comparison(plans[0], quiet)
            again.open()
            again.closing_lines()
            (folder / comparison_table.RECORD).write_bytes(content)
            compare.Comparison(plans[1], quiet).open()
        finally:
            assert beside.is_file(), "a comparison's record reached outside of its folder"

    return folder / comparison_table.RECORD, read


def adapter_file(root: Path) -> tuple[Path, Reader]:
    """`adapter_config.json`."""
    (root / CONFIG_FILE).write_text(adapter_config(SPEC))

    def read() -> None:
        spec = read_spec(root)
        assert 0 < spec.scaling < np.inf
        assert all(isinstance(n, str) for n in (*spec.target_modules, *spec.head_modules))

    return root / CONFIG_FILE, read


FILES = {
    "ensemble.json": ensemble_file,
    "run.json": run_file,
    "metrics.json": metrics_file,
    "comparison.json": comparison_file,
    "adapter_config.json": adapter_file,
}
