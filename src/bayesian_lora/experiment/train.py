"""A config → a run folder: warm start, burn-in, collection, evaluation.

Shapes: M chains.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora.account import Account, account_lines
from bayesian_lora.config import Config, dump_config
from bayesian_lora.data.batching import BatchOrder
from bayesian_lora.ensemble import Ensemble, write_manifest
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.evaluate import evaluate_run
from bayesian_lora.experiment.priors import prior_lines, search_lines, search_prior
from bayesian_lora.experiment.provenance import mean_t_eff, provenance, tempering
from bayesian_lora.experiment.resume import Stop, check_same_inputs, find_earlier, read_state
from bayesian_lora.experiment.samplers import idle_keys, make_chains, open_account
from bayesian_lora.experiment.setup import Prior, Setup, prepare, run_facts
from bayesian_lora.experiment.starts import check_starts, find_starts, place_starts
from bayesian_lora.experiment.step_log import StepLogger
from bayesian_lora.member_files import MemberRecord, MemberWriter
from bayesian_lora.models.peft_io import adapter_config
from bayesian_lora.objective import NonFiniteLoss
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import RunFolder
from bayesian_lora.samplers.base import Diverged
from bayesian_lora.sampling import RunState, spread_start
from bayesian_lora.utils.checkpoint import write_checkpoint
from bayesian_lora.utils.files import write_atomic
from bayesian_lora.utils.lock import locked
from bayesian_lora.utils.lora_params import split
from bayesian_lora.warm_start import EpochReport, StepReport, WarmStart

MANIFEST_EVERY_MEMBER_UP_TO = 200
ROWS_A_PART = 256
"""Rows of traces held, at most, before they are written; a checkpoint holds the others."""


def train(config: Config, progress: Progress | None = None) -> Path:
    """Run the whole job and return the run's folder.

    Raises:
        InputError: wrong input (nothing is written), or a loss that is not finite (what was
            collected so far is kept and can be evaluated).
    """
    progress = progress or Progress()
    assert config.output.dir is not None
    folder = RunFolder(config.output.dir)
    find_earlier(config)
    starts = find_starts(config)
    setup = prepare(config, progress)
    if starts is not None:
        check_starts(setup, *starts)
    with locked(folder.root), Stop().installed() as stop:
        run = Run(setup, folder, progress, stop, None if starts is None else starts[0])
        with _recorded(folder, run):
            run.open(go_on=find_earlier(config))
            with run.timed("train_s"):
                run.warm_start()
            with run.timed("sample_s"):
                run.sample()
            folder.finish("sampled", **run.facts())
        evaluate_run(folder.root, progress=progress, setup=setup)
        folder.finish("finished", **run.facts())
    return folder.root


@contextmanager
def _recorded(folder: RunFolder, run: "Run") -> Iterator[None]:
    """Whatever ends the run early: members, traces and the reason are on disk."""
    try:
        yield
    except Diverged as error:
        run.save()
        folder.finish("stopped", reason=f"{error} in {run.logger.place()}", **run.facts())
        raise InputError(
            f"{error} in {run.logger.place()}: stopped, {len(run.writer.records)} samples kept in "
            f"{folder.root}; lower sampler.step_size or train.lr"
        ) from error
    except InputError as error:
        if not run.opened:
            raise
        run.save()
        folder.finish("stopped", reason=str(error), **run.facts())
        raise InputError(
            f"{error} (the warm starts are kept: train.starts_from={folder.root} "
            "output.dir=<new folder> spares fitting them again)"
        ) from error
    except BaseException as error:
        if not run.opened:
            raise
        run.save()
        reason = f"{type(error).__name__} in {run.logger.place()}"
        folder.finish("stopped", reason=reason, **run.facts())
        raise
    finally:
        run.progress.end()


class Run:
    """One run under way: phases in order, and what each leaves on disk and on the screen."""

    def __init__(
        self,
        setup: Setup,
        folder: RunFolder,
        progress: Progress,
        stop: Stop,
        starts: Ensemble | None = None,
    ) -> None:
        self.setup, self.folder, self.progress, self.stop = setup, folder, progress, stop
        self.config, self.starts = setup.config, starts
        self.peft_config = adapter_config(setup.model.info.spec)
        self.writer = MemberWriter(folder.root, self.peft_config, self.config.sampler.num_samples)
        self.state = RunState(setup.model, setup.objective, setup.streams)
        self.seconds = {"train_s": 0.0, "sample_s": 0.0}
        self.logger = StepLogger(folder, progress, self.config.sampler.temperature)
        self.account: Account | None = None
        self.prior_search: dict[str, Any] | None = None
        self.opened = False
        self.resumed: dict[str, Any] | None = None
        self._before_collection: int | None = None
        self._stage = "map"
        self._saved = time.monotonic()

    def open(self, go_on: bool) -> None:
        """Begin in a fresh folder, or go on from the folder's checkpoint."""
        root = self.folder.root
        tree, trouble = read_state(root) if go_on else (None, None)
        if tree is None:
            self.folder.begin(dump_config(self.config), run_facts(self.setup))
            self.opened = True
            return
        check_same_inputs(root, self.setup)
        if trouble:
            self.progress.say(f"Warning: {trouble}; going on from the one before it")
        self.folder.reopen(tree["folder"])
        write_atomic(root / "config.yaml", dump_config(self.config))
        self.opened, self.resumed, self._stage = True, tree, tree["stage"]
        self.setup.prior, self.prior_search = Prior(**tree["prior"]), tree["prior_search"]
        self.seconds, self._before_collection = tree["seconds"], tree["before_collection"]
        self.writer.load_state_dict(tree["writer"])
        self.progress.say(f"Going on with the run in {root}\n")

    def checkpoint(self) -> None:
        """All that the next step depends on, and where the appended files stand."""
        chains, account = self.state.chains, self.account
        if chains is not None and len(chains.traces.rows) >= ROWS_A_PART:
            self.folder.write_traces(chains.traces.take())
        tree = {
            "stage": self._stage,
            "state": self.state.state_dict(),
            "writer": self.writer.state_dict(),
            "folder": self.folder.position(),
            "prior": dataclasses.asdict(self.setup.prior),
            "prior_search": self.prior_search,
            "account": None if account is None else dataclasses.asdict(account),
            "seconds": dict(self.seconds),
            "before_collection": self._before_collection,
        }
        write_checkpoint(self.folder.root / "checkpoint", tree)
        self._saved = time.monotonic()

    def _on_step(self, report: StepReport) -> None:
        self.logger.step(report)
        due = time.monotonic() - self._saved >= self.config.output.checkpoint_seconds
        if due or self.stop.requested is not None:
            self.checkpoint()
        self.stop.raise_if_requested()

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Steps are under way: signals wait for the end of one."""
        self.stop.stepping = True
        try:
            yield
        finally:
            self.stop.stepping = False

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """The block's wall time added to `seconds`, however it ends."""
        before, began = self.seconds[name], time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = before + time.monotonic() - began

    def warm_start(self) -> None:
        """Every chain's start, fitted or taken over, stored under ``map/``; spread if shared."""
        tree = self.resumed
        if tree is not None and self._stage != "map":
            self.state.load_state_dict(tree["state"])
            return
        if tree is None:
            self._resolve_prior()
        for line in prior_lines(self.setup):
            self.progress.say(line)
        if self.starts is None:
            step = self._fit()
        else:
            place_starts(self.setup, self.starts)
            step = self.starts.records[0].step
            self.progress.say(f"Warm starts of {self.config.train.starts_from}\n")
        writer = MemberWriter(
            self.folder.root, self.peft_config, 1, subfolder="map", name="chain_{:d}", first=0
        )
        writer.load_state_dict({"written": 0, "pack": []})
        self._store(writer, draw=0, step=step)
        if self.config.train.starts == "shared":
            setup = self.setup
            noise = setup.streams.noise
            spread_start(setup.model, setup.objective, self.config.train.jitter, noise)
        self._stage = "ready"
        self.checkpoint()

    def _resolve_prior(self) -> None:
        """``prior.std: auto``: search, or what the run whose starts are taken had found."""
        config, setup = self.config, self.setup
        if config.prior.std != "auto":
            return
        if self.starts is not None:
            setup.prior = Prior(**self.starts.provenance.sampler["prior"])
            self.progress.say(
                f"prior.std={setup.prior.std:g}, that of {config.train.starts_from} (no search)"
            )
            return
        self.progress.say("Searching prior.std on data held out of train...")
        batches = -(-len(setup.train) // config.data.batch_size)
        self.logger.begin("prior", max(1, config.train.epochs) * batches)
        found = self.prior_search = search_prior(setup, self.logger.step)
        self.progress.end()
        for line in search_lines(found):
            self.progress.say(line)
        setup.prior = Prior(found["std"], config.prior.head_std or found["std"])

    def _fit(self) -> int:
        """Fit all chains; the steps it took."""
        config, setup = self.config, self.setup
        shared = config.train.starts == "shared"
        if self.resumed is None:
            self._say_initial()
        first = slice(0, 1) if shared else slice(None)
        order = BatchOrder(len(setup.train), config.data.batch_size, setup.streams.order[first])
        warm = self.state.warm = WarmStart(
            setup.objective,
            setup.groups,
            order,
            epochs=config.train.epochs,
            lr=config.train.lr,
            warmup_share=config.train.warmup_share,
            validation=setup.validation,
            early_stopping=config.train.early_stopping,
            patience=config.train.patience,
            dropout=setup.streams.dropout[first],
        )
        fits = "one shared fit" if shared else f"{config.sampler.chains} chains at once"
        self.progress.say(
            f"Training with AdamW for {config.train.epochs} epochs "
            f"(warm start of {config.sampler.name}, {fits})..."
        )
        if self.resumed is not None:
            self.state.load_state_dict(self.resumed["state"])
        self.logger.begin("map", warm.total)
        with self._stepping():
            warm.run(self._on_step, self._say_epoch)
        self.progress.end()
        self.state.warm = None
        return warm.step

    def sample(self) -> None:
        """Account, burn-in and collection."""
        config, say = self.config, self.progress.say
        say(f"\nSampling with {config.sampler.name}...")
        if idle := idle_keys(config.sampler):
            keys = ", ".join(f"sampler.{key}" for key in idle)
            say(f"Without effect on {config.sampler.name}: {keys}")
        if config.sampler.variance_reduction:
            say(
                f"Control variate: one pass over {len(self.setup.train)} examples a chain now, "
                "then one more gradient a step"
            )
        tree = self.resumed if self._stage == "chains" else None
        chains = self.state.chains = make_chains(self.setup, fresh=tree is None)
        say(f"Target: {chains.sampler.exactness}; law on a quadratic: {chains.sampler.law}")
        if (word := tempering(config.sampler.temperature)) != "posterior":
            say(f"Temperature {config.sampler.temperature:g}: a {word} posterior")
        if tree is None:
            self.account = open_account(self.setup, chains)
            self.folder.write_starts(chains.traces.measure())
            self._stage = "chains"
            self.checkpoint()
        else:
            self.account = Account(**tree["account"])
            self.state.load_state_dict(tree["state"])
        for line in account_lines(
            self.account, config.sampler.bias, not config.sampler.variance_reduction
        ):
            say(line)
        say(f"Burn-in phase: {chains.burn_in.steps} steps")
        self.logger.begin("burn_in", chains.burn_in.steps)
        with self._stepping():
            chains.run_burn_in(self._on_step)
        say(f"Collecting {config.sampler.num_samples} samples (thinning: {config.sampler.thin})")
        self.logger.begin("sampling", chains.thinning.steps)
        if self._before_collection is None:
            self._before_collection = self.setup.objective.evaluations
        with self._stepping():
            chains.collect(self._on_step, self._keep_draw)
        self.progress.end()
        self.checkpoint()
        self.save()

    def _keep_draw(self, draw: int) -> None:
        assert self.state.chains is not None
        # The step that led here may have diverged; the closure would notice at the next one.
        loss = self.setup.objective.mean_nll(self.state.chains.traces.probe)
        if not np.isfinite(loss.numpy()).all():
            raise NonFiniteLoss(loss)
        paths = self._store(self.writer, draw, self.state.chains.step)
        total = self.config.sampler.num_samples
        done = len(self.writer.records) - len(paths)
        for i, path in enumerate(paths, start=1):
            self.progress.say(f"Saved sample {draw * len(paths) + i}/{total}: {path}")
        if done <= MANIFEST_EVERY_MEMBER_UP_TO or draw % 50 == 0:
            self._write_manifest()

    def _store(self, writer: MemberWriter, draw: int, step: int) -> list[Path]:
        noise = self.setup.objective.noise_std
        members = split(dict(self.setup.model.chain_parameters()))
        paths = []
        for m, member in enumerate(members):
            std = None if noise is None else float(noise[m])
            record = MemberRecord("", chain=m, draw=draw, step=step, noise_std=std)
            paths.append(writer.add(member, record))
        return paths

    def save(self) -> None:
        """Members of an unfinished pack, traces, manifest."""
        self.writer.flush()
        if self.state.chains is not None:
            self.folder.write_traces(self.state.chains.traces.take())
        self._write_manifest()

    def _write_manifest(self) -> None:
        head = provenance(self.setup, self.state.chains)
        write_manifest(self.folder.root, head, self.writer.records)

    def facts(self) -> dict[str, Any]:
        """For `run.json`: costs, heat, members."""
        chains, before = self.state.chains, self._before_collection
        evaluations = self.setup.objective.evaluations
        return {
            **{name: round(value, 2) for name, value in self.seconds.items()},
            "gradient_evaluations": evaluations,
            "sampling_gradient_evaluations": None if before is None else evaluations - before,
            "account": None if self.account is None else self.account.facts(),
            "prior_search": self.prior_search,
            "t_eff": None if chains is None else mean_t_eff(chains),
            "members": len(self.writer.records),
        }

    def _say_initial(self) -> None:
        held_out = self.setup.validation or self.setup.evaluation
        loss, accuracy = self.setup.objective.score(held_out)
        self.progress.say("Initial evaluation:")
        known = "" if accuracy is None else f", accuracy: {float(accuracy.mean()):.4f}"
        self.progress.say(f"Initial loss: {float(loss.mean()):.4f}{known}\n")

    def _say_epoch(self, report: EpochReport) -> None:
        parts = [f"Train loss: {float(report.train_loss.mean()):.4f}"]
        if report.validation_loss is not None:
            parts.append(f"Val loss: {float(report.validation_loss.mean()):.4f}")
        if report.validation_accuracy is not None:
            parts.append(f"accuracy: {float(report.validation_accuracy.mean()):.4f}")
        line = f"Epoch {report.epoch + 1}/{self.config.train.epochs}: {', '.join(parts)}"
        self.progress.say(line)
