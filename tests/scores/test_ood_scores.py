"""Scores that tell a foreign set, against scikit-learn, closed forms and cases worked out by hand.

Shapes: K members, N examples inside, M outside, C classes.
"""

import numpy as np
import pytest
from sklearn import metrics as sk

from bayesian_lora.errors import InputError
from bayesian_lora.metrics import uncertainty_per_example
from bayesian_lora.scores.ood_scores import MEASURES, ONE_MEMBER, SCORES, ood_figures, scores_of

N, M = 90, 60


def logits(k: int, n: int, scale: float, seed: int) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((k, n, 3))


def scored(k: int, seed: int = 0) -> tuple[dict, dict]:
    """Inside the members are surer than outside."""
    weights = np.ones(k) / k
    pair = logits(k, N, 3.0, seed), logits(k, M, 1.0, seed + 100)
    first, second = (scores_of(x, weights) for x in pair)
    return first, second


def figures(models: dict, seed: int = 0, replicates: int = 200) -> dict:
    return ood_figures(models, np.random.default_rng(seed), replicates)


def test_scores_are_the_entropies_and_one_minus_the_top_probability() -> None:
    x, weights = logits(4, 20, 2.0, 1), np.array([0.1, 0.2, 0.3, 0.4])
    got = scores_of(x, weights)
    assert tuple(sorted(got)) == tuple(sorted(SCORES))
    for name, values in uncertainty_per_example(x, weights).items():
        np.testing.assert_array_equal(got[name], values)
    probs = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    top = np.einsum("k,knc->nc", weights, probs).max(1)
    np.testing.assert_allclose(got["max_probability"], 1 - top, atol=1e-14)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 1.0]])
def test_one_member_has_no_mutual_information(weights: list[float]) -> None:
    x = logits(len(weights), 5, 1.0, 0)
    assert "mutual_information" not in scores_of(x, weights)
    pair = scores_of(x, weights), scores_of(x - 1, weights)
    row = figures({"map": [pair]}, replicates=5)["models"]["map"]["mutual_information"]
    assert row["auroc"] is None
    assert row["auroc_reason"] == row["aupr_reason"] == ONE_MEMBER
    assert "auroc_se_reason" not in row


def test_areas_are_those_of_scikit_learn() -> None:
    pair = scored(3)
    got = figures({"ensemble": [pair]}, replicates=10)
    assert (got["inside_n"], got["outside_n"], got["replicates"]) == (N, M, 10)
    assert got["base_rate"] == pytest.approx(M / (N + M))
    truth = np.repeat([0, 1], [N, M])
    for score in SCORES:
        values = np.concatenate([pair[0][score], pair[1][score]])
        row = got["models"]["ensemble"][score]
        assert row["auroc"] == pytest.approx(sk.roc_auc_score(truth, values), abs=1e-12)
        assert row["aupr"] == pytest.approx(sk.average_precision_score(truth, values), abs=1e-12)


def test_standard_errors_are_those_of_delong_and_of_a_plain_bootstrap() -> None:
    pair = scored(3)
    row = figures({"e": [pair]}, replicates=2000)["models"]["e"]["predictive_entropy"]
    inside, outside = (scores["predictive_entropy"] for scores in pair)
    # DeLong et al. (1988): the variances of the mean placements of either set in the other.
    above = (outside[:, None] > inside) + 0.5 * (outside[:, None] == inside)
    delong = np.sqrt(above.mean(0).var(ddof=1) / N + above.mean(1).var(ddof=1) / M)
    assert row["auroc_se"] == pytest.approx(delong, rel=0.08)
    rng, truth, found = np.random.default_rng(5), np.repeat([0, 1], [N, M]), []
    for _ in range(500):
        values = np.concatenate([rng.choice(inside, N), rng.choice(outside, M)])
        found.append(sk.average_precision_score(truth, values))
    assert row["aupr_se"] == pytest.approx(np.std(found, ddof=1), rel=0.1)


def test_warm_starts_are_shown_by_their_mean_and_spread() -> None:
    starts = [scored(1, seed) for seed in range(3)]
    got = figures({"map": starts}, replicates=50)["models"]["map"]
    alone = [figures({"map": [start]}, replicates=5)["models"]["map"] for start in starts]
    for measure in MEASURES:
        values = [row["max_probability"][measure] for row in alone]
        row = got["max_probability"]
        assert row[measure] == pytest.approx(np.mean(values))
        assert row[f"{measure}_sd"] == pytest.approx(np.std(values, ddof=1))
        assert f"{measure}_sd" not in alone[0]["max_probability"]


def test_differences_are_paired() -> None:
    models = {"ensemble": [scored(4)], "same": [scored(4)], "map": [scored(1), scored(1, 1)]}
    got = figures(models)
    same = got["differences"]["ensemble-same"]["predictive_entropy"]
    assert same["auroc"] == 0
    assert same["auroc_se"] is None  # not 0: they do not differ at all
    assert "the same in every resample" in same["auroc_se_reason"]
    rows = got["models"]
    difference = got["differences"]["ensemble-map"]
    expected = rows["ensemble"]["max_probability"]["aupr"] - rows["map"]["max_probability"]["aupr"]
    assert difference["max_probability"]["aupr"] == pytest.approx(expected)
    assert difference["mutual_information"]["auroc"] is None
    a, b = (rows[kind]["max_probability"]["auroc_se"] for kind in ("ensemble", "map"))
    assert 0 < difference["max_probability"]["auroc_se"] < a + b


def test_a_score_that_tells_all_and_one_that_tells_nothing() -> None:
    def scores(value: float, n: int) -> dict:
        return dict.fromkeys(SCORES, np.full(n, value))

    apart = figures({"e": [(scores(0.0, N), scores(1.0, M))]})["models"]["e"]["max_probability"]
    assert (apart["auroc"], apart["aupr"], apart["auroc_se"]) == (1.0, 1.0, None)
    equal = figures({"e": [(scores(1.0, N), scores(1.0, M))]})["models"]["e"]["max_probability"]
    assert (equal["auroc"], equal["aupr"]) == (0.5, pytest.approx(M / (N + M)))


def test_one_example_has_no_standard_error() -> None:
    inside, outside = scored(2)
    one = {name: values[:1] for name, values in outside.items()}
    row = figures({"e": [(inside, one)]})["models"]["e"]["predictive_entropy"]
    assert row["auroc"] is not None
    assert row["auroc_se"] is None
    assert "one example" in row["auroc_se_reason"]


def test_an_empty_set_is_one_class_only() -> None:
    inside, outside = scored(2)
    none = {name: values[:0] for name, values in outside.items()}
    with pytest.raises(InputError, match=r"90 examples inside and 0 outside: one class only"):
        figures({"e": [(inside, none)]})


def test_the_same_generator_gives_the_same_errors_and_another_does_not() -> None:
    models = {"e": [scored(2)]}
    assert figures(models, 1) == figures(models, 1)
    errors = {figures(models, seed)["models"]["e"]["max_probability"]["aupr_se"] for seed in (1, 2)}
    assert len(errors) == 2
