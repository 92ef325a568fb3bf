"""SGLD: the unit of its noise, its limits, and its use in anyone's loop.

Its stationary law is in `test_stationary_laws.py`. Units: `bayesian_lora.samplers.base`.
"""

import math

import pytest
import torch
from torch import Tensor

from bayesian_lora.samplers import SGLD
from bayesian_lora.samplers.base import Closure

from .toys import SETTINGS, Hand, assert_follows, closure_of, generator


def rule(c: Hand, noise: float = 1.0) -> None:
    """θ ← θ − hg + s z, tensor by tensor."""
    g, z = c.drift(), c.z()
    for i, p in enumerate(c.theta):
        c.theta[i] = p - c.h[i] * g[i] + noise * c.s[i] * z[i]


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_follows_its_rule(setting: str):
    assert_follows("sgld", rule, setting)


def test_a_wrong_amount_of_noise_is_seen():
    with pytest.raises(AssertionError, match="step 0"):
        assert_follows("sgld", lambda c: rule(c, noise=1.001), "chains")


@pytest.mark.parametrize("factors", [(1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4)])
def test_noise_has_the_stated_unit(factors: tuple[int, int, int]):
    """s = √(2hT/N), d = 10⁶: the sampling error of the standard deviation is .07 %."""
    n, t, h = 50 * factors[0], 0.5 * factors[1], 0.1 * factors[2]
    theta = torch.zeros(1_000_000, requires_grad=True)
    sampler = SGLD([theta], step_size=h, num_examples=n, temperature=t, generators=generator(0))

    def closure() -> Tensor:
        theta.grad = torch.zeros_like(theta)
        return torch.tensor(0.0)

    sampler.step(closure)
    assert theta.std().item() == pytest.approx(math.sqrt(2 * h * t / n), rel=0.005)


def network_and_data(seed: int) -> tuple[torch.nn.Module, Tensor, Tensor]:
    rng = generator(seed)
    network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0, 0.5, generator=rng)
    x = torch.randn(40, 5, generator=rng)
    return network, x, x[:, :3].argmax(1)


def plain_closure(network: torch.nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Closure:
    """As in anyone's loop: no chains, a scalar loss."""

    def closure() -> Tensor:
        network.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x[rows]), y[rows])
        loss.backward()
        return loss.detach()

    return closure


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("prior_std", [0.3, math.inf])
def test_at_zero_temperature_it_is_gradient_descent(prior_std: float, foreach: bool):
    """To the last bit of float32, over 200 minibatch steps; the prior is SGD's weight decay."""
    network, x, y = network_and_data(0)
    twin, *_ = network_and_data(0)
    sampler = SGLD(
        network.parameters(), step_size=0.1, num_examples=40, prior_std=prior_std, temperature=0.0
    )
    decay = 1 / (40 * prior_std**2)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=decay, foreach=foreach)
    order, loss = generator(1), torch.tensor([])
    for _ in range(200):
        rows = torch.randint(40, (8,), generator=order)
        loss = sampler.step(plain_closure(network, x, y, rows))
        plain_closure(twin, x, y, rows)()
        sgd.step()
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert loss.shape == ()
    assert sampler.stats["noise_norm"].item() == 0


def test_an_infinitely_wide_prior_has_no_drift():
    theta = torch.tensor([3.0, -2.0], requires_grad=True)
    closure = closure_of(theta, lambda x: (0.0 * x).sum()[None])
    wide = SGLD([theta], step_size=0.1, num_examples=10, prior_std=math.inf, temperature=0.0)
    wide.step(closure)
    assert torch.equal(theta.detach(), torch.tensor([3.0, -2.0]))
    narrow = SGLD([theta], step_size=0.1, num_examples=10, prior_std=0.5, temperature=0.0)
    narrow.step(closure)
    torch.testing.assert_close(theta.detach(), torch.tensor([3.0, -2.0]) * (1 - 0.1 / 2.5))


def test_parameter_groups_have_their_own_prior_and_temperature():
    """One step by hand, with the noise drawn from a twin of the generator."""
    cold, hot = torch.ones(3, requires_grad=True), torch.full((2, 2), 2.0, requires_grad=True)
    groups = [
        {"params": [cold], "prior_std": 0.5, "temperature": 0.0},
        {"params": [hot], "prior_std": 2.0},
    ]
    sampler = SGLD(groups, step_size=0.2, num_examples=10, temperature=0.7, generators=generator(3))

    def closure() -> Tensor:
        cold.grad, hot.grad = torch.full((3,), 0.1), torch.full((2, 2), -0.3)
        return torch.tensor(1.5)

    assert sampler.step(closure).item() == 1.5
    z = torch.empty(1, 7).normal_(generator=generator(3))[0, 3:].reshape(2, 2)
    g_cold, g_hot = 0.1 + 1 / (10 * 0.25), -0.3 + 2 / (10 * 4.0)
    s = math.sqrt(2 * 0.2 * 0.7 / 10)
    torch.testing.assert_close(cold.detach(), torch.full((3,), 1 - 0.2 * g_cold))
    torch.testing.assert_close(hot.detach(), 2 - 0.2 * g_hot + s * z)
    drift_norm = math.sqrt(3 * g_cold**2 + 4 * g_hot**2)
    assert sampler.stats["drift_norm"].tolist() == pytest.approx([drift_norm])
    assert sampler.stats["noise_norm"].tolist() == pytest.approx([s * z.norm().item()])
    assert sampler.stats["step_size"].tolist() == pytest.approx([0.2])


def test_torch_schedulers_set_the_step_size():
    theta = torch.zeros(100_000, requires_grad=True)
    sampler = SGLD([theta], step_size=0.4, num_examples=10, generators=generator(4))
    scheduler = torch.optim.lr_scheduler.StepLR(sampler, step_size=1, gamma=0.25)
    closure = closure_of(theta, lambda x: (0.0 * x).sum()[None])
    for h in (0.4, 0.1, 0.025):
        before = theta.detach().clone()
        sampler.step(closure)
        scheduler.step()
        moved = (theta.detach() - before).std().item()
        assert moved == pytest.approx(math.sqrt(2 * h / 10), rel=0.01)
        assert sampler.stats["step_size"].item() == pytest.approx(h)


def test_a_plain_model_in_a_plain_loop_is_fitted():
    """No chain dimension, torch's global generator: the loss falls towards the posterior's."""
    network, x, y = network_and_data(5)
    sampler = SGLD(
        network.parameters(), step_size=0.2, num_examples=40, prior_std=1.0, temperature=0.01
    )
    closure = plain_closure(network, x, y, torch.arange(40))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = [sampler.step(closure).item() for _ in range(200)]
    assert losses[-1] < 0.6 * losses[0]


def test_the_closure_is_called_once_with_gradients_enabled():
    theta = torch.ones(2, requires_grad=True)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return closure_of(theta, lambda x: x.square().sum()[None])()

    sampler = SGLD([theta], step_size=0.1, num_examples=5)
    with torch.no_grad():
        value = sampler.step(closure)
    assert calls == [True]
    assert value.tolist() == [2.0]


def test_parameters_without_a_gradient_stay():
    """They move neither by the prior nor by noise, and draw none."""
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    sampler = SGLD(
        [unused, used], step_size=0.1, num_examples=5, prior_std=1.0, generators=generator(6)
    )
    sampler.step(closure_of(used, lambda x: x.square().sum()[None]))
    assert torch.equal(unused.detach(), torch.ones(3))
    z = torch.empty(1, 2).normal_(generator=generator(6))[0]
    expected = 1 - 0.1 * (2 + 1 / 5) + math.sqrt(2 * 0.1 / 5) * z
    torch.testing.assert_close(used.detach(), expected)


@pytest.mark.parametrize(("share", "bounded"), [(0.99, True), (1.01, False)])
def test_its_stability_limit(share: float, bounded: bool):
    theta = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    sampler = SGLD([theta], step_size=1.0, num_examples=10, temperature=0.0)
    sampler.param_groups[0]["lr"] = share * sampler.stability / 3.0
    for _ in range(1000):
        sampler.step(closure_of(theta, lambda x: 1.5 * x.square().sum()[None]))
    assert (theta.abs().max() <= 1) == bounded


def test_its_relaxation_time():
    """Steps to 1/e at hk = .02: 1/(hk) is 1 % above the exact −1/ln(1 − hk)."""
    theta = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    sampler = SGLD([theta], step_size=0.01, num_examples=10, temperature=0.0)
    steps = round(sampler.relaxation_steps(0.01, 2.0))
    for _ in range(steps):
        sampler.step(closure_of(theta, lambda x: x.square().sum()[None]))
    assert theta.item() == pytest.approx(math.exp(-1), rel=0.015)


def test_effective_temperature_of_known_noise():
    """`t_eff` is T + N h v/2, and the heat is seen in θ: Var = T_eff/(Nk) · 1/(1 − hk/2)."""
    chains, h, k, sd, rng = 20_000, 0.05, 0.2, 0.8, generator(7)
    theta = torch.zeros(chains, 1, dtype=torch.float64, requires_grad=True)
    sampler = SGLD([theta], step_size=h, num_examples=10, generators=rng, chain_dim=0)

    def closure() -> Tensor:
        noise = sd * torch.randn(chains, 1, generator=rng, dtype=torch.float64)
        theta.grad = k * theta.detach() + noise
        return torch.zeros(chains)

    sampler.watch(torch.ones(chains, 1, dtype=torch.float64))
    for _ in range(600):
        sampler.step(closure)
    derived = 1 + 10 * h * sd**2 / 2
    assert sampler.stats["t_eff"].mean().item() == pytest.approx(derived, rel=0.005)
    law = derived / (10 * k) * sampler.variance_factor(h, k)
    assert theta.detach().var().item() == pytest.approx(law, rel=0.04)  # sampling error 1 %
