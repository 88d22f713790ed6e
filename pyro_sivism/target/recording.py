"""A function of tensors as a graph: every ATen operation of one call, in order.

The function is called once, on real tensors, and the operations that reach the dispatcher are written down as they go
by. ``make_fx`` does the same and more, symbolic shapes and stack traces among it, and takes fifty times as long, which
a fit of a second would notice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Recording", "TensorMeta", "is_recording", "trace"]

aten = torch.ops.aten

# These take the values out of a tensor, behind the dispatcher's back.
_READS = {
    Tensor.numpy,
    Tensor.tolist,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.untyped_storage,
    Tensor.data_ptr,
}
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]  # a getter written in C
_is_recording: ContextVar[bool] = ContextVar("is_recording", default=False)


class TensorMeta(NamedTuple):
    """What a graph knows of a result without its values; ``node.meta["val"]`` of every node that is a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Recording(NamedTuple):
    """A graph, the tensors behind its ``get_attr`` nodes, and the tensors that the function closed over."""

    graph: fx.Graph
    constants: dict[str, Tensor]
    closed_over: list[Tensor]


def is_recording() -> bool:
    """Whether a graph is being recorded, so that tensors have no values to ask for."""
    return _is_recording.get()


def trace(function: Callable, *inputs: Tensor) -> Recording:
    """The operations of ``function(*inputs)``, as a graph from the inputs to the tensor or tensors it returns.

    Raises:
        RuntimeError: the function asks for the values of a tensor that depends on the inputs or on something random, or
            that requires a gradient, as a branch on it does.
        Exception: whatever else the function raises.
    """
    recorder = _Recorder()
    placeholders = [recorder.placeholder(tensor) for tensor in inputs]
    with _marked(), recorder, _Reads(recorder):
        result = function(*placeholders)
    leaves, spec = tree_flatten(result)
    recorder.graph.output(tree_unflatten([recorder.node(leaf) for leaf in leaves], spec))
    return Recording(recorder.graph, recorder.constants, list(recorder.constants.values()))


@contextmanager
def _marked() -> Iterator[None]:
    token = _is_recording.set(True)
    try:
        yield
    finally:
        _is_recording.reset(token)


class _Recorder(TorchDispatchMode):
    """Writes down operations. ``node.meta["is_known"]`` where a result depends on nothing that may differ next time,
    and its values may be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes = WeakTensorKeyDictionary()

    def placeholder(self, tensor: Tensor) -> Tensor:
        self._name(tensor, self.graph.placeholder(f"input_{len(self._nodes)}"), is_known=False)
        return tensor

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that computed a tensor; a new one for a tensor from outside."""
        node = self._nodes.get(tensor)
        if node is None:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor
            node = self._name(tensor, self.graph.get_attr(name), is_known=not tensor.requires_grad)
        return node

    def check_known(self, name: str, *tensors: Tensor) -> None:
        if not all(self.node(tensor).meta["is_known"] for tensor in tensors):
            raise RuntimeError(f"{name} takes the values out of a tensor that depends on latents or arguments")

    def _name(self, tensor: Tensor, node: fx.Node, is_known: bool) -> fx.Node:
        node.meta["val"] = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        node.meta["is_known"] = is_known
        self._nodes[tensor] = node
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunction():  # what is done here is no read of the function's
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if torch.Tag.data_dependent_output in func.tags:
            self.check_known(func.name(), *tensors)
            return func(*args, **kwargs)
        nodes = tree_map_only(Tensor, self.node, (args, kwargs))
        is_known = torch.Tag.nondeterministic_seeded not in func.tags
        is_known = is_known and all(self.node(tensor).meta["is_known"] for tensor in tensors)
        if func._schema.is_mutable and not is_known:
            self._forget_values(func, args, kwargs)
        result = func(*args, **kwargs)
        # The argument of lift_fresh is a tensor that nobody else has, as of torch.tensor(1.0); in a graph it is shared.
        target = aten.lift_fresh_copy.default if func is aten.lift_fresh.default else func
        node = self.graph.call_function(target, *nodes)
        if isinstance(result, Tensor):
            self._name(result, node, is_known)
        elif isinstance(result, tuple | list):
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._name(part, self.graph.call_function(operator.getitem, (node, i)), is_known)
        return result

    def _forget_values(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Of what an operation is about to write into, in whatever view: the values will depend on more."""
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[i] if i < len(args) else kwargs.get(argument.name)
            for leaf in tree_flatten(written)[0]:
                if isinstance(leaf, Tensor) and self.node(leaf).meta["is_known"]:
                    storage = leaf.untyped_storage()._cdata
                    for tensor, node in list(self._nodes.items()):
                        if tensor.untyped_storage()._cdata == storage:
                            node.meta["is_known"] = False


class _Reads(TorchFunctionMode):
    """Shows the recorder what the dispatcher does not see: values taken out of a tensor, and ``.data``."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == _DATA:
            return args[0].detach()
        if func in _READS:
            self._recorder.check_known(f"{func.__name__}()", args[0])
        return func(*args, **(kwargs or {}))
