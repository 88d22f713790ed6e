"""The affine map and the target seen through it."""

from __future__ import annotations

import pytest
import torch

from pyro_sivism.family import AffineMap, WhitenedTarget
from tests.statistical.oracle import GaussianTarget, random_covariance

pytestmark = pytest.mark.usefixtures("float64")

DIM = 4


@pytest.fixture(params=["dense", "diagonal", "low_rank"])
def affine(request):
    root = torch.linalg.cholesky(random_covariance(DIM))
    if request.param == "dense":
        return AffineMap(torch.randn(DIM), root)
    if request.param == "diagonal":
        return AffineMap(torch.randn(DIM), root.diagonal().clone())
    directions = torch.linalg.qr(torch.randn(DIM, 2)).Q
    return AffineMap(torch.randn(DIM), root.diagonal().clone(), directions, torch.tensor([3.0, -0.7]))


@pytest.mark.parametrize("batch_shape", [(), (5,), (2, 3)])
def test_inverse_undoes_forward(affine, batch_shape):
    y = torch.randn(*batch_shape, DIM)
    assert affine.forward(y).shape == y.shape
    torch.testing.assert_close(affine.inverse(affine.forward(y)), y)


def test_everything_agrees_with_the_jacobian(affine):
    jacobian = torch.func.jacrev(affine.forward)(torch.randn(DIM))
    y = torch.randn(DIM)
    torch.testing.assert_close(affine.linear(y), jacobian @ y)
    torch.testing.assert_close(affine.pull_back(y), jacobian.T @ y)
    torch.testing.assert_close(affine.log_abs_det, torch.linalg.slogdet(jacobian).logabsdet)
    covariance = affine.covariance if affine.covariance.dim() == 2 else affine.covariance.diag()
    torch.testing.assert_close(covariance, jacobian @ jacobian.T)
    torch.testing.assert_close(affine.variances, (jacobian @ jacobian.T).diagonal())


def test_whitened_target_is_the_change_of_variables(affine):
    target = GaussianTarget(torch.randn(DIM), random_covariance(DIM))
    whitened = WhitenedTarget(target, affine)
    y = torch.randn(7, DIM, requires_grad=True)
    log_density, score = whitened.log_density_and_score(y)
    (want,) = torch.autograd.grad(log_density.sum(), y)
    assert whitened.dim == DIM
    torch.testing.assert_close(score, want)
    torch.testing.assert_close(whitened.score(y), want)
    torch.testing.assert_close(whitened.log_density(y), log_density)
    torch.testing.assert_close(log_density, target.log_density(affine.forward(y)) + affine.log_abs_det)


def test_whitening_by_the_target_itself_gives_the_standard_normal():
    target = GaussianTarget(torch.randn(DIM), random_covariance(DIM))
    y = torch.randn(7, DIM)
    log_density, score = WhitenedTarget(
        target, AffineMap(target.loc, torch.linalg.cholesky(target.covariance))
    ).log_density_and_score(y)
    torch.testing.assert_close(score, -y)
    torch.testing.assert_close(log_density, torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(-1))


def test_low_rank_form_is_linear_in_dim():
    """A million dimensions with two directions: a (D, D) matrix anywhere would be 8 TB."""
    dim = 1_000_000
    directions = torch.linalg.qr(torch.randn(dim, 2)).Q
    affine = AffineMap(torch.zeros(dim), torch.ones(dim), directions, torch.tensor([2.0, 1.0]))
    along = directions[:, 0]
    torch.testing.assert_close(affine.linear(along), 3.0 * along)
    torch.testing.assert_close(affine.inverse(3.0 * along), along)
    assert affine.variances.sum().item() == pytest.approx(dim + 8 + 3)
    assert (affine.rank, affine.is_dense) == (2, False)


def test_identity_and_to():
    affine = AffineMap.identity(3, dtype=torch.float32)
    y = torch.randn(2, 3, dtype=torch.float32)
    assert torch.equal(affine.forward(y), y)
    assert affine.to(torch.float64).loc.dtype == affine.to(torch.float64).scale_tril.dtype == torch.float64
    assert affine.to(torch.float64).directions is None
