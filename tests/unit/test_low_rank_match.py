"""One update of the low-rank match against what it should do exactly, on Gaussian targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_sivism.family import AffineMap
from pyro_sivism.family.low_rank_match import LowRankMatch
from tests.statistical.oracle import GaussianTarget

pytestmark = pytest.mark.usefixtures("float64")

DIM = 12
EXACT = 1e12  # a regularization that leaves no weight to the current Gaussian


def orthonormal(rank: int) -> Tensor:
    return torch.linalg.qr(torch.randn(DIM, rank)).Q


def low_rank(rank: int = 3) -> AffineMap:
    stretches = torch.linspace(-0.6, 2.0, rank)
    return AffineMap(torch.randn(DIM), torch.logspace(-1, 1, DIM), orthonormal(rank), stretches)


def whitened(p: GaussianTarget, affine: AffineMap, size: int = 60) -> tuple[Tensor, Tensor]:
    y = torch.randn(size, DIM)
    return y, affine.pull_back(p.score(affine.forward(y)))


def test_target_is_a_fixed_point():
    affine = low_rank()
    p = GaussianTarget(affine.loc, affine.covariance)
    updated, guarded = LowRankMatch(5)(affine, *whitened(p, affine), 1.0)
    assert guarded == []
    torch.testing.assert_close(updated.covariance, affine.covariance)
    torch.testing.assert_close(updated.loc, affine.loc)


@pytest.mark.parametrize("stretches", [[0.5, 1.0], [-0.5, -0.8], [-0.5, 1.0]], ids=["long", "short", "both"])
def test_one_update_finds_the_directions_of_a_gaussian(stretches):
    """Where the diagonal is right already and the rest is of rank 2: exactly."""
    scale = torch.logspace(-1, 1, DIM)
    truth = AffineMap(torch.randn(DIM), scale, orthonormal(2), torch.tensor(stretches))
    p = GaussianTarget(truth.loc, truth.covariance)
    start = AffineMap(truth.loc + 0.5 * scale * torch.randn(DIM), scale)
    updated, guarded = LowRankMatch(4)(start, *whitened(p, start), EXACT)
    assert guarded == []
    torch.testing.assert_close(updated.covariance / scale, truth.covariance / scale, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(updated.loc / scale, truth.loc / scale, rtol=1e-6, atol=1e-6)


def test_one_update_finds_the_scales_of_a_gaussian():
    p = GaussianTarget(torch.randn(DIM), torch.logspace(-0.4, 0.9, DIM).diag())
    start = AffineMap(torch.zeros(DIM), torch.ones(DIM))
    updated, _ = LowRankMatch(0)(start, *whitened(p, start), EXACT)
    assert updated.rank == 0
    torch.testing.assert_close(updated.variances, p.covariance.diagonal())
    torch.testing.assert_close(updated.loc, p.loc)


def test_weight_is_that_of_the_precision():
    """An update of weight w leaves ``(1 - w) P_old + w P_target``."""
    p = GaussianTarget(torch.zeros(DIM), torch.full((DIM,), 0.5).diag())
    start = AffineMap(torch.zeros(DIM), torch.ones(DIM))
    updated, _ = LowRankMatch(0)(start, *whitened(p, start), 1.0)
    torch.testing.assert_close(updated.variances, torch.full((DIM,), 1 / (0.5 * 1 + 0.5 * 2)))


def test_cut_keeps_the_most_stretched_and_the_diagonal_of_the_rest():
    """Short directions leave their diagonal to the precision; what is kept is kept exactly where none overlaps."""
    directions = torch.eye(DIM)[:, :4].clone()
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    directions[:2, :2] = pair
    affine = AffineMap(torch.zeros(DIM), torch.ones(DIM), directions, torch.tensor([3.0, -0.2, -0.5, 1.0]))
    cut = LowRankMatch(1).cut(affine)
    assert cut.rank == 1
    # e_2 and e_3 are coordinates: the diagonal holds all of them
    torch.testing.assert_close(cut.variances[2:4], affine.variances[2:4])
    # half of the short direction's excess precision goes to each of the two coordinates of the pair
    added = 0.5 * ((1 - 0.2) ** -2 - 1)
    kept = AffineMap(torch.zeros(DIM), torch.ones(DIM), directions[:, :1], torch.tensor([3.0]))
    want = torch.linalg.inv(kept.covariance)[:2, :2] + added * torch.eye(2)
    torch.testing.assert_close(torch.linalg.inv(cut.covariance)[:2, :2], want)


def test_cut_stays_positive_definite():
    for _ in range(20):
        affine = AffineMap(torch.zeros(DIM), torch.ones(DIM), orthonormal(9), torch.randn(9).exp() - 1)
        cut = LowRankMatch(3).cut(affine)
        assert cut.rank <= 3
        assert torch.linalg.eigvalsh(cut.covariance).min() > 1e-3 * torch.linalg.eigvalsh(affine.covariance).min()


def test_widening_and_shifts_are_bounded():
    """A target a hundred times as wide and 10^4 of its sds away: each update goes a part of the way and says so."""
    p = GaussianTarget(torch.full((DIM,), 1e6), 1e4 * torch.eye(DIM))
    start = AffineMap(torch.zeros(DIM), torch.ones(DIM))
    updated, guarded = LowRankMatch(2)(start, *whitened(p, start), EXACT)
    assert guarded == ["covariance_bounded", "mean_bounded"]
    assert updated.variances.max() <= 100.0 + 1e-9  # by ten for the diagonal, and by ten for a direction
    assert start.inverse(updated.loc).norm() <= 3 * DIM**0.5 * 10 + 1e-9


def test_noise_makes_no_directions():
    """Scores of N(0, I) with independent noise, in more dimensions than draws: the precision stays near I."""
    dim, affine = 400, AffineMap(torch.zeros(400), torch.ones(400))
    y = torch.randn(64, dim)
    updated, _ = LowRankMatch(16)(affine, y, -y + 0.3 * torch.randn(64, dim), EXACT)
    # On the draws that chose them the directions would have explained noise of .3 sqrt(400 / 64) = .75. The diagonal
    # has an error of .3 / sqrt(64) = .0375 a coordinate, here bounded at 6 of them.
    assert updated.rank <= 2
    root = updated.linear(torch.eye(dim))
    singular = torch.linalg.svdvals(root)
    assert singular.min() > (1 + 6 * 0.0375) ** -0.5
    assert singular.max() < (1 - 6 * 0.0375) ** -0.5
