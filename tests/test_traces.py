"""Traced quantities against dense ΔW = s·BA and log-densities by hand; invariance of gauge.

Shapes: M chains, R rank, D widths, N examples.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bayesian_lora import traces as traces_module
from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.synthetic import generate
from bayesian_lora.models.chain_lora import ChainLora
from bayesian_lora.models.hf_lora import build_huggingface_lora_model
from bayesian_lora.objective import Objective, prior_groups
from bayesian_lora.posterior import LikelihoodName
from bayesian_lora.traces import COORDINATES, PROJECTIONS, RAW, Traces, delta_w_norm

CHAINS, EXAMPLES, PROBE, SUBSET = 2, 24, np.array([5, 0, 11]), np.arange(10)
STD, HEAD_STD = 0.4, 0.9


def traces_of(folder: Path, likelihood: LikelihoodName = "categorical") -> Traces:
    """Three probe examples and ten of the training set, chains that differ in every tensor."""
    examples = generate("train", size=EXAMPLES)
    if likelihood == "gaussian":
        labels = np.array([len(text) / 20 for text in examples.texts[0]], dtype=np.float32)
        examples = Examples(examples.texts, labels, examples.ids)
    outputs = 1 if likelihood == "gaussian" else 2
    model = build_huggingface_lora_model(
        str(folder), outputs, rank=3, alpha=5.0, chains=CHAINS, dtype="float64"
    )
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.chain_parameters().values():
            p.normal_(0, 0.3, generator=rng)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, probe, subset = (
        TokenisedSet(part, tokenizer, 64)
        for part in (examples, examples.take(PROBE), examples.take(SUBSET))
    )
    objective = Objective(model, train, likelihood)
    return Traces(objective, prior_groups(model, STD, HEAD_STD), probe, subset, seed=3)


@pytest.fixture
def traces(tiny_models: dict[str, Path]) -> Traces:
    return traces_of(tiny_models["bert"])


def dense(layer: ChainLora) -> Tensor:
    """ΔW of every chain (M, D_out, D_in), from the layer's own outputs."""
    eye = torch.eye(layer.base.in_features, dtype=torch.float64)
    inputs = eye.repeat(CHAINS, 1)
    with torch.no_grad():
        return (layer(inputs) - layer.base(inputs)).unflatten(0, (CHAINS, -1)).mT


def test_delta_w_norm_is_that_of_the_dense_matrix(traces: Traces):
    layers = traces.objective.model.lora_layers()
    row = traces.measure()
    assert len(layers) == 4
    for name, layer in layers.items():
        expected = dense(layer).flatten(1).norm(dim=1)
        torch.testing.assert_close(delta_w_norm(layer).detach(), expected)
        np.testing.assert_allclose(row[f"delta_w_norm[{name}]"], expected, rtol=1e-10)


def test_delta_w_norm_at_the_start_is_zero(tiny_models: dict[str, Path]):
    model = build_huggingface_lora_model(str(tiny_models["bert"]), 2, rank=3, chains=CHAINS)
    for layer in model.lora_layers().values():
        assert delta_w_norm(layer).tolist() == [0.0, 0.0]


def test_projections_are_those_of_the_dense_matrices(traces: Traces):
    """Σ_l u_lᵀ ΔW_l v_l with unit vectors of the layer's own."""
    row = traces.measure()
    expected = torch.zeros(CHAINS, PROJECTIONS, dtype=torch.float64)
    for name, layer in traces.objective.model.lora_layers().items():
        left, right = (v.double() for v in traces.directions[name])
        torch.testing.assert_close(left.norm(dim=1), torch.ones(PROJECTIONS).double())
        torch.testing.assert_close(right.norm(dim=1), torch.ones(PROJECTIONS).double())
        expected += torch.einsum("jo,moi,ji->mj", left, dense(layer), right)
    for j in range(PROJECTIONS):
        np.testing.assert_allclose(row[f"delta_w_projection[{j}]"], expected[:, j], rtol=1e-9)


def test_raw_figures_are_the_norm_and_fixed_coordinates(traces: Traces):
    """Found again by moving one parameter of one chain at a time."""
    row, state = traces.measure(), traces.objective.model.chain_parameters()
    assert [name for name in row if name.startswith(RAW)] == [
        "raw[norm]",
        *(f"raw[{j}]" for j in range(COORDINATES)),
    ]
    flat = torch.cat([p.detach().flatten(1) for p in state.values()], dim=1)
    np.testing.assert_allclose(row["raw[norm]"], flat.norm(dim=1), rtol=1e-12)
    assert len(set(traces.coordinates)) == COORDINATES
    for j, (name, i) in enumerate(traces.coordinates):
        before = traces.measure()
        with torch.no_grad():
            state[name][1].view(-1)[i] += 0.5
        after = traces.measure()
        moved = {n for n in after if n.startswith(RAW) and (after[n] != before[n]).any()}
        assert moved == {"raw[norm]", f"raw[{j}]"}
        assert (after[f"raw[{j}]"] - before[f"raw[{j}]"]).tolist() == pytest.approx([0, 0.5])


def test_coordinates_are_drawn_from_all_tensors():
    """In proportion to their sizes, each place of each within it."""
    state = {"a": torch.zeros(2, 3, 5), "b": torch.zeros(2, 1), "c": torch.zeros(2, 24)}
    drawn = [pair for seed in range(300) for pair in traces_module._coordinates(state, seed)]
    counts = {name: sum(pair[0] == name for pair in drawn) / len(drawn) for name in state}
    assert counts == pytest.approx({"a": 15 / 40, "b": 1 / 40, "c": 24 / 40}, abs=0.05)
    assert {i for name, i in drawn if name == "a"} == set(range(15))
    assert {i for name, i in drawn if name == "b"} == {0}
    assert traces_module._coordinates({"b": torch.zeros(2, 1)}, 0) == [("b", 0)]


def test_projections_are_fixed_by_their_seed(traces: Traces, tiny_models: dict[str, Path]):
    again = traces_of(tiny_models["bert"])
    state = torch.random.get_rng_state()
    for name, (left, right) in traces.directions.items():
        assert torch.equal(left, again.directions[name][0])
        assert torch.equal(right, again.directions[name][1])
    assert traces.coordinates == again.coordinates
    traces.measure()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_likelihood_and_delta_w_do_not_depend_on_the_gauge(traces: Traces):
    """(BG, G⁻¹A) is the same function: all stays but the prior's part of the log-posterior and
    the parameters themselves, which are recorded for display alone.
    """
    before = traces.measure()
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in traces.objective.model.lora_layers().values():
            g = torch.randn(CHAINS, 3, 3, generator=rng, dtype=torch.float64)
            g += 3 * torch.eye(3, dtype=torch.float64)
            layer.lora_B.copy_(layer.lora_B @ g)
            layer.lora_A.copy_(torch.linalg.solve(g, layer.lora_A))
    after = traces.measure()
    assert before.keys() == after.keys()
    for name in before:
        if name != "log_posterior" and not name.startswith(RAW):
            np.testing.assert_allclose(after[name], before[name], rtol=1e-9, err_msg=name)
    for name in ("log_posterior", "raw[norm]"):
        assert (np.abs(after[name] - before[name]) > 1e-3).all()


def test_classification_by_hand(traces: Traces):
    """Log-probabilities of the probe's labels; −U with N of the whole training set."""
    row, objective = traces.measure(), traces.objective
    state = objective.model.chain_parameters()
    for m in range(CHAINS):
        logprobs = []
        for i in range(EXAMPLES):
            with torch.no_grad():
                logits = objective.model(**objective.data.batch(np.array([i])).inputs)[m, 0]
            label = objective.data.labels[i]
            logprobs.append(torch.distributions.Categorical(logits=logits).log_prob(label).item())
        found = [row[f"probe_logprob[{i}]"][m] for i in range(len(PROBE))]
        assert found == pytest.approx([logprobs[i] for i in PROBE], abs=1e-9)
        prior = sum(
            p[m].square().sum().item() / (2 * (HEAD_STD if "classifier" in n else STD) ** 2)
            for n, p in state.items()
        )
        expected = EXAMPLES * float(np.mean([logprobs[i] for i in SUBSET])) - prior
        assert row["log_posterior"][m] == pytest.approx(expected, abs=1e-8)


def test_regression_by_hand(tiny_models: dict[str, Path]):
    traces = traces_of(tiny_models["bert"], "gaussian")
    objective = traces.objective
    objective.log_noise = torch.tensor([0.3, -0.2])
    row = traces.measure()
    every = [objective.data.batch(np.array([i])) for i in range(EXAMPLES)]
    with torch.no_grad():
        means = torch.cat([objective.model(**batch.inputs)[..., 0] for batch in every], dim=1)
    for i, example in enumerate(PROBE):
        np.testing.assert_allclose(row[f"probe_mean[{i}]"], means[:, example], atol=1e-9)
    law = torch.distributions.Normal(means, objective.log_noise[:, None].double().exp())
    mean_logprob = law.log_prob(objective.data.labels)[:, SUBSET].mean(1)
    state = objective.model.chain_parameters()
    prior = sum(
        p.detach().flatten(1).square().sum(1) / (2 * (HEAD_STD if "classifier" in n else STD) ** 2)
        for n, p in state.items()
    )
    np.testing.assert_allclose(row["log_posterior"], EXAMPLES * mean_logprob - prior, rtol=1e-6)
    assert not any("logprob" in name for name in row)


def test_rows_become_arrays(traces: Traces):
    assert traces.arrays() == {}
    first = traces.record()
    with torch.no_grad():
        for p in traces.objective.model.chain_parameters().values():
            p.mul_(0.5)
    second = traces.record()
    arrays = traces.arrays()
    assert arrays.keys() == first.keys()
    for name, column in arrays.items():
        assert column.shape == (CHAINS, 2)
        assert column.dtype == np.float64
        np.testing.assert_array_equal(column[:, 0], first[name])
        np.testing.assert_array_equal(column[:, 1], second[name])
        assert (column[:, 0] != column[:, 1]).all()
    taken = traces.take()
    assert all(np.array_equal(taken[name], arrays[name]) for name in arrays)
    assert traces.arrays() == {}
