"""Where Hamiltonian Monte Carlo takes the draws of q: a fit that is right stays where it is.

Every draw of q starts a chain of a few trajectories that leave p invariant (Duane, Kennedy, Pendleton, Roweth,
"Hybrid Monte Carlo", Physics Letters B 1987). If q = p, the ends are distributed as the starts, whatever p, so that any
change of a moment beyond Monte Carlo noise is an error of q. Curvature, skewness, tails and cut-off supports, which
low-order statistics of draws and scores cannot see, all show.

The distribution functions of each coordinate are compared as well, for what moments leave open.

What q lacks is often a tail, or the narrow end of a curved ridge, that no chain starts in: moments then move long after
the chains have forgotten where they started. Steps are therefore smaller than q's own draws ask for, as p may be more
curved where q has none; trajectories of a time up to about pi, in the frame that whitens q, go to the other side of q
and beyond; and there are more of them where something is found, twice as many each time, until it is nothing or
certain. What is compared with the draws are the chains in the second half of their trajectories.

Slow chains go part of the way. If a coordinate g has correlation rho between starts and ends, its mean relaxes as
``E_t[g] - E_p[g] = rho (E_0[g] - E_p[g])``, exactly so for an eigenfunction of the chain, and hence

    E_p[g] - E_q[g]  =  (E_t[g] - E_0[g]) / (1 - rho),

with the standard error of a ratio of two means. Where rho stays above .8 the coordinate hardly ever is one such
function: part of it moves, and part stays, as between modes, so that changes are not extrapolated further and the
verdict says that nothing can be said. ``modes.py`` looks for modes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sivism.diagnostics.moments import CUT_OFF, LARGE_ERROR, Frame, MomentErrors, finite_rows
from pyro_sivism.diagnostics.stein import WorstDirection
from pyro_sivism.diagnostics.two_sample import kolmogorov_smirnov
from pyro_sivism.family import TargetDensity, WhitenedTarget

__all__ = ["DriftStatistics", "drift_statistics"]

_TRAJECTORY_TIME = math.pi
_MAX_LEAPFROG_STEPS = 48
_NUM_PILOTS = 256
_MAX_HALVINGS = 6
# The acceptance for which steps are halved, and the one that is enough once more steps would cut trajectories short.
_WANTED_ACCEPTANCE, _ENOUGH_ACCEPTANCE = 0.92, 0.7
_FIRST_TRAJECTORIES, _MAX_TRAJECTORIES = 8, 32
_FORGOTTEN = 0.4  # a correlation with the starts
_NOTHING = 0.05  # an error beyond chance; between it and a large one more trajectories may tell more
_MAX_CORRELATION = 0.8  # up to which changes are extrapolated; beyond it the verdict vouches for nothing


@dataclass(frozen=True)
class DriftStatistics:
    """What the chains say about q.

    Attributes:
        coordinates: the errors of each coordinate of x, K = D.
        direction: the direction in which the spread changed most; None where D = 1 or the draws are too few.
        correlation: of each coordinate, or of its square if larger, between the starts and the second half of the
            trajectories, (D,): near 1 the chains hardly moved.
        distance: of each coordinate, the largest difference between its distribution functions in q's draws and in the
            chains (Kolmogorov and Smirnov's), (D,). By chance .01 to .03.
        acceptance: the mean acceptance rate.
        stuck: the fraction of chains that never moved.
        num_evaluations: log densities and scores of single points computed.
        num_draws: chains.
        num_trajectories: of each.
    """

    coordinates: MomentErrors
    direction: WorstDirection | None
    correlation: Tensor
    distance: Tensor
    acceptance: float
    stuck: float
    num_evaluations: int
    num_draws: int
    num_trajectories: int

    def limit(self, errors: MomentErrors) -> MomentErrors:
        """Errors that another instrument found, no larger than chains that have forgotten their starts allow.

        Chains measure a moment, where Stein's identity extrapolates: in a hierarchy of 200 groups sds that were all off
        by one percent added up to a mean of the groups' scale that was off by .3 sds, by Stein's, and by .03 in truth.
        """
        return errors.limited(self.coordinates, self.correlation < _FORGOTTEN)

    def rules_out(self, error: float, distance: float) -> bool:
        """Whether chains that have forgotten their starts rule out, by two standard errors, that a mean or an sd is off
        by ``error``, and see no distribution function off by ``distance``."""
        largest = self.coordinates.upper_bound().max()
        return bool(largest < error and self.distance.max() < distance and self.correlation.max() < _FORGOTTEN)


def drift_statistics(
    target: TargetDensity,
    x: Tensor,
    *,
    num_chains: int | None = None,
    min_trajectories: int = 0,
    max_trajectories: int = _MAX_TRAJECTORIES,
    large_error: float = LARGE_ERROR,
) -> DriftStatistics:
    """Errors of q's moments from where chains take its draws ``x (N, D)``.

    Args:
        target: the log density and score that x lives in; exact, not a random minibatch.
        x: independent draws of q, at least 50.
        num_chains: how many of the draws, the first ones, start a chain; all if None. 512 of 8,192 give standard
            errors of .03 sds, at 50 to 200 evaluations a chain where nothing is found.
        min_trajectories, max_trajectories: of each chain. After 8, 16 and so on they end where an error beyond chance
            is large, and where nothing is found after ``min_trajectories``.
        large_error: what is large, in sds or log2 of an sd.

    Raises:
        ArgumentError: too few draws, or a coordinate does not vary.
        NonFiniteError: p is not finite at most draws.

    Example:

        >>> class Normal:
        ...     dim = 1
        ...     def log_density_and_score(self, x):
        ...         return -0.5 * x.square().sum(-1), -x
        >>> _ = torch.manual_seed(0)
        >>> errors = drift_statistics(Normal(), 1.0 + torch.randn(1024, 1)).coordinates
        >>> round(errors.mean.item())
        1
    """
    starts = x[:num_chains]
    log_density, score = target.log_density_and_score(starts)
    finite = finite_rows(starts, log_density, score)
    others = x[len(starts) :]
    others = others[finite_rows(others)].double() if len(others) else others.double()
    starts = starts[finite].double()
    frame = Frame.of(torch.cat([starts, others]))
    whitened = WhitenedTarget(target, frame.affine)
    start = _State(
        frame.affine.inverse(starts),
        log_density[finite].double() + frame.affine.log_abs_det,
        frame.affine.pull_back(score[finite].double()),
    )
    step_size, num_steps, num_evaluations = _tune(whitened, start)
    before = torch.cat([start.y, frame.affine.inverse(others)])
    end, acceptances = start, []
    ends: list[Tensor] = []
    num_trajectories = min(_FIRST_TRAJECTORIES, max_trajectories)
    while True:
        while len(ends) < num_trajectories:
            end, accepted = _trajectory(whitened, end, step_size, num_steps)
            ends.append(end.y)
            acceptances.append(accepted.mean().item())
        late = torch.stack(ends[len(ends) // 2 :])
        draws, chains = frame.along_coordinates(before), frame.along_coordinates(late)
        coordinates, correlation = _moment_errors(draws, chains)
        found, forgotten = coordinates.largest(), bool(correlation.max() < _FORGOTTEN)
        is_nothing = found < _NOTHING and forgotten and num_trajectories >= min_trajectories
        if is_nothing or found > large_error or num_trajectories == max_trajectories:
            break
        num_trajectories = min(2 * num_trajectories, max_trajectories)
    return DriftStatistics(
        coordinates=coordinates,
        direction=_worst_direction(frame, before, late),
        correlation=correlation,
        distance=kolmogorov_smirnov(draws, chains.flatten(0, 1)),
        acceptance=sum(acceptances) / len(acceptances),
        stuck=(ends[-1] == start.y).all(-1).double().mean().item(),
        num_evaluations=num_evaluations + len(finite) + num_trajectories * num_steps * len(starts),
        num_draws=len(starts),
        num_trajectories=num_trajectories,
    )


class _State(NamedTuple):
    """Points (N, D) with their log densities (N,) and scores (N, D)."""

    y: Tensor
    log_density: Tensor
    score: Tensor

    def where(self, keep: Tensor, other: _State) -> _State:
        """Rows of self where ``keep (N,)``, of the other elsewhere."""
        return _State(
            torch.where(keep[:, None], self.y, other.y),
            torch.where(keep, self.log_density, other.log_density),
            torch.where(keep[:, None], self.score, other.score),
        )


def _tune(target: WhitenedTarget, start: _State) -> tuple[float, int, int]:
    """A step size that nearly all draws accept, the number of leapfrog steps, and the evaluations that took."""
    pilots = _State(*(values[:_NUM_PILOTS] for values in start))
    step_size, num_evaluations = target.dim**-0.25, 0
    for _ in range(_MAX_HALVINGS):
        num_steps = min(_MAX_LEAPFROG_STEPS, math.ceil(_TRAJECTORY_TIME / step_size))
        _, accepted = _trajectory(target, pilots, step_size, num_steps)
        num_evaluations += num_steps * len(pilots.y)
        enough = _ENOUGH_ACCEPTANCE if num_steps == _MAX_LEAPFROG_STEPS else _WANTED_ACCEPTANCE
        if accepted.mean() >= enough:
            break
        step_size *= 0.5
    return step_size, num_steps, num_evaluations


def _trajectory(target: WhitenedTarget, start: _State, step_size: float, num_steps: int) -> tuple[_State, Tensor]:
    """One leapfrog trajectory per row with its Metropolis decision, and the acceptance probabilities (N,)."""
    # Each chain has its own step size: no period of the target is met by all, and some are small enough for necks.
    step = step_size * (0.2 + torch.rand_like(start.log_density))[:, None]
    momentum = torch.randn_like(start.y)
    energy = start.log_density - 0.5 * momentum.square().sum(-1)
    state, inside = start, torch.ones_like(start.log_density, dtype=torch.bool)
    for _ in range(num_steps):
        momentum = momentum + 0.5 * step * state.score
        y = state.y + step * momentum
        moved = _State(y, *target.log_density_and_score(y))
        inside &= moved.log_density.isfinite() & moved.score.isfinite().all(-1)
        state = moved.where(inside, state)  # a chain that has left the support stays, and is rejected below
        momentum = momentum + 0.5 * step * state.score
    change = state.log_density - 0.5 * momentum.square().sum(-1) - energy
    acceptance = torch.where(inside, change, -torch.inf).nan_to_num(nan=-torch.inf).clamp(max=0.0).exp()
    return state.where(torch.rand_like(acceptance) < acceptance, start), acceptance


def _moment_errors(before: Tensor, late: Tensor) -> tuple[MomentErrors, Tensor]:
    """Errors along K standardized coordinates, and the correlations (K,).

    Args:
        before: all draws, (N, K); the first n of them started chains.
        late: where the chains were after each of some trajectories, (T, n, K).
    """
    before, late = before.clamp(-CUT_OFF, CUT_OFF), late.clamp(-CUT_OFF, CUT_OFF)
    num_chains = late.shape[1]
    changes, correlations = [], []
    for start, ends in ((before, late), (before.square(), late.square())):
        products = _standardized(start[:num_chains], 0) * _standardized(ends, (0, 1)).mean(0)  # with mean rho
        rho = products.mean(0).clamp(0.0, _MAX_CORRELATION)
        end, own, mean = ends.mean(0), start[:num_chains], start.mean(0)
        # Chains end by rho times as much too high as their own starts are, by chance, among all draws.
        change = (end.mean(0) - mean - rho * (own.mean(0) - mean)) / (1.0 - rho)
        # What each draw adds to the numerator, and each chain to it and to the denominator, beyond its share.
        deviation = (1.0 - rho) * (mean - start) / len(start)
        residual = end - end.mean(0) - rho * (own - own.mean(0))
        deviation[:num_chains] += (residual + change * (products - products.mean(0))) / num_chains
        changes += [change, deviation.square().sum(0).sqrt() / (1.0 - rho)]
        correlations.append(products.mean(0))
    return MomentErrors.from_changes(*changes), torch.maximum(*correlations)


def _standardized(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """With mean 0 and variance 1 over dims; 1 all over where they do not vary, so that they correlate wholly."""
    centered = values - values.mean(dim)
    sd = centered.square().mean(dim).sqrt()
    return torch.where(sd > 0, centered / sd, 1.0)


def _worst_direction(frame: Frame, before: Tensor, late: Tensor) -> WorstDirection | None:
    """The direction whose second moment changed most on every other chain, judged on the rest.

    It is looked for in a frame of its own, without the draws it is judged on: where all draws together have covariance
    I, the directions in which one half by chance varies less are those in which the other one varies more. None where
    there are too few draws for that.
    """
    num_chains = late.shape[1]
    others = torch.cat([before[:num_chains:2], before[num_chains:]])
    own_frame = Frame.of(others)
    if own_frame.directions is None:
        return None
    own = own_frame.affine
    start, ends = own.inverse(others), own.inverse(late[:, ::2].flatten(0, 1))
    eigenvalues, vectors = torch.linalg.eigh(ends.T @ ends / len(ends) - start.T @ start / len(start))
    v = vectors[:, eigenvalues.abs().argmax()]
    start, ends = own.inverse(before[1:num_chains:2]) @ v, own.inverse(late[:, 1::2]) @ v
    mean, sd = start.mean(), start.std(correction=0)
    errors, _ = _moment_errors((start[:, None] - mean) / sd, (ends[..., None] - mean) / sd)
    direction = own.linear(v)
    return WorstDirection(frame.loadings(direction / direction.norm()), errors)
