"""The curvature of log p in every coordinate's own unit, from differences of scores.

A quasi-Newton H knows the directions its path has taken and guesses the others. Where the sds of a posterior
span many orders of magnitude, as they do in regressions on raw units, the guess can be wrong by all of them, and a
path stops far from the optimum in a direction that it takes for short. One score a coordinate tells::

    -hessian log p  e_i  =  (score(x) - score(x + d_i e_i)) / d_i

with a step d_i of about one conditional sd, which is itself found from the differences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sivism.family.quasi_newton import Evaluate

__all__ = ["measured_inverse_hessians"]

_MAX_ROUNDS = 8


def measured_inverse_hessians(evaluate: Evaluate, x: Tensor, score: Tensor, steps: Tensor, noise: float) -> Tensor:
    """Positive definite inverses of ``-hessian log p`` at points ``x (S, D)``, (S, D, D).

    Directions of negative curvature count as if they were of positive curvature of the same size (the saddle-free
    Newton method of Dauphin et al., NeurIPS 2014), and those that seem flat as if they had the least curvature that
    rounding lets one see.

    Args:
        evaluate: points (B, D) -> log densities and scores.
        x, score: the points and their scores.
        steps: first guesses of d, (S, D).
        noise: the relative rounding error of scores.
    """
    hessian = _difference_hessians(evaluate, x, score, steps, noise)
    scale = hessian.diagonal(dim1=-2, dim2=-1).abs().clamp(min=1e-280).rsqrt()
    unit = scale[:, :, None] * hessian * scale[:, None, :]
    unit = (0.5 * (unit + unit.mT)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    eigenvalues, vectors = torch.linalg.eigh(unit)
    inverse = 1.0 / eigenvalues.abs().clamp(min=max(1e-10, 100.0 * noise))
    return scale[:, :, None] * ((vectors * inverse[:, None, :]) @ vectors.mT) * scale[:, None, :]


def _difference_hessians(evaluate: Evaluate, x: Tensor, score: Tensor, steps: Tensor, noise: float) -> Tensor:
    """``-hessian log p`` column by column, each step adapted until it is about one conditional sd."""
    smallest = (64.0 * noise * x.abs()).clamp(min=1e-150)
    step = torch.maximum(steps, smallest)
    hessian = torch.diag_embed(step**-2)
    pending = torch.ones_like(x, dtype=torch.bool)
    for _ in range(_MAX_ROUNDS):
        path, coordinate = pending.nonzero(as_tuple=True)
        if len(path) == 0:
            break
        rows = torch.arange(len(path), device=x.device)
        d = step[path, coordinate]
        moved = x[path].clone()
        moved[rows, coordinate] += d
        d = moved[rows, coordinate] - x[path, coordinate]  # what rounding left of it
        _, new_score = evaluate(moved)
        bent = score[path] - new_score
        finite = bent.isfinite().all(-1)
        column = bent / d[:, None]
        own = bent[rows, coordinate].abs()
        seen = own > 100.0 * noise * torch.maximum(score[path, coordinate].abs(), new_score[rows, coordinate].abs())
        hessian[path[finite], :, coordinate[finite]] = column[finite]

        # One conditional sd, but no less than what rounding needs.
        want = torch.maximum((own / d).clamp(min=1e-290).rsqrt(), smallest[path, coordinate])
        near = (d > 0.1 * want) & (d < 3.0 * want)
        grown = torch.where(seen, want.clamp(min=1e-3 * d, max=1e3 * d), 100.0 * d)
        smallest[path, coordinate] = torch.where(finite & ~seen, grown, smallest[path, coordinate])
        step[path, coordinate] = torch.where(finite, grown, 0.1 * d)
        pending[path, coordinate] = ~(finite & seen & near)
    return hessian
