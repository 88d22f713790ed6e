"""Quasi-Newton paths on targets whose optima and Hessians are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
        h = paths.inverse_hessians[length - 1, path]
        eigenvalues = torch.linalg.eigvalsh(root @ h @ root.T)
        assert eigenvalues.min() > 0.05
        assert eigenvalues.max() < 1.5
        for step in range(1, length - 1):
            moved = paths.points[step, path] - paths.points[step - 1, path]
            bent = paths.scores[step - 1, path] - paths.scores[step, path]
            torch.testing.assert_close(paths.inverse_hessians[step, path] @ bent, moved, rtol=1e-8, atol=1e-10)
    assert (paths.ends - p.loc).abs().max() < 5e-3


@pytest.mark.parametrize("diagonal", [False, True])
def test_inverse_hessians_stay_positive(diagonal):
    paths = quasi_newton_paths(rosenbrock, starts(4, 3), max_steps=100, diagonal=diagonal)
    assert paths.is_diagonal is diagonal
    h = paths.inverse_hessians
    assert h.shape == (len(paths.points), 4, 3) if diagonal else (len(paths.points), 4, 3, 3)
    smallest = h if diagonal else torch.linalg.eigvalsh(h)
    assert (smallest > 0).all()


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


@pytest.mark.parametrize("diagonal", [False, True])
def test_gaussians_of_a_path_are_newton_steps(diagonal):
    p = GaussianTarget(torch.randn(3), random_covariance(3))
    paths = quasi_newton_paths(p.log_density_and_score, starts(2, 3), max_steps=100, diagonal=diagonal)
    for path, gaussians in enumerate(paths.gaussians(per_path=4)):
        assert 1 <= len(gaussians.loc) <= 4
        end = int(paths.lengths[path]) - 1  # the last candidate is always the end of the path
        h, score = paths.inverse_hessians[end, path], paths.scores[end, path]
        step = h * score if diagonal else h @ score
        torch.testing.assert_close(gaussians.loc[-1], paths.points[end, path] + step)
        scale = gaussians.scale_tril[-1]
        torch.testing.assert_close(scale.square() if diagonal else scale @ scale.T, h)
