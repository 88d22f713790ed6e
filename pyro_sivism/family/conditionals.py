"""Conditionals q(x|z): Gaussians whose mean, and perhaps scale, depend on the mixing variable z.

To write your own conditional:

1. subclass :class:`Conditional` and give ``forward(z)``: a ``torch.distributions`` object with batch
   shape ``z.shape[:-1]``, event shape (D,) and ``rsample``;
2. if ``grad_x log q(x|z)`` has a closed form, override ``rsample_with_score``; autograd does it otherwise;
3. export it in ``family/__init__.py`` and add a row to ``tests/contract/test_conditionals.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, Normal

from pyro_sivism.errors import ArgumentError
from pyro_sivism.family.networks import MLP, bounded

__all__ = ["Conditional", "DiagonalNormal", "LowRankNormal"]

_MAX_GATE = 1.5  # a mixing variable may be stretched or shrunk 4.5-fold by others


class Conditional(nn.Module):
    """Base class of conditionals q(x|z), x in R^``dim``, z in R^``mixing_dim``."""

    def __init__(self, dim: int, mixing_dim: int) -> None:
        super().__init__()
        if dim < 1 or mixing_dim < 1:
            raise ArgumentError(f"expected dim and mixing_dim of at least 1, got {dim} and {mixing_dim}")
        self.dim, self.mixing_dim = dim, mixing_dim

    def forward(self, z: Tensor) -> Distribution:
        """``z (*batch, M)`` -> q(x|z), a distribution with batch shape ``batch`` and event shape (D,)."""
        raise NotImplementedError

    def rsample_with_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """A reparametrized draw ``x`` from q(x|z) and ``grad_x log q(x|z)``, both ``(*batch, D)``.

        The conditional score is differentiable in the parameters and in z. As the density is a function of
        x *and* of the parameters, the gradient is taken at x held as a leaf, then written as a function of both.
        """
        conditional = self(z)
        x = conditional.rsample()
        differentiable = x.requires_grad
        with torch.enable_grad():
            point = x if differentiable else x.detach().requires_grad_()
            (score,) = torch.autograd.grad(conditional.log_prob(point).sum(), point, create_graph=differentiable)
        return x, score

    def input_parameters(self) -> list[nn.Parameter]:
        """Parameters that read z directly; their learning rate is scaled down where z is long."""
        return []


class _LocScale(nn.Module):
    """``mu(z) = a(z) + e^{b(z)} l(z)``, l linear, and ``sigma(z)``, a sigmoid of ``c(z)`` between two bounds.

    a, b and c are the outputs of one MLP that starts at zero; c is a constant unless the scale depends on z. By the
    gates b, which are bounded, one mixing variable may be the scale of others, as one latent of a hierarchy is (see
    :class:`~pyro_sivism.family.networks.ScoreNetwork`). l starts as ``sqrt(1 - init_scale^2)`` times the first
    ``min(D, M)`` rows of the identity, and sigma as ``init_scale``, or 1 for a coordinate without a mixing variable of
    its own, i >= M: the first q(x) is the standard normal.

    The ceiling only applies to the first M coordinates; one that starts with scale 1 may need up to 1.6.
    """

    low: Tensor
    span: Tensor

    def __init__(
        self,
        dim: int,
        mixing_dim: int,
        hidden_dims: Sequence[int],
        *,
        scale_depends_on_z: bool,
        gated: bool,
        init_scale: float,
        min_scale: float,
        max_scale: float,
    ) -> None:
        super().__init__()
        if not 0 < init_scale < 1:
            raise ArgumentError(f"expected 0 < init_scale < 1 (in whitened units), got {init_scale}")
        if not 0 <= min_scale < init_scale < max_scale:
            raise ArgumentError(
                f"expected 0 <= min_scale < init_scale < max_scale, got {min_scale}, {init_scale} and {max_scale}"
            )
        self.skip = nn.Linear(mixing_dim, dim)
        with torch.no_grad():
            self.skip.weight.copy_(math.sqrt(1.0 - init_scale**2) * torch.eye(dim, mixing_dim))
            self.skip.bias.zero_()
        init, low, high = (torch.full((dim,), value) for value in (init_scale, min_scale, max_scale))
        init[mixing_dim:], high[mixing_dim:] = 1.0, max(max_scale, 1.6)
        self.register_buffer("low", low)
        self.register_buffer("span", high - low)
        self.logit = nn.Parameter(torch.logit((init - low) / (high - low)))
        self.gated, self.scale_depends_on_z = gated, scale_depends_on_z
        num_outputs = 1 + gated + scale_depends_on_z
        self.net = MLP(mixing_dim, num_outputs * dim, hidden_dims, zero_last=True) if hidden_dims else None

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z (*batch, M)`` -> mu ``(*batch, D)`` and sigma, ``(*batch, D)`` or (D,) where it is constant."""
        loc, logit = self.skip(z), self.logit
        if self.net is not None:
            bend, *others = self.net(z).split(len(logit), -1)
            if self.gated:
                loc = loc * bounded(others[0], _MAX_GATE).exp()
            loc = loc + bend
            if self.scale_depends_on_z:
                logit = logit + others[-1]
        return loc, torch.addcmul(self.low, self.span, torch.sigmoid(logit))

    def input_parameters(self) -> list[nn.Parameter]:
        return [*self.skip.parameters(), *(self.net.input_parameters() if self.net is not None else [])]


class DiagonalNormal(Conditional):
    """``q(x|z) = N(mu(z), diag sigma(z)^2)``, with conditional score ``-eps / sigma``.

    ``mu(z) = a(z) + e^{b(z)} l(z)`` with l linear, and a and b the outputs of an MLP that starts at zero. ``sigma``
    starts at ``init_scale`` (1 for the coordinates i >= ``mixing_dim``) and l with the gain ``sqrt(1 - init_scale^2)``:
    the first q(x) is the standard normal, exactly.

    Args:
        dim: D.
        mixing_dim: M, the length of z.
        hidden_dims: widths of the MLP; empty for a linear mixing map and a constant scale, whose q(x) is Gaussian.
        scale_depends_on_z: learn ``sigma(z)`` rather than one constant scale per coordinate.
        gated: learn b, which is what hierarchies want.
        init_scale: first conditional sd, below 1.
        min_scale, max_scale: the floor and the ceiling of the conditional sd. The floor bounds the
            conditional score, whose noise is what the critic has to average out.

    Raises:
        ArgumentError: a size below 1, or scales other than 0 <= min < init < max with init < 1.

    Example:

        >>> z = torch.randn(100, 3)
        >>> DiagonalNormal(dim=2, mixing_dim=3)(z).log_prob(torch.zeros(2)).shape
        torch.Size([100])
    """

    def __init__(
        self,
        dim: int,
        mixing_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        scale_depends_on_z: bool = True,
        gated: bool = True,
        init_scale: float = 0.75,
        min_scale: float = 0.3,
        max_scale: float = 1.2,
    ) -> None:
        super().__init__(dim, mixing_dim)
        self.loc_scale = _LocScale(
            dim,
            mixing_dim,
            hidden_dims,
            scale_depends_on_z=scale_depends_on_z,
            gated=gated,
            init_scale=init_scale,
            min_scale=min_scale,
            max_scale=max_scale,
        )

    def forward(self, z: Tensor) -> Distribution:
        loc, scale = self.loc_scale(z)
        return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def rsample_with_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.loc_scale(z)
        noise = torch.randn_like(loc)
        return loc + scale * noise, -noise / scale

    def input_parameters(self) -> list[nn.Parameter]:
        return self.loc_scale.input_parameters()


class LowRankNormal(Conditional):
    """``q(x|z) = N(mu(z), C)``, ``C = diag(sigma^2) + F F'`` with a constant factor ``F (D, rank)``.

    The conditional score is ``-C^{-1} (x - mu)``, by the Woodbury identity: with ``u = sigma eps1 + F eps2``
    it costs O(D rank) a draw. Correlated conditionals need less of the mixing network where the posterior's
    fine structure is correlated. The entries of F start as draws of sd .01 (at 0 their gradient would vanish), so
    that the first q(x) is ``N(0, I + F F')``, standard normal up to about ``1e-4 rank``.

    Args:
        rank: columns of F; the other arguments are those of :class:`DiagonalNormal`, with ``sigma`` constant.

    Example:

        >>> x, conditional_score = LowRankNormal(dim=5, mixing_dim=3, rank=2).rsample_with_score(torch.randn(100, 3))
        >>> x.shape, conditional_score.shape
        (torch.Size([100, 5]), torch.Size([100, 5]))
    """

    def __init__(
        self,
        dim: int,
        mixing_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        rank: int = 4,
        gated: bool = True,
        init_scale: float = 0.75,
        min_scale: float = 0.3,
        max_scale: float = 1.2,
    ) -> None:
        super().__init__(dim, mixing_dim)
        if rank < 1:
            raise ArgumentError(f"expected a rank of at least 1, got {rank}")
        self.loc_scale = _LocScale(
            dim,
            mixing_dim,
            hidden_dims,
            scale_depends_on_z=False,
            gated=gated,
            init_scale=init_scale,
            min_scale=min_scale,
            max_scale=max_scale,
        )
        self.factor = nn.Parameter(1e-2 * torch.randn(dim, rank))

    def forward(self, z: Tensor) -> Distribution:
        loc, scale = self.loc_scale(z)  # the scale has no batch dims, so that C is factorized once for all z
        return LowRankMultivariateNormal(loc, self.factor, scale.square(), validate_args=False)

    def rsample_with_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.loc_scale(z)
        noise = torch.randn_like(loc)
        factor_noise = torch.randn(loc.shape[:-1] + self.factor.shape[-1:], dtype=loc.dtype, device=loc.device)
        deviation = scale * noise + factor_noise @ self.factor.mT

        # C^{-1} u = S^{-1} u - S^{-1} F (I + F' S^{-1} F)^{-1} F' S^{-1} u,  S = diag(sigma^2), sigma constant.
        variance = scale.square()
        whitened_factor = self.factor / variance[:, None]
        rank = self.factor.shape[-1]
        capacitance = torch.eye(rank, dtype=loc.dtype, device=loc.device) + self.factor.mT @ whitened_factor
        correction = torch.linalg.solve(capacitance, whitened_factor.mT)
        precision_deviation = deviation / variance - (deviation @ whitened_factor) @ correction
        return loc + deviation, -precision_deviation

    def input_parameters(self) -> list[nn.Parameter]:
        return self.loc_scale.input_parameters()
