"""What an objective is: two losses, one for the critic and one for the guide.

To write your own objective:

1. subclass :class:`Objective` and implement ``guide_loss(sample, step)``, whose gradient in the family's
   parameters is the direction to go down;
2. override ``critic_loss`` and ``make_critic`` if it wants another critic than an estimate of grad log q;
   override ``adapt_recipe`` if it needs other defaults, and ``follows_chains`` if ``run(None, ...)`` is not to add to
   its loss the distance from chains, which is scaled like a KL divergence;
3. export it in ``objectives/__init__.py`` and add a row to ``tests/contract/test_objectives.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.functional import mse_loss

from pyro_sivism.devices import is_at_hand
from pyro_sivism.errors import NonFiniteError
from pyro_sivism.family import ScoreNetwork, SemiImplicit, SemiImplicitSample, TargetDensity
from pyro_sivism.recipe import Recipe

__all__ = [
    "GuideLoss",
    "Objective",
    "count_left_out",
    "finite_rows",
    "finite_scores",
    "fisher_divergence",
    "masked",
    "mean_over",
]


class GuideLoss(NamedTuple):
    """What a guide step needs and reports.

    ``loss`` is the scalar to differentiate; ``fisher_divergence`` an estimate of E_q |grad log p - grad log q|^2
    that is comparable between objectives; ``num_nonfinite`` the particles that were left out, all counted once
    the gradient of ``loss`` has been taken.
    """

    loss: Tensor
    fisher_divergence: Tensor
    num_nonfinite: Tensor


class Objective:
    """Base class of objectives. All share one critic, learned by denoising score matching.

    Since ``grad log q(x) = E[grad_x log q(x|z) | x]``, the regression of the conditional score on x

        min over s   E_{z, x|z} |s(x) - grad_x log q(x|z)|^2

    has the score of q as its solution (Vincent, "A connection between score matching and denoising
    autoencoders", 2011), and ``f = s_p - s`` is the critic of the score-matching game.
    """

    family: SemiImplicit
    target: TargetDensity
    critic: nn.Module

    def setup(self, family: SemiImplicit, target: TargetDensity, critic: nn.Module) -> None:
        """Remember the family to move, the whitened target to move it to, and the critic between them."""
        self.family, self.target, self.critic = family, target, critic

    def unbound(self) -> Objective:
        """A copy with the settings and without what :meth:`setup` brought in."""
        other = copy.copy(self)
        for name in ("family", "target", "critic"):
            other.__dict__.pop(name, None)
        return other

    def make_critic(self, dim: int, hidden_dims: Sequence[int], *, gated: bool = True) -> nn.Module:
        """A critic for D = ``dim``: by default an estimate of grad log q."""
        return ScoreNetwork(dim, hidden_dims, gated=gated)

    def adapt_recipe(self, recipe: Recipe) -> Recipe:
        """The defaults this objective wants."""
        return recipe

    @property
    def follows_chains(self) -> bool:
        """Whether a run that ends by itself may add the distance from chains to the losses, which brings q there
        sooner: Fisher divergences and KL(q, p) hardly see what q lacks."""
        return True

    @property
    def depends_on_step(self) -> bool:
        """Whether the losses change with the number of the step, so that a step cannot be compiled once for all."""
        return False

    def critic_loss(self, sample: SemiImplicitSample, step: int) -> Tensor:
        """``mean |s(x) - grad_x log q(x|z)|^2`` over a batch of draws that carries no gradient."""
        total = mse_loss(self.critic(sample.x), sample.conditional_score, reduction="sum")
        return total / len(sample.x)

    def critic_value(self, x: Tensor, target_score: Tensor) -> Tensor:
        """``f(x)`` (B, D), the critic's estimate of ``grad log p - grad log q``."""
        return target_score - self.critic(x)

    def guide_loss(self, sample: SemiImplicitSample, step: int) -> GuideLoss:
        """The loss of one batch of draws that carry the gradient of the family's parameters."""
        raise NotImplementedError


def fisher_divergence(critic_value: Tensor, target_score: Tensor, conditional_score: Tensor) -> Tensor:
    """``2 f.(s_p - grad_x log q(x|z)) - |f|^2`` for each particle, (B,).

    Its mean is a lower bound on the Fisher divergence E_q |s_p - grad log q|^2, tight at the best critic
    (Yu and Zhang, arXiv 2308.10014, equation 10).
    """
    return (critic_value * (2.0 * (target_score - conditional_score) - critic_value)).sum(-1)


def finite_rows(values: Tensor, what: str, advice: str) -> Tensor | None:
    """Which particles' rows of ``values (B, D)`` are finite, (B,); None where all are, which a step need not mask.

    Where the values are not at hand, on an accelerator or in a recording, there is always a mask, and never an error:
    a mean over no particles is NaN, and so is its gradient, which moves nothing.

    Raises:
        NonFiniteError: none is; it says ``what`` of the particles that is and gives the ``advice``.
    """
    can_read = is_at_hand(values) and get_proxy_mode() is None
    if can_read and math.isfinite(values.detach().sum().item()):
        return None
    finite = values.isfinite().all(-1)
    if can_read and not bool(finite.any()):
        raise NonFiniteError(f"{what} is not finite at any of {len(finite)} particles{advice}")
    return finite


def finite_scores(target_score: Tensor) -> Tensor | None:
    """Which particles have a finite target score, as :func:`finite_rows`."""
    return finite_rows(
        target_score,
        "the target's score",
        "; expected most of the guide's draws to lie where the model's density is finite. Check the model for overflow "
        "far from the posterior (float64 data often cures it), or lower the learning rate.",
    )


def masked(values: Tensor, keep: Tensor | None) -> Tensor:
    """``values (B, D)`` with zeros in the rows that are not to be kept."""
    return values if keep is None else torch.where(keep[:, None], values, 0.0)


def mean_over(values: Tensor, keep: Tensor | None) -> Tensor:
    """The mean of ``values (B,)`` over the rows to keep, with no gradient or NaN from the others."""
    return values.mean() if keep is None else torch.where(keep, values, 0.0).sum() / keep.sum()


def count_left_out(target_score: Tensor, keep: Tensor | None) -> Tensor:
    """How many particles are not kept."""
    return target_score.new_zeros((), dtype=torch.long) if keep is None else (~keep).sum()
