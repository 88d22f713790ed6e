"""How far q's means and sds are from those of p, from draws of q and scores of p alone.

**Stein's identity.** For a smooth vector field f that does not grow too fast, ``E_p[div f + f . s_p] = 0``, where
``s_p = grad log p``. Under q the same mean is how fast KL(q, p) falls when the draws move along f. It vanishes for all
f only if q = p.

**What it says about a moment.** Let ``T_k`` be such functions for fields f_k: their means under p are known to be 0, so
they are control variates. The least-squares fit of a coordinate g by them, over draws of q,

    g  ~  c + sum_k beta_k T_k(x),        estimates    E_p[g] - E_q[g]  =  - sum_k beta_k E_q[T_k].

It is exact, whatever q, where g is a combination of the T_k. For q = p its mean is 0 whatever the beta_k, so it never
errs by more than Monte Carlo noise when the fit is right. The fields are the gradients of all linear and quadratic
functions, which is exact for the mean and the covariance of every Gaussian p. Where draws are too few for so many, the
quadratic ones are ``f = u g(x)``, u the direction of g, with ``T = 1 + g u.s``: exact for variances to first order.

**Where the fit is blind.** With long tails in g^2 the least-squares coefficients are those of its few largest values.
The other estimate for a variance is one step of Fisher scoring for the family of maps that f generates: if q is p moved
by lambda along f, then ``E_q[T] = -lambda E[T^2]`` to first order, for any p. It overstates large errors and takes a
wrong correlation for a wrong sd, so that it is taken only where g has long tails and it is sure of more than 1.5 times
as much.

The first two moments of f and g are all it looks at: the best *Gaussian* for a curved or skewed p has
``E_q[s] = 0`` and ``E_q[s y'] = -I``, and passes, though its sds may be wrong. See ``drift.py`` for what does not.

Mira, Solgi, Imparato, "Zero variance Markov chain Monte Carlo for Bayesian estimators", Statistics and Computing 2013;
Oates, Girolami, Chopin, "Control functionals for Monte Carlo integration", JRSS B 2017, who note that the draws need
not come from p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sivism.diagnostics.moments import (
    CUT_OFF,
    NUM_STANDARD_ERRORS,
    Frame,
    MomentErrors,
    finite_rows,
    standard_error,
)

__all__ = ["SteinStatistics", "WorstDirection", "stein_statistics"]

_LONG_TAILS, _SCORING_MARGIN = 10.0, 1.5  # a kurtosis, 3 for a Gaussian; how much more scoring must be sure of
_MIN_DRAWS_PER_VARIATE, _RIDGE = 8, 1e-9
_LEAST_INFORMATION = 0.5  # of a scale, E_p[T^2]: what a Cauchy p has; lighter tails have more


@dataclass(frozen=True)
class WorstDirection:
    """The direction, not necessarily a coordinate, in which q's second moments are furthest off.

    It is found by half of the draws and judged by the rest, so that its error is not the largest of many.

    Attributes:
        loadings: how much a move along it changes each coordinate of x, in q's sds, (D,).
        errors: q's errors along it, K = 1.
    """

    loadings: Tensor
    errors: MomentErrors


@dataclass(frozen=True)
class SteinStatistics:
    """What Stein's identity says about q.

    Attributes:
        coordinates: the errors of each coordinate of x, K = D.
        direction: the worst direction; None where D = 1 or the draws are too few for a dense frame.
        mean_score: ``E_q[s]`` in the frame where q has covariance I, (D,): 0 for q = p.
        mean_score_se: its standard error.
        num_draws: finite draws used.
        num_nonfinite: draws left out.
    """

    coordinates: MomentErrors
    direction: WorstDirection | None
    mean_score: Tensor
    mean_score_se: Tensor
    num_draws: int
    num_nonfinite: int


def stein_statistics(x: Tensor, score: Tensor, *, num_blocks: int = 1) -> SteinStatistics:
    """Errors of q's moments from its draws ``x (N, D)`` and the target's scores there.

    Args:
        x: independent draws of q, in the unconstrained space.
        score: ``grad log p(x)``, (N, D).
        num_blocks: with random minibatches of data, how many equal consecutive blocks of draws have one each (16 or
            more); 1 where scores are exact.

    Raises:
        ArgumentError: the shapes do not fit, there are fewer than 50 draws, or a coordinate does not vary.
        NonFiniteError: most scores are not finite.

    Example:

        >>> _ = torch.manual_seed(0)
        >>> x = 2.0 + 0.5 * torch.randn(4096, 1)  # q = N(2, 1/4) against p = N(1, 1)
        >>> errors = stein_statistics(x, 1.0 - x).coordinates
        >>> round(errors.mean.item(), 1), round(errors.log2_sd.item(), 1)
        (1.0, -1.0)
    """
    finite = finite_rows(x, score)
    x, score = x[finite].double(), score[finite].double()
    frame = Frame.of(x)
    y, s = frame.affine.inverse(x), frame.affine.pull_back(score)
    coordinate = frame.along_coordinates(y)
    quadratic = 1.0 + coordinate * frame.along_coordinates(s)
    variates = _variates(frame, y, s, quadratic)
    return SteinStatistics(
        coordinates=_moment_errors(coordinate, quadratic, variates, num_blocks),
        direction=None if frame.directions is None else _worst_direction(frame, y, s, num_blocks),
        mean_score=s.mean(0),
        mean_score_se=standard_error(s, num_blocks),
        num_draws=len(x),
        num_nonfinite=len(finite) - len(x),
    )


def _variates(frame: Frame, y: Tensor, s: Tensor, quadratic: Tensor) -> Tensor:
    """The control variates, (1, N, K) for all coordinates, or (D, N, 2) where each has its own two.

    Those of all linear and quadratic functions of y; where the draws are too few, with the given quadratic ones alone,
    or each coordinate on its own.
    """
    num_draws, dim = y.shape
    affordable = num_draws // _MIN_DRAWS_PER_VARIATE
    if frame.directions is None or 2 * dim > affordable:
        return torch.stack([frame.along_coordinates(s), quadratic], -1).transpose(0, 1)
    rows, columns = torch.triu_indices(dim, dim, device=y.device)
    if dim + len(rows) > affordable:
        return torch.cat([s, quadratic], -1)[None]
    products = 0.5 * (y[:, rows] * s[:, columns] + y[:, columns] * s[:, rows]) + (rows == columns).to(y.dtype)
    return torch.cat([s, products], -1)[None]


def _moment_errors(values: Tensor, quadratic: Tensor, variates: Tensor, num_blocks: int) -> MomentErrors:
    """Errors of ``values (N, D)`` by control variates ``(groups, N, K)``: one group for all, or one for each."""
    has_long_tails = values.pow(4).mean(0) > _LONG_TAILS
    values = values.clamp(-CUT_OFF, CUT_OFF)
    goals = values[None] if len(variates) == 1 else values.T[..., None]  # (groups, N, goals)
    first, second = (part.flatten(1) for part in _fitted_changes(goals, variates).chunk(2, -1))
    d1, d1_se = first.mean(0), standard_error(first, num_blocks)
    d2, d2_se = second.mean(0), standard_error(second, num_blocks)
    scored = 2.0 * quadratic / quadratic.square().mean(0).clamp(min=_LEAST_INFORMATION)
    d2_scored, d2_scored_se = scored.mean(0), standard_error(scored, num_blocks)
    use_scored = has_long_tails & (_sure(d2_scored, d2_scored_se) > _SCORING_MARGIN * _sure(d2, d2_se))
    d2, d2_se = torch.where(use_scored, d2_scored, d2), torch.where(use_scored, d2_scored_se, d2_se)
    return MomentErrors.from_changes(d1, d1_se, d2, d2_se)


def _fitted_changes(goals: Tensor, variates: Tensor) -> Tensor:
    """``- sum_k beta_k T_k`` for the goals and for their squares, (N, groups, 2 goals).

    The coefficients of one half of the draws are applied to the other: fitted to the draws that they are applied to,
    hundreds of skewed variates would find a change where there is none.
    """
    goals = torch.cat([goals, goals.square()], -1)
    halves = list(zip(goals.tensor_split(2, 1), variates.tensor_split(2, 1)))
    changes = []
    for (goal, variate), (_, other) in zip(halves, halves[::-1]):
        centered = variate - variate.mean(1, keepdim=True)
        gram = centered.mT @ centered
        ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        gram = gram + torch.diag_embed(ridge.expand(gram.shape[:-1]))  # two variates may be one and the same
        coefficients = torch.linalg.solve(gram, centered.mT @ (goal - goal.mean(1, keepdim=True)))
        changes.append(-(other @ coefficients).transpose(0, 1))
    return torch.cat(changes[::-1])


def _sure(change: Tensor, se: Tensor) -> Tensor:
    return (change.abs() - NUM_STANDARD_ERRORS * se).clamp(min=0.0)


def _worst_direction(frame: Frame, y: Tensor, s: Tensor, num_blocks: int) -> WorstDirection:
    """The direction in which ``E_p[y y']`` is furthest from q's, I, by half of the draws; judged on the other half.

    To first order ``E_p[y y'] - I = E_q[s y'] + I + m m'``, symmetrized, with ``m = E_q[s]`` the shift of the mean.
    """
    (y, y_judge), (s, s_judge) = y.tensor_split(2), s.tensor_split(2)
    product, mean = s.T @ y / len(y), s.mean(0)
    change = 0.5 * (product + product.T) + torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    eigenvalues, vectors = torch.linalg.eigh(change + mean[:, None] * mean)
    v = vectors[:, eigenvalues.abs().argmax()]
    value, slope = y_judge @ v[:, None], s_judge @ v[:, None]
    quadratic = 1.0 + value * slope
    errors = _moment_errors(value, quadratic, torch.cat([slope, quadratic], -1)[None], max(1, num_blocks // 2))
    return WorstDirection(frame.loadings(v), errors)
