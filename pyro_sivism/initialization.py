"""What a fit starts from: the model's target, and the Gaussian that q is at first, in the coordinates that suit it.

Where latents have scales that depend on other latents, and the data say little about them, the posterior is a funnel
that no Gaussian is near, and that the family, of one whitened space, reaches with difficulty. Decentered
(``reparametrization.py``) it is none. Both sets of latents are functions of each other, so that the ELBOs of Gaussians
in either bound the same evidence: the higher one tells which to take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sivism.distributed import Ranks
from pyro_sivism.errors import FitWarning, SivismError, TargetPathWarning
from pyro_sivism.family import GaussianFit, Preconditioner
from pyro_sivism.guide import SemiImplicitGuide
from pyro_sivism.layout import LatentLayout
from pyro_sivism.recipe import Recipe
from pyro_sivism.reparametrization import centered_sites, decentering, loose_sites
from pyro_sivism.results import Seconds
from pyro_sivism.target import Target
from pyro_sivism.target.starts import find_starts
from pyro_sivism.warn import warn

__all__ = ["Initialization"]

# A discrepancy of the scores at a few hundred draws of the Gaussian, which is hardly smaller for the right one.
_NEARLY_GAUSSIAN, _POORLY_GAUSSIAN = 0.1, 0.2
_NUM_GAUSSIAN_DRAWS = 64  # that tell which sites the data say little about


@dataclass(frozen=True)
class Initialization:
    """How to start a fit.

    Attributes:
        preconditioner: fits the Gaussian.
        recipe: from D to the settings of the guide's family.
        paths: of the target, see :class:`Target`.
        decenter: whether to look for better coordinates.
        ranks: the processes that share the fit.
        seconds: where to write down how long it took.
    """

    preconditioner: Preconditioner
    recipe: Callable[[int], Recipe]
    paths: Sequence[str]
    decenter: bool
    ranks: Ranks
    seconds: Seconds

    def start(
        self, model: Callable, guide: SemiImplicitGuide, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Target, GaussianFit | None]:
        """The target of a model on its arguments, and the Gaussian that the guide is set to; None for the Gaussian of a
        guide that was fitted before.

        Raises:
            ModelError: the model cannot be fitted, or the guide is of another one.
            NonFiniteError: no finite starting point was found.
        """
        with self.seconds.of("setup"):
            target, init = self._make_target(model, guide, args, kwargs)
        fit = None
        if not guide.is_fitted:
            with self.seconds.of("preconditioner"):
                fit = self._fit_gaussian(guide, target, init)
                if self.decenter and fit.discrepancy > _NEARLY_GAUSSIAN and _may_be_decentered(target):
                    target, fit = self._in_better_coordinates(model, guide, target, fit)
        if self.ranks.is_first:
            warn_of_loop(target)
            _warn_unresolved(guide.layout, fit)
        return target, fit

    def _fit_gaussian(self, guide: SemiImplicitGuide, target: Target, init: Tensor) -> GaussianFit:
        """The Gaussian, which the guide is set to."""
        fit = self.preconditioner.fit(target.over_minibatches(), find_starts(target, init))
        _set_gaussian(guide, fit)
        return fit

    def _make_target(
        self, model: Callable, guide: SemiImplicitGuide, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Target, Tensor]:
        """The target in the coordinates of the guide, which is set up, and its initial point."""
        trace = guide.trace_model(*args, **kwargs)
        layout = LatentLayout.from_trace(trace)
        if guide.is_fitted:
            guide.layout.check_same(layout)
        else:
            guide.setup_from_trace(trace, self.recipe(layout.dim))
        guide.check_model(model, *args, **kwargs)
        target = Target(guide.reparametrized(model), guide.layout, trace, args, kwargs, paths=self.paths)
        return target, guide.layout.init_from_trace(trace)

    def _in_better_coordinates(
        self, model: Callable, guide: SemiImplicitGuide, target: Target, fit: GaussianFit
    ) -> tuple[Target, GaussianFit]:
        """The target and its Gaussian, decentered if the ELBO is higher there, and the guide set to it."""
        other = SemiImplicitGuide(model, init_loc_fn=guide.init_loc_fn)
        try:
            decentered = self._decentered(model, other, target, fit)
        except Exception:  # whatever it may raise in coordinates that its author never saw: it can be fitted as it is
            return target, fit
        if decentered is None:
            return target, fit
        other_target, init = decentered
        try:
            other_fit = self._fit_gaussian(other, other_target, init)
        except SivismError:  # as above
            return target, fit
        num_evaluations = target.num_evaluations + other_target.num_evaluations
        gain = torch.tensor(other_fit.elbo - fit.elbo)
        self.ranks.broadcast_([gain])
        if gain > 0:
            args, kwargs = target.arguments
            guide.reparametrize(other.reparams)
            guide.setup_from_trace(guide.trace_model(*args, **kwargs), self.recipe(target.dim))
            _set_gaussian(guide, other_fit)
            target, fit = other_target, other_fit
        target.num_evaluations = num_evaluations
        return target, fit

    def _decentered(
        self, model: Callable, guide: SemiImplicitGuide, target: Target, fit: GaussianFit
    ) -> tuple[Target, Tensor] | None:
        """The target decentered, and its initial point; None where no site is to be.

        These are the sites about which the data say little by the Gaussian's draws; all where they say so of none and
        the Gaussian is a poor one, as where it sits in a funnel's neck.
        """
        args, kwargs = target.arguments
        centered = centered_sites(model, *args, **kwargs)
        if not centered:
            return None
        noise = torch.randn(_NUM_GAUSSIAN_DRAWS, target.dim).to(fit.affine.loc)
        draws = target.layout.constrain(fit.affine.forward(noise).to(target.layout.dtype))
        sites = loose_sites(model, centered, draws, args, kwargs)
        if not sites and fit.discrepancy <= _POORLY_GAUSSIAN:
            return None
        sites = sites or centered
        guide.reparametrize(decentering(sites))
        return self._make_target(model, guide, args, kwargs)


def warn_of_loop(target: Target) -> None:
    """Say so where scores are slow."""
    if target.path.name == "loop":
        warn(
            "the model's score is computed one particle at a time, which is slow: "
            f"{target.path.reason}. Draws are right all the same.",
            TargetPathWarning,
        )


def _may_be_decentered(target: Target) -> bool:
    """Random minibatches leave no ELBO to compare, and learned parameters move it."""
    return not target.is_subsampled and not target.params()


def _set_gaussian(guide: SemiImplicitGuide, fit: GaussianFit) -> None:
    guide.affine = fit.affine
    guide.is_fitted = True


def _warn_unresolved(layout: LatentLayout, fit: GaussianFit | None) -> None:
    """Say so where the dtype is too coarse for the posterior."""
    if fit is not None and fit.unresolved:
        coarse = ", ".join(layout.coordinate_names[i] for i in fit.unresolved[:5])
        warn(
            f"the posterior sd of {coarse} is below 100 rounding units of its mean in {layout.dtype}, so that "
            "scores and draws are coarse there. Center or rescale the data, or use float64.",
            FitWarning,
        )
