"""The semi-implicit family: z ~ N(0, I_M), x | z ~ q(x|z), and q(x) = E_z q(x|z) never in closed form.

What can be had of it exactly are draws, and the conditional score ``grad_x log q(x|z)`` of each; its
average over z given x is the score of q, which is what the critic learns. (Yin and Zhou, ICML 2018,
"Semi-implicit variational inference"; Yu and Zhang, ICLR 2023, arXiv 2308.10014.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_sivism.errors import ArgumentError
from pyro_sivism.family.conditionals import Conditional

__all__ = ["LogDensityEstimate", "SemiImplicit", "SemiImplicitSample"]


class SemiImplicitSample(NamedTuple):
    """Draws of x, the z behind them, and ``grad_x log q(x|z)``: ``(*batch, D)``, ``(*batch, M)``, ``(*batch, D)``."""

    x: Tensor
    z: Tensor
    conditional_score: Tensor


class LogDensityEstimate(NamedTuple):
    """A Monte Carlo estimate of ``log q(x)`` from ``num_mixing`` mixing draws, and which way it errs.

    ``bias`` is ``"low"`` where its expectation is at most log q(x) at every x (fresh draws only), ``"high"``
    where it is at least log q(x) on average over x ~ q (the draw's own z is among them).
    """

    value: Tensor
    bias: str
    num_mixing: int


class SemiImplicit(nn.Module):
    """``q(x) = E_{z ~ N(0, I)} q(x|z)``.

    Args:
        conditional: q(x|z), see ``family/conditionals.py``.

    Example:

        >>> from pyro_sivism.family import DiagonalNormal
        >>> q = SemiImplicit(DiagonalNormal(dim=2, mixing_dim=2))
        >>> q.rsample(100).x.shape
        torch.Size([100, 2])
    """

    def __init__(self, conditional: Conditional) -> None:
        super().__init__()
        self.conditional = conditional

    @property
    def dim(self) -> int:
        return self.conditional.dim

    @property
    def mixing_dim(self) -> int:
        return self.conditional.mixing_dim

    def sample_mixing(self, batch_shape: Sequence[int] | int) -> Tensor:
        """Mixing draws ``z ~ N(0, I_M)`` of shape ``(*batch_shape, M)``."""
        batch_shape = (batch_shape,) if isinstance(batch_shape, int) else tuple(batch_shape)
        like = next(self.parameters())
        return torch.randn(batch_shape + (self.mixing_dim,), dtype=like.dtype, device=like.device)

    def rsample(self, batch_shape: Sequence[int] | int, z: Tensor | None = None) -> SemiImplicitSample:
        """Reparametrized draws with their conditional scores; at given mixing draws ``z`` if there are any."""
        z = self.sample_mixing(batch_shape) if z is None else z
        x, conditional_score = self.conditional.rsample_with_score(z)
        return SemiImplicitSample(x, z, conditional_score)

    def log_prob_estimate(self, x: Tensor, num_mixing: int, own_z: Tensor | None = None) -> LogDensityEstimate:
        """``log (1/K) sum_k q(x|z_k)``, an estimate of ``log q(x)`` with K = ``num_mixing``.

        With fresh ``z_k`` Jensen's inequality makes it too low on average; its bias vanishes as K grows, but
        where q(x|z) is narrow that takes K exponential in D. With the draw's own z among the z_k it is an upper
        bound on E_q log q, which makes ``E_q[log p - estimate]`` a lower bound on the evidence, the surrogate
        ELBO of Yin and Zhou (2018). The fresh z_k are the same for all points, so that a call costs K passes of
        the mixing network and K x B densities; the errors at different points are therefore not independent.

        Args:
            x: points ``(*batch, D)``.
            num_mixing: K, all told.
            own_z: the mixing draws ``(*batch, M)`` that made ``x``.
        """
        if num_mixing < 1:
            raise ArgumentError(f"expected num_mixing of at least 1, got {num_mixing}")
        if own_z is not None and num_mixing == 1:
            return LogDensityEstimate(self.conditional(own_z).log_prob(x), "high", 1)
        num_fresh = num_mixing if own_z is None else num_mixing - 1
        terms = [] if own_z is None else [self.conditional(own_z).log_prob(x)]
        if num_fresh > 0:
            z = self.sample_mixing((num_fresh, *(1 for _ in x.shape[:-1])))
            terms.append(self.conditional(z).log_prob(x).logsumexp(0))
        value = torch.stack(terms).logsumexp(0) - math.log(num_mixing)
        return LogDensityEstimate(value, "low" if own_z is None else "high", num_mixing)
