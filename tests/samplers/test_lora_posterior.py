"""Every exact sampler against a library's NUTS on one real LoRA posterior of 1,058 dimensions.

Compared are predictive probabilities of held-out texts, which LoRA's gauge and its modes leave
alone. The problem, the reference and the samplers are those of the benchmark.
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bayesian_lora.posterior import PriorGroup, energy, negative_log_likelihood
from bayesian_lora.samplers import SGLD
from bayesian_lora.utils.lora_params import flatten
from bayesian_lora.verification.mutations import mutations

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "lora_posterior_against_nuts.py"

# Standard errors of a probability are about .003 (400 draws of NUTS) and .003 to .006 (ours), so
# .005 to .007 of their difference: its mean modulus over texts is .8 of that, its largest of 64
# correlated texts about 2.5 of it. The steps' O(h) bias (h·k_max ≤ .2: 10 % too wide in the
# stiffest direction, of a logit whose variance is .1) is below .001.
LARGEST, MEAN = 0.03, 0.01
# The mean of a probability hardly feels the temperature (half the noise: gaps of .017 and .006),
# its standard deviation over draws does: .71 of the right one. Of about 200 independent draws it
# has an error of 5 % at one text, less in the mean over texts, and a bias of 5 % at most.
SPREAD = 0.12
NAMES = [
    "sgld",
    "psgld",
    "asgld",
    "sghmc_euler",
    "sghmc_baoab",
    "sgnht",
    "csgld",
    "rank1_frozen",
    "rank1_cross_chain",
]


def load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(BENCHMARK.stem, BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench: Any = load_benchmark()


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bench.make_problem(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def nuts(problem: Any) -> Any:
    return bench.nuts_reference(problem)


def agrees(probs: Any, nuts: Any) -> tuple[bool, tuple[float, float, float]]:
    largest, mean = bench.gap(probs, nuts.probs)
    spread = bench.spread(probs, nuts.probs)
    verdict = largest < LARGEST and mean < MEAN and abs(spread - 1) < SPREAD
    return verdict, (largest, mean, spread)


# --- The posterior itself -------------------------------------------------------------------


def test_it_has_about_a_thousand_dimensions(problem: Any) -> None:
    assert flatten(problem.model(1).chain_parameters()).shape == (1, 1058)


def test_nuts_is_given_the_energy_of_the_package(problem: Any) -> None:
    """U of the listed examples, one by one, through `bayesian_lora.posterior`."""
    model = problem.model(1)
    z = torch.randn(1058, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bench.potential(problem, model)({"z": z})  # which leaves σz in the model
    ones = (problem.targets[:, 1] * bench.LABELS_PER_TEXT).round().long()
    labels = torch.stack([(ones > j).long() for j in range(bench.LABELS_PER_TEXT)], 1)
    ids = problem.train.repeat_interleave(bench.LABELS_PER_TEXT, 0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    nll = negative_log_likelihood("categorical", logits, labels.reshape(1, -1))
    assert nll.shape == (1, bench.NUM_EXAMPLES)
    groups = [PriorGroup(tuple(g["params"]), g["prior_std"]) for g in bench.prior_groups(model)]
    expected = energy(nll.mean(1), bench.NUM_EXAMPLES, groups)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_gradient_given_to_nuts_is_that_of_the_energy(problem: Any) -> None:
    rng = torch.Generator().manual_seed(1)
    z, direction = torch.randn(2, 1058, generator=rng, dtype=torch.float64)
    potential = bench.potential(problem, problem.model(1))
    start = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(potential({"z": start}), start)
    eps = 1e-5
    ahead, behind = (potential({"z": z + side * direction}).item() for side in (eps, -eps))
    assert (gradient @ direction).item() == pytest.approx((ahead - behind) / (2 * eps), rel=1e-6)


# --- Against NUTS ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reference_is_right(nuts: Any) -> None:
    """Chains from the prior agree, far from the prior's .5, and their error is a third of MEAN."""
    rhat, error = bench.mixing(nuts.probs)
    assert rhat < 1.06, rhat
    assert error < 0.004, error
    largest, mean = nuts.split_half()
    assert largest / 2 < 0.012, largest
    assert mean / 2 < 0.005, mean
    assert 0.7 < min(nuts.acceptance) <= max(nuts.acceptance) < 0.98, nuts.acceptance
    assert nuts.divergences == 0
    probability = nuts.probs.mean((0, 1))
    assert probability.min() < 0.4
    assert probability.max() > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_predictive_probabilities(name: str, problem: Any, nuts: Any) -> None:
    verdict, figures = agrees(bench.sample(problem, bench.SETTINGS[name]), nuts)
    assert verdict, figures


def test_every_exact_sampler_is_compared() -> None:
    assert list(bench.SETTINGS) == NAMES


WRONG = mutations(SGLD)


def prior_on_the_mean_loss(groups: list[dict[str, Any]], *, num_examples: int, **rest: Any) -> SGLD:
    """The prior's drift θ/σ² beside the mean loss's gradient, as if N were 1 in it."""
    scale = math.sqrt(num_examples)
    narrowed = [{**group, "prior_std": group["prior_std"] / scale} for group in groups]
    return SGLD(narrowed, num_examples=num_examples, **rest)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [WRONG["N dropped"], WRONG["noise × √½"], prior_on_the_mean_loss])
def test_broken_rules_are_rejected(rule: Callable[..., SGLD], problem: Any, nuts: Any) -> None:
    # Its prior is N times as stiff, so it is stable at a smaller step only.
    step_size = bench.H / 10 if rule is prior_on_the_mean_loss else bench.H
    probs = bench.sample(problem, partial(rule, step_size=step_size), steps=200)
    verdict, figures = agrees(probs, nuts)
    assert not verdict, figures
