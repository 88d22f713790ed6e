"""A Gaussian fitted to the target from its scores, in three stages:

1. **Quasi-Newton paths** climb log p from several starts. Where a path starts the curvature is measured, up to
   D = 256, so that coordinates move in their own units from the first step on: with one step size for all, the scale of
   a hierarchy on raw units collapses before its groups have come near their data. It is measured anew after 4 steps,
   8 more, 16 more and so on, as long as the climb gains by it: optima many sds away are found. Every point of a path
   comes with an estimate H of the inverse Hessian, hence with a Gaussian ``N(x + H score(x), H)``, and each start of a
   climb, where H is the measured one, with ``N(x, H)`` too.
2. **The best of them by ELBO**, as Pathfinder does (Zhang, Carpenter, Gelman, Vehtari, JMLR 2022). Down the neck of a
   funnel, as of a centered hierarchy, log p rises without bound and the ELBO falls. The neck is reached in some ten
   steps, and where the curvature changes as fast, H lags behind and Newton's step overshoots: on the way it is
   ``N(x, H)`` with a measured H whose ELBO tells how good a place is.
3. **Batch and match** (Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei, Saul, ICML 2024): draws of the
   current Gaussian, their scores, and the closed-form Gaussian that balances matching those scores against
   staying near. With exact scores of a Gaussian target the target itself is the fixed point.

Beyond ``max_dense_dim`` the paths are of limited memory, and the covariance is diagonal plus low-rank, matched by
:class:`~pyro_sivism.family.low_rank_match.LowRankMatch`. The algebra is in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_sivism.errors import ArgumentError
from pyro_sivism.family.affine import AffineMap, TargetDensity
from pyro_sivism.family.curvature import measured_inverse_hessians
from pyro_sivism.family.gaussian_fit import GaussianFit
from pyro_sivism.family.inverse_hessians import DenseInverse
from pyro_sivism.family.low_rank_match import LowRankMatch
from pyro_sivism.family.matching import batch_and_match_dense, match
from pyro_sivism.family.quasi_newton import QuasiNewtonPaths, quasi_newton_paths
from pyro_sivism.family.scored_target import ScoredTarget

__all__ = ["BatchAndMatch", "FixedGaussian", "Preconditioner"]

# Pairs a limited-memory path keeps, and the gain in nats that another climb must promise.
_MEMORY = 10
# Beyond, BFGS costs more than it tells: a path is of limited memory, and only the best end is climbed on from.
_MAX_BFGS_DIM = 256
_FIRST_STEPS = 4
_WORTHWHILE = 0.1
_CLOSE = 0.4  # a discrepancy that the family mends; right Gaussians of real posteriors are at .05 to .45
# Nats of ELBO: in thousands of dimensions, with the noise of minibatches, every round gains some.
_WORTHWHILE_ROUND, _WORTHWHILE_PER_DIM = 1.0, 0.01
_NUM_ERRORS = 4.0  # standard errors, of 16 draws: exceeded once in 2,000 times


class Preconditioner(Protocol):
    """Anything that fits a Gaussian to a target from starting points (S, D)."""

    def fit(self, target: TargetDensity, starts: Tensor) -> GaussianFit: ...


class FixedGaussian:
    """A preconditioner that is given: a mean and a covariance (or a vector of variances).

    ``FixedGaussian(torch.zeros(D), torch.ones(D))`` leaves the unconstrained space as it is.

    Raises:
        ArgumentError: shapes that do not fit, or a covariance that is not finite and positive definite.

    Example:

        >>> given = FixedGaussian.from_distribution(torch.distributions.Normal(torch.zeros(3), torch.tensor(2.0)))
        >>> given.affine.variances.tolist()
        [4.0, 4.0, 4.0]
    """

    def __init__(self, loc: Tensor, covariance: Tensor) -> None:
        if covariance.shape not in (loc.shape, loc.shape * 2) or loc.dim() != 1:
            raise ArgumentError(
                "expected a mean (D,) and a covariance (D, D) or variances (D,), got shapes "
                f"{tuple(loc.shape)} and {tuple(covariance.shape)}"
            )
        covariance = covariance.detach().double()
        if covariance.dim() == 1:
            scale_tril, positive = covariance.sqrt(), bool((covariance > 0).all())
        else:
            scale_tril, info = torch.linalg.cholesky_ex(covariance)
            positive = int(info) == 0
        if not (positive and bool(loc.isfinite().all()) and bool(scale_tril.isfinite().all())):
            raise ArgumentError("expected a finite mean, and a covariance that is finite and positive definite")
        self.affine = AffineMap(loc.detach().double(), scale_tril)

    @classmethod
    def from_distribution(cls, distribution: Distribution) -> FixedGaussian:
        """The mean and covariance of a distribution over R^D, its variances where it has no ``covariance_matrix``.

        The posterior of a Gaussian autoguide over the unconstrained latents is one, if it orders them alike.
        """
        while isinstance(distribution, Independent):
            distribution = distribution.base_dist
        covariance = getattr(distribution, "covariance_matrix", None)
        return cls(distribution.mean, distribution.variance if covariance is None else covariance)

    def fit(self, target: TargetDensity, starts: Tensor) -> GaussianFit:
        if target.dim != self.affine.loc.shape[0]:
            raise ArgumentError(f"the given Gaussian has {self.affine.loc.shape[0]} dims, the target {target.dim}")
        none = torch.empty(0, dtype=torch.double)
        return GaussianFit(
            affine=self.affine,
            elbo=math.nan,
            discrepancy=math.nan,
            path_elbo=math.nan,
            num_evaluations=0,
            num_nonfinite=0,
            path_ends=none.reshape(0, target.dim),
            path_log_densities=none,
        )


class _Ends(NamedTuple):
    """Where paths have come to: points (S, D), log densities (S,), scores (S, D)."""

    points: Tensor
    log_densities: Tensor
    scores: Tensor


class BatchAndMatch:
    """The default preconditioner: quasi-Newton paths, the best Gaussian by ELBO, then batch and match.

    Args:
        num_steps: updates a round at most; by default ``max(100, 2 D)`` up to D = 256, then 100 with a dense covariance
            and 150 with a low-rank one.
        batch_size: draws per update, twice as many with a low-rank covariance.
        max_path_steps: quasi-Newton steps per climb at most. Up to D = 256 the first takes 4, each further one up to
            twice as many as the one before.
        max_rounds: rounds at most. Another one, with long steps again, follows while the Gaussian is far off and was
            nearing: in a hundred dimensions one round of small batches may not come all the way.
        max_climbs: climbs per start, each from the end of the one before with its curvature measured anew.
        max_dense_dim: the largest D for a dense covariance. At 650 its 100 updates of 64 draws take 7 seconds, the
            low-rank form's 1 to 3; on a multinomial regression they gained 32 nats of ELBO.
        rank: directions of the low-rank covariance beyond; 0 makes it diagonal.
        candidates_per_path, elbo_draws: how many points of a climb are compared, by how many draws each.
    """

    def __init__(
        self,
        *,
        num_steps: int | None = None,
        batch_size: int = 64,
        max_path_steps: int = 200,
        max_climbs: int = 5,
        max_rounds: int = 3,
        max_dense_dim: int = 1024,
        rank: int = 32,
        candidates_per_path: int = 12,
        elbo_draws: int = 16,
    ) -> None:
        if (num_steps is not None and num_steps < 0) or batch_size < 2:
            raise ArgumentError(f"expected num_steps >= 0 and batch_size >= 2, got {num_steps} and {batch_size}")
        for name, value in (
            ("max_path_steps", max_path_steps),
            ("max_climbs", max_climbs),
            ("max_rounds", max_rounds),
            ("rank + 1", rank + 1),
            ("candidates_per_path", candidates_per_path),
            ("elbo_draws", elbo_draws),
        ):
            if value < 1:
                raise ArgumentError(f"expected {name} of at least 1, got {value}")
        self.num_steps, self.batch_size = num_steps, batch_size
        self.max_path_steps, self.max_climbs, self.max_dense_dim = max_path_steps, max_climbs, max_dense_dim
        self.max_rounds = max_rounds
        self.rank = rank
        self.candidates_per_path, self.elbo_draws = candidates_per_path, elbo_draws

    def fit(self, target: TargetDensity, starts: Tensor) -> GaussianFit:
        """Fit a Gaussian to ``target`` from finite starting points ``starts (S, D)``."""
        scored = ScoredTarget(target)
        scored.measure_eps(starts.double())
        dense = target.dim <= self.max_dense_dim
        climbs, ends = self._climb(scored, starts.double(), dense)
        start, path_elbo = self._best_by_elbo(scored, climbs, ends)
        scored.anchor(start.loc)
        guards: Counter[str] = Counter()
        num_steps = self._default_steps(target.dim) if self.num_steps is None else self.num_steps
        low_rank = LowRankMatch(self.rank)
        affine = _dense(start) if dense else low_rank.cut(start)
        elbo, discrepancy = -math.inf, math.inf
        for _ in range(self.max_rounds):
            matched = match(
                scored,
                affine,
                batch_and_match_dense if dense else low_rank,
                num_steps,
                self.batch_size if dense else 2 * self.batch_size,
                regularization=float(max(target.dim, self.batch_size) if dense else 2 * self.batch_size),
                guards=guards,
            )
            last_elbo, (new_elbo, new_discrepancy) = elbo, self._judge(scored, matched)
            if not new_elbo > last_elbo and math.isfinite(last_elbo):
                break
            affine, elbo, discrepancy = matched, new_elbo, new_discrepancy
            if discrepancy <= _CLOSE or elbo - last_elbo < max(_WORTHWHILE_ROUND, _WORTHWHILE_PER_DIM * target.dim):
                break
        resolution = 100.0 * scored.eps * affine.loc.abs()
        return GaussianFit(
            affine=affine,
            elbo=elbo,
            discrepancy=discrepancy,
            path_elbo=path_elbo,
            num_evaluations=scored.num_evaluations,
            num_nonfinite=scored.num_nonfinite,
            path_ends=ends.points,
            path_log_densities=ends.log_densities,
            guards=dict(+guards),
            unresolved=tuple((affine.variances.sqrt() < resolution).nonzero()[:, 0].tolist()),
        )

    def _default_steps(self, dim: int) -> int:
        """Fewer beyond D = 256, where a dense covariance is a measured one, and an update takes D^3 operations."""
        if dim > self.max_dense_dim:
            return 150
        return max(100, 2 * dim) if dim <= _MAX_BFGS_DIM else 100

    def _climb(self, target: ScoredTarget, starts: Tensor, dense: bool) -> tuple[list[QuasiNewtonPaths], _Ends]:
        """Paths from the starts, and on from their ends with the curvature measured there, while that gains.

        Climbs are short at first, as the neck of a funnel is entered in a few steps, and candidates are needed before.
        Beyond D = 256 the first is long and of limited memory, and only the best end is climbed on from.
        """
        is_large = target.dim > _MAX_BFGS_DIM
        ends = _Ends(starts.clone(), *target(starts))
        going = torch.arange(len(starts), device=starts.device)
        max_steps = self.max_path_steps if is_large or not dense else min(_FIRST_STEPS, self.max_path_steps)
        climbs: list[QuasiNewtonPaths] = []
        while len(climbs) < (self.max_climbs if dense else 1) and len(going) > 0:
            x, log_density, score = (values[going] for values in ends)
            measures = dense and not (is_large and not climbs)
            climb = quasi_newton_paths(
                target,
                x,
                max_steps,
                start_inverse=_measured_inverse(target, x, score) if measures else None,
                memory=None if measures else _MEMORY,
                noise=target.noise,
            )
            climbs.append(climb)
            ends.points[going], ends.log_densities[going], ends.scores[going] = (
                climb.ends,
                climb.end_log_densities,
                climb.end_scores,
            )
            if measures:
                gained = climb.end_log_densities - log_density > _WORTHWHILE + target.noise * log_density.abs()
                going = going[gained]
            else:
                going = ends.log_densities.argmax()[None]
            max_steps = min(2 * max_steps, self.max_path_steps)
        return climbs, ends

    def _best_by_elbo(
        self, target: ScoredTarget, climbs: Iterable[QuasiNewtonPaths], ends: _Ends
    ) -> tuple[AffineMap, float]:
        """The path Gaussian with the highest ELBO that a few draws each can vouch for, and its ELBO.

        What is compared is the estimate less four of its standard errors. Where log p is a small difference of large
        terms, as of log gamma functions at arguments of 1e9 in float32, it is nothing but rounding, of thousands of
        nats to either side, and the highest of many estimates would be one of those.
        """
        # The same for all: what is compared differs by less, and how many there are leaves later draws as they are.
        noise = torch.randn(self.elbo_draws, target.dim, dtype=torch.double, device=ends.points.device)
        best, best_elbo, best_bound = None, -math.inf, -math.inf
        for climb in climbs:
            for candidate in climb.gaussians(self.candidates_per_path):
                log_density, _ = target(candidate.forward(noise))
                elbo, error = _elbo(log_density, noise, candidate)
                if elbo - _NUM_ERRORS * error > best_bound:
                    best, best_elbo, best_bound = candidate, elbo, elbo - _NUM_ERRORS * error
        if best is None:  # every draw of every candidate was non-finite: start small at the best end point
            end = ends.points[ends.log_densities.argmax()]
            scale = torch.full_like(end, 1e-2)
            best = AffineMap(end, scale.diag() if target.dim <= self.max_dense_dim else scale)
        return best, best_elbo

    def _judge(self, target: ScoredTarget, affine: AffineMap) -> tuple[float, float]:
        """ELBO and discrepancy of a Gaussian, on fresh draws."""
        y = torch.randn(256, target.dim, dtype=torch.double, device=affine.loc.device)
        log_density, score = target(affine.forward(y))
        finite = log_density.isfinite()
        if not bool(finite.any()):
            return -math.inf, math.inf
        elbo, _ = _elbo(log_density[finite], y[finite], affine)
        y, score = y[finite], affine.pull_back(score[finite])
        # y'y and y's have the same expectation where q is right: their difference has less noise than y's + 1.
        discrepancy = torch.maximum((score + y).mean(0).abs(), (y * (score + y)).mean(0).abs())
        return elbo, float(discrepancy.max())


def _dense(gaussian: AffineMap) -> AffineMap:
    """The same Gaussian with a triangular factor."""
    if gaussian.is_dense:
        return gaussian
    covariance = gaussian.covariance
    covariance = covariance.diag() if covariance.dim() == 1 else covariance
    return AffineMap(gaussian.loc, torch.linalg.cholesky(covariance))


def _measured_inverse(target: ScoredTarget, x: Tensor, score: Tensor) -> DenseInverse:
    """H at points, from differences of scores."""
    return DenseInverse.measured(measured_inverse_hessians(target, x, score, torch.ones_like(x), target.noise))


def _elbo(log_density: Tensor, y: Tensor, affine: AffineMap) -> tuple[float, float]:
    """``E_q[log p - log q]`` and its standard error, from log densities at ``affine.forward(y)``.

    No entropy is put in for the mean of -log q: the errors of the two logarithms cancel where q is nearly right. The
    ELBO is minus infinity if a log density is NaN.
    """
    ratio = log_density + 0.5 * y.square().sum(-1) + affine.log_abs_det + 0.5 * y.shape[1] * math.log(2.0 * math.pi)
    if not bool(ratio.isfinite().all()):
        return -math.inf, 0.0
    return float(ratio.mean()), float(ratio.std(correction=0)) / math.sqrt(len(ratio))
