"""Bijections from unconstrained vectors to supports: ``biject_to``, and the two matrix supports it lacks.

``torch.distributions`` maps to lower Cholesky factors and positive definite matrices from square matrices, of which
it ignores the upper triangle: not a bijection, and without a Jacobian. Here both come from vectors of n (n + 1) / 2
numbers, the rows of a lower triangle whose diagonal is exponentiated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform
from torch.distributions.utils import tril_matrix_to_vec, vec_to_tril_matrix

__all__ = ["bijection", "same_support"]


def bijection(support: constraints.Constraint) -> Transform:
    """The bijection from an unconstrained space to a support.

    Raises:
        NotImplementedError: there is none.
    """
    if isinstance(support, constraints.independent):
        return IndependentTransform(bijection(support.base_constraint), support.reinterpreted_batch_ndims)
    if isinstance(support, type(constraints.lower_cholesky)):
        return LowerCholesky()
    if isinstance(support, (type(constraints.positive_definite), type(constraints.positive_semidefinite))):
        return ComposeTransform([LowerCholesky(), _FromCholesky()])
    return biject_to(support)


def same_support(a: Any, b: Any) -> bool:
    """Whether two constraints are equal in type and in every bound."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, constraints.Constraint):
        return type(a) is type(b) and all(same_support(v, vars(b).get(k)) for k, v in vars(a).items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_support, a, b))
    return bool(a == b)


class LowerCholesky(Transform):
    """Vectors of n (n + 1) / 2 numbers -> lower triangular n x n matrices with a positive diagonal."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowerCholesky)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        tril = vec_to_tril_matrix(x)
        return tril.tril(-1) + tril.diagonal(dim1=-2, dim2=-1).exp().diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        return tril_matrix_to_vec(y.tril(-1) + y.diagonal(dim1=-2, dim2=-1).log().diag_embed())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Size) -> Size:
        n = (math.isqrt(1 + 8 * shape[-1]) - 1) // 2
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: Size) -> Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


class _FromCholesky(Transform):
    """``L -> L L'``, whose Jacobian on the lower triangles is ``2^n prod_i L_ii^(n - i)``, i = 0 ... n - 1."""

    domain = constraints.lower_cholesky
    codomain = constraints.positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FromCholesky)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        return x @ x.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.cholesky(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        n = x.shape[-1]
        powers = torch.arange(n, 0, -1, dtype=x.dtype, device=x.device)
        return n * math.log(2.0) + (powers * x.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
