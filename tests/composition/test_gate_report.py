"""A gate's figures against sums written out.

Shapes: K members, N examples, E experts, T tasks, C classes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef

from bayesian_lora.composition.gate_report import (
    abstention,
    entropy,
    evaluate_gate,
    gate_of_tasks,
    mixture_information,
    table,
    within_tasks,
)
from bayesian_lora.composition.gated_model import gated_model
from bayesian_lora.composition.stack import Part, Stack
from bayesian_lora.data.joined import JoinedSet
from bayesian_lora.errors import InputError
from tests.composition.stacks import make_sets, make_stack
from tests.composition.test_gated_model import decided


def three_experts(base: Path, members: int) -> Stack:
    stack = make_stack(base, {"long": 2, "third": 2}, members=members)
    parts = (
        Part("first", "", (0, 1), task="long"),
        Part("second", "", (1, 2), task="long"),
        Part("other", "", (2, 4), task="third"),
    )
    return stack.changed(parts=parts, weights=np.array([0.25, 0.75])[:members])


def test_figures_are_those_of_the_definitions(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack, sets = three_experts(base, 2), make_sets(base)
    model = decided(gated_model(stack, "token", top_k=2), 0.5)
    figures = evaluate_gate(model, stack.weights, sets, {"long": ("accuracy", "mcc")})
    json.dumps(figures, allow_nan=False)
    found = {task: model.outputs(own) for task, own in sets.items()}
    rights, losses, gates = [], [], []
    for t, (task, part) in enumerate(model.slices.items()):
        own, labels = figures["tasks"][task], sets[task].examples.labels
        p = np.einsum("k,knc->nc", stack.weights, np.exp(found[task].joint.astype(float)))
        gate = np.stack([p[:, s].sum(1) for s in model.slices.values()], 1)
        at = np.arange(len(labels)), labels + part.start
        guessed = p.argmax(1)
        assert own["gate_accuracy"] == pytest.approx((gate.argmax(1) == t).mean())
        assert own["gate_nll"] == pytest.approx(-np.log(gate[:, t]).mean(), rel=1e-5)
        assert own["joint_accuracy"] == pytest.approx((guessed == at[1]).mean())
        assert own["joint_nll"] == pytest.approx(-np.log(p[at]).mean(), rel=1e-5)
        within = [
            np.exp(j[:, part]) / np.exp(j[:, part]).sum(1, keepdims=True) for j in found[task].joint
        ]
        given = np.tensordot(stack.weights, np.stack(within), axes=1)
        assert own["given_task"]["accuracy"] == pytest.approx((given.argmax(1) == labels).mean())
        nll = -np.log(given[np.arange(len(labels)), labels]).mean()
        assert own["given_task"]["nll"] == pytest.approx(nll, rel=1e-5)
        for i, name in enumerate(["first", "second", "other"]):
            used = found[task].used[..., i]
            assert own["load"][name]["weight"] == pytest.approx(
                stack.weights @ used.mean(1), rel=1e-4
            )
        if task == "long":
            wrong = (guessed < part.start) | (guessed >= part.stop)
            read = np.where(wrong, 1 - labels, guessed - part.start)
            assert own["joint_mcc"] == pytest.approx(matthews_corrcoef(labels, read))
        rights.append(guessed == at[1])
        losses.append(-np.log(p[at]))
        gates.append(entropy(gate))
    mixture = figures["mixture"]
    assert mixture["accuracy"] == pytest.approx(np.concatenate(rights).mean())
    assert mixture["nll"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
    each = figures["mean_over_tasks"]
    assert each["accuracy"] == pytest.approx(np.mean([right.mean() for right in rights]))
    assert each["nll"] == pytest.approx(np.mean([loss.mean() for loss in losses]), rel=1e-5)
    assert figures["gate"]["task_entropy"] == pytest.approx(np.concatenate(gates).mean(), rel=1e-4)
    assert figures["uncertainty"]["mutual_information"] > 1e-4
    lines = "\n".join(table(figures))
    assert all(word in lines for word in ("long", "third", "mixture", "mean of", "other", "risk–"))


def test_information_over_all_tasks_is_the_gate_s_entropy_and_what_is_within(
    tiny_models: dict[str, Path],
) -> None:
    """Against H(Σ g_i p_i) − Σ g_i H(p_i) in the space of all tasks' classes, written out."""
    base = tiny_models["bert"]
    stack, sets = three_experts(base, 2), make_sets(base)
    model = decided(gated_model(stack, "sequence"), 0.5)
    figures = evaluate_gate(model, stack.weights, sets)
    data = JoinedSet(sets, model.slices)
    found = model.outputs(data)
    classes = found.joint.shape[-1]
    laws = np.zeros((2, len(data), 3, classes))
    for i, task in enumerate(["long", "long", "third"]):
        part = model.slices[task]
        if task == "third":  # alone in its task: what the mixture says given the task
            own = np.exp(found.joint[..., part])
        else:
            with model.expert(i):
                own = np.exp(model.outputs(data).joint[..., part])
        laws[..., i, part] = own / own.sum(-1, keepdims=True)
    information = mixture_information(found.full.astype(float), laws)
    wanted = (stack.weights @ information).mean()
    assert figures["experts"]["mutual_information"] == pytest.approx(wanted, rel=1e-4)
    alone = gate_of_tasks(found.joint, model.slices)
    assert wanted > (stack.weights @ entropy(alone)).mean() + 1e-3, "experts of one task differ"
    inner = within_tasks(model, data)
    assert list(inner) == [0]
    assert figures["tasks"]["long"]["experts_mutual_information"] == pytest.approx(
        (stack.weights @ inner[0])[data.task_of == 0].mean()
    )


def test_one_member_has_no_information_and_says_why(tiny_models: dict[str, Path]) -> None:
    stack, sets = make_stack(tiny_models["bert"]), make_sets(tiny_models["bert"])
    figures = evaluate_gate(gated_model(stack, "arrow"), stack.weights, sets)
    assert figures["gate"]["task_mutual_information"] is None
    assert "one member alone" in figures["gate"]["task_mutual_information_reason"]
    assert figures["uncertainty"]["mutual_information"] is None
    assert "experts_mutual_information" not in figures["tasks"]["long"]
    assert "mutual information" not in "\n".join(table(figures))
    with pytest.raises(InputError, match=r"'third'.* give its set"):
        evaluate_gate(gated_model(stack, "arrow"), stack.weights, {"long": sets["long"]})


def test_several_experts_of_one_task_are_an_ordinary_mixture(
    tiny_models: dict[str, Path],
) -> None:
    base = tiny_models["bert"]
    stack = make_stack(base, {"long": 2}, labels={"long": 2})
    parts = (Part("a", "", (0, 1), task="long"), Part("b", "", (1, 2), task="long"))
    model = decided(gated_model(stack.changed(parts=parts), "token"), 0.5)
    sets = make_sets(base, {"long": 2})
    figures = evaluate_gate(model, stack.weights, sets)
    own = figures["tasks"]["long"]
    assert own["gate_accuracy"] == 1
    assert own["joint_nll"] == pytest.approx(own["given_task"]["nll"], rel=1e-5)
    assert figures["gate"]["task_entropy"] == pytest.approx(0, abs=1e-9)
    assert figures["gate"]["expert_entropy"] > 0.1
    assert figures["experts"]["mutual_information"] == own["experts_mutual_information"] > 0


def test_information_of_mixtures_by_hand() -> None:
    shares = np.array([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    sure, other, even = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    probs = np.array([[sure, other], [even, even], [sure, other]])
    np.testing.assert_allclose(mixture_information(shares, probs), [np.log(2), 0, 0], atol=1e-12)


def test_abstention_by_hand() -> None:
    doubt = np.array([0.4, 0.1, 0.3, 0.2])
    right = np.array([False, True, False, True])
    found = abstention(doubt, right)
    # Answered in the order 0.1, 0.2, 0.3, 0.4: right, right, wrong, wrong.
    assert found["area"] == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)
    curve = dict(zip(found["coverage"], found["accuracy"], strict=True))
    assert curve[0.5] == 1.0
    assert curve[0.8] == pytest.approx(2 / 3)
    assert curve[1.0] == 0.5
    for order in ([0, 1, 2, 3], [3, 1, 2, 0]):
        equal = abstention(np.zeros(4), right[order])
        assert equal["area"] == pytest.approx(0.5), "doubt that says nothing gives the error rate"


def test_entropy_of_the_weights_is_no_more_than_that_of_their_mean(
    tiny_models: dict[str, Path],
) -> None:
    base = tiny_models["bert"]
    stack, sets = make_stack(base, members=2), make_sets(base)
    token = evaluate_gate(decided(gated_model(stack, "token"), 2.0), stack.weights, sets)["gate"]
    assert token["entropy_of_mean_weights"] == token["expert_entropy"]
    assert 0 < token["gate_entropy"] < token["expert_entropy"] - 0.01
    one = evaluate_gate(decided(gated_model(stack, "adapter"), 0.5), stack.weights, sets)["gate"]
    assert one["gate_entropy"] == pytest.approx(one["expert_entropy"], rel=1e-4)
    assert one["gate_entropy"] > 0.1


def test_experts_whose_weights_underflow_share_alike(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    stack = make_stack(base, {"long": 2, "third": 1})
    parts = (
        Part("a", "", (0, 1), task="long"),
        Part("b", "", (1, 2), task="long"),
        Part("c", "", (2, 3), task="third"),
    )
    model = gated_model(stack.changed(parts=parts), "adapter")
    state = model.chain_parameters()
    with torch.no_grad():
        state["gate.weight.0"].copy_(torch.tensor([[-300.0, -300.0, 300.0]]))
    sets = make_sets(base)
    found = within_tasks(model, JoinedSet(sets, model.slices))[0]
    assert np.isfinite(found).all()
    assert found.max() > 0


def test_the_oracle_s_area_is_the_least_there_is() -> None:
    right = np.array([1, 0, 1, 0, 1], dtype=bool)
    best = abstention(np.where(right, 0.0, 1.0) + np.arange(5) / 100, right)
    assert best["area_of_oracle"] == pytest.approx((1 / 4 + 2 / 5) / 5)
    assert best["area"] == pytest.approx(best["area_of_oracle"])
    worst = abstention(np.where(right, 1.0, 0.0), right)
    assert worst["area"] > worst["area_of_oracle"] == best["area_of_oracle"]
