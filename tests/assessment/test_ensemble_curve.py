"""The curve of the first k members: its figures, and from which k on they are enough.

Shapes: K members, N examples.
"""

import dataclasses

import numpy as np
import pytest

from bayesian_lora.assessment import evaluation
from bayesian_lora.assessment.ensemble_curve import POINTS, cumulative
from bayesian_lora.predict import Predictions
from tests.scores.plain_bootstrap import plain_errors

from .predictors import classifiers, first, gaussians, nulls_without_reason

WEIGHTS = np.array([0.4, 0.1, 0.2, 0.3])


def losses(p: Predictions) -> np.ndarray:
    """(N,) NLL of each example under the mixture."""
    return -np.log(p.probs[np.arange(len(p)), p.labels])


@pytest.mark.parametrize("regression", [False, True])
def test_each_point_is_the_mixture_of_the_first_members(regression: bool) -> None:
    p = dataclasses.replace(gaussians() if regression else classifiers(), weights=WEIGHTS)
    found = cumulative(regression, p)
    assert found["k"] == [1, 2, 3, 4]
    rows = [evaluation.evaluate((), regression, first(p, k)) for k in found["k"]]
    assert found["nll"] == pytest.approx([row["nll"] for row in rows], rel=1e-12)
    if regression:
        assert found["accuracy"] is found["ece"] is None
    else:
        for name in ("accuracy", "ece"):
            assert found[name] == pytest.approx([row[name] for row in rows], abs=1e-12)
    assert nulls_without_reason(found) == []


def test_differences_are_paired_and_their_error_is_the_bootstraps() -> None:
    p = classifiers(k=3, n=300)
    found = cumulative(False, p)
    gap = losses(first(p, 1)) - losses(p)
    assert found["difference"][0] == pytest.approx(gap.mean(), rel=1e-9)
    drawn = plain_errors(
        lambda index: {"gap": float(gap[index].mean())}, 300, np.random.default_rng(0), 2000
    )
    assert found["difference_se"][0] == pytest.approx(drawn["gap"], rel=0.1)
    assert found["difference_se"][0] < found["enough"]["nll_se"]
    assert found["enough"]["nll_se"] == pytest.approx(losses(p).std() / np.sqrt(300), rel=1e-9)
    assert (found["difference"][-1], found["difference_se"][-1]) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(8))
def test_enough_is_where_no_difference_up_to_the_half_exceeds_its_error(seed: int) -> None:
    p = classifiers(k=12, n=60, seed=seed)
    enough = cumulative(False, p)["enough"]
    gaps = [losses(first(p, k)) - losses(p) for k in range(1, 7)]
    settled = [abs(g.mean()) <= 2 * g.std() / np.sqrt(60) for g in gaps]
    assert enough["k"] == next((k for k in range(1, 7) if all(settled[k - 1 :])), None)
    assert enough["reason"]
    within = [abs(g.mean()) <= losses(p).std() / np.sqrt(60) for g in gaps]
    looser = next((k for k in range(1, 7) if all(within[k - 1 :])), None)
    assert enough["k_within_nll_se"] == looser
    assert enough["still_to_gain"] == pytest.approx(gaps[-1].mean(), rel=1e-9)
    assert enough["still_to_gain_se"] == pytest.approx(gaps[-1].std() / np.sqrt(60), rel=1e-9)


def noisy(k: int, noise: float, seed: int, n: int = 400) -> Predictions:
    """Independent members around the law that the labels are drawn from."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0.0, 1.5, n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(np.int64)
    logits = np.stack([np.zeros((k, n)), z + noise * rng.normal(size=(k, n))], axis=-1)
    return Predictions(logits, labels, np.full(k, 1 / k), np.arange(n))


def test_too_few_members_are_not_called_enough_because_the_last_resemble_the_whole() -> None:
    found = [cumulative(False, noisy(8, 4.0, seed))["enough"] for seed in range(10)]
    missing = [enough["reason"] for enough in found if enough["k"] is None]
    assert len(missing) >= 8
    assert all("draw more" in reason for reason in missing)


def test_where_more_members_bring_nothing_few_are_enough() -> None:
    """Though the first k wander about the whole within their errors for every k."""
    found = [cumulative(False, noisy(80, 0.5, seed))["enough"]["k"] for seed in range(10)]
    assert sum(k is not None and k <= 40 for k in found) >= 8
    assert sum(k is not None and k <= 10 for k in found) >= 5


@pytest.mark.parametrize(("k", "judged"), [(12, 4), (16, 8), (20, 8)])
def test_what_the_first_lack_tells_what_the_whole_lacks(k: int, judged: int) -> None:
    """Each input once with either label, so that infinitely many members would reach log 2."""
    logits = 0.5 * np.random.default_rng(k).normal(size=(k, 4000, 2))
    labels = np.repeat([0, 1], 4000)
    p = Predictions(np.tile(logits, (1, 2, 1)), labels, np.full(k, 1 / k), np.arange(8000))
    enough = cumulative(False, p, chains=4)["enough"]
    assert enough["judged"] == judged
    assert enough["still_to_gain"] == pytest.approx(losses(p).mean() - np.log(2), rel=0.15)


def test_members_that_go_on_improving_are_never_enough() -> None:
    """Each is surer of the right answer than the one before, on every example alike."""
    labels = np.arange(50) % 2
    logits = np.linspace(0.0, 3.0, 6)[:, None, None] * np.eye(2)[labels]
    p = Predictions(logits, labels, np.full(6, 1 / 6), np.arange(50))
    enough = cumulative(False, p)["enough"]
    assert enough["k"] is enough["k_within_nll_se"] is None
    assert "first 3 of 6 samples" in enough["reason"]
    assert f"about {enough['still_to_gain']:.2g} is still to be gained" in enough["reason"]
    assert "draw more" in enough["reason"]
    assert enough["k_within_nll_se_reason"]
    worse = cumulative(False, dataclasses.replace(p, logits=logits[::-1]))["enough"]
    assert worse["k"] is None
    assert "later samples are worse" in worse["reason"]


def test_alike_members_are_enough_from_the_first() -> None:
    p = classifiers(k=1)
    same = dataclasses.replace(p, logits=np.tile(p.logits, (5, 1, 1)), weights=np.full(5, 0.2))
    assert cumulative(False, same)["enough"]["k"] == 1


def test_only_whole_draws_of_all_chains_are_judged() -> None:
    """Two chains in two modes: an odd number of members leans to one of them."""
    p = classifiers(k=2, n=2000)
    both = dataclasses.replace(p, logits=np.tile(p.logits, (4, 1, 1)), weights=np.full(8, 1 / 8))
    worse = both.logits.copy()
    worse[1::2] *= -0.5
    both = dataclasses.replace(both, logits=worse)
    assert cumulative(False, both, chains=2)["enough"]["k"] == 2
    assert cumulative(False, both, chains=1)["enough"]["k"] == 4


def test_the_error_of_what_is_to_gain_grows_with_it() -> None:
    p = classifiers(k=12, n=60)
    gap = losses(first(p, 4)) - losses(p)
    enough = cumulative(False, p, chains=4)["enough"]
    assert enough["still_to_gain"] == pytest.approx(gap.mean() / 2, rel=1e-9)
    assert enough["still_to_gain_se"] == pytest.approx(gap.std() / np.sqrt(60) / 2, rel=1e-9)
    assert "up to 4 of the 12" in enough["reason"] or "first 4 of 12" in enough["reason"]


def test_one_draw_a_chain_is_judged_member_by_member() -> None:
    p = classifiers(k=4, n=60)
    assert cumulative(False, p, chains=4)["enough"] == cumulative(False, p)["enough"]


def test_many_members_are_looked_at_in_steps_of_whole_draws() -> None:
    p = classifiers(k=330, n=5)
    found = cumulative(False, p, chains=3)
    ks = found["k"]
    assert (ks[0], ks[-1]) == (1, 330)
    assert POINTS / 2 < len(ks) <= POINTS + 2
    assert all(k % 3 == 0 for k in ks[1:])
    assert found["nll"][-1] == pytest.approx(losses(p).mean(), rel=1e-9)
    assert found["nll"][10] == pytest.approx(losses(first(p, ks[10])).mean(), rel=1e-9)


def test_members_without_weight_do_not_count() -> None:
    p = dataclasses.replace(classifiers(), weights=np.array([0.0, 0.5, 0.0, 0.5]))
    found = cumulative(False, p)
    assert found["k"] == [1, 2]
    assert found["nll"][0] == pytest.approx(losses(evaluation.member(p, 1)).mean())
    assert found["nll"][1] == pytest.approx(losses(p).mean())


@pytest.mark.parametrize(("k", "n", "part"), [(1, 20, "one sample"), (3, 1, "one example")])
def test_too_little_to_say_what_is_enough(k: int, n: int, part: str) -> None:
    found = cumulative(False, classifiers(k=k, n=n))
    enough = found["enough"]
    assert part in enough["reason"]
    assert enough["k"] is enough["k_within_nll_se"] is enough["nll_se"] is None
    assert enough["judged"] is enough["still_to_gain"] is None
    assert len(found["nll"]) == k
