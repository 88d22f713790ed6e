"""The mixing network and the score network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_sivism.family import MLP, ScoreNetwork

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("hidden_dims", "num_linear"), [((), 1), ((5,), 2), ((5, 4, 3), 4)])
def test_mlp_shapes(hidden_dims, num_linear):
    net = MLP(3, 2, hidden_dims)
    assert net(torch.randn(6, 7, 3)).shape == (6, 7, 2)
    assert sum(isinstance(layer, nn.Linear) for layer in net) == num_linear
    assert net.input_parameters()[0].shape[1] == 3


def test_mlp_starts_at_zero_on_request_and_can_leave_it():
    net = MLP(3, 2, (5,), zero_last=True)
    x = torch.randn(4, 3)
    assert torch.equal(net(x), torch.zeros(4, 2))
    (gradient,) = torch.autograd.grad(net(x).sum(), net[-1].weight)
    assert gradient.abs().max() > 0


def test_mlp_is_smooth():
    net = MLP(2, 2, (8,))
    x = torch.randn(3, 2, requires_grad=True)
    assert torch.autograd.gradgradcheck(net, (x,))


def test_first_score_is_that_of_the_gaussian_with_the_running_moments():
    critic = ScoreNetwork(2, (8,))
    critic.mean.copy_(torch.tensor([1.0, -2.0]))
    critic.sd.copy_(torch.tensor([0.5, 3.0]))
    x = torch.randn(5, 2, requires_grad=True)
    log_density = torch.distributions.Normal(critic.mean, critic.sd).log_prob(x).sum()
    torch.testing.assert_close(critic(x), torch.autograd.grad(log_density, x)[0])


@pytest.mark.parametrize("gaussian_base", [True, False])
def test_gates_multiply_the_standardized_point(gaussian_base):
    """``s = (a + (b - 1) x') / sd``, or ``(a + b x') / sd``, b bounded; with constant a and b it is linear in x."""
    critic = ScoreNetwork(2, (4,), gaussian_base=gaussian_base).double()
    critic.mean.copy_(torch.tensor([1.0, -2.0]))
    critic.sd.copy_(torch.tensor([0.5, 3.0]))
    bend, gate = torch.tensor([0.3, -0.7]).double(), torch.tensor([2.0, 0.25]).double()
    with torch.no_grad():
        critic.net[-1].bias.copy_(torch.cat([bend, gate]))
    x = torch.randn(5, 2).double()
    standardized = (x - critic.mean) / critic.sd
    slope = 4.0 * torch.tanh(gate / 4.0) - float(gaussian_base)
    want = (bend + slope * standardized) / critic.sd
    torch.testing.assert_close(critic(x), want)


def test_network_without_a_gaussian_base_starts_at_zero():
    critic = ScoreNetwork(2, (8,), gaussian_base=False)
    assert torch.equal(critic(torch.randn(5, 2)), torch.zeros(5, 2))


@pytest.mark.parametrize("gaussian_base", [True, False])
def test_score_is_equivariant_under_a_change_of_units(gaussian_base):
    """At the same standardized point, q in units ``a`` times smaller has a score ``a`` times larger."""
    critic = ScoreNetwork(2, (8,), gaussian_base=gaussian_base)
    nn.init.normal_(critic.net[-1].weight)
    x = torch.randn(5, 2)
    before = critic(x)
    critic.sd.mul_(0.01)
    torch.testing.assert_close(critic(0.01 * x), 100 * before)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_running_moments_are_those_of_the_weighted_draws(batch_size):
    """The exponential average of raw moments, started from mean 0 and second moment 1."""
    critic = ScoreNetwork(2, (), decay=0.1)
    mean, second = torch.zeros(2), torch.ones(2)
    for _ in range(20):
        x = 3.0 + 2.0 * torch.randn(batch_size, 2)
        critic.update_moments(x)
        mean, second = mean.lerp(x.mean(0), 0.1), second.lerp(x.square().mean(0), 0.1)
    torch.testing.assert_close(critic.mean, mean)
    torch.testing.assert_close(critic.sd.square(), second - mean.square())


def test_moments_are_saved_but_not_learned():
    critic = ScoreNetwork(2, (4,))
    critic.update_moments(torch.randn(10, 2))
    copy = ScoreNetwork(2, (4,))
    copy.load_state_dict(critic.state_dict())
    assert torch.equal(copy.sd, critic.sd)
    assert {name for name, _ in critic.named_parameters()}.isdisjoint({"mean", "sd"})
