"""Where Hamiltonian Monte Carlo takes the draws of q: a fit that is right stays where it is.

Every draw of q starts a chain of a few trajectories that leave p invariant (Duane, Kennedy, Pendleton, Roweth,
"Hybrid Monte Carlo", Physics Letters B 1987). If q = p, the ends are distributed as the starts, whatever p, so that any
change of a moment beyond Monte Carlo noise is an error of q. Curvature, skewness, tails and cut-off supports, which
low-order statistics of draws and scores cannot see, all show.

Short chains go part of the way. If a coordinate g has correlation rho between starts and ends, its mean relaxes as
``E_t[g] - E_p[g] = rho (E_0[g] - E_p[g])``, exactly so for an eigenfunction of the chain, and hence

    E_p[g] - E_q[g]  =  (E_t[g] - E_0[g]) / (1 - rho).

The frame whitens q, where a trajectory of time pi/2 forgets a Gaussian start altogether. The step size is what the
draws themselves accept. Chains do not cross from one mode to another: ``modes.py`` looks for those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sivism.diagnostics.moments import CUT_OFF, Frame, MomentErrors, finite_rows, standard_error
from pyro_sivism.diagnostics.stein import WorstDirection
from pyro_sivism.family import TargetDensity, WhitenedTarget

__all__ = ["DriftStatistics", "drift_statistics"]

_TRAJECTORY_TIME = 0.5 * math.pi
_MAX_LEAPFROG_STEPS = 12
_NUM_PILOTS = 128
_MAX_HALVINGS = 6
_MIN_TRAJECTORIES, _FORGOTTEN = 2, 0.4  # chains stop when no coordinate is correlated more with its start
_WANTED_ACCEPTANCE = 0.7
# Correlations above this are taken for it: what slower coordinates would change by is not extrapolated further.
_MAX_CORRELATION = 0.75


@dataclass(frozen=True)
class DriftStatistics:
    """What the chains say about q.

    Attributes:
        coordinates: the errors of each coordinate of x, K = D.
        direction: the direction in which the spread changed most; None where D = 1 or the frame is diagonal.
        correlation: between the starts and ends of each coordinate, (D,): near 1 the chains hardly moved.
        acceptance: the mean acceptance rate.
        num_evaluations: log densities and scores of single points computed.
        num_draws: chains.
    """

    coordinates: MomentErrors
    direction: WorstDirection | None
    correlation: Tensor
    acceptance: float
    num_evaluations: int
    num_draws: int


def drift_statistics(target: TargetDensity, x: Tensor, *, max_trajectories: int = 6) -> DriftStatistics:
    """Errors of q's moments from where short chains take its draws ``x (N, D)``.

    Args:
        target: the log density and score that x lives in; exact, not a random minibatch.
        x: independent draws of q, at least 50; 1,024 give standard errors of .05 sds, at about 20 evaluations a draw.
        max_trajectories: trajectories per draw, at most; two are enough where they forget their start.

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
    log_density, score = target.log_density_and_score(x)
    finite = finite_rows(x, log_density, score)
    x = x[finite].double()
    frame = Frame.of(x)
    whitened = WhitenedTarget(target, frame.affine)
    start = _State(
        frame.affine.inverse(x),
        log_density[finite].double() + frame.affine.log_abs_det,
        frame.affine.pull_back(score[finite].double()),
    )
    step_size, num_steps, num_evaluations = _tune(whitened, start)
    num_evaluations += len(finite)
    before, end = frame.along_coordinates(start.y), start
    acceptances: list[float] = []
    while len(acceptances) < max_trajectories:
        end, accepted = _trajectory(whitened, end, step_size, num_steps)
        acceptances.append(accepted.mean().item())
        num_evaluations += num_steps * len(x)
        after = frame.along_coordinates(end.y)
        if len(acceptances) >= _MIN_TRAJECTORIES and _correlation(before, after).max() < _FORGOTTEN:
            break
    direction = None if frame.directions is None else _worst_direction(frame, start.y, end.y)
    return DriftStatistics(
        coordinates=_moment_errors(before, after),
        direction=direction,
        correlation=_correlation(before, after),
        acceptance=sum(acceptances) / len(acceptances),
        num_evaluations=num_evaluations,
        num_draws=len(x),
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
    """A step size that most draws accept, the number of leapfrog steps, and the evaluations that took."""
    pilots = _State(*(values[:_NUM_PILOTS] for values in start))
    step_size, num_evaluations = target.dim**-0.25, 0
    for _ in range(_MAX_HALVINGS):
        num_steps = min(_MAX_LEAPFROG_STEPS, math.ceil(_TRAJECTORY_TIME / step_size))
        _, accepted = _trajectory(target, pilots, step_size, num_steps)
        num_evaluations += num_steps * len(pilots.y)
        if accepted.mean() >= _WANTED_ACCEPTANCE:
            break
        step_size *= 0.5
    return step_size, num_steps, num_evaluations


def _trajectory(target: WhitenedTarget, start: _State, step_size: float, num_steps: int) -> tuple[_State, Tensor]:
    """One leapfrog trajectory per row with its Metropolis decision, and the acceptance probabilities (N,)."""
    # Each chain has its own step size: no period of the target is met by all, and some are small enough for necks.
    step = step_size * (0.5 + 0.7 * torch.rand_like(start.log_density))[:, None]
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


def _moment_errors(before: Tensor, after: Tensor) -> MomentErrors:
    """Errors along coordinates from the standardized starts and the ends of the chains, each (N, K)."""
    before, after = before.clamp(-CUT_OFF, CUT_OFF), after.clamp(-CUT_OFF, CUT_OFF)
    changes = []
    for start, end in ((before, after), (before.square(), after.square())):
        part = 1.0 - _correlation(start, end)
        difference = end - start
        changes += [difference.mean(0) / part, standard_error(difference) / part]
    return MomentErrors.from_changes(*changes)


def _correlation(before: Tensor, after: Tensor) -> Tensor:
    """Between columns, within [0, .75]."""
    before, after = before - before.mean(0), after - after.mean(0)
    product = (before * after).mean(0) / (before.square().mean(0) * after.square().mean(0)).sqrt()
    return product.nan_to_num(nan=1.0).clamp(0.0, _MAX_CORRELATION)


def _worst_direction(frame: Frame, before: Tensor, after: Tensor) -> WorstDirection:
    """The direction whose second moment changed most on every other chain, judged on the rest."""
    change = after[::2].T @ after[::2] - before[::2].T @ before[::2]
    eigenvalues, vectors = torch.linalg.eigh(change)
    v = vectors[:, eigenvalues.abs().argmax()]
    errors = _moment_errors((before[1::2] @ v)[:, None], (after[1::2] @ v)[:, None])
    return WorstDirection(frame.loadings(v), errors)
