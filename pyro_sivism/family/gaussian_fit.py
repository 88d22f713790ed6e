"""What a preconditioner hands over: a Gaussian, and how it came about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pyro_sivism.family.affine import AffineMap

__all__ = ["GaussianFit"]


@dataclass(frozen=True)
class GaussianFit:
    """A fitted Gaussian and how it came about.

    Attributes:
        affine: the map ``x = loc + A y``, float64.
        elbo: its ELBO, ``E_q[log p] + entropy`` (NaN where it was given).
        discrepancy: how far the scores at its draws are from those of a Gaussian, in its whitened space: the largest of
            ``|mean s_i|`` and ``|mean y_i s_i + 1|``. 0 for the right Gaussian; about .1 and less is as good as it gets
            on a few hundred draws; above .5 the target is far from it.
        path_elbo: the ELBO of the best Gaussian on the paths.
        num_evaluations: scores computed.
        num_nonfinite: evaluations that were NaN or infinite and were left out.
        guards: how often an update was shortened or skipped, by kind: ``draws_left_out`` (non-finite), ``scale_halved``
            (hardly any draw was finite), ``scores_clipped``, ``covariance_bounded``, ``mean_bounded``,
            ``update_taken_back`` (the ELBO fell).
        path_ends: where the paths ended, (S, D), and their log densities (S,).
        unresolved: the coordinates whose sd is below 100 rounding units of their mean in the target's own arithmetic,
            so that draws and scores are coarse there. Cured by centering or rescaling them, or by float64.
    """

    affine: AffineMap
    elbo: float
    discrepancy: float
    path_elbo: float
    num_evaluations: int
    num_nonfinite: int
    path_ends: Tensor
    path_log_densities: Tensor
    guards: Mapping[str, int] = field(default_factory=dict)
    unresolved: tuple[int, ...] = ()

    @property
    def num_guarded(self) -> int:
        return sum(self.guards.values())

    def distinct_ends(self, max_drop: float = 10.0, min_distance: float = 3.0) -> list[int]:
        """Which of ``path_ends`` are modes of their own, best first: several mean that the Gaussian sees only one.

        An end counts if its log density is within ``max_drop`` nats of the best one's, and if it is further than
        ``min_distance`` sqrt(D) from those before it in the whitened space, where typical draws are at sqrt(D).
        """
        if len(self.path_ends) == 0:
            return []
        whitened = self.affine.inverse(self.path_ends)
        order = self.path_log_densities.argsort(descending=True).tolist()
        best = float(self.path_log_densities[order[0]])
        kept: list[int] = []
        for end in order:
            far = all(
                float((whitened[end] - whitened[other]).norm()) > min_distance * math.sqrt(whitened.shape[1])
                for other in kept
            )
            if far and float(self.path_log_densities[end]) >= best - max_drop:
                kept.append(end)
        return kept
