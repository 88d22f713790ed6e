"""Quasi-Newton paths uphill from several starts at once.

BFGS keeps an estimate H of the inverse of ``-hessian log p``; a path is a sequence of points, scores and H.
All starts step together, so that one batched evaluation of the target serves them all. The line search
brackets a point of sufficient increase and flattened slope (the weak Wolfe conditions) by doubling and
bisection: doubling finds optima thousands of units away, bisection backs out of non-finite regions.
Nocedal and Wright, "Numerical optimization", 2006, chapters 3 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sivism.family.affine import AffineMap

__all__ = ["QuasiNewtonPaths", "quasi_newton_paths"]

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class QuasiNewtonPaths:
    """S paths of at most T steps: points, scores and inverse Hessians, with the length of each path.

    ``inverse_hessians`` are (T, S, D, D), or (T, S, D) if diagonal.
    """

    points: Tensor
    scores: Tensor
    log_densities: Tensor
    inverse_hessians: Tensor
    lengths: Tensor

    @property
    def is_diagonal(self) -> bool:
        return self.inverse_hessians.dim() == 3

    @property
    def ends(self) -> Tensor:
        """The last point of each path, (S, D)."""
        return self._at_end(self.points)

    @property
    def end_log_densities(self) -> Tensor:
        return self._at_end(self.log_densities)

    def _at_end(self, values: Tensor) -> Tensor:
        return values[self.lengths - 1, torch.arange(values.shape[1], device=values.device)]

    def gaussians(self, per_path: int) -> Iterator[AffineMap]:
        """For each path, Gaussians ``N(x + H score, H)`` at up to ``per_path`` points, batched in one map."""
        for path, length in enumerate(self.lengths.tolist()):
            index = torch.linspace(0, length - 1, min(per_path, length)).round().long()
            x, score, inverse_hessian = (
                values[index, path] for values in (self.points, self.scores, self.inverse_hessians)
            )
            if self.is_diagonal:
                yield AffineMap(x + inverse_hessian * score, inverse_hessian.sqrt())
                continue
            scale_tril, info = torch.linalg.cholesky_ex(inverse_hessian)
            loc = x + (inverse_hessian @ score[..., None])[..., 0]
            ok = (info == 0) & loc.isfinite().all(-1)
            if ok.any():
                yield AffineMap(loc[ok], scale_tril[ok])


def quasi_newton_paths(
    evaluate: Evaluate, starts: Tensor, max_steps: int, *, diagonal: bool = False, tolerance: float = 1e-6
) -> QuasiNewtonPaths:
    """BFGS paths uphill from ``starts (S, D)``, which must be finite.

    Args:
        evaluate: points (B, D) -> log densities (B,) and scores (B, D), NaN where undefined.
        max_steps: at most so many steps a path; a path ends earlier when its log density stops rising.
        diagonal: keep a diagonal H, for large D.
        tolerance: a path ends when a step raises the log density by less than this.
    """
    num_paths, dim = starts.shape
    x = starts.clone()
    log_density, score = evaluate(x)
    # The first step moves each path by about one unit; its outcome then sets the scale of H.
    h = (1.0 / score.norm(dim=-1).clamp(min=1e-12))[:, None].expand(num_paths, dim).clone()
    h = h if diagonal else torch.diag_embed(h)
    active = torch.ones(num_paths, dtype=torch.bool, device=x.device)
    lengths = torch.ones(num_paths, dtype=torch.long, device=x.device)
    history: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    first = active.clone()
    for step in range(max_steps):
        direction = _apply(h, score)
        slope = (direction * score).sum(-1)
        new_x, new_log_density, new_score, ok = _line_search(evaluate, x, direction, log_density, slope, active)
        moved, bent = new_x - x, score - new_score
        curved = ok & ((moved * bent).sum(-1) > 1e-12 * moved.norm(dim=-1) * bent.norm(dim=-1))
        h = _update(h, moved, bent, curved, first & curved)
        first &= ~curved
        rose = new_log_density - log_density
        x, log_density, score = new_x, new_log_density, new_score
        history.append((x, score, log_density, h))
        lengths = torch.where(ok, step + 1, lengths)
        active &= ok & (rose > tolerance)
        if not active.any():
            break
    points, scores, log_densities, hs = (torch.stack(values) for values in zip(*history))
    return QuasiNewtonPaths(points, scores, log_densities, hs, lengths)


def _line_search(
    evaluate: Evaluate, x: Tensor, direction: Tensor, f0: Tensor, slope0: Tensor, active: Tensor, max_tries: int = 30
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A step along each ``direction`` that meets the weak Wolfe conditions, by doubling and bisection.

    Returns the new points, log densities and scores, and which paths found any increase. Paths that are not
    ``active``, or found none, stay where they are.
    """
    best_x, best_f, best_score = x.clone(), f0.clone(), torch.zeros_like(x)
    low = torch.zeros_like(f0)
    high = torch.full_like(f0, torch.inf)
    length = torch.ones_like(f0)
    searching = active.clone()
    found = torch.zeros_like(active)
    for _ in range(max_tries):
        index = searching.nonzero()[:, 0]
        trial = x[index] + length[index, None] * direction[index]
        f, score = evaluate(trial)
        slope = (score * direction[index]).sum(-1)
        rises = f >= f0[index] + 1e-4 * length[index] * slope0[index]  # False where f is NaN
        flat = slope <= 0.9 * slope0[index]

        better = rises & (f >= best_f[index])
        chosen = index[better]
        best_x[chosen], best_f[chosen], best_score[chosen] = trial[better], f[better], score[better]
        found[chosen] = True

        high[index] = torch.where(rises, high[index], length[index])
        low[index] = torch.where(rises & ~flat, length[index], low[index])
        searching[index[rises & flat]] = False
        length[index] = torch.where(high[index].isinf(), 2.0 * length[index], 0.5 * (low[index] + high[index]))
        if not searching.any():
            break
    if not found.all():
        _, score = evaluate(best_x[~found])
        best_score[~found] = score
    return best_x, best_f, best_score, found


def _apply(h: Tensor, vector: Tensor) -> Tensor:
    return h * vector if h.dim() == 2 else (h @ vector[..., None])[..., 0]


def _update(h: Tensor, moved: Tensor, bent: Tensor, curved: Tensor, first: Tensor) -> Tensor:
    """The BFGS update of the inverse Hessian where the curvature along the step was positive.

    On a path's first step H is reset to ``(s'y / y'y) I``, so that its scale is the target's.
    """
    s, y = moved, bent
    sy = (s * y).sum(-1).where(curved, 1.0)
    yy = (y * y).sum(-1).where(curved, 1.0)
    if h.dim() == 2:
        h = torch.where(first[:, None], (sy / yy)[:, None].expand_as(h), h)
        # The diagonal of the dense update (Gilbert and Lemarechal 1989), kept positive by construction.
        inverse = 1.0 / h
        yhy, shs = (h * y * y).sum(-1, keepdim=True), (inverse * s * s).sum(-1, keepdim=True)
        ratio = yhy / sy[:, None]
        inverse = ratio * inverse + y * y / sy[:, None] - ratio * (inverse * s).square() / shs.clamp(min=1e-300)
        updated = 1.0 / inverse.clamp(min=1e-12)
        return torch.where(curved[:, None] & updated.isfinite(), updated, h)
    identity = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    h = torch.where(first[:, None, None], (sy / yy)[:, None, None] * identity, h)
    rho = (1.0 / sy)[:, None, None]
    projector = identity - rho * s[:, :, None] * y[:, None, :]
    updated = projector @ h @ projector.mT + rho * s[:, :, None] * s[:, None, :]
    return torch.where(curved[:, None, None], 0.5 * (updated + updated.mT), h)
