"""A captured graph replayed without Python, by TorchScript's interpreter.

Where the draws are few and the data small, a replay's time goes into handing some two hundred operations to Python one
by one: 1.4 ms at a single point of a hierarchy of 85 groups, where TorchScript's interpreter takes .3. Tracing a graph
takes as long as twenty such replays, for each size of a batch, so only sizes that come again and again are traced.
TorchScript is deprecated and may be gone from a later torch. So its results are compared with the graph's own, and
where it is missing, fails or differs the graph is replayed as it is.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_sivism.target.batch_graph import BatchGraph
from pyro_sivism.target.graph import CHECKS

__all__ = ["TracedReplays"]

aten = torch.ops.aten

_TRACED_AT_REPLAY = 20  # of one size: a trace has then cost no more than what was spent without one
_MAX_TRACES = 16
_NUM_PROFILED = 2  # runs after which TorchScript has specialized a trace


class TracedReplays:
    """Replays of a graph, traced for the sizes of batches that are frequent.

    Args:
        graph: what is replayed.
    """

    def __init__(self, graph: BatchGraph) -> None:
        self._graph = graph
        self._num_replays: Counter[int] = Counter()
        self._traces: dict[int, Any] = {}
        self._is_possible = True

    def __call__(self, x: Tensor, *inputs: Tensor) -> Any:
        """The graph's results at points ``x (B, ...)``."""
        is_plain = x.device.type == "cpu" and not torch.is_grad_enabled()  # on a GPU TorchScript fuses operations
        trace = self._trace_for(x, inputs) if is_plain and self._is_possible else None
        if trace is not None:
            try:
                results, faults = trace(x, *inputs)
                if not any(faults):
                    return results
            except RuntimeError:  # of any operation
                pass  # the graph raises the operation's own error
        return self._graph(x, *inputs)

    def _trace_for(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Any:
        """The trace for batches of this size, made if it is due; None if there is none."""
        size = len(x)
        if size not in self._traces and len(self._traces) < _MAX_TRACES:
            self._num_replays[size] += 1
            if self._num_replays[size] >= _TRACED_AT_REPLAY:
                self._traces[size] = self._trace(x, inputs)
                self._is_possible = self._traces[size] is not None
        return self._traces.get(size)

    def _trace(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Any:
        """A trace that gives exactly what the graph gives at these points; None if it cannot be had."""
        want = self._graph(x, *inputs)  # which may raise where no trace is to blame
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that TorchScript is deprecated, and that numbers become constants
                trace = torch.jit.trace(_OfSize(self._graph, len(x)), (x, *inputs), check_trace=False)
                for _ in range(_NUM_PROFILED):
                    trace(x, *inputs)
            same = _same(trace(x, *inputs)[0], want)
        except Exception:  # whatever a tracer may raise that is no longer kept up
            return None
        return trace if same else None


class _OfSize(nn.Module):
    """The graph for batches of one size, as the module that TorchScript asks for, with the same tensors: its results,
    and whether an operation that only raises would raise. TorchScript drops what returns nothing."""

    def __init__(self, graph: BatchGraph, size: int) -> None:
        super().__init__()
        self._module, self._arguments = _with_faults_returned(graph.module), graph.arguments_for(size)

    def forward(self, x: Tensor, *inputs: Tensor) -> Any:
        return self._module(x, *inputs, *self._arguments)


def _with_faults_returned(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    results = graph.graph_copy(module.graph, {})
    faults = []
    for node in list(graph.nodes):
        if node.target in CHECKS:
            with graph.inserting_before(node):
                values = node.args[0]  # error numbers, or what has to be true
                if node.target is not aten._linalg_check_errors.default:
                    values = graph.call_function(aten.logical_not.default, (values,))
                faults.append(graph.call_function(aten.any.default, (values,)))
            graph.erase_node(node)
    graph.output((results, tuple(faults)))
    return fx.GraphModule(module, graph)


def _same(found: Any, want: Any) -> bool:
    """Whether the results are equal to the last bit, where NaN equals NaN."""
    pairs = zip(found, want, strict=True) if isinstance(want, tuple | list) else [(found, want)]
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()) for a, b in pairs)
