"""Gates' weights in one layer: softmax, temperature, top-k, directions, places of rows.

Shapes: M chains, E experts, S sequences, L tokens, R rank, D widths.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bayesian_lora.models.chain_lora import ChainLora
from bayesian_lora.models.flat import CURRENT, Flat
from bayesian_lora.models.mixing import Gate, GateKind, LayerMix, Run

CPU = torch.device("cpu")
COLUMNS = [0, 1, 1, 2]


def make_gate(kind: GateKind, **options: object) -> Gate:
    gate = Gate(kind, 2, COLUMNS, [6, 6], 5, **options)  # type: ignore[arg-type]
    gate.double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(generator=draw)
    return gate


def make_layer() -> ChainLora:
    layer = ChainLora(nn.Linear(6, 4).double(), 2, 4, 0.5, 0.0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.normal_(generator=draw)
    return layer


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_weights_are_a_softmax_at_the_temperature(tau: float) -> None:
    gate = make_gate("adapter", temperature=tau)
    run = Run(torch.ones(4, 3, dtype=torch.bool), None)
    with gate.running(run):
        weights = gate.mix(0, normal(12, 6), [6, 6], False)
    wanted = torch.exp(gate.weight[0] / tau)
    wanted = wanted / wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, wanted.repeat_interleave(6, 0))


def test_top_k_keeps_the_largest_and_makes_them_sum_to_one() -> None:
    x = normal(12, 6)
    gates = [make_gate("token"), make_gate("token", top_k=2), make_gate("token", top_k=1)]
    found = []
    for gate in gates:
        with gate.running(Run(torch.ones(4, 3, dtype=torch.bool), None)) as run:
            found.append(gate.mix(1, x, [6, 6], False))
        torch.testing.assert_close(run.full[0], found[0].view(4, 3, 3).mean(1))
        torch.testing.assert_close(run.used[0], found[-1].view(4, 3, 3).mean(1))
    full, two, one = found
    least = full.argmin(-1)
    for row in range(12):
        kept = [i for i in range(3) if i != int(least[row])]
        torch.testing.assert_close(two[row, kept], full[row, kept] / full[row, kept].sum())
        assert two[row, least[row]] == 0
        assert one[row].tolist() == np.eye(3)[int(full[row].argmax())].tolist()


def test_arrows_are_first_right_singular_vectors_whatever_the_scale() -> None:
    layer, gate = make_layer(), make_gate("arrow")
    with torch.no_grad():
        layer.lora_B[1, :, 3] = 0
    gate.take_directions({"layer": layer})
    (found,) = gate.prototypes
    for m in range(2):
        for expert in range(3):
            own = [i for i, e in enumerate(COLUMNS) if e == expert]
            update = (layer.lora_B[m][:, own] @ layer.lora_A[m][own]).detach()
            if update.abs().max() == 0:
                assert found[m, expert].abs().max() == 0, "an expert that does nothing"
                continue
            wanted = torch.linalg.svd(update).Vh[0]
            assert abs(float(found[m, expert] @ wanted)) == pytest.approx(1, abs=1e-12)
    x = normal(8, 6)
    with gate.running(Run(torch.ones(8, 1, dtype=torch.bool), None)):
        weights = gate.mix(0, x, [4, 4], False)
    scores = torch.cat([(x[:4] @ found[0].T), (x[4:] @ found[1].T)]).abs()
    torch.testing.assert_close(weights, scores.softmax(-1))


def test_equal_weights_are_the_plain_update_shared_out() -> None:
    layer, gate = make_layer(), make_gate("adapter")
    with torch.no_grad():
        gate.weight[0].zero_()
    x = normal(2, 5, 6)
    plain, base = layer(x), layer.base(x)
    layer.mix = LayerMix(gate, layer, 0, False)
    with gate.running(Run(torch.ones(2, 5, dtype=torch.bool), None)):
        mixed = layer(x)
    torch.testing.assert_close(mixed - base, (plain - base) / 3)


def test_a_mixture_is_the_sum_of_weighted_updates() -> None:
    layer, gate = make_layer(), make_gate("token")
    layer.mix = LayerMix(gate, layer, 1, False)
    x = normal(2, 5, 6)
    with gate.running(Run(torch.ones(2, 5, dtype=torch.bool), None)):
        found = layer(x)
    for m in range(2):
        weights = (x[m] @ gate.weight[1][m].T + gate.bias[1][m]).softmax(-1)
        wanted = layer.base(x[m])
        for expert in range(3):
            own = [i for i, e in enumerate(COLUMNS) if e == expert]
            update = 0.5 * layer.lora_B[m][:, own] @ layer.lora_A[m][own]
            wanted = wanted + weights[:, expert, None] * (x[m] @ update.T)
        torch.testing.assert_close(found[m], wanted)


def test_rows_belong_to_their_sequences_in_every_layout() -> None:
    lengths = np.array([[3, 1], [2, 4]])
    mask = torch.arange(4) < torch.from_numpy(lengths).reshape(-1, 1)
    run = Run(mask, None)
    index, share = run.places(16, False)
    assert index.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert share.view(4, 4)[0].tolist() == pytest.approx([1 / 3] * 3 + [0])
    assert share.view(4, 4).sum(1).tolist() == pytest.approx([1] * 4)
    assert run.places(16, True)[1].view(4, 4).tolist() == [[1, 0, 0, 0]] * 4
    assert run.places(4, False)[0].tolist() == [0, 1, 2, 3]
    token = CURRENT.set(Flat(lengths, CPU))
    try:
        index, share = Run(mask, None).places(10, False)
    finally:
        CURRENT.reset(token)
    assert index.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3]
    assert share[:, 0].tolist() == pytest.approx([1 / 3] * 3 + [1] + [1 / 2] * 2 + [1 / 4] * 4)


def test_starts_are_nearly_equal_and_each_chain_s_own() -> None:
    gate = Gate("sequence", 2, COLUMNS, [6], 500)
    gate.initialise([torch.Generator().manual_seed(s) for s in (3, 4)])
    assert 0.018 < float(gate.weight[0].detach().std()) < 0.022
    other = Gate("sequence", 1, COLUMNS, [6], 500)
    other.initialise([torch.Generator().manual_seed(4)])
    assert torch.equal(gate.weight[0][1], other.weight[0][0])
    assert (gate.bias[0] == 0).all()


def test_a_gate_outside_a_pass_says_so() -> None:
    with pytest.raises(AssertionError, match="run as a whole"):
        make_gate("token").mix(0, normal(2, 6), [1, 1], False)


@pytest.mark.parametrize("top_k", [None, 1])
def test_entropies_are_of_the_softmax_row_by_row(top_k: int | None) -> None:
    """Tokens sent surely, half to each expert: sure weights whose mean is not."""
    gate = Gate("token", 1, [0, 1], [2], 4, top_k=top_k)
    with torch.no_grad():
        gate.weight[0].copy_(torch.tensor([[[200.0, 0.0], [0.0, 200.0]]]))
    mask = torch.tensor([[True, True], [True, False]])
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    run = Run(mask, None, entropies=[])
    with gate.running(run):
        gate.mix(0, x, [4], False)
    assert run.entropies is not None
    torch.testing.assert_close(run.full[0], torch.full((2, 2), 0.5))
    wanted = torch.tensor([[0.0], [math.log(2)]])
    torch.testing.assert_close(run.entropies[0], wanted, rtol=0, atol=1e-6)


def test_shares_have_the_weights_precision() -> None:
    """Devices without float64 can then mix."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        gate = Gate("token", 1, [0, 1], [2], 4).to(dtype)
        run = Run(mask, None)
        with gate.running(run):
            gate.mix(0, torch.ones(6, 2, dtype=dtype), [6], False)
        assert [share.dtype for _, share in run._places.values()] == [dtype]
