"""Runs in real processes that are really killed, cheaply: forked from one that is warm.

`Nursery` starts this file as a process of its own, which imports everything, makes one run, and
then forks a child for every run asked for. A child dies by SIGKILL, from outside after some time or
by its own hand in the middle of a file operation in the run's folder.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from bayesian_lora.utils.checkpoint import Damaged, read_checkpoint
from bayesian_lora.utils.files import read_json

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PHASES = ("opening", "warm start", "burn-in", "collection", "evaluation", "finished")
OPERATIONS = ("open", "os.rename", "os.remove", "os.truncate", "os.rmdir")
KINDS = ("moment", "before a file operation", "half-written file")
HUNG_S = 120.0


@dataclasses.dataclass(frozen=True)
class Kill:
    """When a process dies: after `seconds`, or just before a file operation.

    `operation` counts those in the run's folder from the beginning of `since` (``opening``,
    ``map``, ``burn_in``, ``sampling``, ``evaluation``), the first is 1; `torn`: half of the next
    file that is written is there.
    """

    since: str = "opening"
    operation: int | None = None
    torn: bool = False
    seconds: float | None = None

    @property
    def kind(self) -> str:
        return KINDS[0] if self.seconds is not None else KINDS[2 if self.torn else 1]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended: `signal` if by one, `error` its traceback; operations by phase."""

    signal: int | None
    seconds: float
    error: str | None = None
    operations: dict[str, int] = dataclasses.field(default_factory=dict)


class Nursery:
    """The warm process; `settings` are those of every run, without a folder."""

    def __init__(self, settings: dict[str, Any], model: Path) -> None:
        quiet = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", **ONE_THREAD}
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(settings), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | quiet,
        )

    def run(
        self, folder: Path, keys: tuple[str, ...], kill: Kill | None = None, fault: str = ""
    ) -> Outcome:
        """One process on a folder; `fault` (of `FAULTS`) breaks the program in it."""
        asked = {"folder": str(folder), "keys": keys, "fault": fault}
        asked["kill"] = dataclasses.asdict(kill or Kill())
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        with self._process:  # ends when its standard input does
            assert self._process.stdin is not None
            self._process.stdin.close()


def phase_of(root: Path) -> str:
    """The phase a folder's files say the run is in, one of `PHASES`."""
    if not (root / "run.json").is_file():
        return "opening"
    status = read_json(root / "run.json", "run")["status"]
    if status in ("sampled", "finished"):
        return "evaluation" if status == "sampled" else "finished"
    logged = {"burn_in": "burn-in", "sampling": "collection", "milestone": "collection"}
    if name := logged.get(last_logged(root)):
        return name
    try:
        stage = read_checkpoint(root / "checkpoint")[0]["stage"]
    except (FileNotFoundError, Damaged):
        stage = "map"
    return "warm start" if stage == "map" else "burn-in"


def last_logged(root: Path) -> str:
    """The phase of the last whole line of the log, empty if there is none."""
    log = root / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["phase"] if whole else ""


# What follows runs in the warm process and its children.


class Watch:
    """An audit hook: counts the operations in a folder by phase, and kills at the one named."""

    def __init__(self, root: str, kill: Kill) -> None:
        self.root, self.kill = root, kill
        self.phase, self.begun = "opening", kill.since == "opening"
        self.operations: Counter[str] = Counter()
        self.since, self.dying = 0, False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        inside = event in OPERATIONS and str(arguments[0]).startswith(self.root)
        if self.dying or not inside:
            return
        self.operations[self.phase] += 1
        self.since += self.begun
        wanted = self.kill.operation
        if wanted is not None and self.begun and self.since >= wanted:
            self.dying = True
            if not self.kill.torn or tear(event, arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            self.dying = False

    def begin(self, phase: str) -> None:
        self.phase = phase
        self.begun |= phase == self.kill.since


def tear(event: str, arguments: tuple[Any, ...]) -> bool:
    """Leave half of what is being written, as a process that dies in a write does, if it is."""
    path = Path(arguments[0])
    if event == "os.rename" and path.suffix == ".tmp":
        os.truncate(path, path.stat().st_size // 2)
        return True
    if event == "open" and path.suffix == ".jsonl" and arguments[1] == "ab":
        with path.open("ab") as file:
            file.write(b'{"phase": "sampl')
        return True
    return False


def serve(settings: dict[str, Any], model: str) -> None:
    """Answer requests until standard input ends."""
    import torch

    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:  # so that children find all modules loaded
        run_once(settings, model, {"folder": f"{folder}/run", "keys": []})
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(dataclasses.asdict(attend(settings, model, request))) + "\n")


def run_once(settings: dict[str, Any], model: str, request: dict[str, Any]) -> None:
    from bayesian_lora.config import build_config
    from bayesian_lora.experiment.train import train
    from bayesian_lora.progress import Progress

    keys = [f"model.name={model}", f"output.dir={request['folder']}", *request["keys"]]
    train(build_config(settings, keys), Progress(quiet=True))


def attend(settings: dict[str, Any], model: str, request: dict[str, Any]) -> Outcome:
    """Fork a child, kill it when its time has come, and say how it ended."""
    kill = Kill(**request["kill"])
    reading, writing = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        be_child(settings, model, request, kill, writing)
    os.close(writing)
    limit = HUNG_S if kill.seconds is None else kill.seconds
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() - began >= limit:
            os.kill(pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
            ended = os.waitpid(pid, 0)
            break
        time.sleep(0.001)
    seconds = time.monotonic() - began
    with os.fdopen(reading) as pipe:
        said = json.loads(pipe.read() or "{}")
    if seconds >= HUNG_S:
        said["error"] = f"hung for {HUNG_S} s"
    number = os.WTERMSIG(ended[1]) if os.WIFSIGNALED(ended[1]) else None
    return Outcome(number, seconds, **said)


def be_child(
    settings: dict[str, Any], model: str, request: dict[str, Any], kill: Kill, writing: int
) -> NoReturn:
    watch = Watch(request["folder"], kill)
    follow(watch)
    if request["fault"]:
        FAULTS[request["fault"]]()
    sys.addaudithook(watch)
    error = None
    try:
        run_once(settings, model, request)
    except BaseException:  # whatever it is, it belongs in the report
        error = traceback.format_exc()
    os.write(writing, json.dumps({"error": error, "operations": watch.operations}).encode())
    os._exit(0)


def follow(watch: Watch) -> None:
    """Tell the watch when a phase begins."""
    from bayesian_lora.experiment import train as module
    from bayesian_lora.experiment.step_log import StepLogger

    begin, evaluate = StepLogger.begin, module.evaluate_run

    def begin_watched(self: StepLogger, phase: str, total: int) -> None:
        watch.begin(phase)
        begin(self, phase, total)

    def evaluate_watched(*arguments: Any, **options: Any) -> Any:
        watch.begin("evaluation")
        return evaluate(*arguments, **options)

    StepLogger.begin = begin_watched
    module.evaluate_run = evaluate_watched


def forget_generators() -> None:
    """No generator is put back."""
    import bayesian_lora.sampling as module

    module.restore_states = lambda generators, states: None


def forget_one_generator() -> None:
    """The last chain's batches go on from their seed; every other generator is put back."""
    import bayesian_lora.sampling as module

    restore = module.restore_states

    def partly(generators: Any, states: Any) -> None:
        last = 3 * len(generators) // 5 - 1  # after those of order and dropout
        kept = [i for i in range(len(generators)) if i != last]
        restore([generators[i] for i in kept], [states[i] for i in kept])

    module.restore_states = partly


def draw_other_batches() -> None:
    """A batch is drawn and lost, so that the next one is not the one it should be."""
    from bayesian_lora.sampling import RunState

    load = RunState.load_state_dict

    def then_draw(self: RunState, state: dict[str, Any]) -> None:
        load(self, state)
        if self.chains is not None:
            self.chains.order.iid()

    RunState.load_state_dict = then_draw


def forget_the_sampler() -> None:
    """The sampler's own tensors (momenta, averages) begin anew."""
    from bayesian_lora.samplers.base import Sampler

    Sampler.load_state_dict = lambda self, state_dict: None


def leave_the_log() -> None:
    """What was appended after the checkpoint is not cut."""
    os.truncate = lambda path, length: None


FAULTS: dict[str, Callable[[], None]] = {
    "no generator restored": forget_generators,
    "one chain's batches not restored": forget_one_generator,
    "a batch skipped": draw_other_batches,
    "no sampler state": forget_the_sampler,
    "appended lines not cut": leave_the_log,
}

if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), sys.argv[2])
    os._exit(0)  # there is nothing to tidy up, and the interpreter's end takes seconds
