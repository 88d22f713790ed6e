"""A function of tensors as a graph: every ATen operation of one call, in order.

The function is called once, on real tensors, and the operations that reach the dispatcher are written down as they go
by. ``make_fx`` does the same and more, symbolic shapes and stack traces among it, and takes ten times as long, which a
fit of a second would notice.

The graph is pure. Where the function writes into a tensor, the graph has the operation that returns what is written,
and whatever shares memory with that tensor is computed from it when it is next read: after ``y = zeros(3)`` and
``y[0] = x``, ``y`` is ``select_scatter(zeros(3), x, 0, 0)``.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["DynamicSizeError", "Recording", "TensorMeta", "is_recording", "own_detach", "record"]

aten = torch.ops.aten

# These take the values out of a tensor, behind the dispatcher's back; the second ones out of those in a list.
_READS = {
    Tensor.numpy,
    Tensor.tolist,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.untyped_storage,
    Tensor.data_ptr,
}
_MAKES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]  # a getter written in C
_SAME_NUMBERS = {  # views of all of a tensor's numbers, in the same order
    aten.view.default,
    aten._reshape_alias.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
}
_SCATTERS = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
_OWN_INVERSES = {aten.transpose.int, aten.t.default}
_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


class DynamicSizeError(RuntimeError):
    """How many numbers an operation returns depends on values that may differ in the next call."""


class TensorMeta(NamedTuple):
    """What a graph knows of a result without its values; ``node.meta["val"]`` of every node that is a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


@dataclass
class Recording:
    """What one call of a function did.

    Attributes:
        graph: its operations, from its inputs to the tensor or tensors that it returned.
        constants: the tensors behind the graph's ``get_attr`` nodes.
        closed_over: the tensors that the function read beside its inputs, whether they are in the graph or not.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    closed_over: list[Tensor]

    def compile(self) -> fx.GraphModule:
        """The graph as a function, which may be recorded again, as of a batch.

        Its detaches are then its own, and its views may be of tensors that are laid out differently in memory.
        """
        for node in self.graph.nodes:
            node.target = {aten.detach.default: own_detach, aten.view.default: aten.reshape.default}.get(
                node.target, node.target
            )
        return fx.GraphModule(self.constants, self.graph)


def is_recording() -> bool:
    """Whether a graph is being recorded, so that tensors have no values to ask for."""
    return _recorder.get() is not None


def record(function: Callable, *inputs: Tensor, differentiates: bool = False) -> Recording:
    """Record ``function(*inputs)``.

    Args:
        function: what to record.
        inputs: tensors, which stay variables. What else the function reads becomes constants.
        differentiates: whether the function runs autograd. That detaches the results which a backward pass will read
            again, and in a graph that would cut off every derivative of the backward pass itself: detaches are left
            out, but for those that the function makes by :func:`own_detach`.

    Raises:
        DynamicSizeError: the function selects by values of a tensor that depends on the inputs, as by a mask.
        RuntimeError: the function asks for the values of a tensor that depends on the inputs or on something random, or
            that requires a gradient, as a branch on it does; or it writes into a tensor that it closed over, or in a
            way that is not known here.
        Exception: whatever else the function raises.
    """
    recorder = _Recorder(keeps_detach=not differentiates)
    for tensor in inputs:
        recorder.add_input(tensor)
    token = _recorder.set(recorder)
    try:
        with recorder, _Reads(recorder):
            result = function(*inputs)
    finally:
        _recorder.reset(token)
    recorder.graph.output(_map_tensors(result, recorder.node))
    return Recording(recorder.graph, recorder.constants, list(recorder.constants.values()))


def own_detach(tensor: Tensor) -> Tensor:
    """``tensor.detach()``, told apart from those that autograd makes."""
    recorder = _recorder.get()
    if recorder is None:
        return tensor.detach()
    kept, recorder.keeps_detach = recorder.keeps_detach, True
    try:
        return tensor.detach()
    finally:
        recorder.keeps_detach = kept


class _Value:
    """What the graph knows a tensor by.

    Attributes:
        node: computes it, as long as it and what it is a view of have not been written into since.
        is_known: whether it depends on nothing that may differ next time, and its numbers may be asked for.
        parent, view: what it is a view of, and the operation and its further arguments.
        is_outside: whether the function closed over it.
    """

    def __init__(
        self, node: fx.Node, is_known: bool, parent: _Value | None = None, view: tuple = (), is_outside: bool = False
    ) -> None:
        self.node, self.parent, self.view = node, parent, view
        self._is_known, self.is_outside = is_known, is_outside
        self._version, self._parent_version = 0, 0 if parent is None else parent._version

    @property
    def is_known(self) -> bool:
        return self._is_known and (self.parent is None or self.parent.is_known)

    def current(self) -> fx.Node:
        """The node that computes what the tensor holds by now."""
        if self.parent is not None:
            source = self.parent.current()
            if self.parent._version != self._parent_version:
                function, *arguments = self.view
                self.node = _call(source.graph, function, (source, *arguments), self.node.meta["val"])
                self._version, self._parent_version = self._version + 1, self.parent._version
        return self.node

    def write(self, node: fx.Node, is_known: bool) -> None:
        """From now on the tensor holds what ``node`` computes, and what it is a view of holds that too."""
        if self.is_outside:
            raise RuntimeError("the function writes into a tensor that it closed over")
        if self.parent is not None:
            self.parent.write(_unview(self.parent.current(), node, self.view), is_known)
            self._parent_version = self.parent._version
        self.node, self._is_known, self._version = node, self._is_known and is_known, self._version + 1


class _Recorder(TorchDispatchMode):
    """Writes down operations."""

    def __init__(self, keeps_detach: bool) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.keeps_detach = keeps_detach
        self._values = WeakTensorKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch keeps its compiler out of this mode, for which it would import that, in more than a second."""
        return False

    def add_input(self, tensor: Tensor) -> None:
        node = self.graph.placeholder(f"input_{len(self._values)}")
        node.meta["val"] = TensorMeta.of(tensor)
        self._values[tensor] = _Value(node, is_known=False)

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that computes a tensor."""
        return self._value(tensor).current()

    def check_known(self, name: str, *tensors: Tensor) -> None:
        if not all(self._value(tensor).is_known for tensor in tensors):
            raise RuntimeError(f"{name} takes the values out of a tensor that depends on latents or arguments")

    def _value(self, tensor: Tensor) -> _Value:
        """How a tensor is known; one from outside becomes a constant."""
        value = self._values.get(tensor)
        if value is None:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor
            node = self.graph.get_attr(name)
            node.meta["val"] = TensorMeta.of(tensor)
            self._values[tensor] = value = _Value(node, is_known=not tensor.requires_grad, is_outside=True)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunction():  # what is done here is no read of the function's
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        tensors: list[Tensor] = []
        _map_tensors((args, kwargs), tensors.append)
        if torch.Tag.data_dependent_output in func.tags:
            self.check_known(func.name(), *tensors)
            return func(*args, **kwargs)
        if torch.Tag.dynamic_output_shape in func.tags:
            # Values decide how large the result is; those of an index by numbers do not.
            is_mask = [tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors]
            deciding = tensors if func is not aten.index.Tensor else itertools.compress(tensors[1:], is_mask[1:])
            if not all(self._value(tensor).is_known for tensor in deciding):
                raise DynamicSizeError(f"the size of what {func.name()} returns depends on latents or arguments")
        is_known = torch.Tag.nondeterministic_seeded not in func.tags
        is_known = is_known and all(self._value(tensor).is_known for tensor in tensors)
        if torch.Tag.inplace_view in func.tags:
            return self._record_reshape(func, args, kwargs, is_known)
        if func._schema.is_mutable:
            return self._record_write(func, args, kwargs, is_known)
        nodes, keywords = _map_tensors((args, kwargs), self.node)
        result = func(*args, **kwargs)
        if func is aten.detach.default and not self.keeps_detach:
            self._values[result] = self._value(args[0])
            return result
        # The argument of lift_fresh is a tensor that nobody else has, as of torch.tensor(1.0); in a graph it is shared.
        target = aten.lift_fresh_copy.default if func is aten.lift_fresh.default else func
        node = self.graph.call_function(target, nodes, keywords)
        if isinstance(result, Tensor):
            node.meta["val"] = TensorMeta.of(result)
            parent = self._value(args[0]) if target.is_view else None
            self._values[result] = _Value(node, is_known, parent, (target, *args[1:]))
        elif isinstance(result, tuple | list):
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    item = _call(self.graph, operator.getitem, (node, i), TensorMeta.of(part))
                    parent = self._value(args[0]) if func.is_view else None
                    self._values[part] = _Value(item, is_known, parent, (func, *args[1:]))
        return result

    def _record_write(self, func: Any, args: tuple, kwargs: dict, is_known: bool) -> Any:
        """Record ``add_`` as ``add``, and where its result has been written."""
        if not isinstance(args[0], Tensor):
            raise RuntimeError(f"{func} writes into several tensors, and is not known as an operation that returns any")
        nodes, keywords = _map_tensors((args, kwargs), self.node)
        meta = TensorMeta.of(args[0])
        if func in (aten.copy_.default, aten.fill_.Tensor):
            node = nodes[1]
        elif func in (aten.zero_.default, aten.fill_.Scalar):  # which vmap has no rules for
            node = _call(self.graph, aten.full_like.default, (nodes[0], *(nodes[1:] or (0,))), meta)
        else:
            pure = _without_writing(func)
            node = _call(self.graph, pure, nodes, TensorMeta.of(pure(*args, **kwargs)), keywords)
        result = func(*args, **kwargs)
        if TensorMeta.of(args[0]) != meta:
            raise RuntimeError(f"{func} gives a tensor another size")
        self._value(args[0]).write(_in_layout(node, meta), is_known)
        return result

    def _record_reshape(self, func: Any, args: tuple, kwargs: dict, is_known: bool) -> Any:
        """Record ``squeeze_`` as ``squeeze``: the tensor becomes a view of what it was."""
        pure, before = _without_writing(func), self._value(args[0])
        nodes, keywords = _map_tensors((args, kwargs), self.node)
        result = func(*args, **kwargs)
        node = _call(self.graph, pure, nodes, TensorMeta.of(args[0]), keywords)
        self._values[args[0]] = _Value(node, is_known, before, (pure, *args[1:]))
        return result


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is defined by others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)


def _map_tensors(arguments: Any, function: Callable[[Tensor], Any]) -> Any:
    """An operation's arguments, with the tensors among them replaced; ``tree_map`` is several times slower."""
    if isinstance(arguments, Tensor):
        return function(arguments)
    if isinstance(arguments, tuple | list):
        return type(arguments)([_map_tensors(argument, function) for argument in arguments])
    if isinstance(arguments, dict):
        return {key: _map_tensors(argument, function) for key, argument in arguments.items()}
    return arguments


def _call(graph: fx.Graph, target: Any, args: tuple, meta: TensorMeta, kwargs: dict | None = None) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = meta
    return node


def _without_writing(func: Any) -> Any:
    """The operation that returns what this one writes into its first argument."""
    name, overload = func.overloadpacket.__name__, func._overloadname
    pure = getattr(getattr(torch.ops, func.namespace), name.removesuffix("_"), None)
    if not name.endswith("_") or pure is None or overload not in pure.overloads():
        raise RuntimeError(f"{func} writes into a tensor, and is not known as an operation that returns one")
    return getattr(pure, overload)


def _in_layout(node: fx.Node, meta: TensorMeta) -> fx.Node:
    """Cast, broadcast and laid out in memory as in a tensor that it has been written into; without gaps."""
    have: TensorMeta = node.meta["val"]
    if (have.dtype, have.device) != (meta.dtype, meta.device):
        have = have._replace(dtype=meta.dtype, device=meta.device)
        node = _call(node.graph, aten._to_copy.default, (node,), have, {"dtype": meta.dtype, "device": meta.device})
    if have.shape != meta.shape:
        node = _call(node.graph, aten.expand.default, (node, list(meta.shape)), meta)
    order = sorted(range(len(meta.shape)), key=meta.stride.__getitem__, reverse=True)  # of dims, outermost first
    stride, step = [0] * len(order), 1
    for dim in reversed(order):
        stride[dim], step = step, step * max(1, meta.shape[dim])
    meta = meta._replace(stride=tuple(stride))
    if (have.shape, have.stride) == (meta.shape, meta.stride):
        return node
    packed = _call(node.graph, aten.permute.default, (node, order), meta._replace(stride=()))
    packed = _call(node.graph, aten.clone.default, (packed,), meta, {"memory_format": torch.contiguous_format})
    return _call(node.graph, aten.permute.default, (packed, _inverse(order)), meta)


def _inverse(permutation: Sequence[int]) -> list[int]:
    return sorted(range(len(permutation)), key=permutation.__getitem__)


def _unview(source: fx.Node, node: fx.Node, view: tuple) -> fx.Node:
    """What a tensor holds after ``node`` has been written into a view of it."""
    function, *arguments = view
    graph, meta = source.graph, source.meta["val"]
    if function in _SCATTERS:
        return _call(graph, _SCATTERS[function], (source, node, *arguments), meta)
    unknown = meta._replace(stride=())
    if function in _SAME_NUMBERS:
        return _in_layout(_call(graph, aten.reshape.default, (node, list(meta.shape)), unknown), meta)
    if function in _OWN_INVERSES:
        return _in_layout(_call(graph, function, (node, *arguments), unknown), meta)
    if function is aten.permute.default:
        dims = _inverse([dim % len(meta.shape) for dim in arguments[0]])
        return _in_layout(_call(graph, function, (node, dims), unknown), meta)
    if function is aten.detach.default:  # other numbers, and the derivative of those that were there
        change = _call(graph, aten.sub.Tensor, (node, source), unknown)
        change = _call(graph, aten.detach.default, (change,), unknown)
        return _in_layout(_call(graph, aten.add.Tensor, (source, change), unknown), meta)
    raise RuntimeError(f"the function writes into what {function} returned, a view that cannot be written into here")


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
        if func in _MAKES:
            _map_tensors([arg for arg in args if isinstance(arg, list | tuple)], self._check_made_of)
        return func(*args, **(kwargs or {}))

    def _check_made_of(self, tensor: Tensor) -> None:
        self._recorder.check_known("a tensor made of others", tensor)
