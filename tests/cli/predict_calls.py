"""`bayesian-lora predict` with random members of a tiny model, and what it prints.

Shapes: K members.
"""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bayesian_lora.cli.main import main
from bayesian_lora.ensemble import Ensemble
from tests.composition.stacks import make_stack

K = 4
Called = tuple[int, str, str]


def save_ensemble(
    models: dict[str, Path], root: Path, task: str, noise: float | None = None
) -> Path:
    ensemble = make_stack(models["bert"], members=K).ensemble("long")
    given = {"name": task, "likelihood": "categorical" if noise is None else "gaussian"}
    provenance = dataclasses.replace(ensemble.provenance, task=given)
    records = [dataclasses.replace(record, noise_std=noise) for record in ensemble.records]
    Ensemble(provenance, records, ensemble.members).save(root)
    return root


def call_predict(
    capture: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    *arguments: object,
    stdin: Any = b"",
) -> Called:
    """Status, standard output and standard error, with a standard input of bytes or a stand-in."""
    source = io.BytesIO(stdin) if isinstance(stdin, bytes) else stdin
    given = SimpleNamespace(buffer=source, isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", given)
    with pytest.raises(SystemExit) as ended:
        main(["predict", *map(str, arguments)])
    out, err = capture.readouterr()
    return int(ended.value.code or 0), out.decode(), err.decode()


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def refused(called: Called, message: str) -> bool:
    status, out, err = called
    return status == 2 and out == "" and err.count("\n") == 1 and message in err
