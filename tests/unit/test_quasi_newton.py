"""Quasi-Newton paths on targets whose optima and Hessians are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_sivism.family.inverse_hessians import DenseInverse
from pyro_sivism.family.quasi_newton import quasi_newton_paths
from tests.statistical.oracle import GaussianTarget, random_covariance

pytestmark = pytest.mark.usefixtures("float64")


def starts(num: int, dim: int) -> Tensor:
    return 4 * torch.rand(num, dim) - 2


def rosenbrock(x: Tensor) -> tuple[Tensor, Tensor]:
    """``-sum (1 - x_i)^2 + 100 (x_{i+1} - x_i^2)^2``, with its optimum at 1; curved and badly conditioned."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        valley = x[:, 1:] - x[:, :-1].square()
        log_density = -((1 - x[:, :-1]).square() + 100 * valley.square()).sum(-1)
        (score,) = torch.autograd.grad(log_density.sum(), x)
    return log_density.detach(), score


def test_reaches_the_optimum_of_a_curved_valley():
    paths = quasi_newton_paths(rosenbrock, starts(4, 2), max_steps=200)
    # A path ends when a step gains under 1e-6 nats, which along the valley can be a short step: a thousand times that
    # is left to gain at most, and as the log density is -(1 - x_0)^2 there, x_0 is within sqrt(1e-3) = .032.
    assert (paths.end_log_densities > -1e-3).all()
    assert (paths.ends[:, 0] - 1).abs().max() < 0.032


def test_log_density_rises_along_every_path():
    paths = quasi_newton_paths(rosenbrock, starts(4, 2), max_steps=200)
    for path, length in enumerate(paths.lengths.tolist()):
        assert (paths.log_densities[:length, path].diff() >= 0).all()


@pytest.mark.parametrize("dim", [1, 4, 8])
def test_inverse_hessian_of_a_quadratic(dim):
    """Exact along the last step, which is the secant condition; right to the order of magnitude in every direction.

    It is nowhere much too long, since H starts at the smallest scale that the first step has seen and grows from there.
    """
    p = GaussianTarget(torch.randn(dim), random_covariance(dim))
    paths = quasi_newton_paths(p.log_density_and_score, starts(4, dim), max_steps=200)
    root = torch.linalg.inv(torch.linalg.cholesky(p.covariance))
    for path, length in enumerate(paths.lengths.tolist()):
        inverse = list(paths.inverse_hessians(path))
        assert len(inverse) == length
        eigenvalues = torch.linalg.eigvalsh(root @ inverse[-1].h[0] @ root.T)
        assert eigenvalues.min() > 0.05
        assert eigenvalues.max() < 1.5
        for step in range(1, length):
            moved = paths.points[step, path] - paths.points[step - 1, path]
            bent = paths.scores[step - 1, path] - paths.scores[step, path]
            torch.testing.assert_close(inverse[step].apply(bent[None])[0], moved, rtol=1e-6, atol=1e-9)
    assert (paths.ends - p.loc).abs().max() < 5e-3


def test_limited_inverse_with_all_pairs_is_bfgs_of_its_diagonal():
    """Two-loop recursion against the recursion on matrices, on a quadratic, from the diagonal it ends with."""
    p = GaussianTarget(torch.randn(6), random_covariance(6))
    paths = quasi_newton_paths(p.log_density_and_score, starts(2, 6), max_steps=8, memory=50)
    *_, limited = paths.inverse_hessians(0)
    dense = DenseInverse.measured(torch.diag_embed(limited.diagonal))
    for moved, bent, rho in limited.pairs:
        dense = dense.update(moved, bent, rho > 0)
    vector = torch.randn(1, 6)
    torch.testing.assert_close(limited.apply(vector), dense.apply(vector), rtol=1e-9, atol=1e-9)
    x, score = torch.randn(6), torch.randn(6)
    low_rank, full = limited.gaussian(x, score), dense.gaussian(x, score)
    torch.testing.assert_close(low_rank.loc, full.loc)
    torch.testing.assert_close(low_rank.covariance, full.covariance, rtol=1e-8, atol=1e-9)


def test_limited_inverse_forgets_all_but_the_last_pairs():
    paths = quasi_newton_paths(rosenbrock, starts(2, 3), max_steps=30, memory=4)
    assert [len(h.pairs) for h in paths.inverse_hessians(0)][:8] == [0, 1, 2, 3, 4, 4, 4, 4]
    assert (paths.log_densities[paths.lengths.min() - 1] > paths.log_densities[0]).all()


@pytest.mark.parametrize("memory", [None, 5])
def test_inverse_hessians_stay_positive(memory):
    paths = quasi_newton_paths(rosenbrock, starts(4, 3), max_steps=100, memory=memory)
    basis = torch.eye(3)[:, None]
    for path in range(4):
        for h in paths.inverse_hessians(path):
            matrix = torch.cat([h.apply(vector) for vector in basis])
            assert torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).min() > 0


def test_finds_an_optimum_ten_thousand_sds_away():
    p = GaussianTarget(torch.full((3,), 1e4), torch.eye(3))
    paths = quasi_newton_paths(p.log_density_and_score, starts(2, 3), max_steps=50)
    assert (paths.ends - p.loc).abs().max() < 5e-3


def test_backs_out_of_non_finite_regions():
    """log x - x on x > 0, NaN elsewhere: the first doubling steps fall off the edge."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        log_density, score = (30 * x.log() - 30 * x).sum(-1), 30 / x - 30
        outside = (x <= 0).any(-1)
        return log_density.where(~outside, torch.nan), score.where(~outside[:, None], torch.nan)

    paths = quasi_newton_paths(evaluate, torch.tensor([[8.0, 0.01], [1e-3, 5.0]]), max_steps=100)
    assert paths.points.isfinite().all()
    assert (paths.ends - 1).abs().max() < 1e-3


def test_path_ends_where_nothing_rises():
    """A flat density: no step gains, and each path stays at its start."""
    x = starts(3, 2)
    paths = quasi_newton_paths(lambda x: (torch.zeros(len(x)), torch.zeros_like(x)), x, max_steps=100)
    assert len(paths.points) == 1
    assert torch.equal(paths.ends, x)


@pytest.mark.parametrize("memory", [None, 5])
def test_gaussians_of_a_path_are_newton_steps(memory):
    p = GaussianTarget(torch.randn(3), random_covariance(3))
    paths = quasi_newton_paths(p.log_density_and_score, starts(1, 3), max_steps=100, memory=memory)
    at_start, *gaussians = paths.gaussians(per_path=4)
    torch.testing.assert_close(at_start.loc, paths.points[0, 0])
    assert 1 <= len(gaussians) <= 4
    end = int(paths.lengths[0]) - 1  # the last candidate is always the end of the path
    *_, h = paths.inverse_hessians(0)
    matrix = torch.cat([h.apply(vector[None]) for vector in torch.eye(3)])
    torch.testing.assert_close(gaussians[-1].loc, paths.points[end, 0] + matrix @ paths.scores[end, 0])
    torch.testing.assert_close(gaussians[-1].covariance, matrix)


def test_path_goes_on_where_the_log_density_is_all_rounding():
    """Of a log density near -1e8, float32 keeps steps of 8 nats: only the slopes tell the way to the optimum."""
    p = GaussianTarget(torch.full((3,), 5.0), random_covariance(3))

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        log_density, score = p.log_density_and_score(x)
        return (log_density - 1e8).float().double(), score

    x = p.loc + 0.5 * torch.randn(4, 3)
    paths = quasi_newton_paths(evaluate, x, max_steps=100, noise=8 * torch.finfo(torch.float32).eps)
    assert (paths.ends - p.loc).abs().max() < 0.05
