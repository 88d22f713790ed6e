"""Work on small tensors before they are broadcast to large ones, not after.

In a plate of N, Pyro expands a distribution's parameters to N, takes the logarithm of one scale N times and divides N
numbers by it, and a backward pass divides N more before it sums them.

:func:`expand_late` turns ``log(expand(s, [N]))`` into ``expand(log(s), [N])``.

:func:`factor_out` carries what scales a large tensor, a number or a small tensor, as a factor apart from it:
``sum(-g x / s)`` becomes ``-sum(g x) / s``. Only products: small addends are left where they are, since ``(y - m) - c``
is not ``y - (m + c)`` where y and m nearly cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import fx

from pyro_sivism.target.graph import drop_unread, is_elementwise, let_views_copy, reads_memory
from pyro_sivism.target.recording import Recording, TensorMeta

__all__ = ["expand_late", "factor_out"]

aten = torch.ops.aten

_LARGE = 256  # numbers for each particle, from which an operation on them costs more than one on a few
_SMALLER = 64  # times, at least, that a factor is smaller than what it scales


# --- expansions -----------------------------------------------------------------------------------------


def expand_late(recording: Recording) -> Recording:
    """Let elementwise operations, and softmaxes along dims that are not expanded, work on what is expanded after them;
    in place. Results keep their values and shapes, but are laid out in memory as an expansion is."""
    graph = recording.graph
    if reads_memory(graph):
        return recording
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), TensorMeta):
            _expand_after(graph, node)
    drop_unread(graph)
    return recording


def _expand_after(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a node by an expansion of the same operation on smaller arguments, if there are such."""
    meta: TensorMeta = node.meta["val"]
    sources = {argument: _source(argument) for argument in node.all_input_nodes}
    if all(source is argument for argument, source in sources.items()):
        return
    with graph.inserting_before(node):
        if node.target is aten.expand.default:
            (small,) = sources.values()
        elif is_elementwise(node):
            shape = _broadcast(sources.values())
            if shape.numel() == meta.shape.numel() or not _keeps_type(sources):
                return
            small = graph.node_copy(node, sources.__getitem__)
            small.meta["val"] = meta._replace(shape=shape, stride=())
        elif node.target in (aten._log_softmax.default, aten._softmax.default):
            (source,) = sources.values()
            shape, dim = _shape(source), _from_end(node.args[1], len(meta.shape))
            if -dim > len(shape) or shape[dim] != meta.shape[dim]:
                return
            small = _call(graph, node.target, meta._replace(shape=shape), source, dim, *node.args[2:])
        else:
            return
        expanded = _call(graph, aten.expand.default, meta, small, list(meta.shape))
    node.replace_all_uses_with(expanded)
    graph.erase_node(node)


def _source(node: fx.Node) -> fx.Node:
    """What a node expands; otherwise itself."""
    return cast("fx.Node", node.args[0]) if node.target is aten.expand.default else node


def _keeps_type(sources: dict[fx.Node, fx.Node]) -> bool:
    """Whether a result has the same type: a tensor without dims counts less than one with dims in what type that is."""
    types = {argument.meta["val"].dtype for argument in sources}
    return len(types) == 1 or all((len(_shape(a)) > 0) == (len(_shape(b)) > 0) for a, b in sources.items())


# --- factors --------------------------------------------------------------------------------------------


class _Product(NamedTuple):
    """``number * factors * rest``: a large tensor in parts, of which the factors are small."""

    number: float
    factors: tuple[fx.Node, ...]
    rest: fx.Node


def factor_out(recording: Recording, batch_size: int) -> Recording:
    """Carry small factors of large tensors apart from them; in place, with values the same up to rounding, which may be
    laid out differently in memory.

    Args:
        recording: of a function of a batch.
        batch_size: the length that no dim but that of the batch has.
    """
    if reads_memory(recording.graph):
        return recording
    _Factors(recording, batch_size).run()
    let_views_copy(recording.graph)
    drop_unread(recording.graph)
    return recording


class _Factors:
    def __init__(self, recording: Recording, batch_size: int) -> None:
        self.graph, self.constants, self.batch_size = recording.graph, recording.constants, batch_size
        self._products: dict[fx.Node, _Product] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function" or not self._is_floating(node):
                continue
            with self.graph.inserting_before(node):
                result = self._sum(node) if node.target is aten.sum.dim_IntList else self._scaled(node)
            if result is not None:
                node.replace_all_uses_with(result)

    def _scaled(self, node: fx.Node) -> fx.Node | None:
        """The same in one multiplication for each factor, remembered in parts; None if the operation does not scale."""
        if self._size(node) < _LARGE:
            return None
        product, meta = self._product(node), node.meta["val"]
        limits = torch.finfo(meta.dtype)
        if product is None or not limits.tiny <= abs(product.number) <= limits.max:  # which 0 * inf could follow from
            return None
        if not product.factors and product.number == -1.0:
            result = _call(self.graph, aten.neg.default, meta, product.rest)
        elif not product.factors and product.number == 1.0:
            result = product.rest
        else:
            result = self._multiplied(meta, product.rest, product.factors, product.number)
        self._products[result] = product
        return result

    def _product(self, node: fx.Node) -> _Product | None:
        """What the operation returns, as a product; None if its arguments have no parts to tell apart."""
        if node.kwargs:
            return None
        if node.target is aten.neg.default:
            return self._times(self._parts(node.args[0]), -1.0)
        if node.target in (aten.mul.Tensor, aten.mul.Scalar):
            a, b = node.args
            for whole, small in ((a, b), (b, a)):
                if self._is_whole(whole, node) and (value := self._as_factor(small, node)) is not None:
                    return self._times(self._parts(whole), value)
            if self._is_whole(a, node) and self._is_whole(b, node):
                return self._combined(node, self._parts(a), self._parts(b), aten.mul.Tensor)
        if node.target is aten.div.Tensor and self._is_whole(node.args[0], node):
            a, b = node.args
            if (value := self._as_factor(b, node)) is not None and value != 0.0:
                return self._times(self._parts(a), self._inverse(value))
            if self._is_whole(b, node):
                return self._combined(node, self._parts(a), self._parts(b), aten.div.Tensor)
        return None

    def _inverse(self, value: float | fx.Node) -> float | fx.Node:
        return 1.0 / value if isinstance(value, float) else self._like(aten.reciprocal.default, value)

    def _times(self, parts: _Product, by: float | fx.Node) -> _Product:
        if isinstance(by, float):
            return parts._replace(number=parts.number * by)
        return parts._replace(factors=(*parts.factors, by))

    def _combined(self, node: fx.Node, a: _Product, b: _Product, operation: Any) -> _Product | None:
        """``(n f x) op (m g y) = (n op m) (f op g) (x op y)``."""
        if all(not part.factors and part.number == 1.0 for part in (a, b)):
            return None
        if operation is aten.div.Tensor:
            inverses = tuple(self._like(aten.reciprocal.default, factor) for factor in b.factors)
            b = _Product(1.0 / b.number, inverses, b.rest)
        product = _Product(a.number * b.number, a.factors + b.factors, a.rest)
        if operation is aten.mul.Tensor:
            for one, other in ((a.rest, b.rest), (b.rest, a.rest)):
                if (number := self._uniform(one)) is not None:  # as the gradient of a sum is
                    return product._replace(number=number * product.number, rest=other)
        return product._replace(rest=_call(self.graph, operation, node.meta["val"], a.rest, b.rest))

    def _sum(self, node: fx.Node) -> fx.Node | None:
        """The sum of what is large, scaled afterwards; None if the factor is not the same for all terms."""
        argument, dims, *rest = cast("tuple[fx.Node, list[int], bool]", node.args)
        if argument not in self._products or node.kwargs or not dims:
            return None
        product = self._products[argument]
        factors = [self._without_dims(factor, dims, len(_shape(argument)), *rest) for factor in product.factors]
        if None in factors:
            return None
        meta = node.meta["val"]
        total = _call(self.graph, aten.sum.dim_IntList, meta, product.rest, *node.args[1:])
        return self._multiplied(meta, total, cast("list[fx.Node]", factors), product.number)

    def _multiplied(self, meta: TensorMeta, value: fx.Node, factors: Sequence[fx.Node], number: float) -> fx.Node:
        """By one factor after the other: in float32 their product alone, as 1 / s^4, may underflow."""
        multipliers: list[float | fx.Node] = [*factors] or [number]
        if factors and number != 1.0:
            multipliers[-1] = self._like(aten.mul.Tensor, factors[-1], number)
        for by in multipliers:
            value = _call(self.graph, aten.mul.Tensor, meta, value, by)
        return value

    def _without_dims(self, factor: fx.Node, dims: list[int], rank: int, keepdim: bool = False) -> fx.Node | None:
        """A factor of a tensor as one of its sum; None if it is not the same for all terms."""
        shape = _shape(factor)
        own = [dim for dim in (_from_end(dim, rank) for dim in dims) if -dim <= len(shape)]
        if any(shape[dim] != 1 for dim in own):
            return None
        if not own or keepdim:
            return factor
        kept = [length for i, length in enumerate(shape) if i - len(shape) not in own]
        return self._like(aten.squeeze.dims, factor, own, shape=torch.Size(kept))

    def _parts(self, node: Any) -> _Product:
        return self._products.get(node, _Product(1.0, (), node))

    def _as_factor(self, value: Any, node: fx.Node) -> float | fx.Node | None:
        """A number, or a tensor that is much smaller than the node's, in its type; otherwise None."""
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, fx.Node) or value.meta["val"].dtype != node.meta["val"].dtype:
            return None
        if (number := self._uniform(value)) is not None:
            return number
        source = _source(value)
        return source if self._size(source) * _SMALLER <= self._size(node) else None

    def _uniform(self, node: fx.Node) -> float | None:
        """The number that all of a constant is; otherwise None."""
        constant = self.constants[str(node.target)] if node.op == "get_attr" else None
        if constant is None or constant.requires_grad or constant.numel() == 0:
            return None
        first = constant.flatten()[:1]
        return float(first) if bool((constant == first).all()) else None

    def _is_whole(self, value: Any, node: fx.Node) -> bool:
        """Whether an argument is as large as the result, and of its type."""
        if not isinstance(value, fx.Node):
            return False
        meta, of_node = value.meta["val"], node.meta["val"]
        return (meta.shape, meta.dtype) == (of_node.shape, of_node.dtype)

    def _is_floating(self, node: fx.Node) -> bool:
        meta = node.meta.get("val")
        return isinstance(meta, TensorMeta) and meta.dtype.is_floating_point

    def _size(self, node: fx.Node) -> int:
        """Numbers for each particle."""
        return math.prod(length for length in _shape(node) if length != self.batch_size)

    def _like(self, target: Any, *args: Any, shape: torch.Size | None = None) -> fx.Node:
        """An operation on small tensors, with the broadcast shape of its arguments unless another is given."""
        nodes = [arg for arg in args if isinstance(arg, fx.Node)]
        shape = _broadcast(nodes) if shape is None else shape
        return _call(self.graph, target, nodes[0].meta["val"]._replace(shape=shape), *args)


def _from_end(dim: Any, rank: int) -> int:
    return dim - rank if dim >= 0 else dim


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape


def _broadcast(nodes: Iterable[fx.Node]) -> torch.Size:
    """The shape of an elementwise result."""
    return torch.Size(np.broadcast_shapes(*map(_shape, nodes)))  # torch's own imports sympy, in a second


def _call(graph: fx.Graph, target: Any, meta: TensorMeta, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = meta._replace(stride=())  # not known, and no longer asked for
    return node
