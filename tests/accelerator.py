"""An accelerator made of the CPU, for machines without one.

Within :func:`accelerator`, tensors can be moved to ``DEVICE`` and made there. They compute on the CPU, with its random
numbers, so that results are those of the CPU; but they say that they are elsewhere, may not be mixed with tensors that
are not, and each time that the host asks one for its values is counted. What this finds on any machine is what fails,
or stalls, on a GPU only: a tensor that was made on the wrong device, and a step that waits.

Operations are seen one by one below autograd. What looks at memory itself, as ``vmap`` and captures do, is not served.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["DEVICE", "Waits", "accelerator"]

DEVICE = torch.device("meta")  # a device that autograd knows and whose tensors have no memory of their own

aten = torch.ops.aten
_READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
_COPIES = {aten._to_copy.default, aten.copy_.default}
# Indices may be on the CPU, and are copied; masks have to be counted before the result has a shape.
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Waits(list):
    """Names of the operations by which the host asked the device for values."""


class _Elsewhere(torch.Tensor):
    """A tensor on the accelerator, whose numbers are ``own``'s."""

    own: Tensor

    @staticmethod
    def __new__(cls, own: Tensor) -> _Elsewhere:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, own.shape, strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype, device=DEVICE
        )
        tensor.own = own
        return tensor

    def __repr__(self, **kwargs: Any) -> str:
        return f"{self.own!r} on the accelerator"

    def __format__(self, spec: str) -> str:
        return format(self.own, spec)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of accelerator()")


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if not isinstance(tensor, _Elsewhere)]
        elsewhere = [tensor for tensor in tensors if isinstance(tensor, _Elsewhere)]
        device = kwargs.pop("device", None)
        if elsewhere and func not in _COPIES | _INDEXED and any(tensor.dim() > 0 for tensor in here):
            raise RuntimeError(f"{func} of tensors on the accelerator and on the CPU")
        if elsewhere and (func in _READS or self._has_masks(func, args) or self._brings_back(func, args, device)):
            self._waits.append(str(func))
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(_own, (args, kwargs))
        results = func(*args, **kwargs)
        is_elsewhere = bool(elsewhere) if device is None else torch.device(device) == DEVICE
        if not is_elsewhere:
            return results
        written = {id(tensor.own): tensor for tensor in elsewhere}  # an operation in place returns what it wrote to

        def moved(result: Any) -> Any:
            if not isinstance(result, Tensor):
                return result
            return written[id(result)] if id(result) in written else _Elsewhere(result)

        return tree_map(moved, results)

    @staticmethod
    def _has_masks(func: Any, args: tuple) -> bool:
        return func in _INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1])

    @staticmethod
    def _brings_back(func: Any, args: tuple, device: Any) -> bool:
        if func is aten.copy_.default:
            return not isinstance(args[0], _Elsewhere)
        return func is aten._to_copy.default and device is not None and torch.device(device) != DEVICE


class _Functions(TorchFunctionMode):
    """What never reaches the dispatcher: making tensors of numbers, and numbers of tensors."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            value = args[0]
            return value if isinstance(value, _Elsewhere) else _Elsewhere(func(*args, **{**kwargs, "device": "cpu"}))
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], _Elsewhere):
            self._waits.append(func.__name__)
            return func(args[0].own, *args[1:], **kwargs)
        return func(*args, **kwargs)


def _own(value: Any) -> Any:
    return value.own if isinstance(value, _Elsewhere) else value


@contextmanager
def accelerator() -> Iterator[Waits]:
    """Within, ``DEVICE`` is an accelerator. Gives the list of waits for it, which may be cleared."""
    waits = Waits()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter cannot become a subclass in place
    try:
        with _Operations(waits), _Functions(waits):
            yield waits
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
