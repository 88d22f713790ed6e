"""How far q's draws are from other points, seen along many directions.

The squared sliced Wasserstein-2 distance (Bonneel, Rabin, Peyre, Pfister, "Sliced and Radon Wasserstein barycenters of
measures", Journal of Mathematical Imaging and Vision 51, 2015) of B draws ``y`` from points, in D dimensions,

    D / K  sum_k  1/B sum_i  h( (y . v_k)_(i)  -  m_ik ),        h(r) = r^2 / 2,  linear beyond |r| = 1,

compares order statistics along K directions ``v_k``: ``m_ik`` is what the i-th smallest of B independent points is in
the mean. The directions are those of the coordinates of x, which are looked at in the end, and as many random ones. By
the factor D / K the gradient of draws that are all moved by a vector moves them back by about that vector, as that of a
KL divergence does in the whitened space. h is Huber's, since in a heavy tail the largest of B draws says little.

Order statistics vary about their means, and a square is least where they do not: draws would be drawn together, by 2%
of their spread if they are 128 and normal, by 14% if they are 16. So the ``m_ik`` are spread about their mean over i,
by as much as makes draws of the points' own law stay as wide as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

__all__ = ["SlicedDistance"]

_MIN_BATCHES = 8
_MAX_FORCE = 1.0  # Huber's, in the whitened space


class SlicedDistance:
    """The distance of ``num_draws`` draws from given points.

    Args:
        points: (N, D), in the space of the draws.
        directions: (K / 2, D), unit vectors; as many random ones are added.
        num_draws: B.

    Example:

        >>> _ = torch.manual_seed(0)
        >>> distance = SlicedDistance(torch.randn(4096, 1), torch.ones(1, 1), num_draws=1000)
        >>> round(distance(torch.randn(1000, 1) + 3.0).item(), 1)  # h(3) = 3 - 1 / 2
        2.5
    """

    def __init__(self, points: Tensor, directions: Tensor, num_draws: int) -> None:
        random = torch.randn_like(directions)
        self.directions = torch.cat([directions, random / random.norm(dim=-1, keepdim=True)])
        num_batches = max(_MIN_BATCHES, len(points) // num_draws)
        rows = torch.randint(len(points), (num_batches, num_draws), device=points.device)
        along = points @ self.directions.mT
        batches = (along - along.mean(0))[rows].sort(1).values
        means = batches.mean(0)
        residual = batches - means
        # How strongly batches are drawn together, and how much less so for each part by which the means are spread.
        pull = (residual.clamp(-_MAX_FORCE, _MAX_FORCE) * batches).mean((0, 1))
        relief = ((residual.abs() < _MAX_FORCE) * means * batches).mean((0, 1))
        spread = torch.where(pull < relief, 1.0 + pull / relief, 1.0)  # a single draw has none
        self.order_statistics = along.mean(0) + spread * means

    def __call__(self, y: Tensor) -> Tensor:
        """The formula above, a scalar that is differentiable in the draws ``y (B, D)``."""
        along = (y @ self.directions.mT).sort(0).values
        distance = huber_loss(along, self.order_statistics, reduction="sum", delta=_MAX_FORCE)
        return y.shape[1] / len(self.directions) / len(y) * distance

    def copy_(self, other: SlicedDistance) -> None:
        """Measure what the other does, of as many draws, from now on."""
        self.directions.copy_(other.directions)
        self.order_statistics.copy_(other.order_statistics)
