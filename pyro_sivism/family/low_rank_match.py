"""A Gaussian with a diagonal plus low-rank precision, matched to the target in time and memory linear in D.

At the Gaussian N(m, P^{-1}) nearest to the target in KL(q, p), the score vanishes on average and P is the average of
``-hessian log p`` over q (Opper and Archambeau, Neural Computation 21, 2009). Averages of Hessians times vectors come
from scores alone: by Stein's identity the regression of the scores of draws on the draws estimates them. Every update
moves P towards what one batch shows of it, as natural-gradient variational inference does, and keeps the form

    P = S^{-1} (I + U diag(l) U') S^{-1},      S diagonal, U (D, R) orthonormal,

after Mishkin, Kunstner, Nielsen, Schmidt and Khan, "SLANG: Fast structured covariance approximations for Bayesian deep
learning with natural gradient", NeurIPS 2018. Unlike there, scores are enough, and the regression knows a Gaussian
target without noise once S and U suffice for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sivism.family.affine import AffineMap

__all__ = ["LowRankMatch"]

# An update may widen a standard deviation by a factor sqrt(10), and narrow it by any: with less, a Newton step for the
# mean would overshoot.
_MAX_WIDENING = 10.0
_MAX_SHIFT = 3.0
_ALTERNATIONS = 3
_NEGLIGIBLE = 1e-10
_TINY = 1e-300


class LowRankMatch:
    """The update of :func:`~pyro_sivism.family.matching.match` for a covariance that is diagonal plus low-rank.

    In the frame where the current Gaussian is N(0, I) the precision of the target is ``M = I + diag(d) + Q C Q'``.
    With draws y and scores g, both centered, the residuals ``-(g + y) = (M - I) y`` show the columns of M - I: Q are
    their leading directions, C is the regression of the residuals on the draws within these, and d the coordinatewise
    regression of what is left.

    Args:
        rank: R, the largest number of directions kept.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(
        self, affine: AffineMap, y: Tensor, score: Tensor, regularization: float
    ) -> tuple[AffineMap, list[str]]:
        weight = regularization / (1.0 + regularization)
        y_mean, score_mean = y.mean(0), score.mean(0)
        d, q, c = _regression(y - y_mean, score - score_mean, min(self.rank, len(y) // 8, y.shape[1]))
        # The score at the current mean: what the batch has on average, less what the draws' own mean explains.
        at_mean = score_mean + y_mean + d * y_mean + q @ (c @ (q.mT @ y_mean))

        guarded = []
        diagonal = 1.0 + weight * d
        bounded = diagonal.clamp(min=1.0 / _MAX_WIDENING)
        # M = sqrt(a) (I + B diag(l) B') sqrt(a), with a the diagonal
        basis, triangle = torch.linalg.qr(q / bounded.sqrt()[:, None])
        within, vectors = torch.linalg.eigh(weight * (triangle @ c @ triangle.mT))
        excess = within.clamp(min=1.0 / _MAX_WIDENING - 1.0)
        if bool((bounded != diagonal).any()) or bool((excess != within).any()):
            guarded.append("covariance_bounded")
        updated = self._compose(affine, bounded, basis @ vectors, excess)

        shift = updated.pull_back(_push_forward(affine, weight * at_mean))
        length = shift.norm() / (_MAX_SHIFT * math.sqrt(len(shift)))
        if bool(length > 1):
            guarded.append("mean_bounded")
        return updated._replace(loc=affine.loc + updated.linear(shift / length.clamp(min=1.0))), guarded

    def cut(self, affine: AffineMap) -> AffineMap:
        """``affine`` with at most R directions: the most stretched, less those that are hardly more than a coordinate.

        What a dropped direction adds to the diagonal of the precision, if it is a short one, or of the covariance, if
        it is a long one, is kept, as in SLANG: both are positive, so that what is left stays positive definite.
        """
        for short in (True, False):
            if affine.directions is None or affine.stretches is None:
                return affine
            log_stretches = affine.stretches.log1p()
            spread = 1.0 - affine.directions.pow(4).sum(0)  # 0 for a coordinate's own direction: the diagonal can do it
            importance = log_stretches.abs() * spread
            dropped = torch.ones_like(importance, dtype=torch.bool)
            dropped[importance.argsort(descending=True)[: self.rank]] = False
            dropped |= importance < _NEGLIGIBLE
            absorbed = dropped & ((log_stretches < 0) == short)
            # The first pass leaves the long ones to the second.
            affine = _absorb(affine, absorbed, ~absorbed if short else ~dropped, short)
        return affine

    def _compose(self, affine: AffineMap, diagonal: Tensor, directions: Tensor, excess: Tensor) -> AffineMap:
        """The map whose precision, in the whitened frame of ``affine``, is
        ``sqrt(a) (I + B diag(excess) B') sqrt(a)``, ``a = diagonal``, ``B = directions``; cut to the leading R.

        With ``affine = S F``, ``F = I + U diag(e) U'``, the precision in the frame of the new diagonal
        ``S / sqrt(a)`` is ``a^{-1/2} F^{-1} sqrt(a) (I + ..) sqrt(a) F^{-1} a^{-1/2}``: the identity, but on a span
        of at most 2 R + K directions.
        """
        root = diagonal.sqrt()[:, None]
        old = AffineMap(torch.zeros_like(affine.loc), torch.ones_like(diagonal), affine.directions, affine.stretches)

        def precision_root(v: Tensor) -> Tensor:
            """``sqrt(a) F^{-1} a^{-1/2}`` on columns."""
            return root * old.inverse((v / root).mT).mT

        spanning = [old.inverse((root * directions).mT).mT / root]
        if affine.directions is not None:
            spanning += [affine.directions / root, affine.directions * root]
        span = torch.cat(spanning, -1)
        basis = torch.linalg.qr(span / span.norm(dim=0).clamp(min=_TINY)).Q
        image = precision_root(basis)
        inside = directions.mT @ image
        gram = image.mT @ image + inside.mT @ (excess[:, None] * inside)
        eigenvalues, vectors = torch.linalg.eigh(0.5 * (gram + gram.mT))
        eigenvalues = eigenvalues.clamp(min=1e-12)
        return self.cut(
            AffineMap(affine.loc, affine.scale_tril / root[:, 0], basis @ vectors, eigenvalues.rsqrt() - 1.0)
        )


def _absorb(affine: AffineMap, absorbed: Tensor, kept: Tensor, short: bool) -> AffineMap:
    """Move the diagonal of some directions' part of the precision (``short``) or the covariance to the scale."""
    assert affine.directions is not None
    assert affine.stretches is not None
    power = -2.0 if short else 2.0
    excess = (1.0 + affine.stretches) ** power - 1.0
    root = (1.0 + affine.directions[:, absorbed].square() @ excess[absorbed]).sqrt()
    scale = affine.scale_tril / root if short else affine.scale_tril * root
    if not bool(kept.any()):
        return AffineMap(affine.loc, scale)
    basis, triangle = torch.linalg.qr(affine.directions[:, kept] / root[:, None])
    values, vectors = torch.linalg.eigh(triangle * excess[kept] @ triangle.mT)
    return AffineMap(affine.loc, scale, basis @ vectors, (1.0 + values).clamp(min=1e-12) ** (1.0 / power) - 1.0)


def _push_forward(affine: AffineMap, score: Tensor) -> Tensor:
    """A whitened score -> the score in x, the inverse of :meth:`AffineMap.pull_back`."""
    return (
        affine._replace(loc=torch.zeros_like(score), scale_tril=torch.ones_like(score)).inverse(score)
        / affine.scale_tril
    )


def _regression(y: Tensor, score: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """d (D,), Q (D, K) and C (K, K) with ``-(score + y) ~ d y + Q C Q' y`` on centered draws and scores (B, D).

    Q comes from one half of the batch and C from the other: on the draws that chose them, directions explain noise too,
    and in many dimensions nothing but noise. Eigenvalues of C that noise could have made are set to 0.
    """
    residual = -(score + y)
    energy = y.square().sum(0)
    half = len(y) // 2
    d = torch.zeros_like(energy)
    for _ in range(_ALTERNATIONS):
        left = residual - d * y
        eigenvalues, vectors = torch.linalg.eigh(left[:half] @ left[:half].mT)
        leading = (eigenvalues > 1e-20 * eigenvalues[-1:].clamp(min=_TINY)).nonzero()[:, 0]
        leading = leading[len(leading) - min(rank, len(leading)) :]
        q = torch.linalg.qr(left[:half].mT @ vectors[:, leading]).Q
        inside, response = y[half:] @ q, left[half:] @ q
        c = torch.linalg.lstsq(inside, response).solution if len(leading) > 0 else d.new_zeros(0, 0)
        noise = (response - inside @ c).square().mean().sqrt() / math.sqrt(len(inside) / 2)
        values, rotation = torch.linalg.eigh(0.5 * (c + c.mT))
        values = values.where(values.abs() > noise * math.sqrt(2.0 * len(values)), 0.0)
        q, c = q @ rotation, values.diag()
        d = ((left + d * y - ((y @ q) * values) @ q.mT) * y).sum(0) / energy
    return d, q, c
