"""One graph for batches of every size, from the graphs of two.

Recorded at B = 5 and at B = 7, a function of a batch gives the same operations with other sizes in their arguments:
``expand(c, [5, 8])`` here, ``expand(c, [7, 8])`` there. A number that is ``k B`` in both is that for all B; a
constant whose rows are all the same, 5 of them here and 7 there, has B of them. If anything else differs there is no
such graph.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_sivism.target.graph import drop_unread
from pyro_sivism.target.recording import Recording, TensorMeta

__all__ = ["BatchGraph", "NotOneGraphError", "sizes_in", "unused_size"]

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
_MAX_CACHED_SIZES = 64
_MAX_CACHED_NUMBERS = 2**22  # of one size: past it, making them is cheaper than the memory

OfSize = Callable[[int], "int | Tensor"]


class NotOneGraphError(RuntimeError):
    """The recordings differ in more than the size of the batch."""


def sizes_in(recording: Recording) -> set[int]:
    """The lengths of all dims of all tensors in a recording."""
    metas = [node.meta.get("val") for node in recording.graph.nodes]
    return {size for meta in metas if isinstance(meta, TensorMeta) for size in meta.shape}


def unused_size(used: set[int]) -> int:
    """A size for a batch that would not be taken for one of these."""
    return next((prime for prime in _PRIMES if prime not in used), _PRIMES[-1])


class BatchGraph:
    """A function of a batch ``x (B, ...)`` and of inputs that all its points share, for any B.

    Args:
        recordings: of the function, at two sizes. Both are used up.
        sizes: B of each.

    Attributes:
        module: the operations, which also take what :meth:`arguments_for` gives.

    Raises:
        NotOneGraphError: the recordings differ in more than B.
    """

    def __init__(self, recordings: Sequence[Recording], sizes: Sequence[int]) -> None:
        first, second = recordings
        merger = _Merger(first, second, (sizes[0], sizes[1]))
        self._constants, self._graph = first.constants, merger.merged()
        self._arguments = merger.arguments
        self._cache: OrderedDict[int, list[int | Tensor]] = OrderedDict()
        self.module = fx.GraphModule(self._constants, self._graph)

    def __call__(self, x: Tensor, *inputs: Tensor) -> Any:
        return self.module.forward(x, *inputs, *self.arguments_for(len(x)))

    def part(self, index: int) -> BatchGraph:
        """The same function, of whose results only that one is wanted."""
        part = BatchGraph.__new__(BatchGraph)
        part._constants, part._arguments, part._cache = self._constants, self._arguments, self._cache
        part._graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        results: Any = part._graph.graph_copy(self._graph, copies)
        part._graph.output(results[index])
        drop_unread(part._graph)
        part.module = fx.GraphModule(self._constants, part._graph)
        return part

    def arguments_for(self, size: int) -> list[int | Tensor]:
        """What depends on B alone, and is given to the module after the inputs."""
        if size not in self._cache:
            arguments = [argument(size) for argument in self._arguments]
            if sum(a.numel() for a in arguments if isinstance(a, Tensor)) > _MAX_CACHED_NUMBERS:
                return arguments
            if len(self._cache) >= _MAX_CACHED_SIZES:
                self._cache.popitem(last=False)
            self._cache[size] = arguments
        return self._cache[size]


class _Merger:
    """Turns the first of two recordings into one for all sizes. What depends on B becomes an argument.

    Attributes:
        arguments: these arguments as functions of B, in the order in which the graph takes them after its inputs.
    """

    def __init__(self, first: Recording, second: Recording, sizes: tuple[int, int]) -> None:
        self.first, self.second, self.sizes = first, second, sizes
        self.arguments: list[OfSize] = []
        self._numbers: dict[int, fx.Node] = {}
        self._twins: dict[fx.Node, fx.Node] = {}
        self._last_placeholder = [node for node in first.graph.nodes if node.op == "placeholder"][-1]

    def merged(self) -> fx.Graph:
        nodes, others = list(self.first.graph.nodes), list(self.second.graph.nodes)
        if len(nodes) != len(others):
            raise NotOneGraphError(f"{len(nodes)} operations at B = {self.sizes[0]}, {len(others)} at {self.sizes[1]}")
        for node, other in zip(nodes, others):
            self._twins[node] = other
            if node.op != other.op or (node.op == "call_function" and node.target is not other.target):
                raise NotOneGraphError(f"{node.target} at B = {self.sizes[0]}, {other.target} at {self.sizes[1]}")
            if node.op == "get_attr":
                self._merge_constants(node, other)
            else:
                node.args, node.kwargs = self._merge(node.args, other.args), self._merge(node.kwargs, other.kwargs)
        return self.first.graph

    def _merge(self, value: Any, other: Any) -> Any:
        """One argument of an operation for both of its values."""
        if isinstance(value, fx.Node) and self._twins.get(value) is other:
            return value
        if isinstance(value, tuple | list) and isinstance(other, tuple | list) and len(value) == len(other):
            return type(value)([self._merge(a, b) for a, b in zip(value, other)])
        if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
            return {key: self._merge(value[key], other[key]) for key in value}
        if type(value) is type(other) and (value == other or (value != value and other != other)):
            return value
        if type(value) is type(other) is int:
            return self._number(value, other)
        raise NotOneGraphError(f"an argument is {value} at B = {self.sizes[0]}, and {other} at {self.sizes[1]}")

    def _number(self, value: int, other: int) -> fx.Node:
        factor, rest = divmod(value, self.sizes[0])
        if rest or factor * self.sizes[1] != other:
            raise NotOneGraphError(f"a size is {value} at B = {self.sizes[0]}, and {other} at {self.sizes[1]}")
        if factor not in self._numbers:
            self._numbers[factor] = self._argument(lambda size: factor * size)
        return self._numbers[factor]

    def _merge_constants(self, node: fx.Node, other: fx.Node) -> None:
        tensor, twin = self.first.constants[str(node.target)], self.second.constants[str(other.target)]
        if tensor is twin or (TensorMeta.of(tensor) == TensorMeta.of(twin) and torch.equal(tensor, twin)):
            return
        repeated = _repeated_rows(tensor, twin, self.sizes[0])
        if not (_same(repeated(self.sizes[0]), tensor) and _same(repeated(self.sizes[1]), twin)):
            raise NotOneGraphError(f"a constant {tuple(tensor.shape)} at B = {self.sizes[0]} does not have equal rows")
        argument = self._argument(repeated)
        node.replace_all_uses_with(argument)
        self._twins[argument] = other
        self.first.graph.erase_node(node)

    def _argument(self, of_size: OfSize) -> fx.Node:
        with self.first.graph.inserting_after(self._last_placeholder):
            self._last_placeholder = self.first.graph.placeholder(f"of_size_{len(self.arguments)}")
        self.arguments.append(of_size)
        return self._last_placeholder


def _repeated_rows(tensor: Tensor, twin: Tensor, size: int) -> Callable[[int], Tensor]:
    """The function of B that gives ``tensor`` at B = ``size``, if that has equal rows along the dim in which ``twin``
    differs, and in its memory layout without gaps. Dims that take no memory, as after ``expand``, stay such."""
    longer = [dim for dim, (a, b) in enumerate(zip(tensor.shape, twin.shape)) if a != b]
    if len(longer) != 1 or tensor.dim() != twin.dim():
        return lambda _: tensor
    (dim,), expanded = longer, [stride == 0 for stride in tensor.stride()]
    num_rows = tensor.shape[dim] // size
    unit = tensor.narrow(dim, 0, num_rows)
    for d in range(tensor.dim()):
        unit = unit.narrow(d, 0, min(1, unit.shape[d])) if expanded[d] else unit  # a dim may be empty, too
    outermost_first = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    back = sorted(range(tensor.dim()), key=outermost_first.__getitem__)

    def repeated(size: int) -> Tensor:
        counts = [size if d == dim and not expanded[d] else 1 for d in outermost_first]
        shape = [num_rows * size if d == dim else length for d, length in enumerate(tensor.shape)]
        return unit.permute(outermost_first).repeat(counts).permute(back).expand(shape)

    return repeated


def _same(made: Tensor, tensor: Tensor) -> bool:
    """Equal in values, where NaN equals NaN, and in layout, where ``tensor`` is no part of a larger one."""
    if made.shape != tensor.shape or made.dtype != tensor.dtype:
        return False
    dims = [(length, stride) for length, stride in zip(tensor.shape, tensor.stride()) if length > 1 and stride > 0]
    has_gaps = sum((length - 1) * stride for length, stride in dims) + 1 > math.prod(length for length, _ in dims)
    strides = [(a, b) for a, b, length in zip(made.stride(), tensor.stride(), tensor.shape) if length > 1]
    return (has_gaps or all(a == b for a, b in strides)) and bool(
        ((made == tensor) | ((made != made) & (tensor != tensor))).all()
    )
