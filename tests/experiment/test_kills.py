"""A run killed by SIGKILL, anywhere and again and again, ends as if it had never been disturbed."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from bayesian_lora import Ensemble
from bayesian_lora.config import SAMPLERS
from bayesian_lora.manifest import MANIFEST, read_manifest

from .kill_harness import KINDS, PHASES, Kill, Nursery, Outcome, phase_of
from .same_runs import BASE, assert_same_run, weights

Keys = tuple[str, ...]
Trials = Callable[[str], "Trial"]
CHAINS: dict[int, Keys] = {
    1: ("sampler.chains=1", "sampler.num_samples=3"),
    4: ("sampler.chains=4", "sampler.num_samples=8"),
}
OPTIONS: dict[str, Keys] = {
    "psgld": ("sampler.step_size=auto",),
    "sghmc": ("sampler.integrator=baoab",),
    "csgld": ("sampler.cycle_steps=4",),
    "sam_sgld": ("train.starts=shared",),
    "sam_sgld_rank1": ("sampler.variance_reduction=true",),
}


@dataclass
class Ledger:
    """Every kill, and what became of the runs."""

    kills: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    lost: int = 0
    wrong: int = 0

    def table(self) -> str:
        """Kills by sampler and chains against phase."""
        phases = PHASES[:-1]
        rows = sorted({(name, chains) for _, name, chains in self.kills})
        lines = [" ".join(f"{w:>15}" for w in ("", "chains", *phases))]
        for name, chains in rows:
            counts = [self.kills[phase, name, chains] for phase in phases]
            lines.append(" ".join(f"{w!s:>15}" for w in (name, chains, *counts)))
        kinds = ", ".join(f"{kind}: {count}" for kind, count in self.kinds.items())
        lines.append(
            f"{sum(self.kills.values())} kills ({kinds}) in {self.runs} runs; "
            f"samples lost: {self.lost}; wrong results: {self.wrong}"
        )
        return "\n".join(lines)


def finished(outcome: Outcome) -> Outcome:
    """A process that came to its end; anything else fails, and not by an AssertionError."""
    if outcome.error is not None or outcome.signal is not None:
        pytest.fail(outcome.error or f"died of signal {outcome.signal}")
    return outcome


@dataclass
class Trial:
    """Runs of one model that are killed, beside the same runs undisturbed (made once)."""

    nursery: Nursery
    root: Path
    ledger: Ledger = field(default_factory=Ledger)
    made: dict[Keys, tuple[Path, float, dict[str, int]]] = field(default_factory=dict)

    def whole(self, keys: Keys) -> tuple[Path, float, dict[str, int]]:
        """The undisturbed run, its duration, and its file operations by phase."""
        if keys not in self.made:
            folder = self.root / f"whole_{len(self.made)}" / "run"
            outcome = finished(self.nursery.run(folder, keys))
            self.made[keys] = folder, outcome.seconds, outcome.operations
        return self.made[keys]

    def survive(self, keys: Keys, kills: Sequence[Kill], fault: str = "") -> list[str]:
        """Kill, go on, kill again; at the end nothing may differ. The phases of the kills."""
        whole, _, _ = self.whole(keys)
        self.ledger.runs += 1
        folder = Path(tempfile.mkdtemp(dir=self.root)) / "run"
        phases, seen = [], set[tuple[str, str]]()
        for kill in kills:
            outcome = self.nursery.run(folder, keys, kill, fault)
            if outcome.error is not None:
                pytest.fail(outcome.error)
            if outcome.signal is None or (phase := phase_of(folder)) == "finished":
                break
            phases.append(phase)
            self.note(keys, kill, phase)
            if not fault:
                seen |= self.look_at(folder, whole)
        if phase_of(folder) != "finished":
            finished(self.nursery.run(folder, keys, None, fault))
        self.compare(folder, whole, seen)
        return phases

    def note(self, keys: Keys, kill: Kill, phase: str) -> None:
        values = dict(item.split("=", 1) for item in keys)
        name, chains = values.get("sampler.name", "sgld"), values.get("sampler.chains", "2")
        self.ledger.kills[phase, name, int(chains)] += 1
        self.ledger.kinds[kill.kind] += 1

    def look_at(self, folder: Path, whole: Path) -> set[tuple[str, str]]:
        """What a dead run's manifest lists can be used, and is what it should be: path, sha256."""
        if not (folder / MANIFEST).is_file():
            return set()
        _, found, starts = read_manifest(folder)
        _, expected, expected_starts = read_manifest(whole)
        assert starts == expected_starts
        assert found == expected[: len(found)]
        if found:
            assert len(Ensemble.load(folder)) == len(found)
        return {(record.path, record.sha256) for record in found}

    def compare(self, folder: Path, whole: Path, seen: set[tuple[str, str]]) -> None:
        """Count what is lost and what is wrong, then compare to the last bit."""
        ours, theirs = weights(folder), weights(whole)
        self.ledger.lost += len(theirs.keys() - ours.keys())
        self.ledger.wrong += sum(ours[name] != theirs[name] for name in ours.keys() & theirs)
        listed = {(record.path, record.sha256) for record in read_manifest(folder)[1]}
        self.ledger.lost += len(seen - listed)
        assert_same_run(folder, whole)


@pytest.fixture(scope="module")
def trials(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trials]:
    """The trial of a model family; its warm process ends with the module."""
    made: dict[str, Trial] = {}

    def trial(family: str) -> Trial:
        if family not in made:
            nursery = Nursery(BASE, tiny_models[family])
            made[family] = Trial(nursery, tmp_path_factory.mktemp(family))
        return made[family]

    yield trial
    for one in made.values():
        one.nursery.close()


def by_operation(random: Random, operations: dict[str, int], phase: str) -> Kill:
    """A kill at any of the file operations of the first four fifths of a phase."""
    last = max(1, operations[phase] * 4 // 5)
    return Kill(phase, random.randint(1, last), torn=random.random() < 0.5)


def plan(seed: int, operations: dict[str, int], seconds: float) -> list[Kill]:
    """In every phase, in the opening of a run that goes on, and at some moment after that."""
    random = Random(seed)
    phases = [by_operation(random, operations, phase) for phase in ("map", "burn_in", "sampling")]
    reopening = Kill("opening", random.randint(1, 14), torn=random.random() < 0.5)
    moment = Kill(seconds=seconds * random.uniform(0.1, 0.6))
    return [*phases[:2], reopening, phases[2], moment]


def test_a_run_killed_in_every_phase_ends_the_same(trials: Trials) -> None:
    trial = trials("bert")
    operations = trial.whole(())[2]
    phases = ("map", "burn_in", "sampling", "evaluation")
    kills = [by_operation(Random(seed), operations, phase) for seed, phase in enumerate(phases)]
    found = trial.survive((), [Kill("opening", 3), *kills])
    assert found == list(PHASES[:-1])
    assert (trial.ledger.lost, trial.ledger.wrong) == (0, 0)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("fault", "keys", "since"),
    [
        ("a batch skipped", (), "burn_in"),
        pytest.param("no generator restored", (), "map", marks=SLOW),
        pytest.param("one chain's batches not restored", (), "burn_in", marks=SLOW),
        pytest.param("no sampler state", ("sampler.name=sghmc",), "burn_in", marks=SLOW),
        pytest.param("appended lines not cut", (), "burn_in", marks=SLOW),
    ],
)
def test_a_resume_that_forgets_something_is_caught(
    trials: Trials, tmp_path: Path, fault: str, keys: Keys, since: str
) -> None:
    trial = Trial(trials("bert").nursery, tmp_path, made=trials("bert").made)
    trial.whole(keys)
    with pytest.raises(AssertionError):
        trial.survive(keys, [Kill(since, 12)], fault)
    assert sum(trial.ledger.kills.values()) == 1


@pytest.fixture(scope="module")
def sampler_kills(trials: Trials) -> Callable[[str], Ledger]:
    """The kills of a sampler's runs with 1 and with 4 chains, made once."""
    made: dict[str, Ledger] = {}

    def kills(name: str) -> Ledger:
        if name not in made:
            trial = trials("bert")
            made[name] = trial.ledger = Ledger()
            for chains, count in CHAINS.items():
                keys = (f"sampler.name={name}", *count, *OPTIONS.get(name, ()))
                _, seconds, operations = trial.whole(keys)
                trial.survive(keys, plan(chains, operations, seconds))
        return made[name]

    return kills


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_survives(sampler_kills: Callable[[str], Ledger], name: str) -> None:
    ledger = sampler_kills(name)
    for chains in CHAINS:
        for phase in ("warm start", "burn-in", "collection"):
            assert ledger.kills[phase, name, chains] > 0, (phase, chains)
    assert (ledger.lost, ledger.wrong) == (0, 0)


@pytest.mark.slow
def test_kills_cover_all_samplers_and_phases(
    sampler_kills: Callable[[str], Ledger], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Ledger()
    for ledger in map(sampler_kills, SAMPLERS):
        whole.kills += ledger.kills
        whole.kinds += ledger.kinds
        whole.runs += ledger.runs
        whole.lost += ledger.lost
        whole.wrong += ledger.wrong
    with capsys.disabled():
        print(f"\n{whole.table()}")
    assert sum(whole.kills.values()) >= 60
    assert all(whole.kinds[kind] >= 10 for kind in KINDS[1:])
    assert (whole.lost, whole.wrong) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("bert", ("sampler.chains=4", "sampler.num_samples=8")),
        ("roberta", ("sampler.name=asgld",)),
        ("distilbert", ("prior.std=auto", "prior.candidates=[0.1,0.3]", "sampler.name=sgnht")),
    ],
)
def test_moments_all_over_a_run(trials: Trials, family: str, keys: Keys) -> None:
    """Killed by the clock, with checkpoints by the clock."""
    trial = trials(family)
    trial.ledger = Ledger()
    keys = (*keys, "output.checkpoint_seconds=0.05")
    seconds = trial.whole(keys)[1]
    for seed in range(12):
        random = Random(seed)
        kills = [Kill(seconds=seconds * random.uniform(0.2, 0.9)) for _ in range(4)]
        if len(trial.survive(keys, kills)) < len(kills):
            seconds *= 0.8  # it was over before: the machine has become faster since
        if trial.ledger.kinds["moment"] >= 8:
            break
    assert trial.ledger.kinds["moment"] >= 8
    assert (trial.ledger.lost, trial.ledger.wrong) == (0, 0)
