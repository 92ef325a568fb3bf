"""Closures and values of the mean negative log-likelihood, on a real small encoder in float64.

Shapes: M chains, B examples of a chain's batch, N examples.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bayesian_lora.data.batching import TokenisedSet
from bayesian_lora.data.examples import Examples
from bayesian_lora.data.synthetic import generate
from bayesian_lora.models.chain_lora import ChainModel
from bayesian_lora.models.hf_lora import HuggingFaceLora, build_huggingface_lora_model
from bayesian_lora.objective import Objective, prior_groups
from bayesian_lora.samplers import SGLD
from bayesian_lora.samplers.failures import Diverged

CHAINS, EXAMPLES = 2, 20
ROWS = np.random.default_rng(0).integers(EXAMPLES, size=(CHAINS, 7))


def build(folder: Path, labels: int) -> HuggingFaceLora:
    """M chains that differ in every tensor (LoRA's B starts at 0, which would hide A's part)."""
    options: dict[str, Any] = {"rank": 2, "chains": CHAINS, "dtype": "float64"}
    model = build_huggingface_lora_model(str(folder), labels, **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.chain_parameters().values():
            p.normal_(0, 0.3, generator=rng)
    return model


@pytest.fixture
def classifier(tiny_models: dict[str, Path]) -> Objective:
    folder = tiny_models["bert"]
    data = TokenisedSet(generate("train", size=EXAMPLES), AutoTokenizer.from_pretrained(folder), 64)
    return Objective(build(folder, 2), data, "categorical")


@pytest.fixture
def regressor(tiny_models: dict[str, Path]) -> Objective:
    folder = tiny_models["bert"]
    texts = generate("train", size=EXAMPLES).texts
    labels = np.array([len(text) / 20 for text in texts[0]], dtype=np.float32)
    examples = Examples(texts, labels, np.arange(EXAMPLES))
    data = TokenisedSet(examples, AutoTokenizer.from_pretrained(folder), 64)
    objective = Objective(build(folder, 1), data, "gaussian")
    assert objective.log_noise is not None
    objective.log_noise = torch.tensor([-0.5, 0.8], dtype=torch.float64, requires_grad=True)
    return objective


def outputs_one_by_one(objective: Objective, rows: np.ndarray, m: int) -> Tensor:
    """Chain m's outputs (B, C), every example in a forward pass of its own, without padding."""
    outputs = []
    for row in rows:
        batch = objective.data.batch(np.array([row]))
        outputs.append(objective.model(**batch.inputs)[m, 0])
    return torch.stack(outputs)


def direct_mean_nll(objective: Objective, rows: np.ndarray) -> Tensor:
    """Mean NLL (M,) from torch.distributions, chain after chain."""
    values = []
    for m in range(CHAINS):
        outputs, labels = outputs_one_by_one(objective, rows[m], m), objective.data.labels[rows[m]]
        if objective.log_noise is None:
            law: Any = torch.distributions.Categorical(logits=outputs)
        else:
            law = torch.distributions.Normal(outputs[:, 0], objective.log_noise[m].exp())
        values.append(-law.log_prob(labels).mean())
    return torch.stack(values)


def tensors(objective: Objective) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(objective.model.chain_parameters())
    if objective.log_noise is not None:
        found["log_noise"] = objective.log_noise
    return found


@pytest.mark.parametrize("micro_batch", [1, 3, 7, 100, None])
@pytest.mark.parametrize("task", ["classifier", "regressor"])
def test_closure_is_the_mean_nll_and_its_gradient(
    task: str, micro_batch: int | None, request: pytest.FixtureRequest
):
    """Of each chain's own batch, however the batch is cut; the gradient has no factor of M or B."""
    objective: Objective = request.getfixturevalue(task)
    objective.micro_batch = micro_batch
    of = tensors(objective)
    expected = direct_mean_nll(objective, ROWS)
    gradients = torch.autograd.grad(expected.sum(), list(of.values()))
    loss = objective.closure(ROWS)()
    assert loss.shape == (CHAINS,)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-10)
    for (name, tensor), gradient in zip(of.items(), gradients, strict=True):
        assert tensor.grad is not None, name
        assert bool((gradient != 0).any()), name
        torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("task", ["classifier", "regressor"])
def test_closure_zeroes_gradients_first(task: str, request: pytest.FixtureRequest):
    objective: Objective = request.getfixturevalue(task)
    objective.closure(ROWS)()
    once = {n: p.grad.clone() for n, p in tensors(objective).items() if p.grad is not None}
    objective.closure(ROWS)()
    assert objective.evaluations == 2
    for name, p in tensors(objective).items():
        assert p.grad is not None
        assert torch.equal(p.grad, once[name])


def test_the_base_stays_frozen(classifier: Objective):
    trained = classifier.model.chain_parameters()
    classifier.closure(ROWS)()
    frozen = {n: p for n, p in classifier.model.base.named_parameters() if n not in trained}
    assert len(frozen) > 10
    assert all(p.grad is None and not p.requires_grad for p in frozen.values())


@pytest.mark.parametrize("micro_batch", [2, None])
def test_accuracy_of_the_batch(classifier: Objective, micro_batch: int | None):
    classifier.micro_batch = micro_batch
    classifier.closure(ROWS)()
    expected = []
    for m in range(CHAINS):
        chosen = outputs_one_by_one(classifier, ROWS[m], m).argmax(1)
        expected.append((chosen == classifier.data.labels[ROWS[m]]).double().mean().item())
    assert classifier.accuracy is not None
    assert classifier.accuracy.tolist() == pytest.approx(expected)


def test_regression_has_no_accuracy(regressor: Objective):
    regressor.closure(ROWS)()
    assert regressor.accuracy is None
    assert regressor.score(regressor.data)[1] is None


@pytest.mark.parametrize("task", ["classifier", "regressor"])
def test_mean_nll_of_a_set(task: str, request: pytest.FixtureRequest):
    objective: Objective = request.getfixturevalue(task)
    every = np.broadcast_to(np.arange(EXAMPLES), (CHAINS, EXAMPLES)).copy()
    expected = direct_mean_nll(objective, every).detach()
    found = objective.mean_nll(objective.data)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_score_counts_right_answers(classifier: Objective):
    accuracy = classifier.score(classifier.data)[1]
    rows = np.arange(EXAMPLES)
    assert accuracy is not None
    for m in range(CHAINS):
        right = outputs_one_by_one(classifier, rows, m).argmax(1) == classifier.data.labels
        assert accuracy[m].item() == pytest.approx(right.double().mean().item())


def test_a_loss_that_is_not_finite_names_the_chains_and_moves_nothing(classifier: Objective):
    head = classifier.model.chain_parameters()["classifier.bias"]
    with torch.no_grad():
        head[1] = float("nan")
    before = {n: p.detach().clone() for n, p in classifier.model.chain_parameters().items()}
    sampler = SGLD(
        classifier.model.chain_parameters().values(),
        step_size=0.1,
        num_examples=EXAMPLES,
        chain_dim=0,
    )
    with pytest.raises(Diverged, match="chain 1: the loss is not finite") as caught:
        sampler.step(classifier.closure(ROWS))
    assert caught.value.chains == [1]
    for name, p in classifier.model.chain_parameters().items():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0, equal_nan=True)


def test_gaussian_noise_starts_at_the_labels_spread(regressor: Objective):
    fresh = Objective(regressor.model, regressor.data, "gaussian")
    spread = float(np.std(regressor.data.examples.labels, ddof=1))
    assert fresh.noise_std is not None
    assert fresh.noise_std.tolist() == pytest.approx([spread] * CHAINS, rel=1e-6)


def test_prior_groups_part_factors_from_head(classifier: Objective):
    factors, head = prior_groups(classifier.model, 0.1, 0.5)
    names = {id(p): name for name, p in classifier.model.chain_parameters().items()}
    assert {names[id(t)] for t in head.tensors} == {"classifier.weight", "classifier.bias"}
    assert all(names[id(t)].endswith(("lora_A", "lora_B")) for t in factors.tensors)
    assert len(factors.tensors) + len(head.tensors) == len(names)
    assert (factors.std, head.std) == (0.1, 0.5)
    assert [g.std for g in prior_groups(classifier.model, 0.1, None)] == [0.1, 0.1]


def test_passes_are_as_large_as_runs_fast(classifier: Objective, monkeypatch: pytest.MonkeyPatch):
    """By tokens of all chains; under dropout and where batches are padded, by a fixed number."""
    sizes: list[int] = []
    whole = classifier.data.micro_batches

    def spy(rows: np.ndarray, size: int | None, device: Any) -> Any:
        sizes.append(size or rows.shape[1])
        return whole(rows, size, device)

    monkeypatch.setattr(classifier.data, "micro_batches", spy)
    rows = np.tile(np.arange(EXAMPLES), (CHAINS, 1))
    tokens = int(classifier.data.lengths[rows].sum())
    for budget, expected in ((tokens, 20), (tokens - 1, 10), (tokens // 4, 4), (1, 1)):
        monkeypatch.setattr(ChainModel, "tokens_per_pass", budget)
        classifier.closure(rows)()
        assert sizes[-1] == expected
    classifier.micro_batch = 3
    classifier.closure(rows)()
    assert sizes[-1] == 3
    classifier.micro_batch = None
    classifier.model.flat = False
    classifier.closure(rows)()
    assert sizes[-1] == 8
    classifier.model.flat = True
    classifier.model.lora_dropout([torch.Generator() for _ in range(CHAINS)])
    classifier.closure(rows)()
    assert sizes[-1] == 8
