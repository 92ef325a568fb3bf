"""A gated model against dense matrices written out, in all kinds, families and batch layouts.

Shapes: M chains, B examples, L tokens, E experts, C classes.
"""

import copy
import dataclasses
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bayesian_lora.composition.gated_model import GatedModel, gated_model
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_model import build_stack_model
from bayesian_lora.errors import InputError
from bayesian_lora.metrics import ensemble_log_probs
from bayesian_lora.models.mixing import GateKind
from bayesian_lora.predict import member_logits, predict_logits
from tests.composition.gate_reference import written_out
from tests.composition.stacks import make_sets, make_stack

FAMILIES = ("bert", "roberta", "distilbert")
KINDS: tuple[GateKind, ...] = get_args(GateKind)
RANKS = {"long": 1, "third": 3}
LENGTHS = [[9, 2, 17], [3, 12, 4]]


def double(stack: Stack) -> Stack:
    return stack.changed(model={**stack.model, "dtype": "float64"})


def batch(path: Path, lengths: list[list[int]] = LENGTHS) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    own = torch.tensor(lengths)
    mask = (torch.arange(int(own.max())) < own[..., None]).long()
    ids = torch.randint(5, 190, mask.shape, generator=draw)
    pad = 1 if path.name == "roberta" else 0
    return {"input_ids": ids * mask + pad * (1 - mask), "attention_mask": mask}


def decided(model: GatedModel, std: float = 1.0) -> GatedModel:
    """With a gate that is far from equal shares."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.chain_parameters().items():
            if name.startswith("gate."):
                parameter.normal_(0, std, generator=draw)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_joint_probabilities_are_those_of_dense_matrices(
    tiny_models: dict[str, Path], family: str, kind: GateKind, top_k: int | None
) -> None:
    """Two members, each with its own batch; three experts, of which two are of one task."""
    base = tiny_models[family]
    stack = double(make_stack(base, RANKS, members=2))
    first, second = stack.parts
    halves = [second.columns, (second.columns[0] + 2, second.columns[1])]
    more = [
        first,
        type(second)("a", "", (halves[0][0], halves[1][0]), task="third"),
        type(second)("b", "", halves[1], task="third"),
    ]
    stack = stack.changed(parts=tuple(more))
    model = decided(gated_model(stack, kind, temperature=0.7, top_k=top_k))
    inputs = batch(base)
    wanted = [
        written_out(stack, base, model.gate, m, inputs["input_ids"][m, i, None, :length])
        for m, lengths in enumerate(LENGTHS)
        for i, length in enumerate(lengths)
    ]
    mean = torch.stack([weights for _, weights in wanted])
    assert (mean - 1 / 3).abs().max() > 0.02, "equal weights would prove little"
    for flat in (True, False):
        model.flat = flat
        model._beside = True
        with torch.no_grad():
            joint, weights, *_ = model(**inputs).flatten(0, 1).split([5, 3, 3, 1], -1)
        for own, found in zip(wanted, joint, strict=True):
            by_task = torch.cat([own[0][task] for task in model.slices])
            torch.testing.assert_close(found, by_task, rtol=0, atol=1e-10)
        torch.testing.assert_close(weights, mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(joint.exp().sum(-1), torch.ones(6).double())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_the_layout(
    tiny_models: dict[str, Path], family: str, kind: GateKind
) -> None:
    model = decided(gated_model(make_stack(tiny_models[family], RANKS, members=2), kind), 0.3)
    inputs, found = batch(tiny_models[family]), []
    for flat in (True, False):
        model.flat = flat
        model.zero_grad()
        joint = model(**inputs)
        (joint * torch.linspace(-1, 1, joint.numel()).view_as(joint)).sum().backward()
        found.append(({n: p.grad for n, p in model.chain_parameters().items()}, joint.detach()))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)
    for name, gradient in found[0][0].items():
        assert gradient is not None, name
        other = found[1][0][name]
        assert other is not None
        if name.startswith("gate.") and "bias" not in name:
            assert gradient.abs().max() > 1e-6, name
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradient, other, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_alone_is_its_adapter_alone(tiny_models: dict[str, Path], kind: GateKind) -> None:
    """Without the others' columns, through the ungated model."""
    base = tiny_models["bert"]
    stack = make_stack(base, RANKS)
    model, data = gated_model(stack, kind), make_sets(base)["third"]
    for i, (task, columns) in enumerate([("long", slice(0, 1)), ("third", slice(1, 4))]):
        factors = {
            n: torch.zeros_like(t).index_copy_(
                2, torch.arange(4)[columns], t[:, :, columns].contiguous()
            )
            if n.endswith("lora_B")
            else t
            for n, t in stack.factors.items()
        }
        alone = predict_logits(build_stack_model(stack.changed(factors=factors)), data)
        with model.expert(i):
            joint = predict_logits(model, data)
        part = model.slices[task]
        own = torch.from_numpy(alone[..., part]).log_softmax(-1)
        np.testing.assert_allclose(joint[..., part], own, atol=2e-5)
        other = np.delete(joint, np.r_[part], axis=-1)
        assert other.max() < -60, "the other task is as good as impossible"


def test_the_ungated_path_is_untouched(tiny_models: dict[str, Path]) -> None:
    """Pooled states come from the base alone, and leave no trace."""
    base = tiny_models["roberta"]
    stack = make_stack(base, RANKS, members=2)
    plain, model = build_stack_model(stack), gated_model(stack, "sequence")
    inputs = batch(base)
    shared = {name: x[0] for name, x in inputs.items()}
    before = model(**inputs).detach()
    pooled = model.pooled(**shared)
    assert pooled.shape == (1, 3, 64)  # the inputs of two layers
    torch.testing.assert_close(model.pooled(**inputs)[0], pooled[0], rtol=0, atol=1e-6)
    states = plain.base.roberta(  # type: ignore[operator,union-attr]
        input_ids=inputs["input_ids"].flatten(0, 1),
        attention_mask=inputs["attention_mask"].flatten(0, 1),
        output_hidden_states=True,
    ).hidden_states
    mask = inputs["attention_mask"][0, ..., None]
    means = [(h[:3] * mask).sum(1) / mask.sum(1) for h in states[:2]]
    embedded, adapted = (F.layer_norm(m, m.shape[-1:]) / 2**0.5 for m in means)
    torch.testing.assert_close(pooled[0, :, :32], embedded, rtol=0, atol=1e-5)
    assert (pooled[0, :, 32:] - adapted).abs().max() > 1e-3, "adapters act here"
    assert torch.equal(model(**inputs), before)
    assert model.num_chains == 2


@pytest.mark.parametrize("layers", [["0", "1"], ["1"]])
def test_what_is_pooled_does_not_depend_on_padding(
    tiny_models: dict[str, Path], layers: list[str]
) -> None:
    """Of queries alone too, whose last layer sees first tokens only when batches are flat."""
    base = tiny_models["bert"]
    stack = make_stack(base, RANKS)
    wanted = tuple(f"encoder.layer.{n}.attention.self.query" for n in layers)
    own = {n: t for n, t in stack.factors.items() if any(w in n for w in wanted)}
    spec = dataclasses.replace(stack.spec, target_modules=wanted)
    model = gated_model(stack.changed(spec=spec, factors=own), "sequence")
    inputs = {name: x[0] for name, x in batch(base).items()}
    flat = model.pooled(**inputs)
    assert flat.shape == (1, 3, 32), "the last layer's first tokens count where nothing else does"
    model.flat = False
    torch.testing.assert_close(model.pooled(**inputs), flat, rtol=0, atol=1e-5)


def test_members_predict_alone_what_they_predict_together(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    data = make_sets(base)["long"]
    for kind in KINDS:
        model = decided(gated_model(make_stack(base, RANKS, members=3), kind), 0.3)
        with torch.inference_mode():
            whole = model(**data.batch(np.arange(len(data))).inputs).numpy()
        alone = np.stack([member_logits(model, data, k) for k in range(3)])
        np.testing.assert_allclose(alone, whole, atol=2e-5)
        np.testing.assert_allclose(predict_logits(model, data), whole, atol=2e-5)
        assert np.ptp(whole, axis=0).max() > 0.01, "members differ"
        assert model.num_chains == 3
        for parameter in model.chain_parameters().values():
            assert parameter.requires_grad
            assert not parameter.is_inference()


def test_gates_are_parameters_of_their_chains(tiny_models: dict[str, Path]) -> None:
    """Drawn from (seed, chain): the second of three is the second of two."""
    base = tiny_models["bert"]
    shapes = {"adapter": 1, "layer": 1, "sequence": 2, "token": 8, "arrow": 0}
    for kind in KINDS:
        three = gated_model(make_stack(base, members=3), kind, seed=4).chain_parameters()
        two = gated_model(make_stack(base, members=2), kind, seed=4).chain_parameters()
        names = [n for n in three if n.startswith("gate.")]
        assert len(names) == shapes[kind]
        for name in names:
            assert three[name].shape[0] == 3
            assert torch.equal(three[name][:2], two[name])
            assert name.startswith("gate.bias") or three[name].std() > 0.005
        other = gated_model(make_stack(base, members=2), kind, seed=5).chain_parameters()
        drawn = [n for n in names if "weight" in n]
        assert all(not torch.equal(other[n], two[n]) for n in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(tiny_models: dict[str, Path], kind: GateKind) -> None:
    """On flat and on padded batches, gradients and all."""
    base = tiny_models["bert"]
    stack, inputs = make_stack(base, RANKS, members=2), batch(base)
    half = stack.changed(model={**stack.model, "dtype": "bfloat16"})
    wanted = decided(gated_model(stack, kind), 0.3)(**inputs).detach()
    model = decided(gated_model(half, kind), 0.3)
    for flat in (True, False):
        model.flat = flat
        joint = model(**inputs)
        assert joint.dtype == torch.float32
        assert 1e-6 < (joint.detach() - wanted).abs().max() < 0.15
        joint.sum().backward()
        for name, parameter in model.chain_parameters().items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_arrows_follow_the_factors_that_are_loaded(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    one, other = make_stack(base, RANKS, seed=0), make_stack(base, RANKS, members=2, seed=9)
    model, wanted = gated_model(one, "arrow"), gated_model(other, "arrow")
    model.load_chains({n: p.detach() for n, p in wanted.chain_parameters().items()})
    inputs = batch(base)
    torch.testing.assert_close(model(**inputs), wanted(**inputs), rtol=0, atol=1e-6)


def test_the_fingerprint_is_the_base_s_and_copies_are_whole(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["distilbert"]
    stack = make_stack(base)
    for kind in KINDS:
        model = gated_model(stack, kind)
        model._fingerprint = None
        assert model.fingerprint() == stack.model["fingerprint"]
        inputs = {n: x[:1] for n, x in batch(base).items()}
        joint = model(**inputs)
        model.take_weights()
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(**inputs), joint)
        decided(twin)
        torch.testing.assert_close(model(**inputs), joint, msg="the copy's gate is its own")


def test_outputs_hold_the_weights_beside_the_joint(tiny_models: dict[str, Path]) -> None:
    base = tiny_models["bert"]
    model = decided(gated_model(make_stack(base, RANKS, members=2), "sequence", top_k=1))
    data = make_sets(base)["long"]
    found = model.outputs(data)
    np.testing.assert_allclose(found.joint, predict_logits(model, data), atol=1e-6)
    by_task = [np.exp(found.joint[..., part]).sum(-1) for part in model.slices.values()]
    np.testing.assert_allclose(np.stack(by_task, -1), found.full, atol=1e-5)
    assert set(np.unique(found.used)) == {0.0, 1.0}
    assert (found.used.argmax(-1) == found.full.argmax(-1)).all()
    log_probs = ensemble_log_probs(found.joint, [0.5, 0.5])
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, atol=1e-5)


def test_what_cannot_be_gated_is_refused_before_anything_is_built(
    tiny_models: dict[str, Path],
) -> None:
    stack = make_stack(tiny_models["bert"], RANKS)
    first, second = stack.parts
    part = type(first)
    factors = {n: t.clone() for n, t in stack.factors.items()}
    factors[next(iter(factors))][0, 0, 0] = float("nan")
    cases = {
        "has 1": stack.changed(parts=(first,)),
        "none of the tasks": stack.changed(parts=(first, part("x", "", second.columns))),
        "task 'third' has no adapter": stack.changed(
            parts=(first, part("x", "", second.columns, task="long"))
        ),
        "no columns of its own": stack.changed(
            parts=(part("long", "", (0, 0), task="long"), second)
        ),
        "belongs to no part": stack.changed(parts=(first, part("third", "", (2, 4), task="third"))),
        "not finite": stack.changed(factors=factors),
    }
    nowhere = {**stack.model, "name": "/there/is/no/such/model"}
    for words, wrong in cases.items():
        with pytest.raises(InputError, match=words):
            gated_model(wrong.changed(model=nowhere), "token")
    for top_k in (0, 3):
        with pytest.raises(InputError, match=f"top_k={top_k}: the stack has 2 experts"):
            gated_model(stack.changed(model=nowhere), "token", top_k=top_k)


def test_a_member_is_taken_from_the_whole_gate_whatever_else_has_its_turn(
    tiny_models: dict[str, Path],
) -> None:
    """Arrow's directions are read once the other's turn is over, not while one member is in."""
    model = gated_model(make_stack(tiny_models["bert"], RANKS, members=2), "arrow")
    whole = list(model.gate.prototypes)
    entered: list[int] = []

    def other() -> None:
        with model.member(1):
            entered.append(1)

    with model.member(0):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive(), "it waits for its turn"
    thread.join(10)
    assert entered == [1]
    assert all(a is b for a, b in zip(model.gate.prototypes, whole, strict=True))
