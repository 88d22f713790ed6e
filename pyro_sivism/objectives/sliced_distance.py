"""How far q's draws are from other points, seen along many directions.

The squared sliced Wasserstein-2 distance (Bonneel, Rabin, Peyre, Pfister, "Sliced and Radon Wasserstein barycenters of
measures", Journal of Mathematical Imaging and Vision 51, 2015) of B draws from the points,

    1/2  sum_k  w_k  1/B  sum_i  ( (y . v_k)_(i)  -  m_ki )^2,

compares order statistics along directions ``v_k``: ``m_ki`` is about what the i-th of B independent points is along it,
spread so that B points are neither drawn together nor apart. The directions are those of the coordinates of x, which
are looked at in the end, and as many random ones. Each set has weights that sum to D / 2: were all draws moved by a
vector, the gradient would move them back by about that vector, as that of a KL divergence does in the whitened space.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SlicedDistance"]


class SlicedDistance:
    """The distance of ``num_draws`` draws from given points.

    Args:
        points: (N, D), in the space of the draws.
        directions: (K, D), unit vectors; as many random ones are added.
        num_draws: B.

    Example:

        >>> _ = torch.manual_seed(0)
        >>> distance = SlicedDistance(torch.randn(4096, 1), torch.ones(1, 1), num_draws=1000)
        >>> round(distance(torch.randn(1000, 1) + 3.0).item())  # 3^2 / 2
        5
    """

    def __init__(self, points: Tensor, directions: Tensor, num_draws: int) -> None:
        random = torch.randn_like(directions)
        self.directions = torch.cat([directions, random / random.norm(dim=-1, keepdim=True)])
        along = points @ self.directions.mT
        ranks = torch.arange(1.0, num_draws + 1.0).to(along)
        # Blom's levels, at which quantiles are what order statistics are in the mean.
        quantiles = along.quantile((ranks - 0.375) / (num_draws + 0.25), dim=0)
        # Between the levels there is spread, too, without which the draws of few would be drawn together.
        mean = quantiles.mean(0)
        spread = along.var(0, correction=0) / quantiles.var(0, correction=0).clamp(min=1e-12)  # of one, none
        self.quantiles = along.mean(0) + (quantiles - mean) * spread

    def __call__(self, y: Tensor) -> Tensor:
        """A scalar, differentiable in the draws ``y (B, D)``."""
        along = (y @ self.directions.mT).sort(0).values
        return 0.5 * y.shape[1] / len(self.directions) * (along - self.quantiles).square().mean(0).sum()

    def copy_(self, other: SlicedDistance) -> None:
        """Measure what the other does, of as many draws, from now on."""
        self.directions.copy_(other.directions)
        self.quantiles.copy_(other.quantiles)
