"""A training step's gradients, recorded with the captured score inside and compiled by inductor.

What is recorded is the code that the step runs otherwise: draw from q, evaluate the score, form the loss, differentiate
it. Random draws stay random; the model's arguments and minibatch are inputs; parameters are read where they live. The
optimizers are not part of it.

Compiling takes from ten seconds to minutes and saves a third to a half of a step, so it pays in long runs only. On a
GPU, where small steps cost what it takes to launch their kernels, these are launched together as a CUDA graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_sivism.errors import CompileError
from pyro_sivism.target import Target
from pyro_sivism.target.paths import agree, first_line

__all__ = ["CompiledGradients"]

Gradients = Callable[[], Sequence[Tensor | None]]


class CompiledGradients:
    """Two functions without arguments, of the critic's and of the guide's gradients, compiled.

    Args:
        functions: what to compile. Each returns tensors and reads nothing that changes but parameters, buffers,
            random numbers and the target's inputs.
        target: the model's, computed along a captured path.

    Raises:
        CompileError: there is no captured graph or no compiler, or the compiled gradients differ.
    """

    def __init__(self, functions: Sequence[Gradients], target: Target) -> None:
        self._target = target
        self._devices = [target.layout.device] if target.layout.device.type == "cuda" else []
        self._graph = target.captured_graph("score")
        if self._graph is None:
            raise CompileError(f"scores are computed along '{target.path.name}', and only captured ones compile")
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's own remarks, on hardware and on its cache
                self._compiled = [self._compile(function) for function in functions]
        except CompileError:
            raise
        except Exception as error:  # whatever a compiler, or the lack of one, may raise
            raise CompileError(first_line(error)) from error

    @property
    def is_current(self) -> bool:
        """Whether the target still evaluates the graph that was compiled."""
        return self._target.captured_graph("score") is self._graph

    def __call__(self, index: int) -> Sequence[Tensor | None]:
        """What the function number ``index`` returns."""
        with torch.no_grad():
            if not self._devices:
                return self._compiled[index](*self._target.inputs)
            torch.compiler.cudagraph_mark_step_begin()
            return _copies(self._compiled[index](*self._target.inputs))  # the graph writes into the same memory again

    def _compile(self, function: Gradients) -> Callable[..., Sequence[Tensor | None]]:
        target = self._target

        def of_inputs(*inputs: Tensor) -> list[Tensor | None]:
            with target.inputs_replaced(inputs), torch.enable_grad():
                return [None if tensor is None else tensor.detach() for tensor in function()]

        # The draws of uncompiled code, so that a seed means the same and the two can be compared.
        options: dict[str, Any] = {"fallback_random": True, "triton.cudagraphs": bool(self._devices)}
        with torch.random.fork_rng(devices=self._devices):
            graph = make_fx(of_inputs)(*target.inputs)
            compiled = torch.compile(graph, dynamic=False, fullgraph=True, options=options)
            torch.manual_seed(0)
            got = _copies(compiled(*target.inputs))
            torch.manual_seed(0)
            want = graph(*target.inputs)
        if not all(agree(a, b) for a, b in zip(got, want) if b is not None):
            raise CompileError("the compiled step gave other gradients than the step itself")
        return compiled


def _copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.clone() for tensor in tensors]
