"""Quasi-Newton paths uphill from several starts at once.

A path is a sequence of points, scores and estimates H of the inverse of ``-hessian log p``. All starts step
together, so that one batched evaluation of the target serves them all. The line search brackets a point of
sufficient increase and flattened slope (the weak Wolfe conditions) by doubling and bisection: doubling finds
optima far away, bisection backs out of non-finite regions. Where the increase drowns in the rounding of the log
density, as near the optimum of a long sum in float32, the slopes alone decide, as in the approximate Wolfe
conditions of Hager and Zhang (SIAM J. Optim. 16, 2005). Nocedal and Wright, "Numerical optimization", 2006,
chapters 3 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sivism.family.affine import AffineMap
from pyro_sivism.family.inverse_hessians import DenseInverse, InverseHessian, LimitedInverse

__all__ = ["Evaluate", "QuasiNewtonPaths", "quasi_newton_paths"]

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]

FLOAT64_NOISE = 1e-14
_SUFFICIENT = 1e-4
_FLAT = 0.9
_MAX_STALLS = 4
# Once a step has gained enough, so many bisections are spent on a flatter slope.
_MAX_BISECTIONS = 5


@dataclass(frozen=True)
class QuasiNewtonPaths:
    """S paths of at most T points, the start included, and what is needed to follow H along each.

    Attributes:
        points, scores: (T, S, D).
        log_densities: (T, S).
        curved: (T - 1, S), whether the curvature along a step was positive, so that H was updated by it.
        lengths: points of each path, (S,).
        start: H at the starts.
    """

    points: Tensor
    scores: Tensor
    log_densities: Tensor
    curved: Tensor
    lengths: Tensor
    start: InverseHessian

    @property
    def ends(self) -> Tensor:
        """The last point of each path, (S, D)."""
        return self._at_end(self.points)

    @property
    def end_log_densities(self) -> Tensor:
        return self._at_end(self.log_densities)

    @property
    def end_scores(self) -> Tensor:
        return self._at_end(self.scores)

    def _at_end(self, values: Tensor) -> Tensor:
        return values[self.lengths - 1, torch.arange(values.shape[1], device=values.device)]

    def inverse_hessians(self, path: int) -> Iterator[InverseHessian]:
        """H at each point of a path, made anew from its steps: keeping all of them would cost T D^2."""
        h = self.start.select(path)
        yield h
        for step in range(int(self.lengths[path]) - 1):
            moved, bent = self._step(path, step)
            h = h.update(moved, bent, self.curved[step, path : path + 1])
            yield h

    def _step(self, path: int, step: int) -> tuple[Tensor, Tensor]:
        one = slice(path, path + 1)
        moved = self.points[step + 1, one] - self.points[step, one]
        return moved, self.scores[step, one] - self.scores[step + 1, one]

    def gaussians(self, per_path: int) -> Iterator[AffineMap]:
        """Gaussians ``N(x + H score, H)`` at up to ``per_path`` points of each path, its end among them.

        And ``N(x, H)`` at its start, where Newton's step may go too far.
        """
        for path, length in enumerate(self.lengths.tolist()):
            at_start = self.start.select(path).gaussian(self.points[0, path], torch.zeros_like(self.scores[0, path]))
            if at_start is not None:
                yield at_start
            chosen = set(torch.linspace(length - 1, 0, min(per_path, length)).round().long().tolist())
            for step, h in enumerate(self.inverse_hessians(path)):
                if step in chosen:
                    gaussian = h.gaussian(self.points[step, path], self.scores[step, path])
                    if gaussian is not None:
                        yield gaussian


def quasi_newton_paths(
    evaluate: Evaluate,
    starts: Tensor,
    max_steps: int,
    *,
    start_inverse: InverseHessian | None = None,
    memory: int | None = None,
    tolerance: float = 1e-8,
    noise: float = FLOAT64_NOISE,
) -> QuasiNewtonPaths:
    """Paths uphill from ``starts (S, D)``, which must be finite.

    Args:
        evaluate: points (B, D) -> log densities (B,) and scores (B, D), NaN where undefined.
        max_steps: at most so many steps a path.
        start_inverse: H at the starts; by default a multiple of the identity that moves each start by one unit.
        memory: keep H as a diagonal and so many pairs, for large D; BFGS with a dense H if None.
        tolerance: a path ends where ``score' H score``, twice the gain a Newton step expects, is less than this,
            or where several steps in a row neither gained anything nor halved it.
        noise: the relative rounding error of log densities and scores.
    """
    num_paths, dim = starts.shape
    x = starts.clone()
    log_density, score = evaluate(x)
    if start_inverse is None:
        scale = 1.0 / score.norm(dim=-1).clamp(min=1e-12)
        start_inverse = DenseInverse.start(scale, dim) if memory is None else LimitedInverse.start(scale, dim, memory)
    h = start_inverse
    active = torch.ones(num_paths, dtype=torch.bool, device=x.device)
    lengths = torch.ones(num_paths, dtype=torch.long, device=x.device)
    num_stalls, least_slope = torch.zeros_like(lengths), torch.full_like(log_density, torch.inf)
    history, curved_history = [(x, score, log_density)], []
    for step in range(max_steps):
        direction = h.apply(score)
        slope = (direction * score).sum(-1)
        active &= slope > tolerance
        if not active.any():
            break
        new_x, new_log_density, new_score, ok = _line_search(
            evaluate, x, direction, log_density, score, slope, active, noise
        )
        moved, bent = new_x - x, score - new_score
        rounding = noise * (moved * score).abs().sum(-1)
        curved = ok & ((moved * bent).sum(-1) > rounding)
        h = h.update(moved, bent, curved)
        stalled = new_log_density - log_density <= torch.clamp(noise * log_density.abs(), min=1e-6)
        stalled &= slope > 0.5 * least_slope
        least_slope = torch.minimum(least_slope, slope)
        num_stalls = torch.where(stalled, num_stalls + 1, 0)
        x, log_density, score = new_x, new_log_density, new_score
        history.append((x, score, log_density))
        curved_history.append(curved)
        lengths = torch.where(ok, step + 2, lengths)
        active &= ok & (num_stalls < _MAX_STALLS)
    points, scores, log_densities = (torch.stack(values) for values in zip(*history))
    curved = torch.stack(curved_history) if curved_history else active.new_zeros(0, num_paths)
    return QuasiNewtonPaths(points, scores, log_densities, curved, lengths, start_inverse)


def _line_search(
    evaluate: Evaluate,
    x: Tensor,
    direction: Tensor,
    f0: Tensor,
    score0: Tensor,
    slope0: Tensor,
    active: Tensor,
    noise: float,
    max_tries: int = 60,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A step along each ``direction`` that meets the (approximate) weak Wolfe conditions, by doubling and bisection.

    Returns the new points, log densities and scores, and which paths found any increase. Paths that are not
    ``active``, or found none, stay where they are.
    """
    best_x, best_f, best_score = x.clone(), f0.clone(), score0.clone()
    low = torch.zeros_like(f0)
    high = torch.full_like(f0, torch.inf)
    length = torch.ones_like(f0)
    searching = active.clone()
    found = torch.zeros_like(active)
    num_bisections = torch.zeros_like(f0)
    rounding = noise * f0.abs()
    for _ in range(max_tries):
        index = searching.nonzero()[:, 0]
        trial = x[index] + length[index, None] * direction[index]
        f, score = evaluate(trial)
        slope = (score * direction[index]).sum(-1)
        # Each is False where f is NaN.
        rises = f >= f0[index] + _SUFFICIENT * length[index] * slope0[index]
        rises |= (f >= f0[index] - rounding[index]) & (slope >= -(1.0 - 2.0 * _SUFFICIENT) * slope0[index])
        flat = slope <= _FLAT * slope0[index]

        better = rises & ((f >= best_f[index] - rounding[index]) | flat)
        chosen = index[better]
        best_x[chosen], best_f[chosen], best_score[chosen] = trial[better], f[better], score[better]
        found[chosen] = True

        high[index] = torch.where(rises, high[index], length[index])
        low[index] = torch.where(rises & ~flat, length[index], low[index])
        searching[index[rises & flat]] = False
        length[index] = torch.where(high[index].isinf(), 2.0 * length[index], 0.5 * (low[index] + high[index]))
        num_bisections += searching & ~high.isinf()
        searching &= _bracket_holds(x, direction, low, high) & ~(found & (num_bisections >= _MAX_BISECTIONS))
        if not searching.any():
            break
    return best_x, best_f, best_score, found


def _bracket_holds(x: Tensor, direction: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whether the bracket still holds points that differ in floating point."""
    return ((high - low)[:, None] * direction.abs() > 1e-16 * x.abs()).any(-1)
