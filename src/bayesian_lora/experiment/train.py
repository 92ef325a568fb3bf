"""A config → a run folder: warm start, burn-in, collection, evaluation; stopped, it goes on.

With ``sampler.name: map`` the warm starts are the members, and sampling is left out.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from bayesian_lora.config import MAP, Config
from bayesian_lora.errors import InputError
from bayesian_lora.experiment import phases
from bayesian_lora.experiment.evaluate import evaluate_run
from bayesian_lora.experiment.resume import Stop, find_earlier
from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.run_metrics import evaluated_splits
from bayesian_lora.experiment.setup import prepare
from bayesian_lora.experiment.starts import check_starts, find_starts
from bayesian_lora.progress import Progress
from bayesian_lora.run_folder import RunFolder
from bayesian_lora.samplers.failures import Diverged
from bayesian_lora.utils.checkpoint import has_checkpoint
from bayesian_lora.utils.lock import locked
from bayesian_lora.utils.tracking import check_tracker


def train(config: Config, progress: Progress | None = None, resume: bool = True) -> Path:
    """Run the whole job and return the run's folder.

    A run of this config that was stopped in that folder goes on where it was; one that is finished
    is extended if `sampler.num_samples` has been raised.

    Args:
        config: of the run.
        progress: where lines go.
        resume: False refuses a folder that holds a run.

    Raises:
        InputError: wrong input (nothing is written), or a loss that is not finite (what was
            collected so far is kept and can be evaluated).
    """
    progress = progress or Progress()
    assert config.output.dir is not None
    check_tracker(config.track)
    folder = RunFolder(config.output.dir)
    begun = find_earlier(config, resume) and has_checkpoint(folder.root / "checkpoint")
    starts = None if begun else find_starts(config)  # a run that goes on has its own
    setup = prepare(config, progress)
    if starts is not None:
        check_starts(setup, starts)
    with locked(folder.root), Stop().installed() as stop:
        run = Run(setup, folder, progress, stop, starts)
        with closing(run):
            with _recorded(run):
                run.open(go_on=find_earlier(config, resume))
                with run.timed("train_s"):
                    phases.warm_start(run)
                if config.sampler.name != MAP:
                    with run.timed("sample_s"):
                        phases.sample(run)
                folder.finish("sampled", **run.facts())
            _evaluate(run)
            folder.finish("finished", **run.facts())
    return folder.root


def _evaluate(run: Run) -> None:
    """Figures of every split that the run's end has time for, and the last row of `metrics.csv`."""
    assert run.metrics is not None
    found = {
        split: evaluate_run(run.folder.root, split=split, progress=run.progress, setup=run.setup)
        for split in evaluated_splits(run.setup)
    }
    run.metrics.evaluated(found)


@contextmanager
def _recorded(run: Run) -> Iterator[None]:
    """Whatever ends the run early: members, traces and the reason are on disk."""
    root = run.folder.root
    try:
        yield
    except Diverged as error:
        _close(run, f"{error} in {run.logger.place()}")
        raise InputError(
            f"{error} in {run.logger.place()}: stopped, {len(run.records)} samples kept in "
            f"{root}; lower sampler.step_size or train.lr, or set sampler.on_nonfinite=drop to go "
            "on without the chain"
        ) from error
    except InputError as error:
        if not run.opened:
            raise
        _close(run, str(error))
        if run.stage == "map":
            raise
        raise InputError(
            f"{error} (the warm starts are kept: train.starts_from={root} "
            "output.dir=<new folder> spares fitting them again)"
        ) from error
    except BaseException as error:
        if not run.opened:
            raise
        _close(run, f"{type(error).__name__} in {run.logger.place()}")
        raise
    finally:
        run.progress.end()


def _close(run: Run, reason: str) -> None:
    """Leave what can be left: on a full disk, whatever was written before stays as it is."""
    with suppress(OSError):
        if run.stage != "map":
            run.save()
    with suppress(OSError):
        run.folder.finish("stopped", reason=reason, **run.facts())
