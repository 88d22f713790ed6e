"""Tail indices against densities whose tails are known."""

from __future__ import annotations

import pytest
import torch

from pyro_sivism.diagnostics import judge, stein_statistics, tail_indices
from pyro_sivism.errors import ArgumentError

N = 500


class Target:
    """A density on R^D by its log density of a batch."""

    def __init__(self, log_density, dim):
        self.log_density, self.dim = log_density, dim

    def score(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.log_density(x).sum(), x)[0]


def draws(dim):
    """Draws of N(0, I) whose own mean is 0, from which distances are taken."""
    x = torch.randn(N, dim)
    return x - x.mean(0)


def student(df, scale):
    """Independent Student's t."""
    return lambda x: (-0.5 * (df + 1) * (x.square() / (df * scale**2)).log1p()).sum(-1)


@pytest.mark.parametrize("df", [1.0, 3.0, 4.5])
def test_the_index_of_student_t_is_its_degrees_of_freedom(df, float64):
    """-x s = (nu + 1) x^2 / (nu + x^2), which at 16 sds is below nu + 1 by (nu + 1) nu / 16^2 at most."""
    scale = torch.tensor([1e-3, 1.0, 1e3])
    found = tail_indices(Target(student(df, scale), 3), scale * draws(3))
    short = (df + 1) * df / 14.0**2  # q's sd is right to 5 standard errors of 3%
    assert ((found.index <= df) & (found.index > df - short)).all()
    assert found.num_evaluations == 3 * 48


def test_one_heavy_side_is_enough_and_is_of_its_coordinate(float64):
    """A Gaussian, whose index is 16^2 - 1, but for one side of one coordinate, of index 2."""

    def log_density(x):
        tail = torch.where(x[:, 1] > 1.0, -3.0 * x[:, 1].clamp(min=1.0).log(), -0.5 * x[:, 1].square())
        return tail - 0.5 * x[:, 0].square()

    index = tail_indices(Target(log_density, 2), draws(2)).index
    assert index[1].item() == pytest.approx(2.0, abs=1e-9)
    assert index[0] > 200.0


def test_exponential_and_correlated_gaussian_tails_are_light(float64):
    """|x| of sd 1 has a slope of sqrt(2): an index of 16 sqrt(2) - 1 = 21.6 at the furthest."""
    laplace = Target(lambda x: -(2.0**0.5) * x.abs().sum(-1), 1)
    x = torch.distributions.Laplace(0.0, 0.5**0.5).sample((20_000, 1))
    assert tail_indices(laplace, x).index.item() == pytest.approx(21.6, rel=0.1)

    root = torch.linalg.cholesky(torch.tensor([[1.0, 0.99], [0.99, 1.0]]))
    gaussian = Target(lambda x: -0.5 * torch.linalg.solve_triangular(root, x.mT, upper=False).square().sum(0), 2)
    assert (tail_indices(gaussian, torch.randn(N, 2) @ root.mT).index > 200.0).all()


def test_scores_that_overflow_out_there_are_no_heavy_tail():
    found = tail_indices(Target(lambda x: -(20.0 * x.abs()).exp().sum(-1), 1), torch.randn(N, 1))
    assert found.index.isinf().all()


def test_the_verdict_names_the_coordinate_of_a_heavy_tail(float64):
    """The draws are right in all that statistics of draws see; only the ends are missing, as q's would be."""
    df = 3.0
    target = Target(student(df, torch.ones(2)), 2)
    x = torch.distributions.StudentT(df).sample((40_000, 2))
    x = x[(x.abs() < 6.0).all(-1)][:4096]
    quick = stein_statistics(x, target.score(x))
    labels = ["mu", "tau"]
    verdict = judge(quick, tails=tail_indices(target, x), labels=labels)
    assert verdict.level == "suspect"
    assert any("tails as heavy as Student's t with 3.0 degrees" in finding.text for finding in verdict.findings)
    assert verdict.as_dict()["tail_index_min"] == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize("df", [4.0, 4.9])
def test_draws_that_have_the_tails_lack_none(df, float64):
    """On every one of 20 sets of exact draws."""
    target = Target(student(df, torch.ones(1)), 1)
    for _ in range(20):
        found = tail_indices(target, torch.distributions.StudentT(df).sample((8192, 1)))
        assert found.index.item() < df
        assert found.lacking.isinf().all()


def test_draws_that_have_one_of_two_tails_lack_the_other(float64):
    target, x = Target(student(4.0, torch.ones(3)), 3), torch.distributions.StudentT(4.0).sample((8192, 3))
    x[:, 0] = x[:, 0].clamp(min=-4.5)
    x[:, 1] = x[:, 1].clamp(max=4.5)
    found = tail_indices(target, x)
    assert torch.allclose(found.lacking[:2], found.index[:2], rtol=0.01)
    assert found.lacking[2].isinf()
    assert judge(stein_statistics(x, target.score(x)), tails=found, labels="abc").worst.sites[0] in ("a", "b")


def test_each_side_has_a_tail_of_its_own(float64):
    """p and q are Student's t above 0, and normal below; or q is so below and p is not."""
    t = torch.distributions.StudentT(4.0).sample((16_384, 1))
    x = torch.where(t > 0.0, t, -torch.randn(16_384, 1).abs())

    def above(x):
        return torch.where(x > 0.0, -2.5 * (x.square() / 4.0).log1p(), -0.5 * x.square()).sum(-1)

    found = tail_indices(Target(above, 1), x)
    assert 3.0 < found.index.item() < 4.0
    assert found.lacking.item() > 10.0
    other = tail_indices(Target(above, 1), -x)
    assert other.lacking.item() == other.index.item() < 4.0


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.4])
def test_a_gaussian_lacks_the_tails_of_student_t(scale, float64):
    """Whatever its sd, and whether a few of its draws are over 3 sds out or none."""
    target = Target(student(4.0, torch.ones(1)), 1)
    for num_draws in (100, 400, 8192):
        found = tail_indices(target, scale * torch.randn(num_draws, 1))
        assert found.lacking.item() == found.index.item() < 4.0


def test_a_single_far_draw_is_no_tail(float64):
    x = torch.randn(1000, 1).clamp(-2.0, 2.0)
    x[:2, 0] = torch.tensor([-3.6, 3.6])
    assert tail_indices(Target(student(4.0, torch.ones(1)), 1), x).lacking.item() < 4.0


def test_no_number_of_draws_has_a_tail_of_infinite_variance(float64):
    found = tail_indices(Target(student(2.0, torch.ones(1)), 1), torch.distributions.StudentT(2.0).sample((8192, 1)))
    assert found.lacking.item() == found.index.item() < 2.0


def test_a_density_that_rises_beyond_the_draws_is_no_tail():
    """q stands 20 sds aside of the mass: the moments' error says so, before anything is said of tails."""
    target = Target(lambda x: -0.5 * (x - 20.0).square().sum(-1), 1)
    x = draws(1)
    verdict = judge(stein_statistics(x, target.score(x)), tails=tail_indices(target, x), labels=["mu"])
    assert verdict.level == "bad"
    assert "mu: mean more than 3 sds too low" in verdict.sentence
    assert any("mu: 4 to 16 sds from the draws' mean the density rises" in finding.text for finding in verdict.findings)


def test_too_few_draws_are_refused():
    with pytest.raises(ArgumentError, match="at least 50 draws"):
        tail_indices(Target(student(3.0, torch.ones(1)), 1), torch.randn(10, 1))
