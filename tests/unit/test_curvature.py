"""Curvature from score differences, in units that nobody has given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_sivism.family.curvature import measured_inverse_hessians
from tests.statistical.oracle import GaussianTarget, random_covariance

pytestmark = pytest.mark.usefixtures("float64")

FLOAT32_NOISE = 8 * torch.finfo(torch.float32).eps


def measured(evaluate, x: Tensor, noise: float = 1e-14) -> Tensor:
    return measured_inverse_hessians(evaluate, x, evaluate(x)[1], torch.ones_like(x), noise)


def test_covariance_of_a_gaussian_whatever_its_units():
    """Differences of a linear score are exact: what is left is rounding of x / step, 1e-16 times 2^k for a few k."""
    scale = torch.logspace(-4, 5, 6)
    p = GaussianTarget(scale * torch.randn(6), scale[:, None] * random_covariance(6) * scale)
    x = p.loc + 3 * scale * torch.randn(2, 6)
    for h in measured(p.log_density_and_score, x):
        torch.testing.assert_close(
            h / scale[:, None] / scale, p.covariance / scale[:, None] / scale, rtol=1e-6, atol=1e-6
        )


def test_far_away_in_float32():
    """A thousand sds from the mode a step of one sd changes a float32 score by no more than 1e-3 of it.

    Its rounding, 1e-7 of the score, is then 1e-4 of the difference.
    """
    p = GaussianTarget(torch.full((3,), 1e3), torch.eye(3))

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        log_density, score = p.log_density_and_score(x.float().double())
        return log_density.float().double(), score.float().double()

    (h,) = measured(evaluate, torch.zeros(1, 3), FLOAT32_NOISE)
    torch.testing.assert_close(h, torch.eye(3), rtol=1e-3, atol=1e-3)


def test_negative_curvature_counts_by_its_size():
    """log p = y^2 / 2 - 2 x^2: a saddle, whose Hessian's absolute value is diag(4, 1)."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 1] ** 2 / 2 - 2 * x[:, 0] ** 2, torch.stack([-4 * x[:, 0], x[:, 1]], 1)

    (h,) = measured(evaluate, torch.tensor([[0.3, 0.2]]))
    torch.testing.assert_close(h, torch.tensor([[0.25, 0.0], [0.0, 1.0]]))


def test_flat_direction_and_edge_leave_it_finite_and_positive():
    """No curvature along x_1, and NaN within .01 of x_0: steps grow there and shrink here."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        outside = x[:, 0] > 0.01
        score = torch.stack([-x[:, 0], torch.zeros(len(x))], 1)
        return (-(x[:, 0] ** 2) / 2).where(~outside, torch.nan), score.where(~outside[:, None], torch.nan)

    (h,) = measured(evaluate, torch.zeros(1, 2))
    assert h.isfinite().all()
    assert torch.linalg.eigvalsh(h).min() > 0
    assert h[0, 0].item() == pytest.approx(1.0, rel=1e-6)


def test_a_handful_of_scores_per_coordinate():
    p = GaussianTarget(torch.zeros(20), torch.logspace(-3, 3, 20).square().diag())
    measured(p.log_density_and_score, torch.randn(3, 20))
    assert p.num_evaluations <= 3 + 3 * 20 * 4
