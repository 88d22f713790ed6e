"""Modes of p that q has no draws in: scores at q's draws cannot know of them, so they have to be looked for.

Quasi-Newton paths climb log p from draws of q ("home") and from draws blown up around q's mean ("far"). Where a far
path ends is a lost mode if all of this holds, in the frame where q has covariance I:

1. it is a maximum: log p has negative curvature all around, ``-H`` with inverse ``C`` positive definite;
2. no path from a draw of q has ended there, and q has far fewer draws within C of it than its share of the mass;
3. a valley separates it: on the line to the nearest home end log p falls by ``min_dip`` nats below the lower of the
   two. A plateau, a ridge or a heavy tail has none;
4. its mass matters: by Laplace's method ``log mass = log p + log |C| / 2``, which is compared with that of home.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sivism.diagnostics.moments import Frame, finite_rows
from pyro_sivism.family import TargetDensity, WhitenedTarget
from pyro_sivism.family.quasi_newton import quasi_newton_paths

__all__ = ["LostMode", "ModeSearch", "find_lost_modes"]

_MAX_DENSE_DIM = 512  # beyond it curvatures are those along the coordinates alone
_DIFFERENCE = 0.03  # half the width of central differences of scores, in sds of q or of the mode
_CURVATURE_PASSES = 3
_MAX_DECREMENT = 0.1  # squared Newton step, in sds of the mode per dimension, of what has converged
_SAME_DISTANCE = 3.0  # two ends nearer than this, in sds of the mode per sqrt(D), are one
_LINE_POINTS = 33


@dataclass(frozen=True)
class LostMode:
    """A mode that q has no draws in.

    Attributes:
        x: where it is, (D,).
        displacement: from q's mean, in q's sds of each coordinate, (D,).
        share: its mass over the sum of its and home's, by Laplace's method: right to a factor of a few.
        dip: how far log p falls on the straight line to it, in nats.
    """

    x: Tensor
    displacement: Tensor
    share: float
    dip: float


@dataclass(frozen=True)
class ModeSearch:
    """What the search found.

    Attributes:
        lost: the lost modes, largest share first.
        num_modes: distinct maxima found, home's included.
        num_starts: paths climbed.
        num_evaluations: log densities and scores of single points computed.
    """

    lost: tuple[LostMode, ...]
    num_modes: int
    num_starts: int
    num_evaluations: int


def find_lost_modes(
    target: TargetDensity,
    x: Tensor,
    *,
    extra_starts: Tensor | None = None,
    blow_up: float = 6.0,
    num_home: int = 16,
    num_far: int = 32,
    max_steps: int = 100,
    min_share: float = 0.01,
    min_dip: float = 2.0,
) -> ModeSearch:
    """Look for modes of ``target`` in which q, seen through its draws ``x (N, D)``, has no mass.

    Args:
        target: the log density and score that x lives in.
        x: independent draws of q.
        extra_starts: further far starts (S, D), such as the ends of the preconditioner's own paths.
        blow_up: how far out the far starts are, in q's sds.
        num_home, num_far: how many paths of each kind.
        max_steps: quasi-Newton steps per path.
        min_share, min_dip: what counts as a mode, see above.

    Raises:
        ArgumentError: fewer than 50 draws, or a coordinate does not vary.

    Example:

        >>> class TwoModes:
        ...     dim = 1
        ...     def log_density_and_score(self, x):
        ...         log_density = -0.5 * (x.abs() - 4.0).square().sum(-1)
        ...         return log_density, x.sign() * (4.0 - x.abs())
        >>> _ = torch.manual_seed(0)
        >>> mode, = find_lost_modes(TwoModes(), 4.0 + torch.randn(1000, 1)).lost
        >>> round(mode.x.item(), 2), round(mode.share, 2)
        (-4.0, 0.5)
    """
    x = x[finite_rows(x)].double()
    frame = Frame.of(x)
    counter = _Counter(WhitenedTarget(target, frame.affine))
    y = frame.affine.inverse(x)
    far = blow_up * y[num_home : num_home + num_far]
    if extra_starts is not None:
        far = torch.cat([far, frame.affine.inverse(extra_starts.double())])
    home_ends, home_values = _climb(counter, y[:num_home], max_steps)
    far_ends, far_values = _climb(counter, far, max_steps)

    home = _distinct_maxima(counter, home_ends, home_values)
    candidates = _distinct_maxima(counter, far_ends, far_values)
    new = [mode for mode in candidates if not any(mode.holds(end) for end in home_ends)]
    # Without a maximum at home (an unbounded density, say), q itself stands for it: E_q[log p] plus its entropy.
    home_mass = max((mode.log_mass for mode in home), default=-math.inf)
    if not home:
        log_density, _ = counter(y[: min(len(y), 1000)])
        home_mass = log_density[log_density.isfinite()].mean().item() + 0.5 * counter.dim
    lost = []
    for mode in new:
        share = 1.0 / (1.0 + math.exp(min(700.0, home_mass - mode.log_mass)))
        if share < min_share or mode.fraction_within(y) > 0.1 * share:
            continue
        dip = _dip(counter, mode, home_ends, home_values)
        if dip >= min_dip:
            displacement = frame.along_coordinates(mode.y[None])[0]
            lost.append(LostMode(frame.affine.forward(mode.y), displacement, share, dip))
    lost.sort(key=lambda mode: -mode.share)
    return ModeSearch(tuple(lost), len(home) + len(new), len(home_ends) + len(far_ends), counter.num_evaluations)


class _Counter:
    """The whitened target in float64, counting its evaluations."""

    def __init__(self, target: WhitenedTarget) -> None:
        self._target, self.dim, self.num_evaluations = target, target.dim, 0

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self.num_evaluations += len(y)
        log_density, score = self._target.log_density_and_score(y)
        finite = log_density.isfinite() & score.isfinite().all(-1)
        return (
            torch.where(finite, log_density, torch.nan).double(),
            torch.where(finite[:, None], score, torch.nan).double(),
        )


@dataclass(frozen=True)
class _Maximum:
    """A maximum of log p at ``y (D,)``: curvatures ``-H`` (D, D), or (D,) if diagonal, and its Laplace mass."""

    y: Tensor
    log_density: float
    precision: Tensor
    log_mass: float

    def square_distance(self, points: Tensor) -> Tensor:
        """From points (N, D), in the metric of the mode, (N,)."""
        difference = points - self.y
        along = difference * self.precision if self.precision.dim() == 1 else difference @ self.precision
        return (difference * along).sum(-1)

    def holds(self, point: Tensor) -> bool:
        """Whether a point is no further from the maximum than its own draws are."""
        return bool(self.square_distance(point[None]) < _SAME_DISTANCE**2 * len(self.y))

    def fraction_within(self, points: Tensor) -> float:
        """Of points, where a Gaussian of this shape has all but one in 10^4 of its own."""
        dim = len(self.y)
        return (self.square_distance(points) < dim + 4.0 * math.sqrt(2.0 * dim) + 4.0).double().mean().item()


def _climb(target: _Counter, starts: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
    """The ends (S, D) of the paths from the starts, and log p there, (S,).

    A start where log p is not finite is pulled half way to the centre a few times, then left out.
    """
    for _ in range(4):
        log_density, _ = target(starts)
        starts = torch.where(log_density.isfinite()[:, None], starts, 0.5 * starts)
    starts = starts[target(starts)[0].isfinite()]
    if len(starts) == 0:
        return starts, starts.new_zeros(0)
    paths = quasi_newton_paths(target, starts, max_steps)
    return paths.ends, paths.end_log_densities


def _distinct_maxima(target: _Counter, ends: Tensor, values: Tensor) -> list[_Maximum]:
    """The maxima among the ends of paths, highest first, each once."""
    found: list[_Maximum] = []
    for i in values.argsort(descending=True).tolist():
        if any(mode.holds(ends[i]) for mode in found):
            continue
        mode = _maximum(target, ends[i], values[i].item())
        if mode is not None:
            found.append(mode)
    return found


def _maximum(target: _Counter, y: Tensor, log_density: float) -> _Maximum | None:
    """The maximum at the end ``y (D,)`` of a path, or None if that is no maximum, or not near enough to one.

    Curvatures are measured over steps in proportion to the sds they imply, so that narrow maxima are seen as such.
    """
    step = torch.full_like(y, _DIFFERENCE)
    for _ in range(_CURVATURE_PASSES):
        precision = _curvature(target, y, step)
        curvatures = precision if precision.dim() == 1 else precision.diagonal()
        if not bool((curvatures > 0).all()):
            return None
        step = _DIFFERENCE * curvatures.rsqrt().clamp(max=1.0)
    log_det = _log_det(precision)
    if log_det is None:
        return None
    _, score = target(y[None])
    newton = score[0] / precision if precision.dim() == 1 else torch.linalg.solve(precision, score[0])
    if not bool((newton * score[0]).sum() < _MAX_DECREMENT * len(y)):
        return None
    return _Maximum(y, log_density, precision, log_density - 0.5 * log_det)


def _curvature(target: _Counter, y: Tensor, step: Tensor) -> Tensor:
    """``-hessian log p`` at ``y (D,)`` by central differences of scores: (D, D), or its diagonal (D,) for large D."""
    steps = torch.diag(step)
    _, ahead = target(y + steps)
    _, behind = target(y - steps)
    hessian = (ahead - behind) / (2.0 * step[:, None])
    return -hessian.diagonal() if len(y) > _MAX_DENSE_DIM else -0.5 * (hessian + hessian.T)


def _log_det(precision: Tensor) -> float | None:
    """None where it is not positive definite."""
    if precision.dim() == 1:
        return precision.log().sum().item() if bool((precision > 0).all()) else None
    if not bool(precision.isfinite().all()):
        return None
    root, info = torch.linalg.cholesky_ex(precision)
    return None if int(info) > 0 else 2.0 * root.diagonal().log().sum().item()


def _dip(target: _Counter, mode: _Maximum, home_ends: Tensor, home_values: Tensor) -> float:
    """How far log p falls below the lower end of the line from the nearest home end to the mode."""
    nearest = int((home_ends - mode.y).norm(dim=-1).argmin())
    fraction = torch.linspace(0.0, 1.0, _LINE_POINTS, dtype=mode.y.dtype, device=mode.y.device)[:, None]
    log_density, _ = target(home_ends[nearest].lerp(mode.y, fraction))
    lowest = log_density.nan_to_num(nan=-math.inf).min().item()
    return min(mode.log_density, home_values[nearest].item()) - lowest
