"""The arguments a model is called with, taken apart: tensors, which a captured graph takes as inputs, and the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Arguments"]


class Arguments:
    """``args`` and ``kwargs`` of a call, with nested lists, tuples and dicts flattened into leaves.

    Attributes:
        tensors: the leaves that are tensors.
        signature: what stays the same between the minibatches of one problem: the structure; the shapes, dtypes and
            devices of arrays; the values of integers and strings, which may be sizes and switches; the identity of
            other objects.
        frozen: what may differ between calls of one signature and a captured graph holds as constants: the values of
            floats and the contents of NumPy arrays.
        has_opaque: whether some leaf is an object whose contents nobody here knows.
    """

    def __init__(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        self._leaves, self._structure = tree_flatten((tuple(args), dict(kwargs or {})))
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self.signature = (str(self._structure), *(_kind(leaf) for leaf in self._leaves))
        self.frozen = tuple(_content(leaf) for leaf in self._leaves if isinstance(leaf, float | np.ndarray))
        known = (Tensor, np.ndarray, float, int, str, type(None), torch.dtype, torch.device)
        self.has_opaque = not all(isinstance(leaf, known) for leaf in self._leaves)

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """``args`` and ``kwargs`` with other tensors in the place of :attr:`tensors`."""
        replacements = iter(tensors)
        leaves = [next(replacements) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._structure)

    def same_objects(self, other: Arguments) -> bool:
        """Whether every leaf is the very same object."""
        return len(self._leaves) == len(other._leaves) and all(a is b for a, b in zip(self._leaves, other._leaves))


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    if isinstance(leaf, np.ndarray):
        return type(leaf), leaf.shape, leaf.dtype
    if isinstance(leaf, float):
        return float
    return type(leaf), leaf if isinstance(leaf, int | str | type(None)) else id(leaf)


def _content(leaf: float | np.ndarray) -> Any:
    if isinstance(leaf, float):
        return leaf
    if leaf.dtype == object:
        return id(leaf)
    return hashlib.blake2b(np.ascontiguousarray(leaf).data).digest()
