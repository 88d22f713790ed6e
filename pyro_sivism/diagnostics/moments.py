"""Errors of q's means and standard deviations, in the units in which they are judged.

Instruments see how the first two moments of a standardized coordinate g (mean 0 and sd 1 under q) would change from q
to p: ``d1 = E_p[g] - E_q[g]`` and ``d2 = E_p[g^2] - E_q[g^2]``. The sd of p in sds of q is then
``r = sqrt(1 + d2 - d1^2)``, and the errors of q are

    mean     (E_q[g] - E_p[g]) / sd_p[g]  =  -d1 / r
    log2_sd  log2(sd_q / sd_p)            =  -log2(r)

so that ``log2_sd = -1`` is an sd half as large as it should be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pyro_sivism.errors import ArgumentError, NonFiniteError
from pyro_sivism.family import AffineMap

__all__ = ["CUT_OFF", "LARGE_ERROR", "NUM_STANDARD_ERRORS", "Frame", "MomentErrors", "finite_rows", "standard_error"]

# A dense covariance of q is estimated from at least so many draws per dimension: its eigenvalues are then right to
# about 2 sqrt(1/8) / 2 = 35% at worst, which is enough of a frame. With fewer the frame is diagonal.
_MIN_DRAWS_PER_DIM = 8
_MIN_DRAWS = 50

# Second moments are those of coordinates cut off at so many sds, so that a heavy tail does not drown them.
CUT_OFF = 5.0

# The smallest sd of p, in sds of q, that an extrapolation is trusted to have found.
_MIN_SD = 0.25

# Errors are judged by what is left of them after so many standard errors. The largest of a hundred is then off by
# chance by little more than one standard error, which is .02 with 4,096 draws.
NUM_STANDARD_ERRORS = 2.0

LARGE_ERROR = 0.5  # sds, or log2 of an sd


@dataclass(frozen=True)
class MomentErrors:
    """Errors of q's mean and sd in K directions, with Monte Carlo standard errors; each (K,), float64.

    Attributes:
        mean: ``(E_q - E_p) / sd_p``: positive where q's mean is too high.
        mean_se: its standard error.
        log2_sd: ``log2(sd_q / sd_p)``: negative where q's sd is too small.
        log2_sd_se: its standard error.
        sure_mean, sure_log2_sd: what is left of the errors when the changes they come from are pulled
            ``NUM_STANDARD_ERRORS`` of their standard errors towards none: 0 where Monte Carlo noise would do.
    """

    mean: Tensor
    mean_se: Tensor
    log2_sd: Tensor
    log2_sd_se: Tensor
    sure_mean: Tensor
    sure_log2_sd: Tensor

    @classmethod
    def from_changes(cls, first: Tensor, first_se: Tensor, second: Tensor, second_se: Tensor) -> MomentErrors:
        """From the changes ``d1`` and ``d2`` from q to p of the module docstring, and their standard errors."""
        change = second - first.square()
        change_se = (second_se.square() + (2.0 * first * first_se).square()).sqrt()
        variance = (1.0 + change).clamp(min=_MIN_SD**2)
        sure_variance = (1.0 + _shrink(change, change_se)).clamp(min=_MIN_SD**2)
        return cls(
            mean=-first / variance.sqrt(),
            mean_se=first_se / variance.sqrt(),
            log2_sd=-0.5 * variance.log2(),
            log2_sd_se=change_se / (2.0 * math.log(2.0) * variance),
            sure_mean=-_shrink(first, first_se) / sure_variance.sqrt(),
            sure_log2_sd=-0.5 * sure_variance.log2(),
        )

    def largest(self) -> float:
        """The largest error, beyond what chance makes the largest of 2 K: ``sqrt(2 log 4K)`` standard errors."""
        sure = torch.cat([self.sure_mean, self.sure_log2_sd]).abs()
        se = torch.cat([self.mean_se, self.log2_sd_se])
        chance = max(0.0, math.sqrt(2.0 * math.log(2.0 * len(sure))) - NUM_STANDARD_ERRORS) * se
        # A large error is one whatever its standard error, which may be as large where q is far off.
        return torch.where(sure > LARGE_ERROR, sure, (sure - chance).clamp(min=0.0)).max().item()

    def upper_bound(self) -> Tensor:
        """The larger error of mean or sd in each direction, with ``NUM_STANDARD_ERRORS`` added, (K,)."""
        mean = self.mean.abs() + NUM_STANDARD_ERRORS * self.mean_se
        return torch.maximum(mean, self.log2_sd.abs() + NUM_STANDARD_ERRORS * self.log2_sd_se)

    def at_places(self, places: Sequence[int], own: Sequence[int], count: int) -> MomentErrors:
        """The errors in our directions ``own`` as those in the directions ``places`` of so many; 0 in the others."""
        full = {field.name: getattr(self, field.name).new_zeros(count) for field in fields(self)}
        for name, values in full.items():
            values[list(places)] = getattr(self, name)[list(own)]
        return MomentErrors(**full)

    def limited(self, other: MomentErrors, where: Tensor) -> MomentErrors:
        """These errors, in the directions of ``where (K,)`` no larger than the other's with two standard errors."""
        mean = torch.where(where, other.mean.abs() + NUM_STANDARD_ERRORS * other.mean_se, torch.inf)
        log2_sd = torch.where(where, other.log2_sd.abs() + NUM_STANDARD_ERRORS * other.log2_sd_se, torch.inf)
        return replace(
            self,
            mean=self.mean.clamp(-mean, mean),
            log2_sd=self.log2_sd.clamp(-log2_sd, log2_sd),
            sure_mean=self.sure_mean.clamp(-mean, mean),
            sure_log2_sd=self.sure_log2_sd.clamp(-log2_sd, log2_sd),
        )


def _shrink(change: Tensor, se: Tensor) -> Tensor:
    return change.sign() * (change.abs() - NUM_STANDARD_ERRORS * se).clamp(min=0.0)


@dataclass(frozen=True)
class Frame:
    """The coordinates in which q has mean 0 and covariance I, from its own draws.

    Attributes:
        affine: from whitened ``y`` to ``x``; diagonal where there are too few draws for a dense covariance.
        directions: (D, D), row i the unit vector in ``y`` along which ``x_i`` varies: ``directions @ y`` are the
            coordinates of x, each standardized. None for the identity, which a diagonal frame has.
    """

    affine: AffineMap
    directions: Tensor | None

    @classmethod
    def of(cls, x: Tensor) -> Frame:
        """The frame of draws ``x (N, D)``.

        Raises:
            ArgumentError: fewer than 50 draws, or a coordinate that does not vary.
        """
        num_draws, dim = x.shape
        if num_draws < _MIN_DRAWS:
            raise ArgumentError(f"expected at least {_MIN_DRAWS} draws, got {num_draws}")
        loc, sd = x.mean(0), x.std(0, correction=0)
        if not bool((sd > 0).all()):
            raise ArgumentError(
                f"expected draws that vary, but coordinates {(sd == 0).nonzero()[:, 0].tolist()} do not"
            )
        diagonal = cls(AffineMap(loc, sd), None)
        if dim == 1 or num_draws < _MIN_DRAWS_PER_DIM * dim:
            return diagonal
        correlation = ((x - loc) / sd).T.cov(correction=0)
        root, info = torch.linalg.cholesky_ex(correlation)
        if int(info) > 0:  # collinear to rounding
            return diagonal
        return cls(AffineMap(loc, sd[:, None] * root), root / root.norm(dim=-1, keepdim=True))

    def along_coordinates(self, y: Tensor) -> Tensor:
        """The components of ``y (N, D)`` along each coordinate of x, (N, D)."""
        return y if self.directions is None else y @ self.directions.T

    def loadings(self, direction: Tensor) -> Tensor:
        """A unit vector ``v`` of y -> how much a move along it changes each coordinate of x, in its sds, (D,)."""
        return direction if self.directions is None else self.directions @ direction


def finite_rows(x: Tensor, *values: Tensor) -> Tensor:
    """Which draws ``x (N, D)`` are finite together with all ``values (N, ...)`` there, (N,).

    Raises:
        ArgumentError: the shapes do not fit.
        NonFiniteError: fewer than half the rows are finite.
    """
    shapes = [tuple(value.shape) for value in (x, *values)]
    if x.dim() != 2 or any(shape[:1] != shapes[0][:1] for shape in shapes):
        raise ArgumentError(f"expected draws (N, D) and values at each of them, got shapes {shapes}")
    finite = torch.stack([value.isfinite().reshape(len(x), -1).all(-1) for value in (x, *values)]).all(0)
    if 2 * int(finite.sum()) < len(x):
        raise NonFiniteError(
            f"the target's density or score is finite at only {int(finite.sum())} of {len(x)} draws of q, too few to "
            "judge by. Check the model for overflow; float64 data often cures it."
        )
    return finite


def standard_error(values: Tensor, num_blocks: int = 1) -> Tensor:
    """The standard error of ``values (N, ...)``'s mean over its first dim.

    With ``num_blocks`` > 1 from the means of so many consecutive blocks, so that noise which the draws of a block
    share, such as a random minibatch of the data, is counted.
    """
    if num_blocks == 1:
        return values.std(0) / math.sqrt(len(values))
    means = torch.stack([block.mean(0) for block in values.tensor_split(num_blocks)])
    return means.std(0) / math.sqrt(num_blocks)
