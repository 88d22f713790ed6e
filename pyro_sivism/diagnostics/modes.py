"""Modes of p that q has no draws in, or too few: scores at q's draws cannot know of them.

Quasi-Newton paths climb log p from draws of q ("home") and from draws blown up around q's mean ("far"). The end of a
far path is a separate mode if, in the frame where q has covariance I,

1. it is a maximum: log p has negative curvature all around, ``-H`` with inverse ``C`` positive definite, and has
   converged;
2. no path from a draw of q has ended there;
3. a valley separates it: on the line to the nearest home end log p falls by ``min_dip`` nats below the lower of the
   two. A plateau, a ridge or a heavy tail has none;
4. it is no work of roundings, as where log p is the difference of huge numbers: at points that differ by a few rounding
   units log p is the same.

Its mass is that of Laplace's method, ``log p + log |C| / 2``, improved by importance sampling where that can be done:
draws from a Student t of the mode's shape, each weighed by p, those nearer to another mode left out. A separate mode is
*lost* if its share matters and q has hardly any draws there. If q has draws in all of them, their numbers can still be
wrong: neither scores nor local moves of the draws see the weights of modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Chi2

from pyro_sivism.diagnostics.moments import Frame, finite_rows
from pyro_sivism.family import AffineMap, TargetDensity, WhitenedTarget
from pyro_sivism.family.quasi_newton import quasi_newton_paths
from pyro_sivism.family.scored_target import ScoredTarget

__all__ = ["Mode", "ModeSearch", "find_modes"]

_MAX_DENSE_DIM = 512  # beyond it curvatures are those along the coordinates alone
_MORE_STEPS = 4  # as many times the steps are spent on the paths from q's draws if none comes to a maximum
_MAX_CANDIDATES = 8  # ends whose curvature is measured, the highest ones
_DIFFERENCE = 0.03  # half the width of central differences of scores, in sds of q or of the mode
_CURVATURE_PASSES = 3
_MAX_DECREMENT = 0.1  # squared Newton step, in sds of the mode per dimension, of what has converged
_TOLERANCE = 0.01  # the same, all told, at which a path ends
_SAME_DISTANCE = 3.0  # two ends nearer than this, in sds of the mode per sqrt(D), are one
_MIN_EXPECTED = 5.0
_LINE_POINTS = 33
_NUM_NUDGES, _NUDGE, _MAX_ROUNDING = 4, 2.0, 0.5  # rounding units, nats
_MAX_LOST_FRACTION = 0.1  # a mode is lost if q has less than this part of the draws it should have there
_PROPOSAL_DRAWS, _PROPOSAL_DF, _MIN_EFFECTIVE = 1000, 5.0, 100.0


@dataclass(frozen=True)
class Mode:
    """A separate mode of p.

    Attributes:
        x: where its maximum is, (D,).
        displacement: from q's mean, in q's sds of each coordinate, (D,).
        share: of the mass of all modes found.
        draw_share: of q's draws, each counted for the mode it is nearest to.
        is_lost: whether it matters and q has hardly any draws in it.
    """

    x: Tensor
    displacement: Tensor
    share: float
    draw_share: float
    is_lost: bool

    @property
    def effect(self) -> float:
        """What it does to the sd of the coordinate in which it is furthest off, log2 of with it over without it: a
        thousandth of the mass a hundred sds away is most of a variance."""
        return 0.5 * math.log2(1.0 + self.share * self.displacement.abs().max().item() ** 2)


@dataclass(frozen=True)
class ModeSearch:
    """What the search found.

    Attributes:
        modes: the separate modes, largest share first; empty where no path from q's draws came to a maximum, so that
            there is nothing to compare others with: an unbounded density, or a very long ridge.
        weight_error: half the sum of ``|share - draw_share|``; NaN where importance sampling could not tell the shares
            well enough, which are then Laplace's, right to a factor of a few.
        num_starts: paths climbed.
        num_evaluations: log densities and scores of single points computed.
    """

    modes: tuple[Mode, ...]
    weight_error: float
    num_starts: int
    num_evaluations: int

    @property
    def lost(self) -> tuple[Mode, ...]:
        return tuple(mode for mode in self.modes if mode.is_lost)


def find_modes(
    target: TargetDensity,
    x: Tensor,
    *,
    extra_starts: Tensor | None = None,
    blow_up: float = 6.0,
    num_home: int = 8,
    num_far: int = 24,
    max_steps: int = 40,
    min_share: float = 0.01,
    min_effect: float = 0.17,
    min_dip: float = 2.0,
) -> ModeSearch:
    """Look for modes of ``target`` and compare their masses with where q's draws ``x (N, D)`` are.

    Args:
        target: the log density and score that x lives in.
        x: independent draws of q.
        extra_starts: further far starts (S, D), such as the ends of the preconditioner's own paths.
        blow_up: how far out the far starts are, in q's sds.
        num_home, num_far: how many paths of each kind.
        max_steps: quasi-Newton steps per path.
        min_share: the least share of the mass that matters.
        min_effect: the least :attr:`Mode.effect` that matters where the share does not, and where q is to have at least
            five draws in the mode: that there are none says nothing otherwise.
        min_dip: how deep a valley separates modes, in nats.

    Raises:
        ArgumentError: fewer than 50 draws, or a coordinate does not vary.

    Example:

        >>> class TwoModes:
        ...     dim = 1
        ...     def log_density_and_score(self, x):
        ...         log_density = -0.5 * (x.abs() - 4.0).square().sum(-1)
        ...         return log_density, x.sign() * (4.0 - x.abs())
        >>> _ = torch.manual_seed(0)
        >>> mode, = find_modes(TwoModes(), 4.0 + torch.randn(1000, 1)).lost
        >>> round(mode.x.item(), 2), round(mode.share, 1)
        (-4.0, 0.5)
    """
    x = x[finite_rows(x)].double()
    frame = Frame.of(x)
    y = frame.affine.inverse(x)
    counter = ScoredTarget(WhitenedTarget(target, frame.affine))
    counter.measure_eps(y[:1])
    far = blow_up * y[num_home : num_home + num_far]
    if extra_starts is not None:
        far = torch.cat([far, frame.affine.inverse(extra_starts.double())])
    home, far = _inside(counter, y[:num_home]), _inside(counter, far)
    ends, values = _climb(counter, torch.cat([home, far]), max_steps)  # together: each step is one batch of scores
    sizes = [len(home), len(far)]
    (home_ends, far_ends), (home_values, far_values) = ends.split(sizes), values.split(sizes)
    peaks = _distinct_maxima(counter, frame.affine, home_ends, home_values)
    if not peaks:
        home_ends, home_values = _climb(counter, home_ends, _MORE_STEPS * max_steps)
        peaks = _distinct_maxima(counter, frame.affine, home_ends, home_values)
    if not peaks:
        return ModeSearch((), math.nan, sum(sizes), counter.num_evaluations)

    new = []
    for peak in _distinct_maxima(counter, frame.affine, far_ends, far_values):
        at_home = any(peak.holds(end) for end in home_ends)
        if not at_home and _dip_from_nearest(counter, peak, home_ends, home_values) >= min_dip:
            new.append(peak)
    peaks = _separate(counter, peaks + new, min_dip)

    log_masses, reliable = _log_masses(counter, peaks)
    shares = log_masses.softmax(0)
    draw_shares = torch.nn.functional.one_hot(_nearest(peaks, y), len(peaks)).double().mean(0)
    modes = []
    for peak, share, draw_share in zip(peaks, shares.tolist(), draw_shares.tolist()):
        displacement = frame.along_coordinates(peak.y[None])[0]
        mode = Mode(frame.affine.forward(peak.y), displacement, share, draw_share, is_lost=False)
        has_effect = mode.effect >= min_effect and share * len(y) >= _MIN_EXPECTED
        matters = peak in new and (share >= min_share or has_effect)
        is_lost = matters and peak.fraction_within(y) < _MAX_LOST_FRACTION * share
        modes.append(replace(mode, is_lost=is_lost))
    modes.sort(key=lambda mode: -mode.share)
    return ModeSearch(
        modes=tuple(modes),
        weight_error=0.5 * (shares - draw_shares).abs().sum().item() if reliable else math.nan,
        num_starts=sum(sizes),
        num_evaluations=counter.num_evaluations,
    )


@dataclass(frozen=True, eq=False)
class _Maximum:
    """A maximum of log p at ``y (D,)``: curvatures ``-H`` (D, D), or (D,) if diagonal, and their log determinant."""

    y: Tensor
    log_density: float
    precision: Tensor
    log_det: float  # of the precision

    @property
    def log_mass(self) -> float:
        """By Laplace's method, in units of ``(2 pi)^(D/2)``."""
        return self.log_density - 0.5 * self.log_det

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


def _inside(target: ScoredTarget, starts: Tensor) -> Tensor:
    """The starts, those where log p is not finite pulled half way to the centre a few times, then left out."""
    for _ in range(4):
        is_inside = target(starts)[0].isfinite()
        if bool(is_inside.all()):
            return starts
        starts = torch.where(is_inside[:, None], starts, 0.5 * starts)
    return starts[target(starts)[0].isfinite()]


def _climb(target: ScoredTarget, starts: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
    """The ends (S, D) of the paths from the starts, and log p there, (S,)."""
    if len(starts) == 0:
        return starts, starts.new_zeros(0)
    paths = quasi_newton_paths(target, starts, max_steps, tolerance=_TOLERANCE, noise=target.noise)
    return paths.ends, paths.end_log_densities


def _distinct_maxima(target: ScoredTarget, affine: AffineMap, ends: Tensor, values: Tensor) -> list[_Maximum]:
    """The maxima among the highest ends of paths, highest first, each once; ``affine`` leads to the target's own x."""
    found: list[_Maximum] = []
    num_tried = 0
    for i in values.argsort(descending=True).tolist():
        if num_tried == _MAX_CANDIDATES:
            break
        if any(mode.holds(ends[i]) for mode in found):
            continue
        num_tried += 1
        mode = _maximum(target, ends[i], values[i].item())
        if mode is not None and _is_resolved(target, affine, mode):
            found.append(mode)
    return found


def _is_resolved(target: ScoredTarget, affine: AffineMap, mode: _Maximum) -> bool:
    """Whether log p is the same at points a few rounding units of x away."""
    x = affine.forward(mode.y)
    signs = torch.outer(torch.arange(1.0, _NUM_NUDGES + 1), torch.arange(1.0, len(x) + 1)).cos().sign().to(x)
    values, _ = target(affine.inverse(x * (1.0 + _NUDGE * target.eps * signs)))
    return bool((values - mode.log_density).abs().max() < _MAX_ROUNDING)


def _maximum(target: ScoredTarget, y: Tensor, log_density: float) -> _Maximum | None:
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
    return _Maximum(y, log_density, precision, log_det)


def _curvature(target: ScoredTarget, y: Tensor, step: Tensor) -> Tensor:
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


def _dip(target: ScoredTarget, a: Tensor, b: Tensor, lower: float) -> float:
    """How far log p falls below ``lower`` on the line between two points (D,)."""
    fraction = torch.linspace(0.0, 1.0, _LINE_POINTS, dtype=a.dtype, device=a.device)[:, None]
    log_density, _ = target(a.lerp(b, fraction))
    return lower - log_density.nan_to_num(nan=-math.inf).min().item()


def _dip_from_nearest(target: ScoredTarget, peak: _Maximum, ends: Tensor, values: Tensor) -> float:
    """On the line from the nearest of the ends (S, D), where log p has the given values, to a maximum."""
    i = int((ends - peak.y).norm(dim=-1).argmin())
    return _dip(target, ends[i], peak.y, min(peak.log_density, values[i].item()))


def _separate(target: ScoredTarget, peaks: Sequence[_Maximum], min_dip: float) -> list[_Maximum]:
    """The maxima, by descending mass, between all of which there are valleys."""
    kept: list[_Maximum] = []
    for peak in sorted(peaks, key=lambda peak: -peak.log_mass):
        lines = (_dip(target, other.y, peak.y, min(peak.log_density, other.log_density)) for other in kept)
        if all(dip >= min_dip for dip in lines):
            kept.append(peak)
    return kept


def _nearest(peaks: Sequence[_Maximum], points: Tensor) -> Tensor:
    """For each point (N, D), the maximum whose Gaussian approximation of log p is highest there, (N,)."""
    return torch.stack([peak.log_density - 0.5 * peak.square_distance(points) for peak in peaks]).argmax(0)


def _log_masses(target: ScoredTarget, peaks: Sequence[_Maximum]) -> tuple[Tensor, bool]:
    """The log mass of each mode in units of ``(2 pi)^(D/2)``, and whether they can be relied on.

    By importance sampling if its effective sample size is enough at every mode, by Laplace's method otherwise. A single
    mode needs no mass.
    """
    laplace = torch.tensor([peak.log_mass for peak in peaks], dtype=torch.double, device=peaks[0].y.device)
    if len(peaks) < 2:
        return laplace, True
    masses = []
    for k, peak in enumerate(peaks):
        points, log_proposal = _student_t(peak)
        log_density, _ = target(points)
        log_weights = (log_density - log_proposal).nan_to_num(nan=-math.inf)
        log_weights = torch.where(_nearest(peaks, points) == k, log_weights, -math.inf)
        effective = (2.0 * log_weights.logsumexp(0) - (2.0 * log_weights).logsumexp(0)).exp()
        if not effective >= _MIN_EFFECTIVE:
            return laplace, False
        masses.append(log_weights.logsumexp(0) - math.log(len(points)))
    return torch.stack(masses) - 0.5 * target.dim * math.log(2.0 * math.pi), True


def _student_t(peak: _Maximum) -> tuple[Tensor, Tensor]:
    """Draws (N, D) from a multivariate Student t of the mode's shape, and its log density there, (N,)."""
    dim, df = len(peak.y), _PROPOSAL_DF
    noise = torch.randn(_PROPOSAL_DRAWS, dim, dtype=peak.y.dtype, device=peak.y.device)
    if peak.precision.dim() == 1:
        steps = noise * peak.precision.rsqrt()
    else:
        steps = torch.linalg.solve_triangular(torch.linalg.cholesky(peak.precision).mT, noise.T, upper=True).T
    spread = (Chi2(noise.new_tensor(df)).sample((_PROPOSAL_DRAWS, 1)) / df).rsqrt()
    log_constant = math.lgamma(0.5 * (df + dim)) - math.lgamma(0.5 * df) - 0.5 * dim * math.log(df * math.pi)
    square_distance = (noise * spread).square().sum(-1)
    log_proposal = log_constant + 0.5 * peak.log_det - 0.5 * (df + dim) * (square_distance / df).log1p()
    return peak.y + steps * spread, log_proposal
