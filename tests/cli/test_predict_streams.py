"""`bayesian-lora predict` on input that is long, slow or never ends.

Shapes: K members, N texts.
"""

import io
import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bayesian_lora.cli.predict import BROKEN_PIPE
from bayesian_lora.data.synthetic import generate
from bayesian_lora.predict import Predictions
from bayesian_lora.serving import Service
from tests.cli.predict_calls import Called, K, call_predict, save_ensemble

CODE = "from bayesian_lora.cli.main import main; main()"


@pytest.fixture(scope="module")
def saved(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ensemble(tiny_models, tmp_path_factory.mktemp("predict") / "one", "sst2")


@pytest.fixture
def call(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Called]:
    return partial(call_predict, capfdbinary, monkeypatch)


class Lines:
    """A standard input of n lines that are made when they are asked for."""

    def __init__(self, n: int) -> None:
        self.left = n

    def readline(self, _: int = -1) -> bytes:
        self.left -= 1
        return b"" if self.left < 0 else b"line %d " % self.left + b"x" * 200 + b"\n"


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of a model, what answers at once."""

    def predict(texts: Sequence[Any]) -> Predictions:
        n = len(texts)
        return Predictions(np.zeros((K, n, 2)), np.full(n, -1), np.full(K, 1 / K), np.arange(n))

    service = Service(predict, 2, K)
    predictor = SimpleNamespace(cut=0, max_length=8)
    monkeypatch.setattr(
        "bayesian_lora.experiment.predicting.open_service", lambda *_, **__: (service, predictor)
    )


def test_memory_does_not_grow_with_the_input(
    saved: Path, call: Any, stubbed: None, tmp_path: Path
) -> None:
    def peak(n: int) -> int:
        out = tmp_path / f"{n}.jsonl"
        tracemalloc.start()
        assert call(saved, "--batch", 50, "--out", out, stdin=Lines(n))[0] == 0
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with out.open() as file:
            assert sum(1 for _ in file) == n
        assert out.stat().st_size > 300 * n
        return highest

    peak(50)  # imports and caches
    short, long = peak(500), peak(10_000)
    assert long < 1.2 * short
    assert long < 300 * 10_000, "smaller than what was written"


def test_answers_are_written_before_the_input_ends(
    saved: Path, call: Any, stubbed: None, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    sizes = []

    class Watched(Lines):
        def readline(self, _: int = -1) -> bytes:
            part = tmp_path / "out.jsonl.part"
            sizes.append(part.stat().st_size if part.is_file() else 0)
            return super().readline()

    assert call(saved, "--batch", 10, "--out", out, stdin=Watched(30))[0] == 0
    block = [sizes[i] for i in (9, 10, 20, 30)]
    assert block[0] == 0
    assert 0 < block[1] < block[2] < block[3] == out.stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the system does not tell a child's memory")
def test_a_process_of_its_own_does_not_grow_either(saved: Path, tmp_path: Path) -> None:
    """With what torch keeps for every shape of a batch."""

    def peak(n: int) -> float:
        texts = (generate("train", size=200).texts[0] * (n // 200 + 1))[:n]
        shuffled = np.random.default_rng(0).permutation(np.array(texts))
        source, out = tmp_path / f"{n}.txt", tmp_path / f"{n}.jsonl"
        source.write_text("".join(f"{text}\n" for text in shuffled))
        arguments = ["predict", saved, "--input", source, "--out", out, "--device", "cpu"]
        command = [sys.executable, "-c", CODE, *map(str, arguments)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_maxrss / 1024

    few, many = peak(1_000), peak(16_000)
    assert many - few < 60, f"{few:.0f} MiB for 1,000 texts, {many:.0f} for 16,000"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_a_terminal_alone(
    saved: Path,
    call: Any,
    stubbed: None,
    tmp_path: Path,
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    shown, out = Terminal(), tmp_path / "out.jsonl"
    monkeypatch.setattr("sys.stderr", shown)
    clock = itertools.count()
    monkeypatch.setattr("bayesian_lora.cli.predict.time.monotonic", lambda: next(clock))
    assert call(saved, "--batch", 10, "--out", out, stdin=Lines(20))[0] == 0
    assert ("\r20 texts, 10 a second" in shown.getvalue()) == terminal
    assert shown.getvalue().splitlines()[-1] == f"20 answers in {out}"
    assert shown.getvalue().count("\n") == (2 if terminal else 1)


@pytest.fixture
def process(saved: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A call of its own that reads and writes pipes."""
    command = [sys.executable, "-c", CODE, "predict", str(saved), "--batch", "2", "--device", "cpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as found:
        yield found
        found.kill()


def test_a_pipe_answers_as_it_is_fed_and_ends_quietly_with_its_reader(
    process: subprocess.Popen[bytes],
) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    texts = generate("train", size=4).texts[0]
    process.stdin.write("".join(f"{text}\n" for text in texts[:2]).encode())
    process.stdin.flush()
    assert [json.loads(process.stdout.readline())["text"] for _ in range(2)] == texts[:2]
    assert process.poll() is None, "it waits for more"
    process.stdout.close()
    process.stdin.write("".join(f"{text}\n" for text in texts[2:]).encode())
    process.stdin.close()
    assert process.wait(60) == BROKEN_PIPE
    assert process.stderr.read() == b""
