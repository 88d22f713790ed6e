"""The paper's objective: the Fisher divergence as a game between q and a critic.

    min over q  max over f   E_{z, x|z} [ 2 f(x).(s_p(x) - grad_x log q(x|z)) - |f(x)|^2 ]

(Yu and Zhang, "Semi-implicit variational inference via score matching", ICLR 2023, arXiv 2308.10014,
equations 8-10). The inner maximum is |s_p - grad log q|^2 in expectation. The guide's gradient goes through
x everywhere: through s_p (a Hessian-vector product of log p), through the critic's input and through the
conditional score.

Alone this game is won or lost with the critic: where f is off, q follows its slope, and stays where no critic finds the
way back. The path gradient of KL(q, p) is zero at the same q, needs the same f and no slope of it; with some of it in
the guide's loss the game measured safe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyro_sivism.errors import ArgumentError
from pyro_sivism.family import ScoreNetwork, SemiImplicitSample
from pyro_sivism.objectives.base import (
    GuideLoss,
    Objective,
    count_left_out,
    finite_rows,
    finite_scores,
    fisher_divergence,
    masked,
    mean_over,
)
from pyro_sivism.recipe import Recipe

__all__ = ["FisherDivergence"]


class FisherDivergence(Objective):
    """Move q down the Fisher divergence ``E_q |grad log p - grad log q|^2``, the paper's SIVI-SM, plus ``path_weight``
    times KL(q, p), by its path gradient.

    Prefer :class:`PathGradientKL` unless you want to reproduce the paper, which takes ``path_weight=0``: at the same
    cost in scores that game alone measured less accurate and less robust, lost the weights of separated modes, and was
    reliable up to about a dozen dimensions. With any weight it needs the second derivative of the model.

    Args:
        target_residual: critic ``f = s_p - s`` with s a score network (the paper's residual parametrization). If
            False the critic is a network for f itself.
        annealing_steps: temper the target's score by a factor that rises linearly from ``annealing_start`` to 1
            over so many guide steps; 0 for no annealing.
        annealing_start: the first factor, in (0, 1].
        path_weight: of the path gradient of :class:`PathGradientKL`, to the tempered target; 0 for the paper's
            objective alone.

    Raises:
        ArgumentError: an annealing argument, or the weight, is out of range.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_sivism import SIVISM
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> SIVISM(model, loss=FisherDivergence(annealing_steps=100)).run(3, progress_bar=False).num_steps
        3
    """

    def __init__(
        self,
        *,
        target_residual: bool = True,
        annealing_steps: int = 0,
        annealing_start: float = 0.1,
        path_weight: float = 3.0,
    ) -> None:
        if annealing_steps < 0 or not 0 < annealing_start <= 1:
            raise ArgumentError(
                "expected annealing_steps >= 0 and 0 < annealing_start <= 1, got "
                f"{annealing_steps} and {annealing_start}"
            )
        if not 0 <= path_weight < math.inf:
            raise ArgumentError(f"expected a finite path_weight of at least 0, got {path_weight}")
        self.target_residual, self.path_weight = target_residual, path_weight
        self.annealing_steps, self.annealing_start = annealing_steps, annealing_start

    def adapt_recipe(self, recipe: Recipe) -> Recipe:
        """With fewer critic steps the game diverged in measurements."""
        return replace(recipe, critic_steps=max(3, recipe.critic_steps))

    @property
    def follows_chains(self) -> bool:
        """Not where the paper's game is asked for."""
        return self.path_weight > 0

    @property
    def depends_on_step(self) -> bool:
        return self.annealing_steps > 0

    def make_critic(self, dim: int, hidden_dims: Sequence[int], *, gated: bool = True) -> nn.Module:
        return ScoreNetwork(dim, hidden_dims, gaussian_base=self.target_residual, gated=gated)

    def critic_value(self, x: Tensor, target_score: Tensor) -> Tensor:
        return target_score - self.critic(x) if self.target_residual else self.critic(x)

    def critic_loss(self, sample: SemiImplicitSample, step: int) -> Tensor:
        if self.target_residual:  # the game's inner maximum, as a regression that needs no target
            return super().critic_loss(sample, step)
        with torch.no_grad():
            target_score = self.target.score(sample.x)
            finite = finite_scores(target_score)
            target_score = self._tempering(step) * masked(target_score, finite)
        value = self.critic(sample.x)
        return -mean_over(fisher_divergence(value, target_score, sample.conditional_score), finite)

    def guide_loss(self, sample: SemiImplicitSample, step: int) -> GuideLoss:
        """The game's value and the path term at the tempered target; what is reported is the divergence from the target
        itself.

        Particles whose score has no finite derivative have no gradient. They are found in the backward pass, which
        adds them to ``num_nonfinite``.
        """
        x = sample.x * 1.0  # a node of our own to hook
        target_score = self.target.score(x)
        finite = finite_scores(target_score)
        target_score = masked(target_score, finite)
        tempering = self._tempering(step)
        value = self.critic_value(x, tempering * target_score)
        game = fisher_divergence(value, tempering * target_score, sample.conditional_score)
        path = -(value.detach() * x).sum(-1)
        loss = mean_over(game + self.path_weight * path, finite)
        with torch.no_grad():
            critic_of_target = value + (1.0 - tempering) * target_score
            divergence = mean_over(fisher_divergence(critic_of_target, target_score, sample.conditional_score), finite)
        num_nonfinite = count_left_out(target_score, finite)
        if x.requires_grad:
            x.register_hook(lambda gradient: _drop_nonfinite(gradient, finite, num_nonfinite))
        return GuideLoss(loss, divergence, num_nonfinite)

    def _tempering(self, step: int) -> float:
        """The factor of the target's score."""
        if step >= self.annealing_steps:
            return 1.0
        return self.annealing_start + (1.0 - self.annealing_start) * step / self.annealing_steps


def _drop_nonfinite(gradient: Tensor, finite_score: Tensor | None, num_nonfinite: Tensor) -> Tensor:
    """The gradient in x, without its NaN or infinite rows; counts those whose score is finite.

    A particle where the score is not finite is left out of the loss, but zero times its Hessian is still NaN.

    Raises:
        NonFiniteError: no row is finite.
    """
    finite = finite_rows(
        gradient,
        "the second derivative of the model's log density",
        ", so FisherDivergence cannot move the guide. Use PathGradientKL(), which needs first derivatives only.",
    )
    if finite is None:
        return gradient
    num_nonfinite += (~finite if finite_score is None else finite_score & ~finite).sum()
    return masked(gradient, finite)
