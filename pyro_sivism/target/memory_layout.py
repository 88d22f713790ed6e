"""Long dims innermost in memory, where a loop runs fastest.

A mixture of two components at N observations has log densities (B, N, 2), and torch's inner loop over them two steps:
what makes, adds or sums such tensors took three times as long as where each component's N numbers lie side by side.
Operations on each element keep the layout that their arguments have, so that it is enough to let the *first* ones make
it, those that broadcast (N, 1) and (B, 1, 2) or the like: they are computed on the transposes, and transposed back,
which moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_sivism.target.graph import drop_unread, is_elementwise, let_views_copy, reads_memory
from pyro_sivism.target.recording import Recording, TensorMeta

__all__ = ["lay_long_dims_innermost"]

aten = torch.ops.aten

_MAX_SHORT, _MIN_LONG = 16, 64  # lengths of the last dim and the one before
# Operations, other than on each element, that are as fast on any layout. None that make views, which pass it on: those
# with more dims, as of a Markov chain's transitions, would have yet another one innermost.
_READERS = {
    aten.amax.default,
    aten.logsumexp.default,
    aten.mean.dim,
    aten.sum.default,
    aten.sum.dim_IntList,
}


def lay_long_dims_innermost(recording: Recording, batch_size: int) -> Recording:
    """Let tensors of (..., N, K), N long and K short, lie in memory as (..., K, N), in place, where all that reads them
    is as fast on that.

    Args:
        batch_size: the length that no dim but that of the batch has, which is none of these.
    """
    if reads_memory(recording.graph):
        return recording
    turned: dict[fx.Node, fx.Node] = {}
    for node in list(recording.graph.nodes):
        makes_it = _broadcasts(node, recording.constants) and batch_size not in node.meta["val"].shape[-2:]
        if makes_it and all(map(_reads_any_layout, _followers(node))):
            _compute_transposed(node, recording, turned)
    if turned:
        let_views_copy(recording.graph)  # of sums of what was turned
        drop_unread(recording.graph)
    return recording


def _broadcasts(node: fx.Node, constants: dict[str, Tensor]) -> bool:
    """Whether an operation on each element makes (..., N, K) of arguments that are smaller, or constant."""
    if not is_elementwise(node) or not _is_long_and_short(node) or node.kwargs:
        return False
    size = node.meta["val"].shape.numel()
    return all(_size_in_memory(argument) < size or _is_data(argument, constants) for argument in node.all_input_nodes)


def _followers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads the node, and what reads those of them that have its layout."""
    seen, ahead = {node}, [node]
    while ahead:
        for user in ahead.pop().users:
            if user not in seen:
                seen.add(user)
                yield user
                if is_elementwise(user) and user.meta["val"].shape[-2:] == node.meta["val"].shape[-2:]:
                    ahead.append(user)


def _reads_any_layout(node: fx.Node) -> bool:
    return is_elementwise(node) or node.target in _READERS


def _compute_transposed(node: fx.Node, recording: Recording, turned: dict[fx.Node, fx.Node]) -> None:
    """Put in its place the same of its arguments' transposes, of which those that were ``turned`` before are taken."""
    with recording.graph.inserting_before(node):
        for argument in node.all_input_nodes:
            if argument not in turned:
                turned[argument] = _transposed(argument, recording)
        args = fx.map_arg(node.args, turned.get)
        result = _call(recording.graph, node.target, args, node.meta["val"])
        back = _call(recording.graph, aten.transpose.int, (result, -1, -2), result.meta["val"])
    node.replace_all_uses_with(back)
    recording.graph.erase_node(node)


def _transposed(node: fx.Node, recording: Recording) -> fx.Node:
    """The same with the last two dims exchanged, those of a vector being (1, K)."""
    graph, meta = recording.graph, node.meta["val"]
    if not meta.shape:
        return node
    if len(meta.shape) == 1:
        return _call(graph, aten.unsqueeze.default, (node, -1), meta._replace(shape=(1, *meta.shape)))
    if _is_data(node, recording.constants):
        name = f"{node.target}_transposed"
        recording.constants[name] = constant = recording.constants[str(node.target)].mT.contiguous()
        turned = graph.get_attr(name)
        turned.meta["val"] = TensorMeta.of(constant)
        return turned
    turned = _call(graph, aten.transpose.int, (node, -1, -2), meta)
    if 1 not in meta.shape[-2:] and _size_in_memory(node) == meta.shape.numel():  # as data are: few, and read B times
        turned = graph.call_function(aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})
        turned.meta["val"] = meta._replace(shape=_exchanged(meta.shape), stride=())
    return turned


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], of: TensorMeta) -> fx.Node:
    """An operation whose result is ``of`` with the last two dims exchanged, laid out in some way."""
    node = graph.call_function(target, args)
    node.meta["val"] = of._replace(shape=_exchanged(of.shape), stride=())
    return node


def _exchanged(shape: Sequence[int]) -> torch.Size:
    return torch.Size([*shape[:-2], shape[-1], shape[-2]])


def _is_long_and_short(node: fx.Node) -> bool:
    shape = node.meta["val"].shape
    return len(shape) >= 2 and 1 < shape[-1] <= _MAX_SHORT and shape[-2] >= max(_MIN_LONG, 4 * shape[-1])


def _size_in_memory(node: fx.Node) -> int:
    """How many numbers a tensor has in memory: fewer than elements if it is an expansion."""
    meta: Any = node.meta.get("val")
    if not isinstance(meta, TensorMeta) or len(meta.stride) != len(meta.shape):
        return 2**62  # of an unknown layout
    return torch.Size(length for length, stride in zip(meta.shape, meta.stride) if stride != 0).numel()


def _is_data(node: fx.Node, constants: dict[str, Tensor]) -> bool:
    """Whether it is a constant of two dims or more, and neither an expansion nor to be learned."""
    if node.op != "get_attr":
        return False
    tensor = constants[str(node.target)]
    return tensor.dim() > 1 and 0 not in tensor.stride() and not tensor.requires_grad
