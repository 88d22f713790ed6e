"""A Gaussian fitted to the target from its scores, in three stages:

1. **Quasi-Newton paths.** From several starts, BFGS climbs log p. Every point of a path comes with an
   estimate H of the inverse Hessian, hence with a Gaussian ``N(x + H score(x), H)``.
2. **The best of them by ELBO**, as Pathfinder does (Zhang, Carpenter, Gelman, Vehtari, JMLR 2022): the mode
   of a funnel makes a poor Gaussian, points on the way to it make better ones.
3. **Batch and match** (Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei, Saul, ICML 2024): draws of the
   current Gaussian, their scores, and the closed-form Gaussian that balances matching those scores against
   staying near. With exact scores of a Gaussian target the target itself is the fixed point.

The covariance is dense up to ``max_dense_dim`` and diagonal beyond. The algebra is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sivism.errors import ArgumentError
from pyro_sivism.family.affine import AffineMap, TargetDensity
from pyro_sivism.family.quasi_newton import QuasiNewtonPaths, quasi_newton_paths

__all__ = ["BatchAndMatch", "FixedGaussian", "GaussianFit", "Preconditioner"]


@dataclass(frozen=True)
class GaussianFit:
    """A fitted Gaussian and how it came about.

    Attributes:
        affine: the map ``x = loc + scale_tril y``, float64.
        elbo: the ELBO of the best path Gaussian (NaN where there were no paths), before batch and match.
        num_evaluations: scores computed.
        num_nonfinite: evaluations that were NaN or infinite and were left out.
        num_guarded: batch-and-match updates that a guard shortened or skipped.
        path_ends: where the paths ended, (S, D), and their log densities (S,).
    """

    affine: AffineMap
    elbo: float
    num_evaluations: int
    num_nonfinite: int
    num_guarded: int
    path_ends: Tensor
    path_log_densities: Tensor


class Preconditioner(Protocol):
    """Anything that fits a Gaussian to a target from starting points (S, D)."""

    def fit(self, target: TargetDensity, starts: Tensor) -> GaussianFit: ...


class FixedGaussian:
    """A preconditioner that is given: a mean and a covariance (or a vector of variances).

    ``FixedGaussian(torch.zeros(D), torch.ones(D))`` leaves the unconstrained space as it is.
    """

    def __init__(self, loc: Tensor, covariance: Tensor) -> None:
        if covariance.shape not in (loc.shape, loc.shape * 2) or loc.dim() != 1:
            raise ArgumentError(
                "expected a mean (D,) and a covariance (D, D) or variances (D,), got shapes "
                f"{tuple(loc.shape)} and {tuple(covariance.shape)}"
            )
        covariance = covariance.double()
        if covariance.dim() == 1:
            scale_tril, positive = covariance.sqrt(), bool((covariance > 0).all())
        else:
            scale_tril, info = torch.linalg.cholesky_ex(covariance)
            positive = int(info) == 0
        if not (positive and bool(loc.isfinite().all()) and bool(scale_tril.isfinite().all())):
            raise ArgumentError("expected a finite mean, and a covariance that is finite and positive definite")
        self.affine = AffineMap(loc.double(), scale_tril)

    def fit(self, target: TargetDensity, starts: Tensor) -> GaussianFit:
        if target.dim != self.affine.loc.shape[0]:
            raise ArgumentError(f"the given Gaussian has {self.affine.loc.shape[0]} dims, the target {target.dim}")
        none = torch.empty(0, dtype=torch.double)
        return GaussianFit(self.affine, math.nan, 0, 0, 0, none.reshape(0, target.dim), none)


class BatchAndMatch:
    """The default preconditioner: quasi-Newton paths, the best Gaussian by ELBO, then batch and match.

    Args:
        num_steps: batch-and-match updates; ``max(100, 2 D)`` if None.
        batch_size: draws per update.
        max_path_steps: quasi-Newton steps per start.
        max_dense_dim: the largest D for a dense covariance.
        candidates_per_path, elbo_draws: how many path points are compared, by how many draws each.
    """

    def __init__(
        self,
        *,
        num_steps: int | None = None,
        batch_size: int = 64,
        max_path_steps: int = 200,
        max_dense_dim: int = 512,
        candidates_per_path: int = 12,
        elbo_draws: int = 16,
    ) -> None:
        if (num_steps is not None and num_steps < 0) or batch_size < 2:
            raise ArgumentError(f"expected num_steps >= 0 and batch_size >= 2, got {num_steps} and {batch_size}")
        for name, value in (
            ("max_path_steps", max_path_steps),
            ("candidates_per_path", candidates_per_path),
            ("elbo_draws", elbo_draws),
        ):
            if value < 1:
                raise ArgumentError(f"expected {name} of at least 1, got {value}")
        self.num_steps, self.batch_size = num_steps, batch_size
        self.max_path_steps, self.max_dense_dim = max_path_steps, max_dense_dim
        self.candidates_per_path, self.elbo_draws = candidates_per_path, elbo_draws

    def fit(self, target: TargetDensity, starts: Tensor) -> GaussianFit:
        """Fit a Gaussian to ``target`` from finite starting points ``starts (S, D)``."""
        counter = _Counter(target)
        diagonal = target.dim > self.max_dense_dim
        paths = quasi_newton_paths(counter, starts.double(), self.max_path_steps, diagonal=diagonal)
        start, elbo = self._best_on_paths(counter, paths)
        num_steps = max(100, 2 * min(target.dim, self.max_dense_dim)) if self.num_steps is None else self.num_steps
        match = _match_diagonal if diagonal else _match_dense
        affine, num_guarded = match(counter, start, num_steps, self.batch_size)
        return GaussianFit(
            affine=affine,
            elbo=elbo,
            num_evaluations=counter.num_evaluations,
            num_nonfinite=counter.num_nonfinite,
            num_guarded=num_guarded,
            path_ends=paths.ends,
            path_log_densities=paths.end_log_densities,
        )

    def _best_on_paths(self, target: _Counter, paths: QuasiNewtonPaths) -> tuple[AffineMap, float]:
        """The path Gaussian with the highest ELBO, ``E_q[log p] + entropy``, from a few draws each."""
        best, best_elbo = None, -math.inf
        for candidates in paths.gaussians(self.candidates_per_path):
            locs, scales = candidates.loc, candidates.scale_tril
            noise = torch.randn((self.elbo_draws, *locs.shape), dtype=torch.double, device=locs.device)
            steps = noise * scales if scales.dim() == 2 else (scales @ noise[..., None])[..., 0]
            draws = locs + steps
            log_density, _ = target(draws.reshape(-1, target.dim))
            log_density = log_density.reshape(draws.shape[:-1]).nan_to_num(nan=-math.inf, posinf=-math.inf)
            diagonals = scales if scales.dim() == 2 else scales.diagonal(dim1=-2, dim2=-1)
            elbos = log_density.mean(0) + diagonals.log().sum(-1)
            index = int(elbos.argmax())
            if elbos[index] > best_elbo:
                best, best_elbo = AffineMap(locs[index], scales[index]), float(elbos[index])
        if best is None:  # every draw of every candidate was non-finite: start small at the best end point
            end = paths.ends[paths.end_log_densities.argmax()]
            scale = torch.full_like(end, 1e-2)
            best, best_elbo = AffineMap(end, scale if paths.is_diagonal else scale.diag()), -math.inf
        entropy_constant = 0.5 * target.dim * (1.0 + math.log(2.0 * math.pi))
        return best, best_elbo + entropy_constant


class _Counter:
    """The target in float64, counting evaluations and the non-finite ones among them."""

    def __init__(self, target: TargetDensity) -> None:
        self._target = target
        self.dim = target.dim
        self.num_evaluations = 0
        self.num_nonfinite = 0

    def resample_minibatch(self) -> None:
        """Let a target with random minibatches draw the next; the average over updates is then unbiased."""
        getattr(self._target, "resample_minibatch", lambda: None)()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_density, score = self._target.log_density_and_score(x)
        finite = log_density.isfinite() & score.isfinite().all(-1)
        self.num_evaluations += x.shape[0]
        self.num_nonfinite += int((~finite).sum())
        return log_density.where(finite, torch.nan).detach(), score.where(finite[:, None], torch.nan).detach()


class _Update(NamedTuple):
    """A Gaussian relative to the current one: in its whitened frame, mean and covariance."""

    loc: Tensor
    covariance: Tensor


# A batch and match update may change a standard deviation by a factor sqrt(30) and the mean by 3 sd sqrt(D).
_MAX_EIGENVALUE = 30.0
_MAX_SHIFT = 3.0
_MAX_SCORE = 20.0
_MIN_FINITE = 0.25


def _match_dense(target: _Counter, affine: AffineMap, num_steps: int, batch_size: int) -> tuple[AffineMap, int]:
    """Batch and match with a dense covariance, each update in the frame where the current Gaussian is N(0, I)."""
    dim, num_guarded = target.dim, 0
    for step in range(num_steps):
        target.resample_minibatch()
        noise = torch.randn(batch_size, dim, dtype=torch.double, device=affine.loc.device)
        y, score, guarded = _whitened_scores(target, affine, noise)
        num_guarded += guarded
        if len(y) < max(2, _MIN_FINITE * batch_size):
            affine = AffineMap(affine.loc, 0.5 * affine.scale_tril)
            continue
        update = _batch_and_match_update(y, score, regularization=max(dim, batch_size) / (step + 1.0))
        eigenvalues, vectors = torch.linalg.eigh(update.covariance)
        bounded = eigenvalues.clamp(1.0 / _MAX_EIGENVALUE, _MAX_EIGENVALUE)
        shift = update.loc.norm() / (_MAX_SHIFT * math.sqrt(dim))
        num_guarded += int(bool((bounded != eigenvalues).any()) or bool(shift > 1))
        covariance = (vectors * bounded) @ vectors.mT
        loc = affine.forward(update.loc / shift.clamp(min=1.0))
        affine = AffineMap(loc, affine.scale_tril @ torch.linalg.cholesky(covariance))
    return affine, num_guarded


def _batch_and_match_update(y: Tensor, score: Tensor, regularization: float) -> _Update:
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
    return _Update(weight * (covariance @ g_bar + y_bar), 0.5 * (covariance + covariance.mT))


def _match_diagonal(target: _Counter, affine: AffineMap, num_steps: int, batch_size: int) -> tuple[AffineMap, int]:
    """The same with a diagonal covariance: the quadratic ``u s^2 + s = v`` in each coordinate."""
    dim, num_guarded = target.dim, 0
    for step in range(num_steps):
        target.resample_minibatch()
        noise = torch.randn(batch_size, dim, dtype=torch.double, device=affine.loc.device)
        y, score, guarded = _whitened_scores(target, affine, noise)
        num_guarded += guarded
        if len(y) < max(2, _MIN_FINITE * batch_size):
            affine = AffineMap(affine.loc, 0.5 * affine.scale_tril)
            continue
        regularization = batch_size / (step + 1.0)
        weight = regularization / (1.0 + regularization)
        y_bar, g_bar = y.mean(0), score.mean(0)
        u = regularization * score.var(0, correction=0) + weight * g_bar.square()
        v = 1.0 + regularization * y.var(0, correction=0) + weight * y_bar.square()
        variance = 2.0 * v / (1.0 + (1.0 + 4.0 * u * v).sqrt())
        bounded = variance.clamp(1.0 / _MAX_EIGENVALUE, _MAX_EIGENVALUE)
        shift = weight * (bounded * g_bar + y_bar)
        shortened = shift.clamp(-_MAX_SHIFT, _MAX_SHIFT)
        num_guarded += int(bool((bounded != variance).any()) or bool((shortened != shift).any()))
        affine = AffineMap(affine.forward(shortened), affine.scale_tril * bounded.sqrt())
    return affine, num_guarded


def _whitened_scores(target: _Counter, affine: AffineMap, noise: Tensor) -> tuple[Tensor, Tensor, int]:
    """The finite rows of whitened draws and their whitened scores, the latter clipped in norm."""
    _, score = target(affine.forward(noise))
    finite = score.isfinite().all(-1)
    score = affine.pull_back(score[finite])
    norm = score.norm(dim=-1, keepdim=True) / (_MAX_SCORE * math.sqrt(target.dim))
    guarded = int(not bool(finite.all()) or bool((norm > 1).any()))
    return noise[finite], score / norm.clamp(min=1.0), guarded


def _symmetric_function(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return (vectors * function(eigenvalues)) @ vectors.mT
