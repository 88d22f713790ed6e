"""The Fisher divergence between q and p, from a critic that has learned the score of q.

``F(q, p) = E_q |s_p - grad log q|^2`` needs the score of q, which a semi-implicit q does not have. With f any function,
for instance ``f = s_p - critic``, and the conditional score ``c = grad_x log q(x|z)`` in its place,

    F  >=  2 E[f . (s_p - c)] - E |f|^2,

with equality at the best f (Yu and Zhang, "Semi-implicit variational inference via score matching", ICLR 2023, eq. 10).
The bound is a quadratic in the scale of f; at the best scale ``a = E[f . (s_p - c)] / E |f|^2`` it is ``a^2 E |f|^2``,
which is what is reported. It holds one direction at a time, too.

For a p that is log-concave with curvature 1 in the frame of q, means differ by at most ``sqrt(F)`` sds. Where p has
flat stretches a small F promises nothing, and F does not see a lost mode. Where p has a wall, or a tail much thinner
than a Gaussian's, scores beyond are huge, and F is that of the few draws there, however well q fits p's mass: hence the
*bulk*. As f is a function of x the bound holds for the draws in any set of x, and so for those with ``|f|`` not among
the largest 2%.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sivism.diagnostics.moments import Frame, finite_rows, standard_error

__all__ = ["FisherStatistics", "fisher_statistics"]

_BULK = 0.98


@dataclass(frozen=True)
class FisherStatistics:
    """Lower bounds on the Fisher divergence, in the frame where q has covariance I.

    Attributes:
        total: of all directions together.
        total_se: its standard error.
        bulk: of all directions, from the draws but for the 2% with the largest ``|f|``: a few draws in a thin tail of p
            can make up most of the total, which then says nothing of the others.
        bulk_se: its standard error.
        coordinates: the bulk along each coordinate of x, (D,); they sum to more or less than it where x is correlated.
    """

    total: float
    total_se: float
    bulk: float
    bulk_se: float
    coordinates: Tensor


def fisher_statistics(
    x: Tensor,
    score: Tensor,
    critic_score: Tensor,
    conditional_score: Tensor,
    *,
    second_score: Tensor | None = None,
    num_blocks: int = 1,
) -> FisherStatistics:
    """The Fisher divergence at draws ``x (N, D)`` of q that the critic has not been trained on.

    Args:
        x: draws of q; everything else is (N, D) too and in the same coordinates.
        score: ``grad log p(x)``.
        critic_score: the critic's estimate of ``grad log q(x)``.
        conditional_score: ``grad_x log q(x|z)`` at the z behind each draw.
        second_score: with random minibatches, the score at the same draws from other minibatches, independent of the
            first; without it their noise would count as divergence.
        num_blocks: with random minibatches, how many consecutive blocks of draws have one each.

    Raises:
        ArgumentError: the shapes do not fit, there are fewer than 50 draws, or a coordinate does not vary.
        NonFiniteError: most scores are not finite.

    Example:

        >>> _ = torch.manual_seed(0)
        >>> x = 1.0 + torch.randn(4096, 1)  # q = N(1, 1), p = N(0, 1), an exact critic
        >>> round(fisher_statistics(x, -x, 1.0 - x, 1.0 - x).total, 1)
        1.0
    """
    second_score = score if second_score is None else second_score
    values = (score, critic_score, conditional_score, second_score)
    finite = finite_rows(x, *values)
    frame = Frame.of(x[finite].double())
    s, critic, conditional, second = (frame.affine.pull_back(value[finite].double()) for value in values)
    # Each of the two scores is in f once while the other is in the difference it is held against.
    product = 0.5 * ((s - critic) * (second - conditional) + (second - critic) * (s - conditional))
    square = (s - critic) * (second - critic)
    squares = square.sum(-1)
    total, total_se = _bound(product.sum(-1), squares, num_blocks)
    in_bulk = (squares <= squares.quantile(_BULK)).to(squares.dtype)
    in_bulk = in_bulk / in_bulk.mean()
    bulk, bulk_se = _bound(product.sum(-1) * in_bulk, squares * in_bulk, num_blocks)
    if frame.directions is not None:
        along = [frame.along_coordinates(value) for value in (s, critic, conditional, second)]
        s, critic, conditional, second = along
        product = 0.5 * ((s - critic) * (second - conditional) + (second - critic) * (s - conditional))
        square = (s - critic) * (second - critic)
    coordinates, _ = _bound(product * in_bulk[:, None], square * in_bulk[:, None])
    return FisherStatistics(total.item(), total_se.item(), bulk.item(), bulk_se.item(), coordinates)


def _bound(product: Tensor, square: Tensor, num_blocks: int = 1) -> tuple[Tensor, Tensor]:
    """``a^2 E|f|^2`` with ``a = E[f . (s_p - c)] / E|f|^2``, and its standard error to first order in both means."""
    size = square.mean(0)
    scale = torch.where(size > 0, product.mean(0) / size, 0.0).clamp(min=0.0)
    return scale.square() * size, standard_error(2.0 * scale * product - scale.square() * square, num_blocks)
