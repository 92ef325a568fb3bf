"""Chains that mix on MRPC in function space, at a stated cost: one configuration, one run.

    python benchmarks/mixing_mrpc.py --dry-run
    python benchmarks/mixing_mrpc.py
    python benchmarks/mixing_mrpc.py --configuration last_layer --set prior.std=0.03
    python benchmarks/mixing_mrpc.py --quick

The means, all stated with the result: a narrow prior, rank 1, fewer layers, control variates. A
chain forgets in Nσ²·f/h steps where only the prior holds, and minibatch heat N·h·c/(2·f·B·T) keeps
h/f small, so what mixes must have a small σ or little gradient variance c: control variates lower c
the more, the nearer a chain stays to where they stand. The spread of the starts is reported and
must be at least 2 for R-hat to count: `narrow` spreads its chains around one fit, at which the
control variates stand; the others start from fits of their own, from their own initial factors.
Needs the `offline` extra and local data (BAYESIAN_LORA_DATA), `--quick` no data. A stopped run goes
on with the same command, a finished one is only shown.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baselines_plan import CONFIGS, finished, sampler_keys, sampling_steps
from posterior_against_baselines import QUICK, make_toy, step_seconds

from bayesian_lora.config import Config, load_config
from bayesian_lora.diagnostics import DISPERSION_LIMIT, ESS_BULK_LIMIT, RHAT_LIMIT
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.setup import data_folder, load_training_data, resolve_device, task_of
from bayesian_lora.experiment.train import train
from bayesian_lora.progress import Progress
from bayesian_lora.utils.files import write_atomic

LAST_LAYER = "[layer.5.attention.self.query, layer.5.attention.self.value]"
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "narrow": (
        *("model.lora.rank=1", "model.lora.alpha=2", f"model.lora.target_modules={LAST_LAYER}"),
        *("prior.std=0.04", "prior.head_std=0.1", "train.starts=shared", "train.jitter=0.1"),
        # Set by hand: `auto` weighs the variance at the spread starts, where it is largest.
        *("sampler.step_size=0.15", "sampler.burn_in_step_size=0.02"),
    ),
    "last_layer": (f"model.lora.target_modules={LAST_LAYER}", "prior.std=0.05"),
    "rank1": ("model.lora.rank=1", "model.lora.alpha=2", "prior.std=0.05"),
}
"""From the narrowest posterior to the widest."""
LONG = (
    *("train.epochs=2", "sampler.bias=0.3", "sampler.burn_in=600", "sampler.thin=150"),
    *("sampler.num_samples=80", "sampler.trace_every=5"),
)
WORST = 5
FOLDER = Path("runs/mixing")
Figures = Mapping[str, Any]


def config_of(args: argparse.Namespace, out: Path) -> Config:
    """The run's config. Raises InputError for wrong keys."""
    keys = [*sampler_keys(args.sampler), *CONFIGURATIONS[args.configuration], *LONG]
    file = CONFIGS / "benchmark_mrpc.yaml"
    if args.quick:
        targets = "model.lora.target_modules=[query,value]"
        toy = f"model.name={_encoder(out)}"
        keys, file = [*keys, *QUICK, "prior.std=0.2", targets, toy], CONFIGS / "demo.yaml"
    return load_config(file, [*keys, *args.set, f"output.dir={out}"])


def _encoder(out: Path) -> Path:
    """Where the toy's encoder lies."""
    return out.with_name(f"{out.name}_encoder")


def cost_lines(config: Config, seconds: float | None) -> list[str]:
    """What the run costs: gradient steps of all chains at once, and hours if a step is timed.

    Raises:
        InputError: no data.
    """
    s = config.sampler
    train_set, _ = load_training_data(config, task_of(config), data_folder(config))
    epoch = -(-len(train_set) // config.data.batch_size)
    steps, gradients = sampling_steps(s), 2 if s.variance_reduction else 1
    total = config.train.epochs * epoch + gradients * steps
    lines = [
        f"{s.chains} chains of {steps:,} steps: {s.chains * steps:,} chain-steps of "
        f"{config.data.batch_size} examples, {gradients} gradients each; with the fits "
        f"{total:,} gradient steps of all chains at once"
    ]
    if seconds is not None:
        hours = seconds * total / 3600
        lines.append(
            f"A step takes {seconds:.3g} s: {hours:.2f} hours, traces and evaluation apart"
        )
    return lines


def result_lines(m: Figures, config: Config) -> list[str]:
    """Markdown: what was run, how it mixed, what it predicts, and whether the target is met."""
    d, s, lora = m["diagnostics"], config.sampler, config.model.lora
    prior = f"σ = {config.prior.std:g}, head {config.prior.head_std or config.prior.std:g}"
    reduced = ", control variates" if s.variance_reduction else ""
    shared = config.train.starts == "shared"
    starts = f"one fit, spread by {config.train.jitter:g}" if shared else "fits of their own"
    rows = {
        "largest R-hat": d["rhat_max"],
        "least bulk ESS": d["ess_bulk_min"],
        "least tail ESS": d["ess_tail_min"],
        "spread of the starts, within-chain sd": d["start_dispersion"],
        "T_eff": d["t_eff"],
        "step size": m["sampler"]["step_size"],
        "NLL: MAP, deep ensemble, posterior": _three(m, "nll"),
        "accuracy: MAP, deep ensemble, posterior": _three(m, "accuracy"),
        "gradients of a chain after burn-in": m["cost"]["sampling_gradient_evaluations"],
        "seconds: fits, sampling": f"{m['cost']['train_s']:.0f}, {m['cost']['sample_s']:.0f}",
    }
    return [
        f"{s.name}{reduced}; rank {lora.rank} on {lora.target_modules}; {prior}; {s.chains} chains "
        f"from {starts}, of {sampling_steps(s):,} steps, {s.burn_in:,} of them burn-in",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_shown(value)} |" for name, value in rows.items()),
        "",
        f"Worst quantities: {', '.join(worst(d))}",
        f"Verdict: {d['verdict']}: {d['reason']}",
        target(d),
    ]


def worst(d: Figures) -> list[str]:
    """Those of the largest R-hat, with it and their bulk ESS."""
    known = {n: q for n, q in d["quantities"].items() if q.get("rhat") is not None}
    names = sorted(known, key=lambda n: -known[n]["rhat"])[:WORST]
    return [f"{n} {known[n]['rhat']:.3f} ({_shown(known[n]['ess_bulk'])})" for n in names]


def target(d: Figures) -> str:
    """Met, missed (by what), or not available."""
    names = ("rhat_max", "ess_bulk_min", "start_dispersion")
    if unknown := [d.get(f"{name}_reason") or name for name in names if d.get(name) is None]:
        return f"Target: not available ({unknown[0]})"
    rhat, ess, dispersion = (d[name] for name in names)
    asked = {
        f"R-hat {rhat:.4g}, at most {RHAT_LIMIT:g}": rhat <= RHAT_LIMIT,
        f"bulk ESS {ess:.4g}, at least {ESS_BULK_LIMIT:g}": ess >= ESS_BULK_LIMIT,
        f"spread of the starts {dispersion:.3g}, at least {DISPERSION_LIMIT:g}": (
            dispersion >= DISPERSION_LIMIT
        ),
    }
    missed = [words for words, holds in asked.items() if not holds]
    return f"Target: {'missed' if missed else 'met'} ({'; '.join(missed or asked)})"


def _three(m: Figures, name: str) -> str:
    values = (m["map"][name]["mean"], m["map_ensemble"][name], m["ensemble"][name])
    return ", ".join(_shown(value) for value in values)


def _shown(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def mix(args: argparse.Namespace, command: str) -> None:
    """What the command line asks for.

    Raises:
        InputError: wrong input; nothing has been made or written.
    """
    if args.configuration not in CONFIGURATIONS:
        known = ", ".join(CONFIGURATIONS)
        raise InputError(f"--configuration {args.configuration}: unknown; choose of {known}")
    out = args.out or FOLDER / ("quick" if args.quick else args.configuration)
    config = config_of(args, out)
    resolve_device(config.device)
    metrics = finished(out, config)
    lines = cost_lines(config, None)
    if metrics is None and (args.measure or not args.dry_run):
        if config.model.name == str(_encoder(out)):
            make_toy(_encoder(out))
        lines = cost_lines(config, step_seconds(config))
    print("\n".join(lines), flush=True)
    if args.dry_run:
        return
    if metrics is None:
        train(config, Progress())
        metrics = finished(out, config)
    assert metrics is not None
    text = "\n".join([f"`{command}`", "", *result_lines(metrics, config)]) + "\n"
    write_atomic(out.with_name(f"{out.name}.md"), text)
    print(f"\n{text}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configuration", default="narrow", help=f"of {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--sampler", default="sghmc+vr", metavar="NAME[+vr]")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: in {FOLDER}")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="print the cost, make nothing")
    parser.add_argument("--measure", action="store_true", help="of a dry run: time a few steps")
    parser.add_argument("--quick", action="store_true", help="a toy of it, under a minute")
    try:
        mix(parser.parse_args(given), shlex.join(["python", "benchmarks/mixing_mrpc.py", *given]))
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
