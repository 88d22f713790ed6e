"""Estimates H of the inverse of ``-hessian log p`` along quasi-Newton paths, for S paths at once.

Both forms answer the same three questions: H times a vector, H after a step s along which the score fell by
y, and the Gaussian ``N(x + H score, H)``. :class:`DenseInverse` is BFGS; :class:`LimitedInverse` keeps a
diagonal and the last M pairs (s, y), in time and memory linear in D. Nocedal and Wright, "Numerical
optimization", 2006, sections 6.1 and 7.2; the diagonal: Gilbert and Lemarechal, Math. Prog. 45, 1989.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pyro_sivism.family.affine import AffineMap

__all__ = ["DenseInverse", "InverseHessian", "LimitedInverse"]

_TINY = 1e-300


class InverseHessian(Protocol):
    """A positive definite H for each of S paths; ``update`` makes a new one and leaves the old as it is."""

    def apply(self, vectors: Tensor) -> Tensor:
        """``H v`` (S, D) of ``vectors (S, D)``."""

    def update(self, moved: Tensor, bent: Tensor, curved: Tensor) -> InverseHessian:
        """H after steps ``moved`` = s that lowered the scores by ``bent`` = y, where ``curved (S,)`` says s'y > 0."""

    def select(self, path: int) -> InverseHessian:
        """That of one path, with S = 1."""

    def gaussian(self, x: Tensor, score: Tensor) -> AffineMap | None:
        """``N(x + H score, H)`` at one point (D,) of the one path there is; None where H has lost its definiteness."""


class DenseInverse:
    """BFGS: ``H' = (I - s y' / s'y) H (I - y s' / s'y) + s s' / s'y``.

    Args:
        h: the first H, (S, D, D).
        rescale: whether the first step resets H to ``(s'y / y'y) I``, so that its scale is the target's.
    """

    def __init__(self, h: Tensor, rescale: Tensor) -> None:
        self.h, self.rescale = h, rescale

    @classmethod
    def start(cls, scale: Tensor, dim: int) -> DenseInverse:
        """``scale (S,)`` times the identity, to be rescaled."""
        identity = torch.eye(dim, dtype=scale.dtype, device=scale.device)
        return cls(scale[:, None, None] * identity, torch.ones_like(scale, dtype=torch.bool))

    @classmethod
    def measured(cls, h: Tensor) -> DenseInverse:
        """``h (S, D, D)`` as it is."""
        return cls(h, torch.zeros(len(h), dtype=torch.bool, device=h.device))

    def apply(self, vectors: Tensor) -> Tensor:
        return (self.h @ vectors[..., None])[..., 0]

    def update(self, moved: Tensor, bent: Tensor, curved: Tensor) -> DenseInverse:
        sy = (moved * bent).sum(-1).where(curved, 1.0)
        yy = (bent * bent).sum(-1).where(curved, 1.0)
        identity = torch.eye(self.h.shape[-1], dtype=self.h.dtype, device=self.h.device)
        first = self.rescale & curved
        h = torch.where(first[:, None, None], (sy / yy)[:, None, None] * identity, self.h)
        rho = (1.0 / sy)[:, None, None]
        s, y = moved[:, :, None], bent[:, :, None]
        hy = h @ y
        # The product written out: two rank-one terms in place of two D^3 products.
        updated = h - rho * (s * hy.mT + hy * s.mT) + (rho * rho * (y.mT @ hy) + rho) * (s * s.mT)
        keep = curved & updated.isfinite().all(-1).all(-1)
        return DenseInverse(torch.where(keep[:, None, None], updated, self.h), self.rescale & ~first)

    def select(self, path: int) -> DenseInverse:
        return DenseInverse(self.h[path : path + 1], self.rescale[path : path + 1])

    def gaussian(self, x: Tensor, score: Tensor) -> AffineMap | None:
        h = self.h[0]
        scale = h.diagonal().clamp(min=_TINY).sqrt()  # the Cholesky factor of a correlation matrix is the safer one
        root, info = torch.linalg.cholesky_ex(h / scale[:, None] / scale)
        loc = x + h @ score
        if int(info) != 0 or not bool(loc.isfinite().all()):
            return None
        return AffineMap(loc, scale[:, None] * root)


class LimitedInverse:
    """L-BFGS: a diagonal, itself updated, corrected by the last M pairs.

    Args:
        diagonal: (S, D).
        rescale: as for :class:`DenseInverse`.
        pairs: (s, y, 1 / s'y) of past steps, each (S, D), (S, D), (S,), with 0 for the last where there was none.
        memory: M.
    """

    def __init__(
        self, diagonal: Tensor, rescale: Tensor, pairs: tuple[tuple[Tensor, Tensor, Tensor], ...], memory: int
    ) -> None:
        self.diagonal, self.rescale, self.pairs, self.memory = diagonal, rescale, pairs, memory

    @classmethod
    def start(cls, scale: Tensor, dim: int, memory: int) -> LimitedInverse:
        diagonal = scale[:, None].expand(-1, dim).clone()
        return cls(diagonal, torch.ones_like(scale, dtype=torch.bool), (), memory)

    def apply(self, vectors: Tensor) -> Tensor:
        return self._apply(vectors[:, None])[:, 0]

    def _apply(self, vectors: Tensor) -> Tensor:
        """The two-loop recursion on K vectors a path, (S, K, D)."""
        q, alphas = vectors, []
        for s, y, rho in reversed(self.pairs):
            alpha = rho[:, None] * (q @ s[:, :, None])[..., 0]
            q = q - alpha[..., None] * y[:, None]
            alphas.append(alpha)
        r = q * self.diagonal[:, None]
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas)):
            beta = rho[:, None] * (r @ y[:, :, None])[..., 0]
            r = r + (alpha - beta)[..., None] * s[:, None]
        return r

    def update(self, moved: Tensor, bent: Tensor, curved: Tensor) -> LimitedInverse:
        sy = (moved * bent).sum(-1, keepdim=True).where(curved[:, None], 1.0)
        yy = (bent * bent).sum(-1, keepdim=True).where(curved[:, None], 1.0)
        first = self.rescale & curved
        d = torch.where(first[:, None], (sy / yy).expand_as(self.diagonal), self.diagonal)
        # The diagonal of the BFGS update of diag(1 / d), positive by construction.
        ratio = (d * bent * bent).sum(-1, keepdim=True) / sy
        shs = (moved * moved / d).sum(-1, keepdim=True).clamp(min=_TINY)
        inverse = ratio / d + bent * bent / sy - ratio * (moved / d).square() / shs
        updated = 1.0 / inverse.clamp(min=_TINY)
        keep = curved[:, None] & updated.isfinite() & (inverse > 0)
        rho = torch.where(curved, 1.0 / sy[:, 0], 0.0)
        pairs = (*self.pairs, (moved, bent, rho))[-self.memory :]
        return LimitedInverse(torch.where(keep, updated, self.diagonal), self.rescale & ~first, pairs, self.memory)

    def select(self, path: int) -> LimitedInverse:
        one = slice(path, path + 1)
        pairs = tuple((s[one], y[one], rho[one]) for s, y, rho in self.pairs)
        return LimitedInverse(self.diagonal[one], self.rescale[one], pairs, self.memory)

    def gaussian(self, x: Tensor, score: Tensor) -> AffineMap | None:
        """With d the diagonal, ``d^{-1/2} H d^{-1/2}`` is the identity but on the span of the scaled pairs."""
        scale = self.diagonal[0].sqrt()
        loc = x + self.apply(score[None])[0]
        if not bool(loc.isfinite().all() and scale.isfinite().all()):
            return None
        pairs = [(s[0], y[0]) for s, y, rho in self.pairs if float(rho[0]) > 0]
        if not pairs:
            return AffineMap(loc, scale)
        span = torch.stack([v for s, y in pairs for v in (s / scale, y * scale)], -1)
        basis = torch.linalg.qr(span / span.norm(dim=0).clamp(min=_TINY)).Q
        image = self._apply((basis / scale[:, None]).mT[None])[0].mT / scale[:, None]
        within = basis.mT @ image
        if not bool(within.isfinite().all()):
            return None
        eigenvalues, vectors = torch.linalg.eigh(0.5 * (within + within.mT))
        if float(eigenvalues[0]) <= 0.0:
            return None
        return AffineMap(loc, scale, basis @ vectors, eigenvalues.sqrt() - 1.0)
