"""Tails heavier than q can draw, which no statistic at q's own draws shows.

Where a density falls like ``|x_i|^{-(nu + 1)}``, as Student's t with nu degrees of freedom does, ``-x_i s_i`` tends to
``nu + 1``; where it falls like a Gaussian or an exponential, it grows without bound. So draws of q are moved out along
one coordinate, to several distances R on both sides, and the *tail index*

    nu_i = min over the two sides of  max over R of  (-R sd_i s_i - 1),        R = 4, 8, 16 sds from q's mean,

is a lower bound on how light the tail is: 15 and more for a Gaussian's or an exponential's of q's own sd. The largest
over the distances is taken because a tail that is heavy only far out, where no mass is, does no harm.

A mixture of Gaussians, as q is, ends where its last component does: it leaves out the tail's share of the variance,
unless it reaches as far as its draws are to tell. Those beyond 3 sds from its mean have an index of their own, by
Hill's estimate ("A simple general approach to inference about the tail of a distribution", Annals of Statistics 1975),

    1 / nu_i  =  mean of log (r / 3),        r > 3 the distances in sds,

with the standard error 1 / (nu_i sqrt(n)) from n of them, of which three are allowed for, since there are 2 D tails to
look at. Where that is as heavy as p's, nothing is left out that the same number of exact draws would have, but for
chance: 8,192 of these are said to lack a tail in half a percent of coordinates at nu = 4, and in one and a half at 3. A
tail with an infinite variance, nu <= 2, no number of draws has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sivism.diagnostics.moments import finite_rows
from pyro_sivism.errors import ArgumentError
from pyro_sivism.family import TargetDensity

__all__ = ["TailIndices", "tail_indices"]

_DISTANCES = (4.0, 8.0, 16.0)
_NUM_DRAWS = 8
_MIN_DRAWS = 50
_NEAR = 3.0  # sds, from where on draws are a tail's
_MIN_FAR, _NUM_STANDARD_ERRORS = 10, 3.0
_MIN_INDEX = 2.0  # of a finite variance


@dataclass(frozen=True)
class TailIndices:
    """How heavy the tails are.

    Attributes:
        index: of each coordinate's heavier tail, (D,): about the degrees of freedom of Student's t if small; infinite
            where the scores out there are not finite.
        lacking: the same of the tails that q's draws do not have, (D,); infinite where they have both.
        num_evaluations: scores of single points computed.
    """

    index: Tensor
    lacking: Tensor
    num_evaluations: int


def tail_indices(target: TargetDensity, x: Tensor) -> TailIndices:
    """The tail index of each coordinate of ``target``, seen from q's draws ``x (N, D)``; 48 scores a coordinate.

    Raises:
        ArgumentError: fewer than 50 draws.

    Example:

        >>> class Cauchy:
        ...     dim = 1
        ...     def score(self, x):
        ...         return -2.0 * x / (1.0 + x.square())
        >>> _ = torch.manual_seed(0)
        >>> round(tail_indices(Cauchy(), torch.randn(100, 1)).index.item(), 1)
        1.0
    """
    x = x[finite_rows(x)]
    if len(x) < _MIN_DRAWS:
        raise ArgumentError(f"expected at least {_MIN_DRAWS} draws, got {len(x)}")
    dim, loc, sd = x.shape[1], x.mean(0), x.std(0)
    steps = torch.tensor([side * r for side in (-1.0, 1.0) for r in _DISTANCES], dtype=x.dtype, device=x.device)
    points = x[:_NUM_DRAWS].expand(dim, len(steps), -1, -1).clone()
    coordinates = torch.arange(dim, device=x.device)
    moved = loc[:, None] + sd[:, None] * steps  # (D, steps)
    points[coordinates, :, :, coordinates] = moved[..., None].expand(-1, -1, points.shape[2])
    score = target.score(points.reshape(-1, dim)).reshape(points.shape)
    along = score[coordinates, :, :, coordinates]  # (D, steps, draws)
    index = -(steps[:, None] * sd[:, None, None] * along) - 1.0
    index = index.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).quantile(
        0.5, -1, interpolation="lower"
    )
    index = index.reshape(dim, 2, len(_DISTANCES)).amax(-1).double()  # of both sides
    has_tail = (1.0 / index <= _inverse_index_at_most((x - loc) / sd)) & (index > _MIN_INDEX)
    return TailIndices(
        index.amin(-1),
        torch.where(has_tail, torch.inf, index).amin(-1),
        num_evaluations=points[..., 0].numel(),
    )


def _inverse_index_at_most(standardized: Tensor) -> Tensor:
    """Hill's estimate of 1 / nu, and what it may be short of it by chance, of the lower and the upper tails, (D, 2); 0
    where there are too few draws in a tail to have an estimate."""
    distances = torch.stack([-standardized, standardized], -1).double()
    is_far = distances > _NEAR
    count = is_far.sum(0)
    mean = torch.where(is_far, distances / _NEAR, 1.0).log().sum(0) / count
    return torch.where(count < _MIN_FAR, 0.0, mean * (1.0 + _NUM_STANDARD_ERRORS / count.sqrt()))
