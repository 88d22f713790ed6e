"""A Gaussian refined from batches of its draws and the target's scores at them.

One loop, :func:`match`, draws a batch, whitens its scores, asks a rule for the next Gaussian, and stops when the two
agree to rounding. The rules differ in the form of the covariance:

- :func:`batch_and_match_dense`: the closed-form update of Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and
  Saul, "Batch and match: black-box variational inference with a score-based divergence", ICML 2024.
- :class:`~pyro_sivism.family.low_rank_match.LowRankMatch`: diagonal plus low-rank, for large D.

The algebra is in float64, in the frame where the current Gaussian is N(0, I).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sivism.family.affine import AffineMap
from pyro_sivism.family.scored_target import ScoredTarget

__all__ = ["MatchRule", "batch_and_match_dense", "batch_and_match_update", "match"]


# The next Gaussian from the current one, whitened draws and scores (B, D), and the regularization; and what it guarded.
MatchRule = Callable[[AffineMap, Tensor, Tensor, float], tuple[AffineMap, list[str]]]

# An update may change a standard deviation by a factor sqrt(30) and the mean by 3 sd sqrt(D).
_MAX_EIGENVALUE = 30.0
_MAX_SHIFT = 3.0
_MAX_SCORE = 20.0
_MIN_FINITE = 0.25
# Below this discrepancy from N(0, I), and no longer falling, the target is Gaussian to rounding.
_GAUSSIAN = 1e-3
_STILL_FALLING = 0.5
_MAX_ERRORS = 3.0


class _Batch(NamedTuple):
    """Whitened draws of a Gaussian with finite scores, these whitened too, and the ELBO they tell, with its error."""

    y: Tensor
    score: Tensor
    elbo: float
    elbo_error: float
    discrepancy: float


def match(
    target: ScoredTarget,
    affine: AffineMap,
    rule: MatchRule,
    num_steps: int,
    batch_size: int,
    *,
    regularization: float,
    guards: Counter[str],
) -> AffineMap:
    """At most ``num_steps`` batches, each followed by an update by ``rule``; ended where the fit is exact.

    An update after which the ELBO is lower, beyond its error, is taken back and tried again at a third of its
    regularization, and of 1 at most. A target that is not Gaussian leaves every update noisy, by its few draws: the
    mean and covariance of the last half of them are averaged then, where the covariance is dense.

    Args:
        regularization: lambda of the first update; update t has a t-th of it, so that the updates average the batches.
        guards: counts, by kind, how often an update was shortened or taken back.
    """
    current, candidate, batch = affine, affine, None
    bound, last_discrepancy = math.inf, math.inf
    average = _Average() if affine.is_dense else None
    for step in range(num_steps):
        target.resample_minibatch()
        new = _draw(target, candidate, batch_size, guards)
        if new is None:
            candidate = candidate._replace(scale_tril=0.5 * candidate.scale_tril)
            guards["scale_halved"] += 1
            continue
        if batch is None or _no_worse(new, batch, target.noise):
            current, batch = candidate, new
            bound *= 2.0
        else:
            bound = min(bound, 1.0) / 3.0
            guards["update_taken_back"] += 1
        candidate, guarded = rule(current, batch.y, batch.score, min(bound, regularization / (step + 1.0)))
        guards.update(guarded)
        if _STILL_FALLING * last_discrepancy < batch.discrepancy < _GAUSSIAN:
            return candidate
        last_discrepancy = batch.discrepancy
        if average is not None and 2 * step >= num_steps:
            average.add(candidate)
    return current if average is None else average.result(current)


def _no_worse(new: _Batch, old: _Batch, noise: float) -> bool:
    error = math.hypot(new.elbo_error, old.elbo_error) + noise * abs(old.elbo)
    return new.elbo >= old.elbo - _MAX_ERRORS * error


def _draw(target: ScoredTarget, affine: AffineMap, batch_size: int, guards: Counter[str]) -> _Batch | None:
    """A batch without its non-finite rows, None where these are most of it; scores are clipped in norm.

    They are at 20 times the norm of a Gaussian's, or of the batch's median where that is more: outliers are, the common
    large score of a Gaussian far away is not.
    """
    y = torch.randn(batch_size, target.dim, dtype=torch.double, device=affine.loc.device)
    log_density, score = target(affine.forward(y))
    finite = log_density.isfinite()
    if int(finite.sum()) < max(2, _MIN_FINITE * batch_size):
        return None
    guards["draws_left_out"] += int(not bool(finite.all()))
    y, score, log_density = y[finite], affine.pull_back(score[finite]), log_density[finite]
    norm = score.norm(dim=-1, keepdim=True)
    norm = norm / (_MAX_SCORE * norm.median().clamp(min=math.sqrt(target.dim)))
    guards["scores_clipped"] += int(bool((norm > 1).any()))
    residual = y + score
    ratio = log_density + 0.5 * y.square().sum(-1) + affine.log_abs_det
    return _Batch(
        y,
        score / norm.clamp(min=1.0),
        float(ratio.mean()),
        float(ratio.std() / math.sqrt(len(y))),
        max(float(residual.mean(0).abs().max()), float((residual * y).mean(0).abs().max())),
    )


class _Average:
    """The mean of the means and covariances of Gaussians."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, affine: AffineMap) -> None:
        self.count += 1
        if self.count == 1:
            self.loc, self.covariance = affine.loc, affine.covariance
        self.loc = self.loc + (affine.loc - self.loc) / self.count
        self.covariance = self.covariance + (affine.covariance - self.covariance) / self.count

    def result(self, default: AffineMap) -> AffineMap:
        """``default`` where nothing was averaged, or where sds without bounds have left no root of the mean."""
        if self.count == 0:
            return default
        scale = self.covariance.diagonal().sqrt()  # units apart, as they may span more than rounding allows
        root, info = torch.linalg.cholesky_ex(self.covariance / scale[:, None] / scale)
        return AffineMap(self.loc, scale[:, None] * root) if int(info) == 0 else default


class GaussianUpdate(NamedTuple):
    """A Gaussian relative to the current one: in its whitened frame, mean and covariance."""

    loc: Tensor
    covariance: Tensor


def batch_and_match_dense(
    affine: AffineMap, y: Tensor, score: Tensor, regularization: float
) -> tuple[AffineMap, list[str]]:
    """The update of a Gaussian with a dense covariance.

    With fewer draws than half the dimensions nothing happens outside the span of draws and scores, where all
    the algebra but one Cholesky factor is done then.
    """
    dim, guarded = y.shape[1], []
    basis = None
    if 2 * len(y) < dim:
        basis = torch.linalg.qr(torch.cat([y, score]).mT).Q
        y, score = y @ basis, score @ basis
    update = batch_and_match_update(y, score, regularization)
    eigenvalues, vectors = torch.linalg.eigh(update.covariance)
    bounded = eigenvalues.clamp(1.0 / _MAX_EIGENVALUE, _MAX_EIGENVALUE)
    shift = update.loc.norm() / (_MAX_SHIFT * math.sqrt(dim))
    if bool((bounded != eigenvalues).any()):
        guarded.append("covariance_bounded")
    if bool(shift > 1):
        guarded.append("mean_bounded")
    loc = update.loc / shift.clamp(min=1.0)
    if basis is None:
        covariance = (vectors * bounded) @ vectors.mT
    else:
        loc, vectors = basis @ loc, basis @ vectors
        covariance = (vectors * (bounded - 1.0)) @ vectors.mT
        covariance.diagonal().add_(1.0)
    return AffineMap(affine.forward(loc), affine.scale_tril @ torch.linalg.cholesky(covariance)), guarded


def batch_and_match_update(y: Tensor, score: Tensor, regularization: float) -> GaussianUpdate:
    """The closed-form update of Cai et al. (2024, arXiv 2402.14758, section 3), from the Gaussian N(0, I).

    Over Gaussians q = N(m, S) it minimizes, on a batch of draws y and scores g,

        mean |grad log q(y) - g|^2_S  +  (2 / lambda) KL(N(0, I), q),      |v|^2_S = v' S v.

    With batch means ``y_bar, g_bar`` and covariances ``C, G`` of draws and scores and lambda = regularization,

        U = lambda G + lambda / (1 + lambda) g_bar g_bar'
        V = I + lambda C + lambda / (1 + lambda) y_bar y_bar'

    the new covariance S solves the quadratic ``S U S + S = V``, and the new mean is
    ``lambda / (1 + lambda) (S g_bar + y_bar)``.
    """
    weight = regularization / (1.0 + regularization)
    y_bar, g_bar = y.mean(0), score.mean(0)
    y_cov = (y - y_bar).mT @ (y - y_bar) / len(y)
    g_cov = (score - g_bar).mT @ (score - g_bar) / len(y)
    u = regularization * g_cov + weight * torch.outer(g_bar, g_bar)
    v = regularization * y_cov + weight * torch.outer(y_bar, y_bar)
    v.diagonal().add_(1.0)

    # S = R (2 / (1 + sqrt(1 + 4 R U R))) R with R = sqrt(V): symmetric, so that eigh serves throughout.
    root = _symmetric_function(v, torch.sqrt)
    inner = _symmetric_function(root @ u @ root, lambda e: 2.0 / (1.0 + (1.0 + 4.0 * e.clamp(min=0.0)).sqrt()))
    covariance = root @ inner @ root
    return GaussianUpdate(weight * (covariance @ g_bar + y_bar), 0.5 * (covariance + covariance.mT))


def _symmetric_function(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return (vectors * function(eigenvalues)) @ vectors.mT
