"""Where Hamiltonian Monte Carlo takes the draws of q: a fit that is right stays where it is.

Every draw of q starts a chain of a few trajectories that leave p invariant (``chains.py``). If q = p, the ends are
distributed as the starts, whatever p, so that any change of a moment beyond Monte Carlo noise is an error of q.
Curvature, skewness, tails and cut-off supports, which low-order statistics of draws and scores cannot see, all show.

The distribution functions of each coordinate are compared as well, for what moments leave open, and what lies far
out: moments are those of coordinates cut off at 5 sds, lest a heavy tail drown them, and a hundredth of the mass at 15
sds is most of a variance. What far ends of p that q lacks add to it is

    far_i = 1/2 log2( 1 + E_p[(y_i^2 - 25)_+] - E_q[(y_i^2 - 25)_+] ),

in log2 of the sd of the standardized coordinate y_i. Few chains come there, so that one standard error is taken off the
change and not two: in 150 sets of chains from exact draws of funnels and of Student's t with 4 and 5 degrees of freedom
none was above .17 then.

What q lacks is often a tail, or the narrow end of a curved ridge, that no chain starts in: moments then move long after
the chains have forgotten where they started. There are therefore more trajectories where something is found, twice as
many each time, until it is nothing or certain. What is compared with the draws are the chains in the second half of
their trajectories.

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

import torch
from torch import Tensor

from pyro_sivism.diagnostics.chains import Chains
from pyro_sivism.diagnostics.moments import (
    CUT_OFF,
    LARGE_ERROR,
    NUM_STANDARD_ERRORS,
    Frame,
    MomentErrors,
    standard_error,
)
from pyro_sivism.diagnostics.stein import WorstDirection
from pyro_sivism.diagnostics.two_sample import kolmogorov_smirnov

__all__ = ["DriftStatistics", "drift_statistics"]

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
        far_change, far_change_se: of the expectation in the formula above from q to p, and its standard error, (D,).
        far_share, far_share_of_draws: how much of the chains' ends, and of q's draws, is over 5 sds out, (D,).
        acceptance: the mean acceptance rate.
        stuck: the fraction of chains that never moved.
        num_evaluations: log densities and scores of single points computed.
        num_draws: chains.
        num_trajectories: of each, that were looked at.
    """

    coordinates: MomentErrors
    direction: WorstDirection | None
    correlation: Tensor
    distance: Tensor
    far_change: Tensor
    far_change_se: Tensor
    far_share: Tensor
    far_share_of_draws: Tensor
    acceptance: float
    stuck: float
    num_evaluations: int
    num_draws: int
    num_trajectories: int

    @property
    def far(self) -> Tensor:
        """The formula above, less one standard error of the change, (D,); 0 where q lacks nothing."""
        return _as_log2_sd(self.far_change - self.far_change_se)

    def largest(self) -> float:
        """The largest error of a moment or by a far end, beyond what chance makes the largest of so many."""
        chance = math.sqrt(2.0 * math.log(2.0 * len(self.far_change)))
        far = _as_log2_sd(self.far_change - chance * self.far_change_se)
        return max(self.coordinates.largest(), far.max().item())

    def limit(self, errors: MomentErrors) -> MomentErrors:
        """Errors that another instrument found, no larger than chains that have forgotten their starts allow.

        Chains measure a moment, where Stein's identity extrapolates: in a hierarchy of 200 groups sds that were all off
        by one percent added up to a mean of the groups' scale that was off by .3 sds, by Stein's, and by .03 in truth.
        """
        return errors.limited(self.coordinates, self.correlation < _FORGOTTEN)

    def rules_out(self, error: float, distance: float) -> bool:
        """Whether chains that have forgotten their starts rule out, by two standard errors, that a mean or an sd is off
        by ``error``, and see no distribution function off by ``distance``."""
        far = _as_log2_sd(self.far_change + NUM_STANDARD_ERRORS * self.far_change_se)
        largest = torch.maximum(self.coordinates.upper_bound(), far).max()
        return bool(largest < error and self.distance.max() < distance and self.correlation.max() < _FORGOTTEN)


def drift_statistics(
    chains: Chains,
    *,
    min_trajectories: int = 0,
    max_trajectories: int = _MAX_TRAJECTORIES,
    large_error: float = LARGE_ERROR,
) -> DriftStatistics:
    """Errors of q's moments from where chains take its draws.

    512 chains from 8,192 draws give standard errors of .03 sds, at 50 to 200 evaluations a chain where nothing is
    found.

    Args:
        chains: from draws of q; they are run on.
        min_trajectories, max_trajectories: of each chain. They are looked at after 8 trajectories, or half of
            ``min_trajectories`` if that is more, then after twice as many each time, and end where an error beyond
            chance is large, or where nothing is found after ``min_trajectories``.
        large_error: what is large, in sds or log2 of an sd.

    Example:

        >>> class Normal:
        ...     dim = 1
        ...     def score(self, x):
        ...         return -x
        ...     def log_density_and_score(self, x):
        ...         return -0.5 * x.square().sum(-1), -x
        >>> _ = torch.manual_seed(0)
        >>> errors = drift_statistics(Chains(Normal(), 1.0 + torch.randn(1024, 1))).coordinates
        >>> round(errors.mean.item())
        1
    """
    frame, before = chains.frame, torch.cat([chains.starts, chains.others])
    num_trajectories = min(max(_FIRST_TRAJECTORIES, min_trajectories // 2), max_trajectories)
    while True:
        late = chains.run(num_trajectories).late
        draws, arrived = frame.along_coordinates(before), frame.along_coordinates(late)
        coordinates, correlation = _moment_errors(draws, arrived)
        far_change, far_change_se = _far_changes(draws, arrived)
        found, forgotten = coordinates.largest(), bool(correlation.max() < _FORGOTTEN)
        is_nothing = max(found, _as_log2_sd(far_change).max().item()) < _NOTHING and forgotten
        is_nothing = is_nothing and num_trajectories >= min_trajectories
        if is_nothing or found > large_error or num_trajectories == max_trajectories:
            break
        num_trajectories = min(2 * num_trajectories, max_trajectories)
    return DriftStatistics(
        coordinates=coordinates,
        direction=_worst_direction(frame, before, late),
        correlation=correlation,
        distance=kolmogorov_smirnov(draws, arrived.flatten(0, 1)),
        far_change=far_change,
        far_change_se=far_change_se,
        far_share=(arrived.abs() > CUT_OFF).double().mean((0, 1)),
        far_share_of_draws=(draws.abs() > CUT_OFF).double().mean(0),
        acceptance=chains.acceptance,
        stuck=chains.stuck,
        num_evaluations=chains.num_evaluations,
        num_draws=len(chains.starts),
        num_trajectories=chains.num_trajectories,
    )


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


def _far_changes(before: Tensor, late: Tensor) -> tuple[Tensor, Tensor]:
    """How ``E[(y^2 - 25)_+]`` changes from q to p in K standardized coordinates, and the standard errors, (K,)."""
    own, ends = ((values.square() - CUT_OFF**2).clamp(min=0.0) for values in (before, late))
    of_chains = ends.mean(0)
    return of_chains.mean(0) - own.mean(0), torch.hypot(standard_error(of_chains), standard_error(own))


def _as_log2_sd(change: Tensor) -> Tensor:
    """What more of a variance makes of an sd of 1."""
    return 0.5 * change.clamp(min=0.0).log1p() / math.log(2.0)


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
