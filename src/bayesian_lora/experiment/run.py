"""One run under way: its state, and what of it is on disk.

Shapes: M chains.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bayesian_lora.account import Account
from bayesian_lora.config import MAP, dump_run_config, load_run_config
from bayesian_lora.config_checks import least_chains
from bayesian_lora.experiment.cells import identity
from bayesian_lora.experiment.provenance import chain_facts, provenance
from bayesian_lora.experiment.resume import (
    FORMAT,
    Stop,
    check_own,
    check_same_inputs,
    read_state,
)
from bayesian_lora.experiment.run_metrics import RunMetrics
from bayesian_lora.experiment.setup import Prior, Setup, run_facts
from bayesian_lora.experiment.starts import Given, Members, StartsOf, as_members, write_starts
from bayesian_lora.experiment.step_log import StepLogger
from bayesian_lora.manifest import Alternatives, parse_alternatives, write_manifest
from bayesian_lora.member_files import MemberRecord, MemberWriter, parse_record
from bayesian_lora.models.peft_io import adapter_config
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import RunFolder
from bayesian_lora.samplers.failures import Diverged, require_finite
from bayesian_lora.sampling import RunState
from bayesian_lora.utils.checkpoint import drop_newest, write_checkpoint
from bayesian_lora.utils.files import write_atomic
from bayesian_lora.warm_start import StepReport

MANIFEST_EVERY_MEMBER_UP_TO = 200
ROWS_A_PART = 256
"""Rows of traces held, at most, before they are written; a checkpoint holds the others."""


class Run:
    """A run's state between two steps; `phases` moves it on.

    `alive` are the numbers of the chains that go on, in the order of the chain dimension; `stage`
    is ``map`` (the warm start is not finished), ``ready``, or ``chains`` (sampling has begun).
    """

    def __init__(
        self,
        setup: Setup,
        folder: RunFolder,
        progress: Progress,
        stop: Stop,
        starts: Given | None = None,
    ) -> None:
        self.setup, self.folder, self.progress, self.stop = setup, folder, progress, stop
        self.config, self.starts = setup.config, starts
        self.peft_config = adapter_config(setup.model.info.spec)
        self.writer = MemberWriter(folder.root, self.peft_config, self.config.sampler.num_samples)
        self.start_records: list[MemberRecord] = []
        self.other_starts = Alternatives()
        self.state = RunState(setup.model, setup.objective, setup.streams)
        self.alive = list(range(self.config.sampler.chains))
        self.seconds = {"train_s": 0.0, "sample_s": 0.0}
        self.logger = StepLogger(folder, progress, self.config.sampler.temperature, self.alive)
        self.metrics: RunMetrics | None = None
        self.account: Account | None = None
        self.prior_search: dict[str, Any] | None = None
        self.dropped: list[dict[str, Any]] = []
        self.departures: list[dict[str, Any]] = []
        self.opened = False
        self.resumed: dict[str, Any] | None = None
        self.before_collection: int | None = None
        self.stage = "map"
        self._saved = time.monotonic()
        self._timing: tuple[str, float] | None = None

    def open(self, go_on: bool) -> None:
        """Begin in a fresh folder, or go on from the folder's checkpoint."""
        root = self.folder.root
        tree, trouble = read_state(root) if go_on else (None, None)
        if tree is None:
            self.folder.begin(dump_run_config(self.config), run_facts(self.setup))
            self.opened = True
            self.metrics = RunMetrics(self.setup, root)
            return
        for warning in [*check_same_inputs(root, self.setup), *([trouble] if trouble else [])]:
            self.progress.say(f"Warning: {warning}")
        check_own(root, tree, self.config)
        # Its starts are made: another folder named now is not where they come from.
        self.config.train.starts_from = load_run_config(root).train.starts_from
        self.folder.verify(tree["folder"])
        self.writer.load_state_dict(tree["writer"])
        self.folder.reopen(tree["folder"])
        if trouble:
            drop_newest(root / "checkpoint")
        write_atomic(root / "config.yaml", dump_run_config(self.config))
        self.opened, self.resumed, self.stage = True, tree, tree["stage"]
        self.metrics = RunMetrics(self.setup, root, tree.get("metrics_bytes", 0))
        self.setup.prior, self.prior_search = Prior(**tree["prior"]), tree["prior_search"]
        self.seconds, self.before_collection = tree["seconds"], tree["before_collection"]
        self.dropped, self.departures = tree["dropped"], tree["departures"]
        self.start_records = [parse_record(row) for row in tree["starts"]]
        self.other_starts = parse_alternatives(tree["other_starts"])
        self._narrow(tree["alive"])
        self.progress.say(f"Going on with the run in {root}\n")

    def _narrow(self, alive: list[int]) -> None:
        """Leave the chains that a checkpoint has no more."""
        kept = [self.alive.index(number) for number in alive]
        if len(kept) < len(self.alive):
            self._keep(kept)

    def _keep(self, kept: list[int]) -> None:
        if self.setup.model.num_chains == len(self.alive):  # else one fit for all, still to spread
            self.state.keep(kept)
        self.setup.streams = self.state.streams = self.setup.streams.keep(kept)
        self.alive[:] = [self.alive[m] for m in kept]

    def checkpoint(self) -> None:
        """All that the next step depends on, and where the appended files stand."""
        self._tick()
        account = self.account
        tree = {
            "format": FORMAT,
            "stage": self.stage,
            "settings": identity(self.config),
            "state": self.state.state_dict(),
            "writer": self.writer.state_dict(),
            "folder": self.folder.position(),
            "metrics_bytes": 0 if self.metrics is None else self.metrics.position,
            "prior": dataclasses.asdict(self.setup.prior),
            "prior_search": self.prior_search,
            "account": None if account is None else dataclasses.asdict(account),
            "starts": [dataclasses.asdict(record) for record in self.start_records],
            "other_starts": self.other_starts.facts(),
            "alive": list(self.alive),
            "dropped": self.dropped,
            "departures": self.departures,
            "seconds": dict(self.seconds),
            "before_collection": self.before_collection,
        }
        write_checkpoint(self.folder.root / "checkpoint", tree)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Whatever is open besides the folder: the tracker."""
        if self.metrics is not None:
            self.metrics.close()

    def on_step(self, report: StepReport) -> None:
        """After every step of any phase: log, warn, checkpoint where one is due."""
        self.logger.step(report)
        if (chains := self.state.chains) is not None:
            for found in chains.energies.take():
                number = self.alive[found.chain]
                self.progress.say(f"Warning: {found.told(number)}")
                self.departures.append({**dataclasses.asdict(found), "chain": number})
            for found in chains.milestones.take():
                self.logger.milestone(found)
            if len(chains.traces.rows) >= ROWS_A_PART:
                self.write_traces()
        due = time.monotonic() - self._saved >= self.config.output.checkpoint_seconds
        if due or self.stop.requested is not None:
            self.checkpoint()
        self.stop.raise_if_requested()

    def lose(self, error: Diverged) -> list[int]:
        """Drop the chains that cannot go on, if the config allows it and others can.

        Raises:
            Diverged: it does not, or none is left; the message has the chains' numbers.
        """
        kept = [m for m in range(self.setup.model.num_chains) if m not in error.chains]
        numbers = [self.alive[m] for m in error.chains]
        told = Diverged(error.what, numbers)
        sampler = self.config.sampler
        if sampler.on_nonfinite == "stop" or len(kept) < least_chains(sampler):
            raise told from error
        self.write_traces()
        where = {"phase": self.logger.phase, "after_step": self.logger.last, "reason": error.what}
        self.dropped += [{"chain": number, **where} for number in numbers]
        self._keep(kept)
        if self.stage == "chains":
            self.write_manifest()
        self.progress.say(f"Warning: {told} in {self.logger.place()}: dropped, its samples too")
        return kept

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Steps are under way: signals wait for the end of one."""
        self.stop.stepping = True
        try:
            yield
        finally:
            self.stop.stepping = False
        if self.stop.requested is not None:  # after the last step of all
            self.checkpoint()
        self.stop.raise_if_requested()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """The block's wall time added to `seconds`, however it ends."""
        self._timing = name, time.monotonic()
        try:
            yield
        finally:
            self._tick()
            self._timing = None

    def _tick(self) -> None:
        """Count the time since the last tick, so that a checkpoint holds it."""
        if self._timing is not None:
            name, since = self._timing
            self._timing = name, time.monotonic()
            self.seconds[name] += self._timing[1] - since

    def keep_draw(self, draw: int) -> None:
        """Store the chains as they stand as members; `draw` is their time index."""
        chains = self.state.chains
        assert chains is not None
        # The step that led here may have diverged; the closure would notice at the next one.
        while True:
            try:
                require_finite("the loss", self.setup.objective.mean_nll(chains.traces.probe))
                break
            except Diverged as error:
                self.lose(error)
        total = self.config.sampler.num_samples
        for member, record in self._members(draw, [chains.step] * len(self.alive)):
            path = self.writer.add(member, record)
            self.progress.say(f"Saved sample {len(self.writer)}/{total}: {path}")
        if len(self.writer) <= MANIFEST_EVERY_MEMBER_UP_TO or draw % 50 == 0:
            self.write_manifest()

    def keep_starts(self, starts: StartsOf) -> None:
        """Store the warm starts, one PEFT folder a chain, and the fits of the other kind."""
        own = self._members(0, starts.steps)
        self.start_records, self.other_starts = write_starts(
            self.folder.root, own, starts, self.peft_config
        )

    def _members(self, draw: int, steps: list[int]) -> Members:
        tensors = self.setup.model.chain_parameters()
        return as_members(tensors, self.setup.objective.noise_std, self.alive, draw, steps)

    @property
    def records(self) -> list[MemberRecord]:
        """Of the members so far, without the chains that were dropped; of ``map`` the starts."""
        if self.config.sampler.name == MAP:
            return self.start_records
        return [record for record in self.writer.records if record.chain in self.alive]

    def save(self) -> None:
        """Members of an unfinished pack, traces, manifest."""
        self.writer.flush()
        self.write_traces()
        self.write_manifest()

    def write_traces(self) -> None:
        """The rows held, as the next part."""
        if self.state.chains is not None:
            self.folder.write_traces(self.by_chain(self.state.chains.traces.take()))

    def by_chain(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """(M, …) of the chains alive → of all that began, NaN where one was dropped."""
        total = self.config.sampler.chains
        whole = {n: np.full((total, *x.shape[1:]), np.nan) for n, x in arrays.items()}
        for name, values in arrays.items():
            whole[name][self.alive] = values
        return whole

    def write_manifest(self) -> None:
        """`ensemble.json` as things stand, without the chains that were dropped."""
        head = provenance(self.setup, self.state.chains, self.dropped)
        root, others = self.folder.root, self.other_starts
        write_manifest(root, head, self.records, self.start_records, others)

    def facts(self) -> dict[str, Any]:
        """For `run.json`: costs, heat, members, what went wrong."""
        before, evaluations = self.before_collection, self.setup.objective.evaluations
        return {
            **{name: round(value, 2) for name, value in self.seconds.items()},
            "gradient_evaluations": evaluations,
            "sampling_gradient_evaluations": None if before is None else evaluations - before,
            "account": None if self.account is None else self.account.facts(),
            "prior_search": self.prior_search,
            "members": len(self.records),
            "dropped_chains": self.dropped,
            **chain_facts(self.state.chains, self.departures),
        }
