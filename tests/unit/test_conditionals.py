"""What is particular to each conditional; what all share is in ``tests/contract/test_conditionals.py``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, StudentT

from pyro_sivism.errors import ArgumentError
from pyro_sivism.family import Conditional, DiagonalNormal, LowRankNormal, SemiImplicit

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("mixing_dim", [2, 4, 6], ids=["M<D", "M=D", "M>D"])
@pytest.mark.parametrize("init_scale", [0.2, 0.75])
@pytest.mark.parametrize("scale_depends_on_z", [True, False])
def test_first_marginal_is_the_standard_normal(mixing_dim, init_scale, scale_depends_on_z):
    """From the weights: the networks are 0 everywhere, and ``W W' + diag sigma^2`` is the identity."""
    dim = 4
    settings = {"init_scale": init_scale, "min_scale": 0.1, "scale_depends_on_z": scale_depends_on_z}
    conditional = DiagonalNormal(dim, mixing_dim, (8,), **settings)
    z = 3 * torch.randn(50, mixing_dim)
    weight = conditional.loc_scale.skip.weight
    with torch.no_grad():
        loc, scale = conditional.loc_scale(z)
        torch.testing.assert_close(loc, z @ weight.T, rtol=0, atol=0)
        scale = scale.expand_as(loc)
        torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=0, atol=0)
        torch.testing.assert_close(weight @ weight.T + scale[0].square().diag(), torch.eye(dim))


def test_first_marginal_of_low_rank_is_near_the_standard_normal():
    conditional = LowRankNormal(4, 3, (8,), rank=2)
    with torch.no_grad():
        weight, (_, scale) = conditional.loc_scale.skip.weight, conditional.loc_scale(torch.zeros(3))
        torch.testing.assert_close(weight @ weight.T + scale.square().diag(), torch.eye(4))
        assert (conditional.factor @ conditional.factor.T).abs().max() < 2 * 36 * 1e-4  # F of sd .01, 6 sd out
        assert conditional.factor.abs().min() > 0  # F = 0 would be a point without gradient


@pytest.mark.parametrize("logit", [-50.0, 50.0])
@pytest.mark.parametrize("depends_on_z", [True, False])
def test_floor_and_ceiling_hold(logit, depends_on_z):
    conditional = DiagonalNormal(3, 2, (4,), scale_depends_on_z=depends_on_z, min_scale=0.3, max_scale=1.2)
    z = 100 * torch.randn(20, 2)
    with torch.no_grad():
        conditional.loc_scale.logit.add_(logit)
        if depends_on_z:
            nn.init.normal_(conditional.loc_scale.net[-1].weight, std=10.0)
        scale = conditional.loc_scale(z)[1].expand(20, 3)
    assert scale.min() >= 0.3
    assert scale[:, :2].max() <= 1.2
    assert scale[:, 2].max() <= 1.6  # no z reaches it: it starts at 1 and may grow
    if not depends_on_z:
        extreme = torch.tensor([1.2, 1.2, 1.6]) if logit > 0 else torch.full((3,), 0.3)
        torch.testing.assert_close(scale, extreme.expand(20, 3))


def test_scale_is_constant_or_follows_z():
    z = torch.randn(20, 2)
    constant = DiagonalNormal(2, 2, (4,), scale_depends_on_z=False)
    varying = DiagonalNormal(2, 2, (4,), scale_depends_on_z=True)
    for conditional in (constant, varying):
        nn.init.normal_(conditional.loc_scale.net[-1].weight)
    assert constant.loc_scale(z)[1].shape == (2,)
    assert varying.loc_scale(z)[1].std(0).min() > 0


@pytest.mark.parametrize("scale_depends_on_z", [True, False])
def test_mean_is_bent_and_gated(scale_depends_on_z):
    """``mu = a + e^b l(z)``, b bounded; with constant a and b it is a linear map of z again."""
    conditional = DiagonalNormal(2, 2, (4,), scale_depends_on_z=scale_depends_on_z)
    bend, gate = torch.tensor([0.3, -0.7]), torch.tensor([1.0, -0.5])
    z = torch.randn(5, 2)
    with torch.no_grad():
        conditional.loc_scale.net[-1].bias[:4] = torch.cat([bend, gate])
        stretch = (1.5 * torch.tanh(gate / 1.5)).exp()
        torch.testing.assert_close(conditional.loc_scale(z)[0], bend + stretch * conditional.loc_scale.skip(z))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_low_rank_score_agrees_with_the_dense_covariance(rank):
    """Woodbury against a dense solve; ranks above D too."""
    dim = 5
    conditional = LowRankNormal(dim, 2, (4,), rank=rank)
    nn.init.normal_(conditional.factor)
    z = torch.randn(10, 2)
    x, score = conditional.rsample_with_score(z)
    loc, scale = conditional.loc_scale(z)
    covariance = scale.square().diag() + conditional.factor @ conditional.factor.T
    torch.testing.assert_close(score, -torch.linalg.solve(covariance, (x - loc).T).T)
    dense = MultivariateNormal(loc, covariance)
    torch.testing.assert_close(conditional(z).log_prob(x), dense.log_prob(x))


def test_low_rank_draws_have_their_covariance():
    conditional = LowRankNormal(3, 2, (4,), rank=2)
    nn.init.normal_(conditional.factor)
    n = 200_000
    with torch.no_grad():
        _, scale = conditional.loc_scale(torch.zeros(2))
        covariance = scale.square().diag() + conditional.factor @ conditional.factor.T
        x, _ = conditional.rsample_with_score(torch.zeros(n, 2))
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), x.T, upper=False)
    # se sqrt(2/n) on the diagonal; 6 of them fail once in 10^8 fresh seeds
    assert (whitened @ whitened.T / n - torch.eye(3)).abs().max() < 6 * math.sqrt(2 / n)


def test_input_parameters_are_those_that_read_z():
    conditional = DiagonalNormal(3, 2, (4, 4))
    names = {id(p): name for name, p in conditional.named_parameters()}
    first_layers = ("loc_scale.skip", "loc_scale.net.0")
    want = {f"{layer}.{kind}" for layer in first_layers for kind in ("weight", "bias")}
    assert {names[id(p)] for p in conditional.input_parameters()} == want
    assert len(LowRankNormal(3, 2, ()).input_parameters()) == 2


class StudentConditional(Conditional):
    """Needs nothing but ``forward``: its score comes from autograd."""

    def __init__(self, dim: int, mixing_dim: int) -> None:
        super().__init__(dim, mixing_dim)
        self.loc = nn.Linear(mixing_dim, dim)
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def forward(self, z: Tensor) -> Independent:
        return Independent(StudentT(5.0, self.loc(z), self.log_scale.exp()), 1)


def student_score(conditional: StudentConditional, z: Tensor, x: Tensor) -> Tensor:
    scale = conditional.log_scale.exp()
    t = (x - conditional.loc(z)) / scale
    return -6.0 * t / (5.0 + t.square()) / scale


def test_default_score_of_a_custom_conditional():
    conditional = StudentConditional(3, 2)
    z = torch.randn(4, 5, 2)
    x, score = conditional.rsample_with_score(z)
    assert x.shape == score.shape == (4, 5, 3)
    torch.testing.assert_close(score, student_score(conditional, z, x))
    # The score's own gradient: as a function of the parameters, x moving with them.
    weights = torch.randn_like(score)
    got = torch.autograd.grad((weights * score).sum(), list(conditional.parameters()), retain_graph=True)
    want = torch.autograd.grad((weights * student_score(conditional, z, x)).sum(), list(conditional.parameters()))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    assert conditional.input_parameters() == []


def test_default_score_carries_no_graph_where_gradients_are_off():
    with torch.no_grad():
        x, score = StudentConditional(3, 2).rsample_with_score(torch.randn(4, 2))
    assert not x.requires_grad
    assert not score.requires_grad


def test_mixing_draws_can_be_given():
    family = SemiImplicit(DiagonalNormal(3, 2))
    z = torch.randn(4, 2)
    sample = family.rsample(4, z)
    assert sample.z is z
    assert (family.dim, family.mixing_dim) == (3, 2)
    assert family.rsample((2, 5)).x.shape == (2, 5, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiagonalNormal(0, 2),
        lambda: DiagonalNormal(2, 0),
        lambda: DiagonalNormal(2, 2, init_scale=1.0),
        lambda: DiagonalNormal(2, 2, init_scale=0.0),
        lambda: DiagonalNormal(2, 2, init_scale=0.5, min_scale=0.5),
        lambda: DiagonalNormal(2, 2, min_scale=-0.1),
        lambda: DiagonalNormal(2, 2, init_scale=0.75, max_scale=0.7),
        lambda: LowRankNormal(2, 2, rank=0),
        lambda: SemiImplicit(DiagonalNormal(2, 2)).log_prob_estimate(torch.zeros(2), 0),
    ],
)
def test_arguments_out_of_range(make):
    with pytest.raises(ArgumentError, match="expected"):
        make()


def test_base_class_asks_for_forward():
    with pytest.raises(NotImplementedError):
        Conditional(2, 2)(torch.zeros(2))


def test_normal_conditional_score_is_minus_noise_over_scale():
    conditional = DiagonalNormal(3, 2, (4,))
    z = torch.randn(6, 2)
    x, score = conditional.rsample_with_score(z)
    loc, scale = conditional.loc_scale(z)
    torch.testing.assert_close(score, (loc - x) / scale.square())
    torch.testing.assert_close(conditional(z).log_prob(x), Normal(loc, scale).log_prob(x).sum(-1))
