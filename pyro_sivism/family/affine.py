"""The whitened space the family and the critic live in.

A Gaussian N(loc, A A') fitted to the target gives the map ``x = loc + A y``. In ``y`` that Gaussian is
standard normal, whatever the units and correlations of ``x``; densities and scores follow by the chain rule:

    log p(y) = log p(x) + log |det A|,      score(y) = A' score(x).

A is a lower triangular matrix, or diagonal, or, where D is large, diagonal times low-rank:

    A = diag(s) (I + U diag(e) U'),      U (D, R) with orthonormal columns, e > -1,

whose inverse ``(I - U diag(e / (1 + e)) U') diag(1 / s)``, determinant ``prod s prod (1 + e)`` and products
all cost O(D R). Its covariance ``diag(s) (I + U diag((1 + e)^2 - 1) U') diag(s)`` stretches R directions
of the space scaled by s and leaves the others alone.
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
    """``x = loc + A y``.

    Attributes:
        loc: (D,).
        scale_tril: A itself, lower triangular (D, D); or the diagonal (D,).
        directions: U (D, R), orthonormal columns: with them A is ``diag(scale_tril) (I + U diag(stretches) U')``.
        stretches: e (R,), above -1; given where ``directions`` are, and only where ``scale_tril`` is (D,).
    """

    loc: Tensor
    scale_tril: Tensor
    directions: Tensor | None = None
    stretches: Tensor | None = None

    @classmethod
    def identity(cls, dim: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> AffineMap:
        return cls(torch.zeros(dim, dtype=dtype, device=device), torch.ones(dim, dtype=dtype, device=device))

    @property
    def is_dense(self) -> bool:
        return self.scale_tril.dim() == 2

    @property
    def rank(self) -> int:
        """R, the number of stretched directions; 0 for the triangular and the diagonal form."""
        return 0 if self.directions is None else self.directions.shape[1]

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> AffineMap:
        parts = (None if part is None else part.to(device, dtype) for part in self)
        return AffineMap(*parts)  # type: ignore[arg-type]  # loc, the first, is never None

    def forward(self, y: Tensor) -> Tensor:
        """Whitened ``y (*batch, D)`` -> ``x``."""
        return self.loc + self.linear(y)

    def linear(self, y: Tensor) -> Tensor:
        """``A y``, without the shift."""
        return y @ self.scale_tril.mT if self.is_dense else self._stretch(y, self.stretches) * self.scale_tril

    def inverse(self, x: Tensor) -> Tensor:
        """``x (*batch, D)`` -> whitened ``y``."""
        centered = x - self.loc
        if self.is_dense:
            # One matrix on the right: with a batch of vectors there, A would be copied for each of them.
            columns = centered.reshape(-1, centered.shape[-1]).mT
            return torch.linalg.solve_triangular(self.scale_tril, columns, upper=False).mT.reshape(centered.shape)
        undone = None if self.stretches is None else -self.stretches / (1.0 + self.stretches)
        return self._stretch(centered / self.scale_tril, undone)

    def pull_back(self, score: Tensor) -> Tensor:
        """A score in ``x`` -> the score in ``y``: ``A' score``."""
        return score @ self.scale_tril if self.is_dense else self._stretch(score * self.scale_tril, self.stretches)

    def _stretch(self, y: Tensor, stretches: Tensor | None) -> Tensor:
        """``(I + U diag(stretches) U') y``, symmetric, so that it serves for the transpose too."""
        if self.directions is None or stretches is None:
            return y
        return y + (y @ self.directions * stretches) @ self.directions.mT

    @property
    def log_abs_det(self) -> Tensor:
        diagonal = self.scale_tril.diagonal() if self.is_dense else self.scale_tril
        log_det = diagonal.abs().log().sum()
        return log_det if self.stretches is None else log_det + self.stretches.log1p().sum()

    @property
    def variances(self) -> Tensor:
        """The diagonal of the covariance, (D,); linear in D for the diagonal and low-rank forms."""
        if self.is_dense:
            return self.scale_tril.square().sum(-1)
        if self.directions is None or self.stretches is None:
            return self.scale_tril.square()
        excess = self.stretches * (2.0 + self.stretches)  # (1 + e)^2 - 1
        return self.scale_tril.square() * (1.0 + self.directions.square() @ excess)

    @property
    def covariance(self) -> Tensor:
        """``A A'`` (D, D), or the variances (D,) if diagonal. The low-rank form is written out: mind large D."""
        if self.is_dense:
            return self.scale_tril @ self.scale_tril.mT
        if self.directions is None:
            return self.variances
        rows = self.linear(torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device))  # A' row by row
        return rows.mT @ rows


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
