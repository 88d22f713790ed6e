"""What is exact when everything is Gaussian.

With a linear mixing map, ``x = W z + b + L eps`` with ``L L' = S`` the conditional covariance, q(x) is
``N(b, C)``, ``C = W W' + S``. Against a Gaussian target ``N(m, T)`` all the algorithm estimates is a closed form,
with ``P = T^{-1}``, ``Q = C^{-1}``, ``A = Q - P`` and ``d = b - m``:

    best critic         f*(x) = s_p(x) - grad log q(x) = A (x - b) - P d
    Fisher divergence   E_q |f*|^2 = tr(A C A) + |P d|^2
    KL(q, p)            (tr(P C) + d' P d - D + log |T| - log |C|) / 2

Their gradients in the family's parameters follow by the chain rule from those in b and C:

    KL        d/db = P d,       d/dC = (P - Q) / 2
    Fisher    d/db = 2 P P d,   d/dC = P P - Q Q

The last since ``tr(A C A) = tr(Q) - 2 tr(P) + tr(P C P)``. They are written out here, not left to autograd, so that
``test_gaussian_oracle.py`` can check one against the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_sivism.family import DiagonalNormal, LowRankNormal, SemiImplicit

# A two-sided normal tail of 6 standard errors has probability 2e-9; with the few hundred numbers compared in this
# folder a wrong alarm has probability below 1e-6 for a fresh seed. Means of 10^5 draws are normal enough out there.
NUM_STANDARD_ERRORS = 6.0


class GaussianTarget:
    """``N(loc, covariance)`` with a closed-form score; refuses to be differentiated twice if asked to."""

    def __init__(self, loc: Tensor, covariance: Tensor, *, once_differentiable: bool = False) -> None:
        self.loc, self.covariance = loc, covariance
        self.precision = torch.linalg.inv(covariance)
        self.once_differentiable = once_differentiable
        self.num_evaluations = 0

    @property
    def dim(self) -> int:
        return len(self.loc)

    def log_density(self, x: Tensor) -> Tensor:
        return self.log_density_and_score(x)[0]

    def score(self, x: Tensor) -> Tensor:
        return self.log_density_and_score(x)[1]

    def log_density_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.once_differentiable and x.requires_grad:
            raise AssertionError("the score was asked for at points that carry a gradient")
        self.num_evaluations += len(x)
        centered = x - self.loc
        score = -centered @ self.precision
        log_det = torch.linalg.slogdet(self.covariance).logabsdet
        return 0.5 * (centered * score).sum(-1) - 0.5 * (log_det + self.dim * math.log(2 * math.pi)), score


@dataclass(frozen=True)
class GaussianQ:
    """q(x) of a linear family: its mean, covariance and the parameters behind them, all differentiable."""

    loc: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, family: SemiImplicit) -> GaussianQ:
        conditional = family.conditional
        if not isinstance(conditional, (DiagonalNormal, LowRankNormal)) or conditional.loc_scale.net is not None:
            raise TypeError(f"only a linear mixing map has a Gaussian marginal, got {conditional}")
        skip = conditional.loc_scale.skip
        weight, bias = skip.weight, skip.bias
        _, scale = conditional.loc_scale(weight.new_zeros(conditional.mixing_dim))
        covariance = weight @ weight.mT + scale.square().diag()
        if isinstance(conditional, LowRankNormal):
            covariance = covariance + conditional.factor @ conditional.factor.mT
        return cls(bias, covariance)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.distributions.MultivariateNormal(self.loc, self.covariance).log_prob(x)

    def score(self, x: Tensor) -> Tensor:
        return -torch.linalg.solve(self.covariance, (x - self.loc).mT).mT


def kl_divergence(q: GaussianQ, p: GaussianTarget) -> Tensor:
    shift = q.loc - p.loc
    log_dets = torch.linalg.slogdet(p.covariance).logabsdet - torch.linalg.slogdet(q.covariance).logabsdet
    return 0.5 * ((p.precision @ q.covariance).trace() + shift @ p.precision @ shift - p.dim + log_dets)


def fisher_divergence(q: GaussianQ, p: GaussianTarget) -> Tensor:
    difference = torch.linalg.inv(q.covariance) - p.precision
    shift = p.precision @ (q.loc - p.loc)
    return (difference @ q.covariance @ difference).trace() + shift @ shift


def kl_gradients(q: GaussianQ, p: GaussianTarget) -> tuple[Tensor, Tensor]:
    """In q's mean and covariance."""
    return p.precision @ (q.loc - p.loc), 0.5 * (p.precision - torch.linalg.inv(q.covariance))


def fisher_gradients(q: GaussianQ, p: GaussianTarget) -> tuple[Tensor, Tensor]:
    """In q's mean and covariance."""
    q_precision = torch.linalg.inv(q.covariance)
    gram = p.precision @ p.precision
    return 2.0 * gram @ (q.loc - p.loc), gram - q_precision @ q_precision


def parameter_gradients(family: SemiImplicit, loc_gradient: Tensor, covariance_gradient: Tensor) -> dict[str, Tensor]:
    """The chain rule by hand, from gradients in (b, C) to those in (W, b, logit of sigma, F):

    dC/dW gives ``2 G W``, dC/dF ``2 G F``, dC/dsigma_i ``2 sigma_i G_ii``; and sigma is a sigmoid of its logit.
    """
    conditional = family.conditional
    with torch.no_grad():
        scale = conditional.loc_scale
        fraction = torch.sigmoid(scale.logit)
        sigma = scale.low + scale.span * fraction
        slope = scale.span * fraction * (1.0 - fraction)
        gradients = {
            "conditional.loc_scale.skip.weight": 2.0 * covariance_gradient @ conditional.loc_scale.skip.weight,
            "conditional.loc_scale.skip.bias": loc_gradient,
            "conditional.loc_scale.logit": 2.0 * sigma * covariance_gradient.diagonal() * slope,
        }
        if isinstance(conditional, LowRankNormal):
            gradients["conditional.factor"] = 2.0 * covariance_gradient @ conditional.factor
    return gradients


class ExactScore(nn.Module):
    """The score of a Gaussian q, frozen as a function: the critic that training converges to."""

    def __init__(self, q: GaussianQ) -> None:
        super().__init__()
        self.q = GaussianQ(q.loc.detach().clone(), q.covariance.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.q.score(x)


class ExactDifference(nn.Module):
    """``s_p - grad log q``, frozen as a function: what a critic without the target residual converges to."""

    def __init__(self, q: GaussianQ, p: GaussianTarget, temperature: float = 1.0) -> None:
        super().__init__()
        self.score, self.p, self.temperature = ExactScore(q), p, temperature

    def forward(self, x: Tensor) -> Tensor:
        return self.temperature * self.p.score(x) - self.score(x)


def random_covariance(dim: int) -> Tensor:
    """Well conditioned and far from diagonal."""
    root = torch.randn(dim, dim) / math.sqrt(dim)
    return root @ root.mT + 0.5 * torch.eye(dim)


def linear_family(kind: str, dim: int = 3, mixing_dim: int = 2) -> SemiImplicit:
    """A linear family away from its start: random weights, bias, scales, and factor."""
    if kind == "diagonal":
        conditional = DiagonalNormal(dim, mixing_dim, (), scale_depends_on_z=False, init_scale=0.6)
    else:
        conditional = LowRankNormal(dim, mixing_dim, (), rank=2, init_scale=0.6)
    family = SemiImplicit(conditional)
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return family
