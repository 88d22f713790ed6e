"""The whitened space the family and the critic live in.

A Gaussian N(loc, scale_tril scale_tril') fitted to the target gives the map ``x = loc + scale_tril y``.
In ``y`` that Gaussian is standard normal, whatever the units and correlations of ``x``; densities and
scores follow by the chain rule:

    log p(y) = log p(x) + log |det scale_tril|,      score(y) = scale_tril' score(x).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["AffineMap", "TargetDensity", "WhitenedTarget"]


class TargetDensity(Protocol):
    """What the algorithm asks of a target: an unnormalized log density on R^D and its score."""

    @property
    def dim(self) -> int: ...

    def log_density(self, x: Tensor) -> Tensor:
        """``log p(x)`` (B,) at points (B, D)."""

    def score(self, x: Tensor) -> Tensor:
        """``grad log p(x)`` (B, D) at points (B, D)."""

    def log_density_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one evaluation."""


class AffineMap(NamedTuple):
    """``x = loc + y @ scale_tril.T``; ``scale_tril`` is lower triangular (D, D), or (D,) if diagonal."""

    loc: Tensor
    scale_tril: Tensor

    @classmethod
    def identity(cls, dim: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> AffineMap:
        return cls(torch.zeros(dim, dtype=dtype, device=device), torch.ones(dim, dtype=dtype, device=device))

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> AffineMap:
        return AffineMap(self.loc.to(device, dtype), self.scale_tril.to(device, dtype))

    def forward(self, y: Tensor) -> Tensor:
        """Whitened ``y (*batch, D)`` -> ``x``."""
        return self.loc + self.linear(y)

    def linear(self, y: Tensor) -> Tensor:
        """``scale_tril y``, without the shift."""
        return y * self.scale_tril if self.scale_tril.dim() == 1 else y @ self.scale_tril.mT

    def inverse(self, x: Tensor) -> Tensor:
        """``x (*batch, D)`` -> whitened ``y``."""
        centered = x - self.loc
        if self.scale_tril.dim() == 1:
            return centered / self.scale_tril
        return torch.linalg.solve_triangular(self.scale_tril, centered[..., None], upper=False)[..., 0]

    def pull_back(self, score: Tensor) -> Tensor:
        """A score in ``x`` -> the score in ``y``: ``scale_tril' score``."""
        return score * self.scale_tril if self.scale_tril.dim() == 1 else score @ self.scale_tril

    @property
    def log_abs_det(self) -> Tensor:
        diagonal = self.scale_tril if self.scale_tril.dim() == 1 else self.scale_tril.diagonal()
        return diagonal.abs().log().sum()

    @property
    def covariance(self) -> Tensor:
        """``scale_tril scale_tril'`` (D, D), or the variances (D,) if diagonal."""
        return self.scale_tril**2 if self.scale_tril.dim() == 1 else self.scale_tril @ self.scale_tril.mT


class WhitenedTarget:
    """A target seen from the whitened space of an :class:`AffineMap`."""

    def __init__(self, target: TargetDensity, affine: AffineMap) -> None:
        self._target, self._affine = target, affine

    @property
    def dim(self) -> int:
        return self._target.dim

    def log_density(self, y: Tensor) -> Tensor:
        return self._target.log_density(self._affine.forward(y)) + self._affine.log_abs_det

    def score(self, y: Tensor) -> Tensor:
        return self._affine.pull_back(self._target.score(self._affine.forward(y)))

    def log_density_and_score(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_density, score = self._target.log_density_and_score(self._affine.forward(y))
        return log_density + self._affine.log_abs_det, self._affine.pull_back(score)
