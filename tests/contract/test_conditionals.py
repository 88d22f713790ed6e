"""What every conditional must do. To add one, add a row to ``CONDITIONALS``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Laplace

from pyro_sivism.family import Conditional, DiagonalNormal, LowRankNormal, SemiImplicit

DIM, MIXING_DIM = 3, 2


class LaplaceConditional(Conditional):
    """A conditional as a user would write it: ``forward`` only."""

    def __init__(self, dim: int, mixing_dim: int) -> None:
        super().__init__(dim, mixing_dim)
        self.loc, self.log_scale = nn.Linear(mixing_dim, dim), nn.Linear(mixing_dim, dim)

    def forward(self, z: Tensor) -> Independent:
        return Independent(Laplace(self.loc(z), self.log_scale(z).exp()), 1)


CONDITIONALS = {
    "diagonal": lambda: DiagonalNormal(DIM, MIXING_DIM, (8,)),
    "diagonal_constant": lambda: DiagonalNormal(DIM, MIXING_DIM, (8,), scale_depends_on_z=False),
    "diagonal_linear": lambda: DiagonalNormal(DIM, MIXING_DIM, (), scale_depends_on_z=False),
    "low_rank": lambda: LowRankNormal(DIM, MIXING_DIM, (8,), rank=2),
    "custom": lambda: LaplaceConditional(DIM, MIXING_DIM),
}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=CONDITIONALS)
def conditional(request, dtype):
    """Away from its start, so that no network is identically zero."""
    conditional = CONDITIONALS[request.param]().to(dtype)
    with torch.no_grad():
        for parameter in conditional.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return conditional


BATCH_SHAPES = [(), (1,), (7,), (2, 3)]


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)
def test_shapes_and_dtype(conditional, dtype, batch_shape):
    z = torch.randn(*batch_shape, MIXING_DIM, dtype=dtype)
    x, score = conditional.rsample_with_score(z)
    assert x.shape == score.shape == (*batch_shape, DIM)
    assert x.dtype == score.dtype == dtype
    assert conditional(z).log_prob(x).shape == batch_shape


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)
def test_score_is_the_gradient_of_the_density_at_fixed_z(conditional, dtype, batch_shape):
    z = torch.randn(*batch_shape, MIXING_DIM, dtype=dtype)
    x, score = conditional.rsample_with_score(z)
    point = x.detach().requires_grad_()
    (want,) = torch.autograd.grad(conditional(z).log_prob(point).sum(), point)
    torch.testing.assert_close(score, want, rtol=1e4 * torch.finfo(dtype).eps, atol=1e3 * torch.finfo(dtype).eps)


def test_draw_and_score_are_differentiable_in_every_parameter(conditional, dtype):
    x, score = conditional.rsample_with_score(torch.randn(50, MIXING_DIM, dtype=dtype))
    parameters = dict(conditional.named_parameters())
    by_x = torch.autograd.grad(x.square().sum(), list(parameters.values()), retain_graph=True)
    for name, gradient in zip(parameters, by_x):
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
    # A location drops out of the score of a reparametrized draw, so that not every parameter has a gradient here.
    by_score = torch.autograd.grad(score.square().sum(), list(parameters.values()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in by_score)


def test_draws_follow_the_seed_and_carry_no_graph_under_no_grad(conditional, dtype):
    z = torch.randn(5, MIXING_DIM, dtype=dtype)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.no_grad():
            draws.append(conditional.rsample_with_score(z))
    assert torch.equal(draws[0][0], draws[1][0])
    assert not draws[0][0].requires_grad
    assert not draws[0][1].requires_grad


def test_score_has_mean_zero(conditional):
    """E[grad_x log q(x|z)] = 0 for every z: 6 standard errors, wrong once in 10^8 fresh seeds."""
    z = torch.randn(MIXING_DIM, dtype=next(conditional.parameters()).dtype).expand(50_000, MIXING_DIM)
    with torch.no_grad():
        _, score = conditional.rsample_with_score(z)
    assert (score.mean(0).abs() / (score.std(0) / 50_000**0.5)).max() < 6


def test_in_the_family(conditional, dtype):
    family = SemiImplicit(conditional)
    sample = family.rsample((2, 4))
    assert sample.x.shape == sample.conditional_score.shape == (2, 4, DIM)
    assert sample.z.shape == (2, 4, MIXING_DIM)
    for num_mixing in (1, 5):
        for own_z, bias in [(None, "low"), (sample.z, "high")]:
            estimate = family.log_prob_estimate(sample.x, num_mixing, own_z)
            assert (estimate.value.shape, estimate.value.dtype) == ((2, 4), dtype)
            assert (estimate.bias, estimate.num_mixing) == (bias, num_mixing)
            assert estimate.value.isfinite().all()


def test_copy_and_state_dict(conditional):
    twin = copy.deepcopy(conditional)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(conditional.state_dict())
    z = torch.randn(5, MIXING_DIM, dtype=next(conditional.parameters()).dtype)
    torch.manual_seed(0)
    a = conditional.rsample_with_score(z)[0]
    torch.manual_seed(0)
    assert torch.equal(a, twin.rsample_with_score(z)[0])
