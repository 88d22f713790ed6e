"""Graphs of tensor operations: recorded from a function by ``make_fx``, and made smaller without changing a value.

A recorded graph is a flat list of ATen operations. :func:`record` makes one that is pure: no operation writes into a
tensor, so that equal operations can be shared and operations on constants done once; the Bernoulli log likelihood is
written in 8 operations, backward pass included, where torch takes 30. :func:`simplify` then

1. folds what depends on constants only. Tensors that the function closed over count as constants, unless they are
   leaves that require a gradient: those stay references, read anew at each replay;
2. drops operations that change nothing (views to the same shape, ``x + 0``, ``x * 1``, ``x ** 1``);
3. shares equal operations, and drops those that nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.func import functionalize

from pyro_sivism.target.recording import TensorMeta, trace

__all__ = ["closed_over", "has_detach", "is_random", "record", "simplify"]

aten = torch.ops.aten

# Operations whose result nothing reads and which must stay: they raise where the values are bad.
_CHECKS = {aten._linalg_check_errors.default, aten._assert_async.default, aten._assert_async.msg}
_ALIASES = {aten.alias.default, aten.detach.default, aten.lift_fresh.default}
# These return their argument's values in another shape, type or memory layout; where that is the same, the argument.
_RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.squeeze.dims,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
}
_NEUTRAL = {
    aten.add.Tensor: 0.0,
    aten.sub.Tensor: 0.0,
    aten.mul.Tensor: 1.0,
    aten.mul.Scalar: 1.0,
    aten.div.Tensor: 1.0,
    aten.pow.Tensor_Scalar: 1.0,
}
_COMMUTES = {aten.add.Tensor, aten.mul.Tensor}
_FILLS = {
    aten.zeros_like.default: 0.0,
    aten.new_zeros.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_ones.default: 1.0,
}
_MAX_CONSTANT = 2**22  # numbers in a folded tensor: past it, recomputing is cheaper than the memory


def record(function: Callable, *inputs: Tensor) -> fx.GraphModule:
    """The graph of ``function(*inputs)``, without operations that write into tensors.

    Raises:
        As :func:`pyro_sivism.target.recording.trace`.
    """
    recording = trace(function, *inputs)
    for node in recording.graph.nodes:  # now, as making the graph pure takes them apart
        if node.target is aten.binary_cross_entropy_with_logits.default:
            _replace(node, _bernoulli(recording.graph, node))
    graph_module = fx.GraphModule(recording.constants, recording.graph)
    if any(_is_mutable(node) for node in recording.graph.nodes):
        pure = trace(functionalize(graph_module, remove="mutations"), *inputs)
        for node in pure.graph.nodes:
            if node.target is aten.copy.default:  # has no derivative; it is its source, in the target's shape
                _replace(node, _like_target(pure.graph, node))
        graph_module = fx.GraphModule(pure.constants, pure.graph)
    graph_module.meta["closed_over"] = recording.closed_over
    return graph_module


def simplify(graph_module: fx.GraphModule, keep_detach: bool = False) -> fx.GraphModule:
    """Make the graph smaller, in place. ``keep_detach`` where the graph will be differentiated and a ``detach`` is the
    model's own."""
    _Simplifier(graph_module, keep_detach).run()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def closed_over(graph_module: fx.GraphModule) -> list[Tensor]:
    """The tensors that the recorded function read beside its inputs, and which may be changed in place later."""
    return graph_module.meta["closed_over"]


def has_detach(graph_module: fx.GraphModule) -> bool:
    """Whether the graph stops some gradient."""
    return any(node.target is aten.detach.default for node in graph_module.graph.nodes)


class _Simplifier:
    def __init__(self, graph_module: fx.GraphModule, keep_detach: bool) -> None:
        self.module, self.graph = graph_module, graph_module.graph
        self.aliases = _ALIASES - ({aten.detach.default} if keep_detach else set())
        self.num_constants = 0

    def run(self) -> None:
        seen: dict[Any, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.op in ("call_function", "get_attr"):
                self._rewrite(node, seen)
        self._drop_unread()

    def _rewrite(self, node: fx.Node, seen: dict[Any, fx.Node]) -> None:
        if node.target in _CHECKS:
            return
        if node.target is aten.select_scatter.default:
            node = self._select_scatter(node)
        elif node.target is aten.slice_scatter.default:
            self._count_from_front(node)
        source = self._unchanged(node)
        if source is not None:
            _replace(node, source)
            return
        folded = self._fold(node)
        if folded is not None:
            _replace(node, folded)
            return
        key = _key(node)
        if key is not None and key in seen:
            _replace(node, seen[key])
        elif key is not None:
            seen[key] = node

    def _unchanged(self, node: fx.Node) -> fx.Node | None:
        """The argument that this operation returns as it is, or None."""
        arguments = [a for a in node.args if isinstance(a, fx.Node)]
        if not arguments or not isinstance(node.meta.get("val"), TensorMeta):
            return None
        if node.target in self.aliases:
            return arguments[0]
        if node.target in _RESHAPES:
            return arguments[0] if _same_meta(node, arguments[0]) else None
        if node.target in _NEUTRAL and not node.kwargs and len(node.args) == 2:
            left, right = node.args
            if self._is_all(right, _NEUTRAL[node.target]) and _same_meta(node, left):
                return left  # type: ignore[return-value]  # _same_meta is false for numbers
            if node.target in _COMMUTES and self._is_all(left, _NEUTRAL[node.target]) and _same_meta(node, right):
                return right  # type: ignore[return-value]  # as above
        return None

    def _is_all(self, value: Any, number: float) -> bool:
        if isinstance(value, int | float):
            return value == number
        constant = self._constant(value)
        return constant is not None and constant.numel() > 0 and bool((constant == number).all())

    def _constant(self, value: Any) -> Tensor | None:
        """The tensor behind a node that reads one which is not to be learned."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensor = getattr(self.module, str(value.target))
            return None if tensor.requires_grad else tensor
        return None

    def _fold(self, node: fx.Node) -> fx.Node | None:
        """A constant in the place of an operation on constants, or None."""
        value = node.meta.get("val")
        if (
            node.op == "get_attr"
            or not isinstance(value, TensorMeta)
            or value.shape.numel() > _MAX_CONSTANT
            or _is_random(node)
        ):
            return None
        if node.target in _FILLS:  # only the argument's shape is read
            result = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
            result.fill_(_FILLS[node.target])
        else:
            found = [self._constant(argument) for argument in node.all_input_nodes]
            if any(constant is None for constant in found):
                return None
            lookup: dict[fx.Node, Any] = dict(zip(node.all_input_nodes, found))
            operation: Any = node.target
            with torch.no_grad():
                result = operation(*fx.map_arg(node.args, lookup.get), **fx.map_arg(node.kwargs, lookup.get))
        name = f"_folded_constant{self.num_constants}"
        self.num_constants += 1
        self.module.register_buffer(name, result)
        with self.graph.inserting_before(node):
            folded = self.graph.get_attr(name)
        folded.meta = dict(node.meta)
        return folded

    def _select_scatter(self, node: fx.Node) -> fx.Node:
        """The same by ``slice_scatter``: through ``vmap``, the derivative of ``select_scatter`` is silently wrong."""
        target, source, dim, index = cast("tuple[fx.Node, fx.Node, int, int]", node.args)
        index %= target.meta["val"].shape[dim]
        with self.graph.inserting_before(node):
            row = self.graph.call_function(aten.unsqueeze.default, (source, dim))
            result = _call(self.graph, node, aten.slice_scatter.default, target, row, dim, index, index + 1)
        _replace(node, result)
        return result

    def _count_from_front(self, node: fx.Node) -> None:
        """Write the ends of a ``slice_scatter`` from the front: ``vmap`` takes no negative ones."""
        target, source, *rest = cast("tuple[Any, ...]", node.args)
        given = dict(zip(("dim", "start", "end", "step"), rest))
        dim, step = given.get("dim", 0), given.get("step", 1)
        start, end, _ = slice(given.get("start"), given.get("end")).indices(target.meta["val"].shape[dim])
        node.args = (target, source, dim, start, end, step)

    def _drop_unread(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users and node.target not in _CHECKS:
                self.graph.erase_node(node)


def is_random(graph_module: fx.GraphModule) -> bool:
    """Whether a replay draws random numbers."""
    return any(_is_random(node) for node in graph_module.graph.nodes)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _replace(node: fx.Node, by: fx.Node) -> None:
    if node is not by:
        node.replace_all_uses_with(by)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new operation whose result has the shape and type of ``like``'s."""
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    return node


def _bernoulli(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``BCE(z, y) = softplus(z) - y z``, for ``reduction="none"`` without weights; softplus(z) = z past z = 40, where
    the difference, exp(-z), is below float64's rounding of z."""
    weights, reduction = node.args[2:4], node.args[4] if len(node.args) > 4 else 1
    logits, y = node.args[:2]
    if any(weight is not None for weight in weights) or reduction != 0:
        return node
    with graph.inserting_before(node):
        softplus = _call(graph, node, aten.softplus.default, logits, 1, 40)
        product = _call(graph, node, aten.mul.Tensor, logits, y)
        return _call(graph, node, aten.sub.Tensor, softplus, product)


def _like_target(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The source of a ``copy(target, source)``, broadcast and cast as the copy does."""
    target, source = node.args[:2]
    if _same_meta(target, source):
        return source  # type: ignore[return-value]  # _same_meta is false for numbers
    meta = node.meta["val"]
    with graph.inserting_before(node):
        cast = graph.call_function(aten._to_copy.default, (source,), {"dtype": meta.dtype})
        result = graph.call_function(aten.expand.default, (cast, list(meta.shape)))
    cast.meta, result.meta = {}, dict(node.meta)
    return result


def _same_meta(a: Any, b: Any) -> bool:
    """Whether two nodes are tensors of the same shape, strides, dtype and device."""
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return False
    x = a.meta.get("val")
    return x is not None and x == b.meta.get("val")


def _key(node: fx.Node) -> Any:
    """Equal for nodes that compute the same, or None where that cannot be told."""
    if _is_random(node):
        return None
    key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in sorted(value.items()))
    return value if isinstance(value, fx.Node) else (type(value), value)
