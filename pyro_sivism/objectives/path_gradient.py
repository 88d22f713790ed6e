"""The path gradient of KL(q, p), with the score of q learned.

By the reparametrization x = x_phi(z, eps),

    grad_phi KL(q, p) = E[ (grad log q(x) - grad log p(x)) . dx / dphi ],

since the expected derivative of log q in its own parameters is zero (Roeder, Wu, Duvenaud, NeurIPS 2017,
"Sticking the landing"). The unknown score of q is the critic's, so the loss to differentiate is

    - mean f(x) . x,      f = s_p - s held fixed.

It needs scores of the target only, no Hessian-vector products, and its gradient has no variance left
where q equals p and the critic is exact.
"""

from __future__ import annotations

import torch

from pyro_sivism.family import SemiImplicitSample
from pyro_sivism.objectives.base import (
    GuideLoss,
    Objective,
    count_left_out,
    finite_scores,
    fisher_divergence,
    masked,
    mean_over,
)

__all__ = ["PathGradientKL"]


class PathGradientKL(Objective):
    """Move q down the path gradient of KL(q, p). The default objective: it measured the most reliable.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_sivism import SIVISM
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> SIVISM(model, loss=PathGradientKL()).run(3, progress_bar=False).num_steps
        3
    """

    def guide_loss(self, sample: SemiImplicitSample, step: int) -> GuideLoss:
        with torch.no_grad():
            x = sample.x.detach()
            target_score = self.target.score(x)
            finite = finite_scores(target_score)
            target_score = masked(target_score, finite)
            direction = self.critic_value(x, target_score)
            divergence = mean_over(fisher_divergence(direction, target_score, sample.conditional_score), finite)
        num_kept = len(x) if finite is None else finite.sum()
        loss = -(masked(direction, finite) * sample.x).sum() / num_kept
        return GuideLoss(loss, divergence, count_left_out(target_score, finite))
