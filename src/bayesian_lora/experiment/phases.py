"""The phases of a run, in order: warm start, account, burn-in, collection.

Each goes on from where a run's checkpoint stands.
"""

from bayesian_lora.account import Account, account_lines, longer
from bayesian_lora.config import MAP
from bayesian_lora.data.batching import BatchOrder, TokenisedSet
from bayesian_lora.data.preparation import fixed_part
from bayesian_lora.experiment.priors import prior_lines, schedule_of, search_lines, search_prior
from bayesian_lora.experiment.provenance import tempering
from bayesian_lora.experiment.run import Run
from bayesian_lora.experiment.samplers import idle_keys, make_chains, open_account
from bayesian_lora.experiment.setup import Prior
from bayesian_lora.experiment.starts import StartsOf, fitted, place_starts, taken_over
from bayesian_lora.sampling import spread_start, widen_start
from bayesian_lora.warm_start import EpochReport, WarmStart

KINDS = {"last": "of the last epoch", "early_stopped": "early-stopped"}
INITIAL_SIZE = 32
"""Examples of the initial evaluation."""


def warm_start(run: Run) -> None:
    """Every chain's start, fitted or taken over, stored under ``map/``."""
    tree, setup = run.resumed, run.setup
    if tree is not None and run.stage != "map":
        run.state.load_state_dict(tree["state"])
        return
    if tree is None:
        _resolve_prior(run)
    for line in prior_lines(setup):
        run.progress.say(line)
    if run.starts is None:
        starts = _fit(run)
    else:
        place_starts(setup, run.starts.fits)
        starts = taken_over(run.starts, run.alive)
        kind = f", {KINDS[starts.kind]}" if starts.kind is not None else ""
        run.progress.say(f"Warm starts of {run.config.train.starts_from}{kind}\n")
    run.keep_starts(starts)
    run.write_manifest()
    if run.config.train.starts == "shared":
        widen_start(setup.model, setup.objective, run.config.sampler.chains)
    run.stage = "ready"
    run.checkpoint()


def _resolve_prior(run: Run) -> None:
    """``prior.std: auto``: search, or what the run whose starts are taken had found."""
    config, setup, say = run.config, run.setup, run.progress.say
    if config.prior.std != "auto":
        return
    if run.starts is not None:
        setup.prior = Prior(**run.starts.fits.provenance.sampler["prior"])
        say(f"prior.std={setup.prior.std:g}, that of {config.train.starts_from} (no search)")
        return
    say("Searching prior.std on data held out of train...")
    batches = -(-len(setup.train) // config.data.batch_size)
    run.logger.begin("prior", max(1, config.train.epochs) * batches)
    found = run.prior_search = search_prior(setup, run.logger.step)
    run.progress.end()
    for line in search_lines(found):
        say(line)
    setup.prior = Prior(found["std"], config.prior.head_std or found["std"])


def _fit(run: Run) -> StartsOf:
    """Fit all chains: the fits that sampling starts from, and those beside them."""
    config, setup, train = run.config, run.setup, run.config.train
    shared = train.starts == "shared"
    if run.resumed is None:
        _say_initial(run)
    first = slice(0, 1) if shared else slice(None)
    order = BatchOrder(len(setup.train), config.data.batch_size, setup.streams.order[first])
    warm = run.state.warm = WarmStart(
        setup.objective,
        setup.groups,
        order,
        epochs=train.epochs,
        **schedule_of(train),
        validation=setup.validation,
        early_stopping=train.early_stopping,
        both=True,
        patience=train.patience,
        dropout=setup.streams.dropout[first],
        lose=run.lose,
    )
    chains = setup.model.num_chains
    several = f"{chains} chains at once" if chains > 1 else "one chain"
    fits = "one shared fit" if shared else several
    name = config.sampler.name
    what = f"warm start of {name}" if name != MAP else "no sampling: of sampler only chains counts"
    run.progress.say(f"Training with AdamW for {train.epochs} epochs ({what}, {fits})...")
    if run.resumed is not None:
        run.state.load_state_dict(run.resumed["state"])
        run.resumed = None  # else the whole state is held a second time
    run.logger.begin("map", warm.total)
    with run.stepping():
        warm.run(run.on_step, lambda report: _epoch_ended(run, report))
    run.progress.end()
    run.state.warm = None
    return fitted(warm, run.alive)


def sample(run: Run) -> None:
    """Chains, spread if they share a fit, which the control variate stands at; account, burn-in and
    collection.
    """
    config, say = run.config, run.progress.say
    say(f"\nSampling with {config.sampler.name}...")
    _say_notes(run)
    tree = run.resumed if run.stage == "chains" else None
    chains = run.state.chains = make_chains(run.setup, fresh=tree is None, lose=run.lose)
    say(f"Target: {chains.sampler.exactness}; law on a quadratic: {chains.sampler.law}")
    if (word := tempering(config.sampler.temperature)) != "posterior":
        say(f"Temperature {config.sampler.temperature:g}: a {word} posterior")
    if tree is None:
        if config.train.starts == "shared":
            spread_start(run.setup.model, config.train.jitter, run.setup.streams.noise)
        run.account = open_account(run.setup, chains)
        run.folder.write_starts(run.by_chain(chains.traces.measure()))
        run.stage = "chains"
        run.checkpoint()
    else:
        steps = chains.burn_in.steps + chains.thinning.steps
        run.account = longer(chains.sampler, Account(**tree["account"]), steps)
        run.state.load_state_dict(tree["state"])
        tree = run.resumed = None  # else the whole state is held a second time
    for line in account_lines(run.account, config.sampler.bias):
        say(line)
    say(f"Burn-in phase: {chains.burn_in.steps} steps")
    run.logger.begin("burn_in", chains.burn_in.steps)
    with run.stepping():
        chains.run_burn_in(run.on_step)
    say(f"Collecting {config.sampler.num_samples} samples (thinning: {config.sampler.thin})")
    run.logger.begin("sampling", chains.thinning.steps)
    if run.before_collection is None:
        run.before_collection = run.setup.objective.evaluations
    with run.stepping():
        chains.collect(run.on_step, run.keep_draw)
    run.progress.end()
    run.checkpoint()
    run.save()


def _say_notes(run: Run) -> None:
    """Keys without effect, and what the control variate costs."""
    s, say = run.config.sampler, run.progress.say
    if idle := idle_keys(s):
        keys = ", ".join(f"sampler.{key}" for key in idle)
        say(f"Without effect on {s.name}: {keys}")
    if s.variance_reduction:
        say(
            f"Control variate: one pass over {len(run.setup.train)} examples a chain now, "
            "then one more gradient a step"
        )


def _say_initial(run: Run) -> None:
    """Of chains not fitted yet, on part of what is held out: the first step waits for it."""
    config, setup = run.config, run.setup
    held_out = setup.raw.evaluation if setup.raw.validation is None else setup.raw.validation
    part = fixed_part(held_out, INITIAL_SIZE, config.seed)
    data = TokenisedSet(part, setup.tokenizer, config.data.max_length)
    loss, accuracy = setup.objective.score(data)
    run.progress.say("Initial evaluation:")
    known = "" if accuracy is None else f", accuracy: {float(accuracy.mean()):.4f}"
    run.progress.say(f"Initial loss: {float(loss.mean()):.4f}{known}")
    run.progress.say(f"(on {len(data)} of {len(held_out)} held-out examples)\n")


def _epoch_ended(run: Run, report: EpochReport) -> None:
    assert run.metrics is not None
    run.metrics.epoch(report, run.alive)
    parts = [f"Train loss: {float(report.train_loss.mean()):.4f}"]
    if report.validation_loss is not None:
        parts.append(f"Val loss: {float(report.validation_loss.mean()):.4f}")
    if report.validation_accuracy is not None:
        parts.append(f"accuracy: {float(report.validation_accuracy.mean()):.4f}")
    line = f"Epoch {report.epoch + 1}/{run.config.train.epochs}: {', '.join(parts)}"
    run.progress.say(line)
