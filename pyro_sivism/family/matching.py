"""A Gaussian refined from batches of its draws and the target's scores at them.

One loop, :func:`match`, draws a batch, whitens its scores, asks a rule for the next Gaussian, and stops when the two
agree to rounding. The rules differ in the form of the covariance:

- :func:`batch_and_match_dense`, :func:`batch_and_match_diagonal`: the closed-form update of Cai, Modi,
  Pillaud-Vivien, Margossian, Gower, Blei and Saul, "Batch and match: black-box variational inference with a
  score-based divergence", ICML 2024.
- :class:`LowRankMatch`: see there.

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

__all__ = ["MatchRule", "batch_and_match_dense", "batch_and_match_diagonal", "batch_and_match_update", "match"]


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
    """At most ``num_steps`` updates by ``rule``; the last half of them averaged, unless the fit is exact before.

    Args:
        regularization: lambda of the first update; update t has a t-th of it, so that the updates average the batches.
        guards: counts, by kind, how often an update was shortened or skipped.
    """
    last_discrepancy = math.inf
    for step in range(num_steps):
        target.resample_minibatch()
        noise = torch.randn(batch_size, target.dim, dtype=torch.double, device=affine.loc.device)
        y, score, guarded = _whitened_scores(target, affine, noise)
        guards.update(guarded)
        if len(y) < max(2, _MIN_FINITE * batch_size):
            affine = affine._replace(scale_tril=0.5 * affine.scale_tril)
            guards["scale_halved"] += 1
            continue
        residual = y + score
        discrepancy = max(float(residual.mean(0).abs().max()), float((residual * y).mean(0).abs().max()))
        affine, guarded = rule(affine, y, score, regularization / (step + 1.0))
        guards.update(guarded)
        if _STILL_FALLING * last_discrepancy < discrepancy < _GAUSSIAN:
            break
        last_discrepancy = discrepancy
    return affine


def _whitened_scores(target: ScoredTarget, affine: AffineMap, noise: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """The finite rows of whitened draws and their whitened scores, the latter clipped in norm."""
    _, score = target(affine.forward(noise))
    finite = score.isfinite().all(-1)
    score = affine.pull_back(score[finite])
    norm = score.norm(dim=-1, keepdim=True) / (_MAX_SCORE * math.sqrt(target.dim))
    guarded = [
        kind
        for kind, happened in (("draws_left_out", ~finite.all()), ("scores_clipped", (norm > 1).any()))
        if bool(happened)
    ]
    return noise[finite], score / norm.clamp(min=1.0), guarded


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


def batch_and_match_diagonal(
    affine: AffineMap, y: Tensor, score: Tensor, regularization: float
) -> tuple[AffineMap, list[str]]:
    """The same with a diagonal covariance: the quadratic ``u s^2 + s = v`` in each coordinate."""
    weight = regularization / (1.0 + regularization)
    y_bar, g_bar = y.mean(0), score.mean(0)
    u = regularization * score.var(0, correction=0) + weight * g_bar.square()
    v = 1.0 + regularization * y.var(0, correction=0) + weight * y_bar.square()
    variance = 2.0 * v / (1.0 + (1.0 + 4.0 * u * v).sqrt())
    bounded = variance.clamp(1.0 / _MAX_EIGENVALUE, _MAX_EIGENVALUE)
    shift = weight * (bounded * g_bar + y_bar)
    shortened = shift.clamp(-_MAX_SHIFT, _MAX_SHIFT)
    guarded = []
    if bool((bounded != variance).any()):
        guarded.append("covariance_bounded")
    if bool((shortened != shift).any()):
        guarded.append("mean_bounded")
    return AffineMap(affine.forward(shortened), affine.scale_tril * bounded.sqrt()), guarded
