"""Where to start from: points at which the target is finite."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sivism.errors import NonFiniteError
from pyro_sivism.target.density import Target

__all__ = ["check_finite_start", "find_starts"]

_MAX_TRIES = 100


def find_starts(target: Target, init: Tensor, count: int = 4) -> Tensor:
    """At most ``count`` finite starting points: ``init (D,)``, and draws from U(-2, 2) around the origin.

    Raises:
        NonFiniteError: none of many was finite.
    """

    def uniform(number: int) -> Tensor:
        return 4.0 * torch.rand(number, target.dim, dtype=init.dtype, device=init.device) - 2.0

    starts = torch.cat([init[None], uniform(count - 1)])
    log_density, score = target.log_density_and_score(starts)
    if not bool((log_density.isfinite() & score.isfinite().all(-1)).any()):
        starts = torch.cat([init[None], uniform(_MAX_TRIES)])
    return check_finite_start(target, starts)[:count]


def check_finite_start(target: Target, starts: Tensor) -> Tensor:
    """The rows of ``starts (S, D)`` with finite log density and score.

    Raises:
        NonFiniteError: there is none; the message names the sites that are non-finite at the first.
    """
    log_density, score = target.log_density_and_score(starts)
    finite = log_density.isfinite() & score.isfinite().all(-1)
    if not finite.any():
        sites = target.nonfinite_sites(starts[0])
        where = f"site(s) {', '.join(sites)}" if sites else "the score (the log densities are finite)"
        raise NonFiniteError(
            f"the log density or score is not finite at any of {len(starts)} starting points; at the first, the "
            f"cause is {where}. Check the data for NaN (under a mask too: its gradient is still NaN, so use "
            "torch.nan_to_num) and the observed values against their supports, or give a feasible start: "
            "SemiImplicitGuide(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values=...))."
        )
    return starts[finite]
