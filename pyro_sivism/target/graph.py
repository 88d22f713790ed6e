"""Graphs made smaller without changing a value.

A recorded graph is a flat list of ATen operations, none of which writes into a tensor, so that equal operations can be
shared and operations on constants done once. :func:`simplify`

1. folds what depends on constants only. Tensors that the function closed over count as constants, unless they are
   leaves that require a gradient: those stay references, read anew at each replay;
2. drops operations that change nothing (views to the same shape, ``x + 0``, ``x * 1``, ``x ** 1``);
3. shares equal operations, and drops those that nothing reads;
4. writes the Bernoulli log likelihood in 8 operations, backward pass included, where torch takes 30, a matrix product
   with one term as a product, and B products with one matrix as one product.

:func:`index_rows`, for the graphs of batches, lets the operations for just that select what a list of indices names, as
each observation's group, and add up what comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from pyro_sivism.target.recording import Recording, TensorMeta

__all__ = [
    "CHECKS",
    "drop_unread",
    "index_rows",
    "is_elementwise",
    "is_random",
    "let_views_copy",
    "reads_memory",
    "simplify",
]

aten = torch.ops.aten

# Operations whose result nothing reads and which must stay: they raise where the values are bad.
CHECKS = {aten._linalg_check_errors.default, aten._assert_async.default, aten._assert_async.msg}
_ALIASES = {aten.alias.default, aten.lift_fresh.default}
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
_FILLS = {  # what was only allocated has no values yet that anything could read
    aten.empty.memory_format: 0.0,
    aten.empty_like.default: 0.0,
    aten.empty_strided.default: 0.0,
    aten.new_empty.default: 0.0,
    aten.new_empty_strided.default: 0.0,
    aten.zeros_like.default: 0.0,
    aten.new_zeros.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_ones.default: 1.0,
}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_MEMORY_READERS = {
    aten.as_strided.default,
    aten.as_strided_scatter.default,
    aten._reshape_alias.default,
    aten.view.dtype,
    aten.view_as_complex.default,
}
_MAX_CONSTANT = 2**22  # numbers in a folded tensor: past it, recomputing is cheaper than the memory


def simplify(recording: Recording) -> Recording:
    """Make the graph smaller, in place."""
    _Simplifier(recording).run()
    recording.graph.lint()
    return recording


def drop_unread(graph: fx.Graph) -> None:
    """Drop the operations whose results nothing reads."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and node.target not in CHECKS:
            graph.erase_node(node)


def index_rows(recording: Recording) -> Recording:
    """Write ``x[:, index]`` as ``index_select`` and its backward pass as ``index_add``, in place; a fifth of the time
    of what takes any indices. Not before ``vmap``, which makes yet other operations of these."""
    for node in list(recording.graph.nodes):
        if node.target in (aten.index.Tensor, aten.index_put.default):
            _index_rows(recording, node)
    drop_unread(recording.graph)
    return recording


def _index_rows(recording: Recording, node: fx.Node) -> None:
    source, indices, *rest = cast("tuple[Any, ...]", node.args)
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or not _is_contiguous(node):
        return
    ((dim, index),) = given
    meta: TensorMeta = index.meta["val"]
    on_one_device = meta.device == source.meta["val"].device
    if meta.dtype not in (torch.int64, torch.int32) or len(meta.shape) != 1 or not on_one_device:
        return
    graph = recording.graph
    with graph.inserting_before(node):
        if index.op != "get_attr" or bool((recording.constants[index.target] < 0).any()):
            from_end = _call(graph, index, aten.add.Tensor, index, source.meta["val"].shape[dim])
            is_negative = graph.call_function(aten.lt.Scalar, (index, 0))
            is_negative.meta["val"] = meta._replace(dtype=torch.bool)
            index = _call(graph, index, aten.where.self, is_negative, from_end, index)
        if node.target is aten.index.Tensor:
            _replace(node, _call(graph, node, aten.index_select.default, source, dim, index))
        elif len(rest) == 2 and rest[1] and _has_rows(rest[0], source, dim, index):
            _replace(node, _call(graph, node, aten.index_add.default, source, dim, index, rest[0]))


def is_random(recording: Recording) -> bool:
    """Whether a replay draws random numbers."""
    return any(_is_random(node) for node in recording.graph.nodes)


def reads_memory(graph: fx.Graph) -> bool:
    """Whether an operation reads memory as it is laid out, so that no layout may be changed."""
    return any(node.target in _MEMORY_READERS for node in graph.nodes)


def let_views_copy(graph: fx.Graph) -> None:
    """Write views, which ask for a layout in memory, as what copies where it is another one."""
    for node in graph.nodes:
        if node.target in _VIEWS:
            node.target = aten.reshape.default


def is_elementwise(node: fx.Node) -> bool:
    """Whether an operation computes each element from those in its place, and leaves the layout to its arguments."""
    tags = getattr(node.target, "tags", ())
    is_copy = "memory_format" in node.kwargs  # made for its layout in memory
    is_tensor = isinstance(node.meta.get("val"), TensorMeta)
    return is_tensor and torch.Tag.pointwise in tags and not _is_random(node) and not is_copy


class _Simplifier:
    def __init__(self, recording: Recording) -> None:
        self.graph, self.constants = recording.graph, recording.constants

    def run(self) -> None:
        seen: dict[Any, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.op in ("call_function", "get_attr"):
                self._rewrite(node, seen)
        drop_unread(self.graph)

    def _rewrite(self, node: fx.Node, seen: dict[Any, fx.Node]) -> None:
        if node.target in CHECKS:
            return
        if node.target is aten.select_scatter.default:
            node = self._select_scatter(node)
        elif node.target is aten.slice_scatter.default:
            self._count_from_front(node)
        elif node.target is aten.bmm.default and _is_outer_product(node):
            node.target = aten.mul.Tensor
        elif node.target is aten.bmm.default and (product := self._by_shared_matrix(node)) is not None:
            _replace(node, product)
            return
        elif node.target is aten.binary_cross_entropy_with_logits.default:
            _replace(node, _bernoulli(self.graph, node))
            return
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
        if node.target in _ALIASES:
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
            tensor = self.constants[str(value.target)]
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
        with self.graph.inserting_before(node):
            return self._new_constant(result)

    def _new_constant(self, tensor: Tensor) -> fx.Node:
        name = f"folded_{len(self.constants)}"
        self.constants[name] = tensor
        node = self.graph.get_attr(name)
        node.meta["val"] = TensorMeta.of(tensor)
        return node

    def _by_shared_matrix(self, node: fx.Node) -> fx.Node | None:
        """``(B, n, k)`` by B times the same ``(k, m)``, or the same ``(n, k)`` by ``(B, k, m)``, as one product of two
        matrices, which reads the shared one once: for n = 1 or m = 10 in a fifth of the time. None if none is shared.

        ``A X_b`` is computed as ``(X_b' A')'``.
        """
        left, right = cast("tuple[fx.Node, fx.Node]", node.args)
        size, num_rows, num_terms = left.meta["val"].shape
        num_columns = right.meta["val"].shape[2]
        with self.graph.inserting_before(node):
            if (matrix := self._shared_matrix(right)) is not None:
                rows = self._made(aten.reshape.default, (size * num_rows, num_terms), left)
                product = self._made(aten.mm.default, (size * num_rows, num_columns), rows, matrix)
                return self._made(aten.reshape.default, (size, num_rows, num_columns), product)
            if (matrix := self._shared_matrix(left)) is not None:
                turned = self._made(aten.transpose.int, (size, num_columns, num_terms), right, 1, 2)
                rows = self._made(aten.reshape.default, (size * num_columns, num_terms), turned)
                matrix = self._made(aten.t.default, (num_terms, num_rows), matrix)
                product = self._made(aten.mm.default, (size * num_columns, num_rows), rows, matrix)
                product = self._made(aten.reshape.default, (size, num_columns, num_rows), product)
                return self._made(aten.transpose.int, (size, num_rows, num_columns), product, 1, 2)
        return None

    def _shared_matrix(self, node: fx.Node) -> fx.Node | None:
        """The one matrix that B of them are, (k, m); otherwise None."""
        if node.target in (aten.transpose.int, aten.mT.default) and set(node.args[1:]) in ({1, 2}, {-1, -2}, set()):
            matrix = self._shared_matrix(cast("fx.Node", node.args[0]))
            return None if matrix is None else self._made(aten.t.default, matrix.meta["val"].shape[::-1], matrix)
        constant = self._constant(node)
        if constant is not None:  # an expansion that has been folded
            return self._new_constant(constant[0]) if constant.stride(0) == 0 else None
        if node.target is not aten.expand.default:
            return None
        source = cast("fx.Node", node.args[0])
        shape = source.meta["val"].shape
        if len(shape) not in (2, 3) or tuple(shape[-2:]) != tuple(node.meta["val"].shape[1:]):
            return None
        if len(shape) == 2:
            return source
        return self._made(aten.squeeze.dim, shape[1:], source, 0) if shape[0] == 1 else None

    def _made(self, target: Any, shape: Sequence[int], *args: Any) -> fx.Node:
        """A new operation, whose result has that shape, laid out in some way."""
        if target is aten.reshape.default:
            args = (*args, list(shape))
        node = self.graph.call_function(target, args)
        node.meta["val"] = args[0].meta["val"]._replace(shape=torch.Size(shape), stride=())
        return node

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


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


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


def _is_outer_product(node: fx.Node) -> bool:
    """Whether a ``bmm`` sums over one term only, ``(N, n, 1)`` by ``(N, 1, m)``, which as a product takes a tenth of
    the time; and whether the product is laid out in memory as the ``bmm``."""
    metas = [argument.meta["val"] for argument in node.all_input_nodes]
    if len(metas) != 2 or metas[0].shape[2] != 1 or not all(meta.stride for meta in metas):
        return False
    strides = [[s for s, length in zip(meta.stride, meta.shape) if length > 1] for meta in metas]
    return all(stride == sorted(stride, reverse=True) for stride in strides)


def _has_rows(values: fx.Node, source: fx.Node, dim: int, index: fx.Node) -> bool:
    """Whether values have the shape of ``source`` with one row along dim for each index, not one to broadcast."""
    shape = list(source.meta["val"].shape)
    shape[dim] = index.meta["val"].shape[0]
    return list(values.meta["val"].shape) == shape


def _is_contiguous(node: fx.Node) -> bool:
    meta: TensorMeta = node.meta["val"]
    return meta.stride == torch.empty(meta.shape, device="meta").stride()


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
