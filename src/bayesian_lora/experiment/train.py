"""A config → a run folder: warm start, burn-in, collection, evaluation.

Shapes: M chains.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora.config import Config, dump_config
from bayesian_lora.data.batching import BatchOrder
from bayesian_lora.data.preparation import probe_and_subset
from bayesian_lora.ensemble import Provenance, write_manifest
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.evaluate import evaluate_run
from bayesian_lora.experiment.setup import Setup, make_sampler, prepare, run_facts
from bayesian_lora.experiment.step_log import StepLogger
from bayesian_lora.member_files import MemberRecord, MemberWriter
from bayesian_lora.models.peft_io import adapter_config
from bayesian_lora.objective import NonFiniteLoss
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import RunFolder
from bayesian_lora.samplers.schedules import BurnIn, Thinning
from bayesian_lora.sampling import Chains, RunState, spread_start
from bayesian_lora.traces import Traces
from bayesian_lora.utils.lora_params import split
from bayesian_lora.warm_start import EpochReport, WarmStart

TRACE_ROWS = 100
MANIFEST_EVERY_MEMBER_UP_TO = 200


def train(config: Config, progress: Progress | None = None) -> Path:
    """Run the whole job and return the run's folder.

    Raises:
        InputError: wrong input (nothing is written), or a loss that is not finite (what was
            collected so far is kept and can be evaluated).
    """
    progress = progress or Progress()
    assert config.output.dir is not None
    folder = RunFolder(config.output.dir)
    folder.check_free(config.output.overwrite)
    setup = prepare(config, progress)
    folder.begin(dump_config(config), run_facts(setup))
    run = Run(setup, folder, progress)
    with _recorded(folder, run):
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
    except NonFiniteLoss as error:
        run.save()
        folder.finish("stopped", reason=f"{error} in {run.logger.place()}", **run.facts())
        raise InputError(
            f"{error} in {run.logger.place()}: stopped, {len(run.writer.records)} samples kept in "
            f"{folder.root}; lower sampler.step_size or train.lr"
        ) from error
    except BaseException as error:
        run.save()
        reason = f"{type(error).__name__} in {run.logger.place()}"
        folder.finish("stopped", reason=reason, **run.facts())
        raise
    finally:
        run.progress.end()


class Run:
    """One run under way: phases in order, and what each leaves on disk and on the screen."""

    def __init__(self, setup: Setup, folder: RunFolder, progress: Progress) -> None:
        self.setup, self.folder, self.progress = setup, folder, progress
        self.config = setup.config
        self.peft_config = adapter_config(setup.model.info.spec)
        self.fingerprint = folder.status["model_fingerprint"]
        self.writer = MemberWriter(folder.root, self.peft_config, self.config.sampler.num_samples)
        self.state = RunState(setup.model, setup.objective, setup.streams)
        self.seconds = {"train_s": 0.0, "sample_s": 0.0}
        self.logger = StepLogger(folder, progress, self.config.sampler.temperature)
        self._traces_written = 0
        self._trace_parts = 0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """The block's wall time into `seconds`, however it ends."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - began

    def warm_start(self) -> None:
        """Fit all chains, store them under ``map/``, spread them if they share one start."""
        config, setup = self.config, self.setup
        shared = config.train.starts == "shared"
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
        self.logger.begin("map", warm.total)
        warm.run(self.logger.step, self._say_epoch)
        self.progress.end()
        self.state.warm = None
        writer = MemberWriter(
            self.folder.root, self.peft_config, 1, subfolder="map", name="chain_{:d}", first=0
        )
        self._store(writer, draw=0, step=warm.step)
        if shared:
            noise = setup.streams.noise
            spread_start(setup.model, setup.objective, config.train.jitter, noise)

    def sample(self) -> None:
        """Burn-in and collection."""
        config = self.config
        chains = self.state.chains = self._chains()
        self.folder.write_starts(chains.traces.measure())
        self.progress.say(f"\nSampling with {config.sampler.name}...")
        self.progress.say(f"Burn-in phase: {chains.burn_in.steps} steps")
        self.logger.begin("burn_in", chains.burn_in.steps)
        chains.run_burn_in(self.logger.step)
        self.progress.say(
            f"Collecting {config.sampler.num_samples} samples (thinning: {config.sampler.thin})"
        )
        self.logger.begin("sampling", chains.thinning.steps)
        chains.collect(self.logger.step, self._keep_draw)
        self.progress.end()
        self.save()

    def _chains(self) -> Chains:
        config, setup = self.config, self.setup
        s, batch = config.sampler, config.data.batch_size
        n = len(setup.train)
        thinning = Thinning(s.thin, s.num_samples // s.chains)
        probe, subset = probe_and_subset(
            setup.raw, setup.tokenizer, config.data.max_length, config.seed
        )
        return Chains(
            setup.objective,
            make_sampler(config, setup.groups, n, setup.streams),
            BatchOrder(n, batch, setup.streams.batches),
            BurnIn(s.burn_in, s.burn_in_step_size or s.step_size, s.step_size),
            thinning,
            Traces(setup.objective, setup.groups, probe, subset, config.seed),
            s.trace_every or max(1, thinning.steps // TRACE_ROWS),
            BatchOrder(n, batch, setup.streams.heat),
        )

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
            arrays = self.state.chains.traces.arrays(self._traces_written)
            if arrays:
                self._trace_parts += 1
                self.folder.write_traces(self._trace_parts, arrays)
                self._traces_written = len(self.state.chains.traces.rows)
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_manifest(self.folder.root, self.provenance(), self.writer.records)

    def provenance(self) -> Provenance:
        """The head of `ensemble.json` as things stand."""
        config, setup, info = self.config, self.setup, self.setup.model.info
        chains = self.state.chains
        model = {
            "name": config.model.name,
            "base": info.source.public_id,
            "fingerprint": self.fingerprint,
            "num_labels": setup.task.num_labels,
            "max_length": config.data.max_length,
            "dtype": config.model.dtype,
        }
        task = {
            "name": setup.task.name,
            "label_names": list(setup.task.label_names),
            "likelihood": setup.task.likelihood,
        }
        s = config.sampler
        shared = config.train.starts == "shared"
        sampler = {
            "name": s.name,
            "step_size": s.step_size,
            "temperature": s.temperature,
            "tempering": _tempering(s.temperature),
            "t_eff": None if chains is None else mean_t_eff(chains),
            "exactness": None if chains is None else chains.sampler.exactness,
            "chains": s.chains,
            "starts": "within one mode" if shared else "independent",
            "num_examples": len(setup.train),
            "prior": dataclasses.asdict(config.prior),  # type: ignore[call-overload]
        }
        spec = dataclasses.asdict(info.spec)
        return Provenance(model, task, spec, sampler)

    def facts(self) -> dict[str, Any]:
        """For `run.json`: costs, heat, members."""
        chains = self.state.chains
        return {
            **{name: round(value, 2) for name, value in self.seconds.items()},
            "gradient_evaluations": self.setup.objective.evaluations,
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


def mean_t_eff(chains: Chains) -> float | None:
    """T_eff over chains and probes; None before the first probe, or where it overflowed."""
    value = float(np.mean([t.numpy() for t in chains.t_eff])) if chains.t_eff else math.nan
    return value if math.isfinite(value) else None


def _tempering(temperature: float) -> str:
    if temperature == 1.0:
        return "posterior"
    return "cold" if temperature < 1.0 else "hot"
