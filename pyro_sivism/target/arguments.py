"""The arguments a model is called with, taken apart: tensors, which a captured graph takes as inputs, and the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Arguments", "version_of"]

_FROZEN = (float, np.floating, np.ndarray)
_VALUES = (int, np.integer, np.bool_, str, type(None), torch.dtype, torch.device)


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
        self.frozen = tuple(
            _content(leaf) for leaf in self._leaves if isinstance(leaf, _FROZEN) and not _is_opaque(leaf)
        )
        self.has_opaque = any(_is_opaque(leaf) for leaf in self._leaves)

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """``args`` and ``kwargs`` with other tensors in the place of :attr:`tensors`."""
        replacements = iter(tensors)
        leaves = [next(replacements) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._structure)

    def same_objects(self, other: Arguments) -> bool:
        """Whether every leaf is the very same object."""
        return len(self._leaves) == len(other._leaves) and all(a is b for a, b in zip(self._leaves, other._leaves))


def _is_opaque(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return type(leaf) is not np.ndarray or leaf.dtype.hasobject  # a subclass may have more, such as a mask
    return not isinstance(leaf, (Tensor, *_FROZEN, *_VALUES))


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    if _is_opaque(leaf):
        return type(leaf), id(leaf)
    if isinstance(leaf, np.ndarray):
        return type(leaf), leaf.shape, leaf.dtype
    return type(leaf) if isinstance(leaf, _FROZEN) else (type(leaf), leaf)


def _content(leaf: float | np.floating | np.ndarray) -> Any:
    if not isinstance(leaf, np.ndarray):
        return float(leaf)
    return hashlib.blake2b(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data).digest()


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written into; None of one made under ``torch.inference_mode``, which does not count."""
    return None if tensor.is_inference() else tensor._version
